"""Deadlines: how many tokens a frame can afford, from latencies measured on this machine."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lac_vla.engine.budget import smallest_budget
from lac_vla.errors import InputError
from lac_vla.factory import CachedVLA
from lac_vla.models import VLA
from lac_vla.policies import CachePolicy
from lac_vla.types import Decision, Frame, PolicyInput

SHARES = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)
"""Shares of the visual tokens that are computed at the table's points."""
ROUNDS = 12
"""Frames per point of the table."""
QUANTILE = 0.995
"""Share of the frames that are to keep the deadline."""
STEP = 0.3
"""Step of the controller's correction after a late frame, in its logarithm."""


@dataclass(frozen=True)
class LatencyTable:
    """Latency of a frame, from observation to action, by the number of tokens computed; and of a batch of frames.

    Attributes:
        tokens: Numbers of tokens, rising.
        milliseconds: A high quantile of the latency at each of them, never falling.
        batches: Numbers of frames that are computed together, rising from 1.
        factors: Latency of so many together, over the sum of their latencies one by one.
    """

    tokens: tuple[int, ...]
    milliseconds: tuple[float, ...]
    batches: tuple[int, ...] = (1,)
    factors: tuple[float, ...] = (1.0,)

    @classmethod
    def measure(cls, vla: CachedVLA, rounds: int = ROUNDS, max_batch: int = 1) -> LatencyTable:
        """Time the model, with its policy and flow, on synthetic frames.

        Takes about ``6 · rounds`` frames, and ``(rounds + 4) · (2 + max_batch)`` for batches.
        """
        frames = sample_frames(vla.model)
        count = sum(rows * cols for rows, cols in vla.model.grids.values())
        points = sorted({smallest_budget(count, vla.max_age), *(round(count * share) for share in SHARES)} - {0})
        times = []
        for tokens in points:
            session = replace(vla, policy=_Fixed(vla.policy, tokens)).session()
            took = []
            for index in range(rounds + 2):  # the first is dense, the second warms up what is sparse
                session.act(frames[index % len(frames)])
                took.append(session.last_info.timings["observation_to_action"] if session.last_info else math.nan)
            times.append(float(np.quantile(took[2:], 0.9)))
        table = cls(tuple(points), tuple(np.maximum.accumulate(times).tolist()))
        batches = tuple(sorted({1, min(2, max_batch), max_batch}))
        factors = (1.0, *(table._measure_factor(vla, frames, count, rounds) for count in batches[1:]))
        return replace(table, batches=batches, factors=factors)

    def _measure_factor(self, vla: CachedVLA, frames: Sequence[Frame], count: int, rounds: int) -> float:
        """Measure the factor of a batch with the fewest tokens and with half of all: the greater one counts."""
        factors = []
        for tokens in (self.tokens[0], self.tokens[-1] // 2):
            fixed, took = replace(vla, policy=_Fixed(vla.policy, tokens)), []
            sessions = [fixed.session() for _ in range(count)]
            for index in range(rounds // 2 + 2):
                begin = time.perf_counter()
                plans = [session.plan(frames[index % len(frames)]) for session in sessions]
                for session, plan, result in zip(sessions, plans, fixed.engine.run(plans), strict=True):
                    session.commit(plan, result)
                took.append(1e3 * (time.perf_counter() - begin))
            factors.append(float(np.quantile(took[2:], 0.9)) / (count * self(tokens)))
        return max(factors)

    def factor(self, count: int) -> float:
        """Return what ``count`` frames together take, relative to one by one."""
        return float(np.interp(count, self.batches, self.factors))

    def __call__(self, tokens: float) -> float:
        """Return the milliseconds of a frame with so many tokens."""
        return float(np.interp(tokens, self.tokens, self.milliseconds))

    def tokens_in(self, milliseconds: float) -> int:
        """Return the most tokens that a frame of so many milliseconds can compute; 0 if not even the fewest fit."""
        if milliseconds < self.milliseconds[0]:
            return 0
        # Where the table is level, the largest count of that time is meant: hence the tiny slope.
        rising = np.asarray(self.milliseconds) + 1e-9 * np.arange(len(self.tokens))
        return int(np.interp(milliseconds + 1e-8, rising, self.tokens))


@dataclass
class DeadlineController:
    """Turns the time that is left into a number of tokens, and corrects its table by what frames really take.

    The correction tracks a quantile: it rises by a step after a frame that took longer than predicted, and falls so
    slowly otherwise that both balance when :data:`QUANTILE` of the frames are in time.

    Attributes:
        deadline_ms: Milliseconds from a request's arrival to its answer.
        table: Latencies on this machine.
        floor: Tokens per frame that are never denied, see :func:`lac_vla.engine.budget.smallest_budget`.
        correction: What frames take, relative to the table.

    Raises:
        InputError: If the deadline cannot be met even with the fewest tokens.
    """

    deadline_ms: float
    table: LatencyTable
    floor: int
    correction: float = 1.0

    def __post_init__(self) -> None:
        if not self.deadline_ms > (least := self.least_ms):
            raise InputError(
                f"a deadline of {self.deadline_ms:g} ms cannot be kept: {self.floor} tokens per frame, the fewest that "
                f"the maximum age allows, take {least:.1f} ms here; give more time, or a greater --max-age"
            )

    @property
    def least_ms(self) -> float:
        """Milliseconds of a frame with the fewest tokens, by the table."""
        return self.table(self.floor)

    def left(self, waited_ms: float) -> float:
        """Return the time that is left to a request which has waited so long, in the table's milliseconds."""
        return (self.deadline_ms - waited_ms) / self.correction

    def batch_ms(self, frames_ms: Sequence[float]) -> float:
        """Return the table's milliseconds of a batch of frames that take so many each, one by one."""
        return self.table.factor(len(frames_ms)) * sum(frames_ms)

    def largest_batch(self, limit: int) -> int:
        """Return the most frames, up to ``limit``, that keep the deadline together, with the fewest tokens each."""
        fits = (count for count in range(limit, 1, -1) if self.batch_ms([self.least_ms] * count) <= self.deadline_ms)
        return next(fits, 1)

    def token_budget(self, milliseconds: float) -> int:
        """Return the tokens that a frame of so many of the table's milliseconds affords; never fewer than the floor."""
        return max(self.floor, self.table.tokens_in(milliseconds))

    def observe(self, predicted_ms: float, milliseconds: float) -> None:
        """Learn from a run for which the table says ``predicted_ms``."""
        late = milliseconds > self.correction * predicted_ms
        self.correction *= math.exp(STEP * (QUANTILE if late else QUANTILE - 1))
        self.correction = min(max(self.correction, 0.5), 20.0)


@dataclass(frozen=True)
class _Fixed(CachePolicy):
    """Runs a policy for its cost, and then has exactly so many tokens computed."""

    policy: CachePolicy
    tokens: int

    @property
    def flow(self) -> str:
        return self.policy.flow

    def probe(self, n_layers: int) -> Any:
        return self.policy.probe(n_layers)

    def check_layout(self, grids: Mapping[str, tuple[int, int]]) -> None:
        self.policy.check_layout(grids)

    def decide(self, inputs: PolicyInput) -> Decision:
        self.policy.decide(inputs)
        return Decision.reuse(np.arange(inputs.layout.n_visual) >= self.tokens, inputs.n_layers)


def sample_frames(model: VLA) -> list[Frame]:
    """Make a few noisy pictures of one scene, as the model's cameras might send them."""
    rng = np.random.default_rng(0)
    length = model.processor.state_dim
    state = None if length is None else np.zeros(length, dtype=np.float32)
    scenes = {camera: rng.integers(60, 190, (224, 224, 3)) for camera in model.grids}
    frames = []
    for _ in range(4):
        noisy = {c: (scene + rng.integers(-9, 10, scene.shape)).astype(np.uint8) for c, scene in scenes.items()}
        frames.append(Frame(noisy, "pick up the object", state))
    return frames
