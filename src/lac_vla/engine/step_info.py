"""A session's report of a frame: what was computed, what was reused, how old that is, and how long it took."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from lac_vla.models.protocols import DecoderShape
from lac_vla.running_chunk import RealTimeChunk
from lac_vla.timing import windows
from lac_vla.types import (
    AttentionProbe,
    BoolArray,
    Decision,
    FloatArray,
    Frame,
    IntArray,
    SkippedTokens,
    TokenLayout,
    UInt8Image,
)


@dataclass(frozen=True, eq=False)
class StepInfo:
    """A report of what :meth:`lac_vla.session.Session.act` did with a frame.

    Attributes:
        layout: Where the tokens were.
        decision: How deep every visual token was computed; without predicted changes, which are in the slots.
        forced: bool, (N,): tokens that the policy would have cached, recomputed because of their age.
        age: Age of every slot after the frame, in frames, int64, (N,); 0 where the frame pruned, for what is absent
            is not old.
        dense_reason: Why the policy was not asked (``"first frame"``, ``"scene cut"``, …); ``None`` if it was.
        stages: Milliseconds by stage, see :data:`lac_vla.timing.STAGES`.
        metadata: What the head says of its action (token ids, …).
        pixels: Camera → what the model saw.
        flow_macs: Multiply-accumulates of optical flow, see :class:`lac_vla.flow.Flow`.
        policy_macs: Multiply-accumulates of the policy's own networks.
        probe: Attention that was computed aside for the policy.
        draft: Tokens that rode along in the prefill as a guess.
        n_queries: Rows of the prefill that had queries in its last layer; ``None`` for all.
        decode_passes: First and one-past-last appended token of every decoding pass behind the prefill.
        stack_passes: The same of the head's own stacks: shape of the stack, first and one-past-last row.
        prompt_passes: Passes over the prompt: more than one if the head runs it again with another suffix.
        unchanged: Cameras whose picture was the last one to the bit, and the vision stem not computed of it again: all
            of a frame, or some where that costs less.
        encoded: Visual tokens whose features the vision tower computed, bool, (N,).
        eager_runs: Runs of layers, or of parts of the vision encoder, that the option ``cuda_graphs`` left to the
            ordinary loop although they might have been graphs.
    """

    layout: TokenLayout
    decision: Decision
    forced: BoolArray
    age: IntArray
    dense_reason: str | None
    stages: Mapping[str, float]
    metadata: Mapping[str, Any]
    pixels: Mapping[str, UInt8Image]
    flow_macs: int = 0
    policy_macs: int = 0
    probe: AttentionProbe | None = None
    draft: int = 0
    n_queries: int | None = None
    decode_passes: tuple[tuple[int, int], ...] = ()
    stack_passes: tuple[tuple[DecoderShape, int, int], ...] = ()
    prompt_passes: int = 1
    unchanged: tuple[str, ...] = ()
    encoded: BoolArray | None = None
    eager_runs: int = 0

    @property
    def ratio(self) -> float:
        """Effective cache ratio, in [0, 1]."""
        return self.decision.ratio

    @property
    def camera_ratios(self) -> dict[str, float]:
        """Effective cache ratio of every camera's tokens, in [0, 1]."""
        computed = self.decision.exit_layer / self.decision.n_layers
        return {camera.name: 1.0 - float(computed[camera.tokens].mean()) for camera in self.layout.cameras}

    @property
    def nominal_ratio(self) -> float | None:
        """The cache ratio that the policy aimed at, in [0, 1]; ``None`` if it aims at none."""
        return self.decision.nominal_ratio

    @property
    def accepted(self) -> int | None:
        """Number of drafted tokens that were accepted; ``None`` if there was no draft."""
        if not self.draft:
            return None
        return self.decode_passes[0][0] if self.decode_passes else self.draft

    @property
    def oldest_age(self) -> int | None:
        """Age of the oldest slot after the frame, in frames; ``None`` where the frame pruned: it reuses nothing."""
        return None if self.decision.skipped is SkippedTokens.PRUNE else int(self.age.max(initial=0))

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


class StepReport(Protocol):
    """The part of a report that records need; a session's own :class:`StepInfo`, or what a server says of one."""

    @property
    def ratio(self) -> float: ...  # noqa: D102
    @property
    def nominal_ratio(self) -> float | None: ...  # noqa: D102
    @property
    def oldest_age(self) -> int | None: ...  # noqa: D102
    @property
    def timings(self) -> Mapping[str, float]: ...  # noqa: D102
    @property
    def stages(self) -> Mapping[str, float]: ...  # noqa: D102


class PolicySession(Protocol):
    """Drives one robot: a session, here or behind a server."""

    @property
    def last_info(self) -> StepReport | None:
        """The report of the last call of :meth:`act`."""
        ...

    def reset(self, seed: int | None = None) -> None:
        """Begin a new episode."""
        ...

    def act(self, frame: Frame, rtc: RealTimeChunk | None = None) -> FloatArray:
        """Answer an observation with an action, (A,), or a chunk of actions, (horizon, A); or go on with a chunk."""
        ...


class StepObserver(Protocol):
    """Watches an episode, e.g. to make a video of it."""

    def add(self, frame: Frame, step: StepInfo) -> None:
        """See one observation and what the session did with it."""
        ...
