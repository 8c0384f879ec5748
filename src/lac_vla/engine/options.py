"""The options beside caching: ways to spend less time on the same frame, each of which can be switched.

Caching shortens the prefill alone. These shorten the rest, for the dense model too; whoever claims what caching is
worth gives them to both.

``torch.compile`` is none of them: the number of active rows changes from frame to frame, so that it would compile anew,
or for any number. ``bucket`` and ``cuda_graphs`` are the answer to the same question that a GPU needs: few shapes, and
no launch of a kernel by the host for each of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from lac_vla.checks import check_whole
from lac_vla.errors import InputError


@dataclass(frozen=True)
class EngineOptions:
    """Options beside caching; but for rounding, only ``vision_kv_reuse`` and ``bucket`` change any number.

    Attributes:
        draft: Decode action tokens by draft and verification: the last action's tokens ride along in the prefill,
            and what does not stand is decoded by fixed-point iteration; see :mod:`lac_vla.models.decoding`.
        sparse_vision_head: Let the vision tower leave out work that only cached tokens need, where it has such work.
        picture_reuse: Take what the vision tower made of a camera's last picture where this one is the same to the bit:
            a slow camera, one that stands still. Not beside ``vision_kv_reuse``.
        vision_kv_reuse: Carry the decision one storey up: a vision transformer recomputes the active patches alone,
            over the keys and values that it kept of the others. Staleness spreads: this one changes the features;
            ``lac train --vision-kv-reuse`` makes a policy for it.
        async_policy: Estimate flow and decide while the tower works.
        bucket: The number of active visual tokens is rounded up to a multiple of this, so that few shapes occur; 1
            for no rounding. What is added are the oldest cached tokens, no padding; see
            :func:`lac_vla.engine.budget.pad_to_bucket`.
        cuda_graphs: Run the layers over buffers that stay where they are, on a GPU by replaying CUDA graphs; see
            :mod:`lac_vla.engine.cuda_graphs`.

    Raises:
        InputError: If there can be no such bucket.
    """

    draft: bool = True
    sparse_vision_head: bool = True
    picture_reuse: bool = True
    vision_kv_reuse: bool = False
    async_policy: bool = False
    bucket: int = 1
    cuda_graphs: bool = False

    def __post_init__(self) -> None:
        check_whole("bucket", self.bucket, 1, 2**31)

    @classmethod
    def parse(cls, text: str) -> EngineOptions:
        """Read options joined by +: ``draft+async-policy``, ``draft+bucket=16``, ``default+cuda-graphs``, ``none``.

        ``default`` stands for the options that are on by default; ``exact`` for these and ``async_policy``, which
        changes no number either, but needs a core to spare.

        Raises:
            InputError: If there is no such option.
        """
        known = [field.name for field in fields(cls)]
        options = NONE
        for word in text.split("+"):
            name, given, value = word.strip().replace("-", "_").partition("=")
            if name in PRESETS and not given:
                options = replace(options, **PRESETS[name])
            elif name == "bucket" and value.isdecimal():
                options = replace(options, bucket=int(value))
            elif name in known and name != "bucket" and not given:
                options = replace(options, **{name: True})
            elif name in RENAMED:
                raise InputError(f"the option {word!r} is called {RENAMED[name]!r} now")
            else:
                raise InputError(
                    f"there is no option {word!r} in {text!r}: join some of {known} by +, bucket as bucket=16; "
                    f"or give {', '.join(PRESETS)}"
                )
        return options

    def __str__(self) -> str:
        """The text that :meth:`parse` reads."""
        words = {field.name: field.name for field in fields(self) if getattr(self, field.name)}
        words["bucket"] = f"bucket={self.bucket}" if self.bucket > 1 else ""
        return "+".join(filter(None, words.values())) or "none"


NONE = EngineOptions(draft=False, sparse_vision_head=False, picture_reuse=False)
PRESETS: Mapping[str, Mapping[str, bool]] = {
    "none": {},
    "default": {"draft": True, "sparse_vision_head": True, "picture_reuse": True},
    "exact": {"draft": True, "sparse_vision_head": True, "picture_reuse": True, "async_policy": True},
}
"""Words for several options."""
RENAMED: Mapping[str, str] = {
    "partial_tower": "sparse_vision_head",
    "tower_reuse": "vision_kv_reuse",
    "overlap": "async_policy",
    "graphs": "cuda_graphs",
}
"""Names of before → names of now."""
