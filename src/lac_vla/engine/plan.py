"""Plans and results: a session plans a frame on the host, and an engine hands back what became of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lac_vla.engine.kv_cache import Region
from lac_vla.engine.prefill import Refine, SequenceState
from lac_vla.models.protocols import PromptInputs
from lac_vla.running_chunk import RealTimeChunk
from lac_vla.timing import Stopwatch
from lac_vla.types import AttentionProbe, BoolArray, Decision, FloatArray, Frame, UInt8Image


@dataclass(eq=False)
class FramePlan:
    """A plan says what is to be computed of one frame of one session.

    Attributes:
        engine: Whose session it is.
        frame: The observation.
        images: Camera → what the model sees.
        prompt: Instruction and state.
        region: The session's part of the store.
        vision_kv: What the vision encoder keeps of the session's frames; ``None`` for nothing.
        stems: Camera → its part of the vision stem, made of the same picture before; it may be taken.
        begin: Called once before the engine touches the store: from then on the cache may not be built upon. It
            refuses a plan whose session has gone on since.
        clock: Stages timed so far; after a run also those of the whole batch.
        decided: The decision, and the tokens where maximum age or budget overruled the policy, bool, (N,); perhaps
            still being made beside the vision stem.
        dense_reason: Why nothing is reused; ``None`` if the policy was asked.
        probe: Attention to compute aside.
        refine: See :class:`lac_vla.engine.prefill.SequenceState`.
        drafted: What the preceding action's draft is made of; ``None`` for no draft.
        rtc: The running chunk, to go on with in real time; ``None`` for a new beginning.
        rng: Chance of the action head; ``None`` to stop behind the prefill.
        elapsed: Frames by which slots that are not computed grow older.
        used: Whether an engine has taken it.
    """

    engine: Any
    frame: Frame
    images: Mapping[str, UInt8Image]
    prompt: PromptInputs
    region: Region
    vision_kv: Any
    begin: Callable[[], None]
    clock: Stopwatch
    decided: tuple[Decision, BoolArray] | Future[tuple[Decision, BoolArray]]
    dense_reason: str | None = None
    probe: AttentionProbe | None = None
    refine: Refine | None = None
    drafted: Mapping[str, Any] | None = None
    rtc: RealTimeChunk | None = None
    rng: np.random.Generator | None = None
    stems: Mapping[str, Any] = field(default_factory=dict)
    elapsed: int = 1
    used: bool = False

    def decision(self) -> tuple[Decision, BoolArray]:
        """Wait for the decision, if it is still being made."""
        return self.decided.result() if isinstance(self.decided, Future) else self.decided


@dataclass(eq=False)
class FrameResult:
    """A result is what became of a plan.

    Attributes:
        plan: The plan.
        action: In the robot's own units, float32, (action_dim,) or (horizon, action_dim); ``None`` without decoding.
        metadata: What the head says of it.
        sequence: The prompt in the cache, and what was appended to it.
        stems: Camera → its part of the vision stem; empty if none is to be kept.
        unchanged: Cameras whose part of the vision stem was taken, and not made again.
        encoded: Visual tokens whose features the vision encoder computed, bool, (N,).
        eager_runs: Runs that were not replayed although ``cuda_graphs`` is on, those of the whole batch.
        rng_state: Of the head's generator before the action was decoded.
        error: What went wrong; the others are not to be used then.
    """

    plan: FramePlan
    action: FloatArray | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    sequence: SequenceState | None = None
    stems: Mapping[str, Any] = field(default_factory=dict)
    unchanged: tuple[str, ...] = ()
    encoded: BoolArray | None = None
    eager_runs: int = 0
    rng_state: Mapping[str, Any] = field(default_factory=dict)
    error: Exception | None = None
