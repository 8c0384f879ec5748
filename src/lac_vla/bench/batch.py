"""The section ``batch``: several robots' sessions on one engine, which computes their frames together."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from lac_vla.bench.config import BenchConfig
from lac_vla.bench.engine import DENSE
from lac_vla.bench.measure import Ratio, measured, milliseconds, take_turns
from lac_vla.bench.methods import cached_vla, row_name
from lac_vla.bench.scene import Scene
from lac_vla.factory import CachedVLA
from lac_vla.models import VLA
from lac_vla.policies import paths_by_name
from lac_vla.results.stats import Percentiles
from lac_vla.session import plan_together


@dataclass(frozen=True)
class BatchRow:
    """One method with one number of sessions.

    Attributes:
        name: ``dense`` or the policy; with the options behind it, if any are on.
        sessions: Sessions whose frames are computed together.
        frames_per_second: Of all sessions together, over the median time of a pass.
        latency_ms: Of a pass: from all sessions' observations to all their actions.
        ratio_effective: Mean share of (token, layer) pairs that were not computed.
        faster_than_one: Frames per second over those of one session.
        faster_than_dense: Frames per second over those of as many sessions of dense with the same options.
    """

    name: str
    sessions: int
    frames_per_second: float
    latency_ms: Percentiles
    ratio_effective: float
    faster_than_one: Ratio
    faster_than_dense: Ratio


@dataclass(frozen=True)
class BatchResult:
    """The section ``batch``.

    Attributes:
        model: Its name.
        dtype: Of its weights.
        source: Where the frames come from.
        random_weights: Whether no number here tells what a trained model would reuse or guess.
        rows: Dense first, then the policies, each with every number of sessions.
    """

    model: str
    dtype: str
    source: str
    random_weights: bool
    rows: tuple[BatchRow, ...]


@dataclass
class Robots:
    """Sessions of one engine, each at another frame of the scene.

    Attributes:
        vla: Makes the sessions.
        count: How many.
        seed: Of the first session; the others' are those after it.
        times: Milliseconds of every counted pass.
        ratios: Effective ratios of every counted frame.
    """

    vla: CachedVLA
    count: int
    seed: int
    times: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._sessions = [self.vla.session(self.seed + number) for number in range(self.count)]

    def act(self, scene: Scene, index: int, ratios: list[float]) -> None:
        """Compute one frame of every session: plan all, run the plans together, commit all; append their ratios."""
        frames = []
        for number, session in enumerate(self._sessions):
            place = (index + number * len(scene.frames) // self.count) % len(scene.frames)
            if place in scene.starts:
                session.reset()
            frames.append((session, scene.frames[place]))
        plans = []
        for plan in plan_together(frames):
            if isinstance(plan, Exception):
                raise plan
            plans.append(plan)
        for session, plan, result in zip(self._sessions, plans, self.vla.engine.run(plans), strict=True):
            ratios.append(session.commit(plan, result).ratio)


def measure_batch(model: VLA, scene: Scene, config: BenchConfig) -> BatchResult:
    """Run the section: in every round each method computes a frame of all sessions, with every number of them."""
    counts = sorted({1, *config.batch})
    robots: dict[tuple[str, str, int], Robots] = {}
    for options in dict.fromkeys(config.options):
        for spec in (DENSE, *config.methods):
            vla = cached_vla(model, spec, options, config)
            robots |= {(paths_by_name(spec), options, count): Robots(vla, count, config.seed) for count in counts}
    least, seconds = config.warmup + 1, 60 * config.minutes if config.minutes else math.inf
    turns = take_turns(list(robots), config.warmup + config.rounds, config.seed, "batch", least=least, seconds=seconds)
    for index, order in turns:
        for key in order:
            ratios: list[float] = []
            elapsed = milliseconds(partial(robots[key].act, scene, index, ratios), model.device)
            if index >= config.warmup:
                robots[key].times.append(elapsed)
                robots[key].ratios += ratios

    def row(method: str, options: str, count: int) -> BatchRow:
        own, dense = robots[method, options, count], robots[DENSE, options, count]
        latency = measured(own.times)
        return BatchRow(
            name=row_name(method, options),
            sessions=count,
            frames_per_second=1e3 * count / latency.p50,
            latency_ms=latency,
            ratio_effective=float(np.mean(own.ratios)),
            faster_than_one=Ratio.of([count * time for time in robots[method, options, 1].times], own.times),
            faster_than_dense=Ratio.of(dense.times, own.times),
        )

    return BatchResult(
        model=model.name,
        dtype=str(model.dtype).removeprefix("torch."),
        source=scene.source,
        random_weights=config.model is None,
        rows=tuple(row(*key) for key in robots),
    )
