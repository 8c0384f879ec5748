"""Frames that are prepared but not decided on: what several policies' networks would do one by one is done at once."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from lac_vla.models.protocols import PromptInputs
from lac_vla.policies import CachePolicy
from lac_vla.running_chunk import RealTimeChunk
from lac_vla.timing import Stopwatch
from lac_vla.types import Decision, Frame, PolicyInput, UInt8Image


@dataclass(eq=False)
class PreparedFrame:
    """A frame of one session that is checked, and seen as the model and the policy will see it.

    Attributes:
        policy: Decides about it.
        frame: The observation.
        images: Camera → what the model sees.
        prompt: Instruction and state.
        clock: Stages timed so far.
        dense_reason: Why nothing is reused; ``None`` if the policy is asked.
        drafted: See :class:`lac_vla.engine.plan.FramePlan`.
        rtc: The running chunk that the answer is to go on with.
        inputs: What the policy decides by; ``None`` if it is not asked, or makes its decision beside the vision stem.
        decision: What it decided, once it has.
    """

    policy: CachePolicy
    frame: Frame
    images: Mapping[str, UInt8Image]
    prompt: PromptInputs
    clock: Stopwatch
    dense_reason: str | None
    drafted: Mapping[str, Any] | None
    rtc: RealTimeChunk | None = None
    inputs: PolicyInput | None = None
    decision: Decision | None = None


def decide_together(frames: Sequence[PreparedFrame]) -> None:
    """Let policies that can decide about several frames at once do so; the others are left to decide one by one.

    If that fails, nothing has changed: one by one, the error comes to light where it belongs.

    Args:
        frames: Of different sessions; ``decision`` is set where one was made.
    """
    open_ = [frame for frame in frames if frame.inputs is not None and frame.decision is None]
    for policy in {id(frame.policy): frame.policy for frame in open_}.values():
        own = [frame for frame in open_ if frame.policy is policy]
        inputs = [frame.inputs for frame in own if frame.inputs is not None]
        if len(own) < 2:
            continue
        chance, begun = [each.rng.bit_generator.state for each in inputs], time.perf_counter()
        decisions: Sequence[Decision] | None = None
        with suppress(Exception):
            decisions = policy.decide_together(inputs)
        if decisions is None:
            for each, state in zip(inputs, chance, strict=True):
                each.rng.bit_generator.state = state
            continue
        took = 1e3 * (time.perf_counter() - begun)  # every robot waits for all of them
        for frame, decision in zip(own, decisions, strict=True):
            frame.decision = decision
            frame.clock.stages["policy"] += took
