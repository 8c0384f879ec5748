"""The levers beside caching: ways to spend less time on the same frame, each of which can be switched.

Caching shortens the prefill alone. These shorten the rest, for the dense model too; whoever claims what caching is
worth gives them to both.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from lac_vla.errors import InputError


@dataclass(frozen=True)
class Levers:
    """What a session does beside caching. But for rounding, none but ``tower_reuse`` changes any number.

    Attributes:
        draft: Decode action tokens by draft and verification: the last action's tokens ride along in the prefill,
            and what does not stand is decoded by fixed-point iteration; see :mod:`lac_vla.models.decoding`.
        partial_tower: Let the vision tower leave out work that only cached tokens need, where it has such work.
        tower_reuse: Carry the decision one storey up: a vision transformer recomputes the active patches alone, over
            the keys and values that it kept of the others. Staleness spreads: this one changes the features.
        overlap: Estimate flow and decide while the tower works.
    """

    draft: bool = True
    partial_tower: bool = True
    tower_reuse: bool = False
    overlap: bool = False

    @classmethod
    def parse(cls, text: str) -> Levers:
        """Pull the levers of a text: ``none``, ``default``, ``exact`` (all that change no number) or ``draft+overlap``.

        Raises:
            InputError: If there is no such lever.
        """
        names = [name.strip().replace("-", "_") for name in text.split("+")]
        match names:
            case ["default"]:
                return cls()
            case ["none"]:
                names = []
            case ["exact"]:
                names = [field.name for field in fields(cls) if field.name != "tower_reuse"]
        known = [field.name for field in fields(cls)]
        if unknown := [name for name in names if name not in known]:
            raise InputError(
                f"there are no levers {unknown} in {text!r}: join some of {known} by +, or give none, default, exact"
            )
        return cls(**{name: name in names for name in known})

    def __str__(self) -> str:
        """The text that :meth:`parse` reads."""
        return "+".join(field.name for field in fields(self) if getattr(self, field.name)) or "none"
