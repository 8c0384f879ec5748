"""What a session reports of a frame: what was computed, what was reused, how old that is, and how long it took."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lac_vla.timing import windows
from lac_vla.types import Beyond, BoolArray, Decision, IntArray, TokenLayout, UInt8Image, Watch


@dataclass(frozen=True, eq=False)
class Step:
    """What the last call of :meth:`lac_vla.vla.Session.act` did.

    Attributes:
        layout: Where the tokens were.
        decision: How deep every visual token was computed.
        forced: bool, (N,): tokens that the policy would have cached, recomputed because of their age.
        age: Age of every slot after the frame, in frames, int64, (N,); 0 where the frame pruned, for what is absent
            is not old.
        dense_because: Why the policy was not asked (``"first frame"``, ``"scene cut"``, …); ``None`` if it was.
        stages: Milliseconds by stage, see :data:`lac_vla.timing.STAGES`.
        info: What the backbone says about its action (token ids, …).
        pixels: Camera → what the model saw.
        flow_macs: Multiply-accumulates of optical flow, see :class:`lac_vla.flow.Flow`.
        policy_macs: Multiply-accumulates of the policy's own networks.
        watch: Attention that was computed aside for the policy.
        draft: Tokens that rode along in the prefill as a guess.
        whole: Whether all rows of the prefill asked in the last layer, not the suffix and the draft alone.
        passes: First and one-past-last appended token of every decoding pass behind the prefill.
        seen: Visual tokens whose features the vision tower computed, bool, (N,).
        fallbacks: Runs of layers that the lever ``graphs`` left to the ordinary loop.
    """

    layout: TokenLayout
    decision: Decision
    forced: BoolArray
    age: IntArray
    dense_because: str | None
    stages: Mapping[str, float]
    info: Mapping[str, Any]
    pixels: Mapping[str, UInt8Image]
    flow_macs: int = 0
    policy_macs: int = 0
    watch: Watch | None = None
    draft: int = 0
    whole: bool = False
    passes: tuple[tuple[int, int], ...] = ()
    seen: BoolArray | None = None
    fallbacks: int = 0

    @property
    def ratio(self) -> float:
        """Effective cache ratio, in [0, 1]."""
        return self.decision.ratio

    @property
    def nominal_ratio(self) -> float | None:
        """The cache ratio that the policy aimed at, in [0, 1]; ``None`` if it aims at none."""
        return self.decision.nominal_ratio

    @property
    def accepted(self) -> int | None:
        """How many of the drafted tokens stood; ``None`` if there was no draft."""
        if not self.draft:
            return None
        return self.passes[0][0] if self.passes else self.draft

    @property
    def oldest_age(self) -> int | None:
        """Age of the oldest slot after the frame, in frames; ``None`` where the frame pruned: it reuses nothing."""
        return None if self.decision.beyond is Beyond.PRUNE else int(self.age.max(initial=0))

    @property
    def active(self) -> BoolArray:
        """Visual tokens computed in every layer, bool, (N,)."""
        return self.decision.active

    @property
    def cached(self) -> BoolArray:
        """Visual tokens reused or pruned in at least one layer, bool, (N,)."""
        return ~self.active

    @property
    def recovered(self) -> BoolArray:
        """Visual tokens recomputed by recovery, because of their age or to fill a bucket, bool, (N,)."""
        recovered = self.decision.recovered
        return self.forced if recovered is None else recovered | self.forced

    @property
    def timings(self) -> dict[str, float]:
        """Milliseconds in the three windows, see :data:`lac_vla.timing.WINDOWS`."""
        return windows(self.stages)
