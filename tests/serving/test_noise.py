"""A noisy neighbour beside robots of different loads: real turns, the model a clock that takes what frames take."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from lac_vla.serving.batches import Batcher, Request
from lac_vla.serving.sessions import PAUSES, RobotSession, pace

REUSED_S, DENSE_S = 0.0204, 0.0267
"""About what frames of ``mini`` take on one thread."""
BATCHED = ((1, 8), (1.0, 0.6))
"""Frames in a batch, and their time relative to one by one."""
PIECES = (0.05, 0.14, 0.05, *(0.08,) * 8, 0.12)
"""Shares of a dense frame: checks, vision, embeddings, halves of four layers, decoding."""
HZ, JITTER = 20.0, 0.05


class Model:
    """An engine whose frames take time and nothing else."""

    def __init__(self, interruptible: bool = True) -> None:
        self.now, self.interrupted, self.interruptible = 0.0, 0, interruptible

    def run(self, plans: Sequence[Any], between: Callable[[], None] = lambda: None) -> list[None]:
        took = float(np.interp(len(plans), *BATCHED)) * sum(plan.took for plan in plans)
        for share in PIECES[:-1]:
            self.now += share * took
            before = self.now
            if self.interruptible:
                between()
            self.interrupted += self.now > before
        self.now += PIECES[-1] * took
        return [None] * len(plans)


class Robot:
    """A robot's session as far as the batcher needs it."""

    def __init__(self, model: Model, hz: float, dense_every: int, joins: float = 0.0) -> None:
        self.model, self.hz, self.dense_every = model, hz, dense_every
        self.due = self.answered = joins
        self.pause: float | None = None
        self.pauses, self.frames, self.took = deque[float](maxlen=PAUSES), 0, list[float]()

    def prepare(self, _: Any, arrived: float) -> Any:
        self.pauses.append(max(0.0, arrived - self.answered))
        self.pause = pace(self.pauses)
        return SimpleNamespace(prepared=SimpleNamespace(inputs=None))

    def plan(self, *_: Any) -> Any:
        self.frames += 1
        dense = self.frames % self.dense_every == 0
        return SimpleNamespace(plan=SimpleNamespace(took=DENSE_S if dense else REUSED_S), tokens=0.0)

    def commit(self, *_: Any) -> Any:
        self.answered = self.model.now
        return SimpleNamespace(step=SimpleNamespace(dense_reason=None, decision=None))


def play(robots: Sequence[Robot], model: Model, max_batch: int, seconds: float) -> None:
    """Let robots ask at their pace, each when its last request is answered; what it took is theirs."""
    rng, sessions = np.random.default_rng(0), cast("list[RobotSession]", robots)
    batcher = Batcher(cast("Any", model), max_batch=max_batch)
    waiting: list[Request] = []
    asking: set[Robot] = set()

    def answer(between: Callable[[], None] | None = None) -> None:
        for robot in robots:
            if robot.due <= model.now and robot not in asking:
                asking.add(robot)
                waiting.append(Request(cast("RobotSession", robot), {}, robot.due))
        batch = batcher.choose(waiting, sessions)
        waiting[:] = [request for request in waiting if request not in batch]
        for request in batcher.answer(batch, waiting, sessions, between) if batch else ():
            robot = cast("Robot", request.robot)
            asking.remove(robot)
            robot.took.append(model.now - request.arrived)
            robot.due = max(model.now, request.arrived + (1 + JITTER * rng.standard_normal()) / robot.hz)

    for robot in robots:
        robot.due += rng.random() / HZ
    while model.now < seconds:
        if not asking:
            model.now = max(model.now, min(robot.due for robot in robots))
        answer(answer)


def played(
    monkeypatch: pytest.MonkeyPatch,
    hz: Sequence[float],
    max_batch: int,
    noisy: bool = False,
    interruptible: bool = True,
) -> tuple[Model, list[Robot]]:
    """Play a minute; the noisy one comes a second after the others."""
    model = Model(interruptible)
    monkeypatch.setattr("time.perf_counter", lambda: model.now)
    robots = [Robot(model, each, dense_every=40) for each in hz]
    robots += [Robot(model, 10 * HZ, dense_every=1, joins=1.0)] * noisy
    play(robots, model, max_batch, 60.0)
    return model, robots


def p99(robots: Sequence[Robot]) -> float:
    """Of all but the first two seconds."""
    return float(np.quantile(np.concatenate([robot.took[40:] for robot in robots]), 0.99))


@pytest.mark.parametrize("max_batch", [1, 8])
@pytest.mark.parametrize(("calm", "share", "more"), [(1, 1 / 2, 0.15), (2, 1 / 8, 0.15), (3, 1 / 8, 0.5)])
def test_a_noisy_neighbour_costs_others_little(
    calm: int, share: float, more: float, max_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asks ten times as often and cuts in every frame; what the others leave of the model's time is its own.

    Three are more than the model can serve: all ask again at once, and it is one of them.
    """
    _, alone = played(monkeypatch, [HZ] * calm, max_batch)
    model, [*beside, noisy] = played(monkeypatch, [HZ] * calm, max_batch, noisy=True)
    before, after, own = p99(alone), p99(beside), len(noisy.took) * DENSE_S / 59
    row = f"{1e3 * before:.1f} → {1e3 * after:.1f} ms ({100 * (after / before - 1):+.0f} %) | {100 * own:.0f} % |"
    print(f"\n| {calm} | {max_batch} | {row}", end="", flush=True)
    assert after < (1 + more) * before
    assert own > share
    assert max(noisy.took) < 1.0
    assert model.interrupted > 100 or calm > 2


@pytest.mark.parametrize("max_batch", [1, 8])
@pytest.mark.parametrize("calm", [2, 3, 4, 8, 32])
def test_robots_that_are_alike_give_way_to_nobody(calm: int, max_batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if there are more than the model can serve."""
    model, robots = played(monkeypatch, [HZ] * calm, max_batch)
    assert model.interrupted == 0
    counts = [len(robot.took) for robot in robots]
    assert max(counts) <= 1.05 * min(counts)


@pytest.mark.parametrize("interruptible", [True, False])
@pytest.mark.parametrize("count", [3, 8])
def test_fast_robots_beside_slow_ones_keep_their_batches(
    count: int, interruptible: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All are healthy; compared with turns by which nobody gives way."""
    hz = [HZ] * count + [HZ / 40] * count
    _, ranked = played(monkeypatch, hz, 8, interruptible=interruptible)
    monkeypatch.setattr("lac_vla.serving.batches.OFTEN", 0.0)
    _, equal = played(monkeypatch, hz, 8, interruptible=interruptible)
    answered, possible = (sum(len(robot.took) for robot in robots[:count]) for robots in (ranked, equal))
    assert answered > 0.95 * possible
    assert p99(ranked[:count]) < 1.1 * p99(equal[:count])
