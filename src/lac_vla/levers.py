"""The levers beside caching: ways to spend less time on the same frame, each of which can be switched.

Caching shortens the prefill alone. These shorten the rest, for the dense model too; whoever claims what caching is
worth gives them to both.

``torch.compile`` is none of them: the number of active rows changes from frame to frame, so that it would compile anew,
or for any number. ``bucket`` and ``graphs`` are the answer to the same question that a GPU needs: few shapes, and no
launch of a kernel by the host for each of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import numpy as np

from lac_vla.errors import InputError
from lac_vla.types import Beyond, Decision, IntArray


@dataclass(frozen=True)
class Levers:
    """What a session does beside caching. But for rounding, only ``tower_reuse`` and ``bucket`` change any number.

    Attributes:
        draft: Decode action tokens by draft and verification: the last action's tokens ride along in the prefill,
            and what does not stand is decoded by fixed-point iteration; see :mod:`lac_vla.models.decoding`.
        partial_tower: Let the vision tower leave out work that only cached tokens need, where it has such work.
        tower_reuse: Carry the decision one storey up: a vision transformer recomputes the active patches alone, over
            the keys and values that it kept of the others. Staleness spreads: this one changes the features; ``lac
            train --tower-reuse`` makes a policy for it.
        overlap: Estimate flow and decide while the tower works.
        bucket: The number of active visual tokens is rounded up to a multiple of this, so that few shapes occur; 1
            for no rounding. What is added are the oldest cached tokens, no padding; see :func:`rounded_up`.
        graphs: Run the layers over buffers that stay where they are, on a GPU by replaying CUDA graphs; see
            :mod:`lac_vla.graphs`.

    Raises:
        InputError: If there can be no such bucket.
    """

    draft: bool = True
    partial_tower: bool = True
    tower_reuse: bool = False
    overlap: bool = False
    bucket: int = 1
    graphs: bool = False

    def __post_init__(self) -> None:
        if self.bucket < 1:
            raise InputError(f"bucket is {self.bucket}; give a number of tokens, at least 1, which rounds nothing")

    @classmethod
    def parse(cls, text: str) -> Levers:
        """Pull the levers of a text, joined by +: ``draft+overlap``, ``draft+bucket=16``, ``default+graphs``, ``none``.

        ``default`` stands for the levers that are pulled by default; ``exact`` for these and ``overlap``, which changes
        no number either, but needs a core to spare.

        Raises:
            InputError: If there is no such lever.
        """
        known = [field.name for field in fields(cls)]
        levers = NONE
        for word in text.split("+"):
            name, given, value = word.strip().replace("-", "_").partition("=")
            if name in PRESETS and not given:
                levers = replace(levers, **PRESETS[name])
            elif name == "bucket" and value.isdecimal():
                levers = replace(levers, bucket=int(value))
            elif name in known and name != "bucket" and not given:
                levers = replace(levers, **{name: True})
            else:
                raise InputError(
                    f"there is no lever {word!r} in {text!r}: join some of {known} by +, bucket as bucket=16; "
                    f"or give {', '.join(PRESETS)}"
                )
        return levers

    def __str__(self) -> str:
        """The text that :meth:`parse` reads."""
        words = {field.name: field.name for field in fields(self) if getattr(self, field.name)}
        words["bucket"] = f"bucket={self.bucket}" if self.bucket > 1 else ""
        return "+".join(filter(None, words.values())) or "none"


NONE = Levers(draft=False, partial_tower=False)
PRESETS: Mapping[str, Mapping[str, bool]] = {
    "none": {},
    "default": {"draft": True, "partial_tower": True},
    "exact": {"draft": True, "partial_tower": True, "overlap": True},
}
"""Words for several levers."""


def rounded_up(decision: Decision, age: IntArray, bucket: int) -> Decision:
    """The decision with so many more tokens active that their number is a multiple of ``bucket``, or all are.

    The oldest cached tokens are added, of equal age the first: the extra work makes the cache fresher. They count as
    ``recovered``. Decisions that prune, or that leave tokens in mid-depth, have no one number of rows: they stay.

    Args:
        decision: What is computed.
        age: Of every slot, in frames, int64, (N,).
        bucket: At least 1.
    """
    cached = np.flatnonzero(decision.depth == 0)
    active = decision.depth.size - cached.size
    missing = min(-active % bucket, cached.size)
    if not missing or decision.beyond is not Beyond.REUSE or active != np.count_nonzero(decision.active):
        return decision
    added = np.zeros(decision.depth.size, dtype=np.bool_)
    added[cached[np.argsort(-age[cached], kind="stable")[:missing]]] = True
    recovered = added if decision.recovered is None else decision.recovered | added
    return replace(decision.with_active(added), recovered=recovered)
