"""Requests answered together: the same answers as alone, fair by robot, within the deadline."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from lac_vla import CachedVLA, Decision, Dense, InputError, PolicyInput, random_vla
from lac_vla.engine.engine import Engine
from lac_vla.engine.plan import FramePlan, FrameResult
from lac_vla.models import FAMILIES, VLA
from lac_vla.policies import CachePolicy
from lac_vla.realtime.deadline import DeadlineController, LatencyTable
from lac_vla.serving.batches import Batcher, Outcome, Request
from lac_vla.serving.executor import ModelExecutor
from lac_vla.serving.sessions import FEWEST_PAUSES, Answer, RobotSession, SessionOptions
from lac_vla.types import AttentionProbe, TokenLayout
from tests.serving.conftest import KEYS, ask, observation

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
TEXTS = ("pick up the bowl", "stop", "put the mug on the plate, then open the drawer and stop")
ROBOTS = 32
FRAMES = int(os.environ.get("LAC_LOAD_FRAMES", "10000"))


class CrashError(RuntimeError):
    """A policy fails."""


@dataclass(frozen=True)
class Moody(CachePolicy):
    """Reuses another share in every frame; fails where a robot is told so, before the run or in the middle of it."""

    def probe(self, n_layers: int) -> AttentionProbe:
        return AttentionProbe((0,), "last")

    def decide(self, inputs: PolicyInput) -> Decision:
        if inputs.instruction == "crash early":
            raise CrashError("early")
        reused = inputs.rng.random(inputs.layout.n_visual) < inputs.rng.random()
        # a token that leaves in mid-depth marks the frame, for refine() sees no instruction
        depth = 1 if inputs.instruction == "crash late" else 0
        return Decision(np.where(reused, depth, inputs.n_layers).astype(np.int64), inputs.n_layers)

    def refine(self, layout: TokenLayout, layer: int, attention: torch.Tensor, decision: Decision) -> Decision:
        if (decision.exit_layer == 1).any():
            raise CrashError("late")
        return decision


@dataclass
class Life:
    """One robot's chance: what it sees and sends next."""

    number: int
    rng: np.random.Generator = field(init=False)
    step: int = 0
    text: str = TEXTS[0]

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.number)
        self.text = TEXTS[self.number % len(TEXTS)]

    def next(self, trouble: float) -> dict[str, Any]:
        """Make its next message; with the chance ``trouble`` one that resets, cuts, or fails."""
        self.step += 1
        message = observation(1000 * self.number + self.step, self.text)
        if self.rng.random() >= trouble:
            return message
        kind = self.rng.integers(7)
        if kind == 0:
            return message | {"reset": True, "seed": int(self.rng.integers(99))}
        if kind == 1:
            self.text = TEXTS[self.rng.integers(len(TEXTS))]
            return message | {"prompt": self.text}
        if kind == 2:
            return message | {"observation/image": np.full((64, 64, 3), 255, np.uint8)}  # a scene cut
        if kind == 3:
            return message | {"observation/image": np.zeros((32, 48, 3), np.uint8)}  # other cameras
        if kind == 4:
            return message | {"prompt": " "}  # refused
        self.text = "crash early" if kind == 5 else "crash late"  # from its second frame on
        return message | {"prompt": self.text}


def same(mine: Outcome, alone: Outcome) -> None:
    """Equal answers, and equal faults."""
    if isinstance(alone, Exception):
        assert type(mine) is type(alone)
        assert str(mine) == str(alone)
        return
    assert isinstance(mine, Answer)
    np.testing.assert_allclose(mine.message["actions"], alone.message["actions"], **CLOSE)
    assert mine.step.metadata.get("tokens") == alone.step.metadata.get("tokens")
    assert (mine.step.decision.exit_layer == alone.step.decision.exit_layer).all()
    assert (mine.step.age == alone.step.age).all()
    assert (mine.reset, mine.step.dense_reason) == (alone.reset, alone.step.dense_reason)


def outcome_alone(robot: RobotSession, message: dict[str, Any], arrived: float) -> Outcome:
    try:
        return ask(robot, message, arrived)
    except Exception as error:
        return error


def live(model: VLA, rounds: int, seed: int, trouble: float, robots: int = ROBOTS) -> Counter[str]:
    """Let robots arrive at random, in batches of random size and order, each beside its double that is served alone.

    Returns:
        Outcomes by kind: answers by why they are dense, if they are, else what went wrong.
    """
    together, alone = (CachedVLA(model, Moody(), max_age=4) for _ in range(2))
    options, rng = SessionOptions(gap_s=1e9), np.random.default_rng(seed)

    def pair(number: int) -> tuple[RobotSession, RobotSession]:
        one, other = (RobotSession(vla, KEYS, options, seed=number) for vla in (together, alone))
        return one, other

    lives = [Life(number + 100 * seed) for number in range(robots)]
    pairs = [pair(number) for number in range(robots)]
    seen: dict[bytes, int] = {}
    kinds: Counter[str] = Counter()
    for _ in range(rounds):
        size = int(rng.integers(1, robots + 1))
        arriving = rng.permutation(robots)[:size].tolist()
        messages = {number: lives[number].next(trouble) for number in arriving}
        batcher = Batcher(together.engine, max_batch=int(rng.integers(1, robots + 1)))
        waiting = [Request(pairs[number][0], messages[number], 0.0) for number in arriving]
        outcomes: dict[Request, Outcome] = {}
        while remaining := [request for request in waiting if request not in outcomes]:
            outcomes |= batcher.answer(batcher.choose(remaining))
        for number, request in zip(arriving, waiting, strict=True):
            mine, other = outcomes[request], outcome_alone(pairs[number][1], messages[number], 0.0)
            same(mine, other)
            if isinstance(mine, Answer):
                kinds[str(mine.step.dense_reason)] += 1
                if model.horizon > 1:  # its actions are continuous: no two robots' are equal, and a mix would show
                    assert seen.setdefault(mine.message["actions"].tobytes(), number) == number
            else:  # its connection ends, as the server does it
                kinds[str(mine)] += 1
                pairs[number], lives[number].text = pair(number), TEXTS[0]
    return kinds


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> VLA:
    family = FAMILIES[request.param]
    return random_vla(family.presets[family.tiny], seed=3)


def test_batches_of_every_order_and_size_equal_sessions_alone(model: VLA) -> None:
    kinds = live(model, rounds=6, seed=0, trouble=0.0)
    assert set(kinds) == {"None", "first frame"}
    assert kinds["None"] > ROBOTS


def test_resets_and_failures_touch_no_other_robot(model: VLA) -> None:
    kinds = live(model, rounds=16, seed=1, trouble=0.3, robots=10)
    assert min(kinds[kind] for kind in ("None", "first frame", "scene cut", "early", "late")) > 0
    assert any("instruction is empty" in kind for kind in kinds)


@pytest.mark.slow
def test_many_frames_without_one_mixed_answer(model: VLA) -> None:
    """``LAC_LOAD_SEED`` goes on where a run of so many frames was stopped: a line is printed for every seed."""
    frames, seed = 0, int(os.environ.get("LAC_LOAD_SEED", "2"))
    while frames < FRAMES / len(FAMILIES):
        kinds = live(model, rounds=60, seed=seed, trouble=0.05)
        frames += kinds.total()
        print(f"\n{model.name}, seed {seed}: {kinds.total()} frames, none mixed; {frames} so far", flush=True)
        seed += 1


# Whose turn it is, and what a frame may cost, by a clock that goes on when a batch is run.

TABLE = LatencyTable((4, 52), (4.0, 52.0), (1, 8), (1.0, 0.5))
"""A token takes a millisecond, in a batch of eight half of one."""


PIECES = 6


class Clock:
    """The model takes what the table says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("time.perf_counter", lambda: self.now)
        run = Engine.run

        def timed(
            engine: Engine, plans: Sequence[FramePlan], between: Callable[[], None] = lambda: None
        ) -> list[FrameResult]:
            costs = [TABLE(float(plan.decision()[0].exit_layer.sum()) / plan.decision()[0].n_layers) for plan in plans]
            for _ in range(PIECES):
                self.now += TABLE.factor(len(plans)) * sum(costs) / 1e3 / PIECES
                between()
            return run(engine, plans)

        monkeypatch.setattr(Engine, "run", timed)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture(scope="module")
def tiny() -> VLA:
    return random_vla("tiny")


CUT = {"observation/image": np.full((64, 64, 3), 255, np.uint8)}


@dataclass
class Served:
    """A server's robots without the server."""

    vla: CachedVLA
    clock: Clock
    deadline_ms: float = 60.0
    max_batch: int = 8
    robots: list[RobotSession] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.controller = DeadlineController(self.deadline_ms, TABLE, 4)
        self.batcher = Batcher(self.vla.engine, self.controller, self.max_batch)

    def warm(self, count: int) -> list[RobotSession]:
        """Robots that have seen a frame, in this order."""
        new = [RobotSession(self.vla, KEYS, SessionOptions(), self.controller) for _ in range(count)]
        for robot in new:
            ask(robot, observation(0), self.clock.now)
        self.robots += new
        return new

    def request(self, robot: RobotSession, waited_ms: float = 0.0, **change: Any) -> Request:
        return Request(robot, observation(1) | change, self.clock.now - waited_ms / 1e3)


def budgets(outcomes: dict[Request, Outcome]) -> list[int]:
    return [outcome.message["lac"]["token_budget"] for outcome in outcomes.values() if isinstance(outcome, Answer)]


@pytest.mark.parametrize(("count", "tokens"), [(1, 52), (2, 32), (4, 19), (8, 15)])
def test_the_time_is_shared_out_equally(tiny: VLA, clock: Clock, count: int, tokens: int) -> None:
    served = Served(CachedVLA(tiny, Dense()), clock)
    batch = [served.request(robot) for robot in served.warm(count)]
    begun = clock.now
    assert budgets(served.batcher.answer(batch)) == [tokens] * count
    assert clock.now - begun < 0.0601


def test_what_waits_or_will_come_has_its_share_kept(tiny: VLA, clock: Clock) -> None:
    served = Served(CachedVLA(tiny, Dense()), clock)
    one, other = served.warm(2)
    one.idle = other.idle = 9.0

    def tokens(waiting: Sequence[Request] = ()) -> list[int]:
        served.controller.correction = 1.0
        return budgets(served.batcher.answer([served.request(one)], waiting, [one, other]))

    assert tokens() == [52]
    assert tokens([served.request(other)]) == [32]
    assert tokens([served.request(other, waited_ms=30)]) == [16]
    other.answered, other.idle = clock.now, 0.02
    assert tokens() == [32]
    other.answered = clock.now - 1  # it was expected, and has not come
    assert tokens() == [52]


def test_what_one_robot_leaves_the_next_may_use(tiny: VLA, clock: Clock) -> None:
    @dataclass(frozen=True)
    class Modest(CachePolicy):
        def decide(self, inputs: PolicyInput) -> Decision:
            few = 6 if inputs.instruction == TEXTS[0] else inputs.layout.n_visual
            return Decision.reuse(np.arange(inputs.layout.n_visual) >= few, inputs.n_layers)

    served = Served(CachedVLA(tiny, Modest()), clock)
    modest, greedy, late = served.warm(3)
    for robot in (greedy, late):
        ask(robot, observation(0, TEXTS[1]), clock.now)
        served.controller.correction = 1.0
    batch = [served.request(modest), served.request(greedy, prompt=TEXTS[1]), served.request(late, prompt=TEXTS[1])]
    assert budgets(served.batcher.answer(batch)) == [23, 40, 24]


def test_never_fewer_tokens_than_the_maximum_age_needs(tiny: VLA, clock: Clock) -> None:
    served = Served(CachedVLA(tiny, Dense(), max_age=16), clock)
    robots = served.warm(8)
    for _ in range(20):
        outcomes = served.batcher.answer([served.request(robot, waited_ms=100) for robot in robots])
        served.controller.correction = 1.0
        assert budgets(outcomes) == [4] * 8
    assert max(answer.message["lac"]["oldest_age"] for answer in outcomes.values()) <= 16


def test_a_frame_in_full_that_would_make_the_others_late_comes_next(tiny: VLA, clock: Clock) -> None:
    served = Served(CachedVLA(tiny, Dense()), clock)
    cutting, *others = served.warm(4)
    cut = served.request(cutting, **CUT)
    batch = [cut, *(served.request(robot) for robot in others)]
    outcomes = served.batcher.answer(batch)
    assert list(outcomes) == batch[1:]
    assert budgets(outcomes) == [19] * 3  # their shares, as if it had been like them
    assert not any(answer.message["lac"]["late"] for answer in outcomes.values())
    after = [served.request(robot) for robot in others]
    chosen = served.batcher.choose([*after, cut])
    assert chosen[0] is cut
    [answer, *_] = served.batcher.answer(chosen).values()
    assert answer.step.dense_reason == "scene cut"
    assert answer.message["lac"]["waited_ms"] > 0  # once, and it is told


def test_turns_go_by_robot_not_by_request(tiny: VLA, clock: Clock) -> None:
    served = Served(CachedVLA(tiny, Dense()), clock, max_batch=2)
    robots = served.warm(4)  # answered one after the other
    ask(robots[0], observation(0), clock.now)
    clock.now += 0.01
    greedy = served.request(robots[0], waited_ms=9)
    waiting = [greedy, *(served.request(robot) for robot in robots[1:])]
    assert [request.robot for request in served.batcher.choose(waiting)] == robots[1:3]
    twice = [served.request(robots[1]), served.request(robots[1])]
    assert served.batcher.choose(twice) == twice[:1]  # its order stays
    assert served.batcher.choose([]) == []


def test_a_batch_is_as_large_as_its_deadlines_allow(tiny: VLA, clock: Clock) -> None:
    served = Served(CachedVLA(tiny, Dense()), clock)
    robots = served.warm(8)

    def size(waited_ms: float) -> int:
        first = served.request(robots[0], waited_ms=waited_ms)
        return len(served.batcher.choose([first, *(served.request(robot) for robot in robots[1:])]))

    assert [size(waited) for waited in (0, 48, 52, 56)] == [8, 3, 2, 1]
    assert size(57) == 8  # it is late whatever is done: no reason to make the others wait


def loop(served: Served, clock: Clock, hz: Sequence[float], seconds: float, cutting: Sequence[int] = ()) -> list[Any]:
    """Play robots that ask at their pace; returns every robot's reports after its first second."""
    rng = np.random.default_rng(0)
    robots = served.warm(len(hz))
    served.controller.correction = 1.0
    start, due = clock.now, [clock.now + rng.random() / rate for rate in hz]
    waiting: dict[int, Request] = {}
    reports: list[list[Any]] = [[] for _ in hz]
    while clock.now < start + seconds:
        for number, at in enumerate(due):
            if at <= clock.now and number not in waiting:
                step = len(reports[number])
                white = {"observation/image": np.full((64, 64, 3), 255 * (step % 2), np.uint8)}
                message = observation(step % 7) | (white if number in cutting else {})
                waiting[number] = Request(robots[number], message, at)
        if not waiting:
            clock.now = min(due)
            continue
        batch = served.batcher.choose(list(waiting.values()), robots)
        others = [request for request in waiting.values() if request not in batch]
        for request, outcome in served.batcher.answer(batch, others, robots).items():
            number = robots.index(request.robot)
            assert isinstance(outcome, Answer)
            reports[number].append(outcome.message["lac"] | {"took_ms": 1e3 * (clock.now - request.arrived)})
            del waiting[number]
            due[number] = max(clock.now, due[number] + 1 / hz[number])
    return [own[int(rate) :] for own, rate in zip(reports, hz, strict=True)]


def late_share(reports: Sequence[Any]) -> float:
    return float(np.mean([report["late"] for own in reports for report in own]))


def test_robots_of_all_phases_keep_their_deadlines_and_ages(tiny: VLA, clock: Clock) -> None:
    served = Served(CachedVLA(tiny, Dense(), max_age=16), clock, deadline_ms=50.0)
    reports = loop(served, clock, hz=[20.0] * 6, seconds=6)
    assert late_share(reports) < 0.01
    assert max(report["oldest_age"] for own in reports for report in own) <= 16
    tokens = [np.mean([report["token_budget"] for report in own]) for own in reports]
    assert max(tokens) < 1.5 * min(tokens)  # whoever comes in company shares with it
    assert min(tokens) > 6  # more than the fewest: there is time


def test_a_noisy_neighbour_makes_nobody_late(tiny: VLA, clock: Clock) -> None:
    served = Served(CachedVLA(tiny, Dense(), max_age=16), clock, deadline_ms=120.0)
    reports = loop(served, clock, hz=[5.0] * 6 + [50.0], seconds=12, cutting=[6])
    assert late_share(reports[:6]) < 0.01
    assert all(report["dense_reason"] == "scene cut" for report in reports[6])


def test_who_asks_often_is_served_where_the_others_leave_time(tiny: VLA, clock: Clock) -> None:
    served = Served(CachedVLA(tiny, Dense()), clock)
    served.batcher = Batcher(served.vla.engine)
    *calm, often = loop(served, clock, [1.0] * 6 + [10.0], 10)  # a frame alone takes 52 ms: there is time for all
    assert min(len(own) for own in calm) >= 7
    took = [report["took_ms"] for report in often]
    assert len(took) > 50
    assert np.median(took) < 120


def one_calm_one_often(tiny: VLA, clock: Clock) -> tuple[Served, RobotSession, RobotSession]:
    served = Served(CachedVLA(tiny, Dense()), clock)
    calm, often = served.warm(2)
    for _ in range(FEWEST_PAUSES):
        assert calm.pause is often.pause is None
        ask(calm, observation(1), calm.answered + 4)
        ask(often, observation(1), often.answered)
    return served, calm, often


def test_who_asks_often_waits_behind_others_but_not_for_long(tiny: VLA, clock: Clock) -> None:
    served, calm, often = one_calm_one_often(tiny, clock)
    batcher, robots = Batcher(served.vla.engine), served.robots
    quiet, noisy = served.request(calm), served.request(often, waited_ms=499)
    assert batcher.choose([noisy, quiet], robots) == [quiet]
    assert batcher.choose([noisy], robots) == [noisy]
    impatient = served.request(often, waited_ms=501)  # half a second, and no more
    assert batcher.choose([impatient, quiet], robots) == [impatient]  # alone: its run can be interrupted
    third = served.warm(1)
    assert set(batcher.choose([quiet, served.request(third[0])], served.robots)) > {quiet}
    seen = []

    def between() -> None:
        waiting = [served.request(calm), served.request(often)]
        seen.append([request.robot for request in batcher.choose(waiting, robots)])
        assert batcher.choose(waiting[1:], robots) == []

    batcher.answer([noisy], [quiet], robots, between)
    assert seen == [[calm]] * PIECES
    batcher.answer([quiet], [noisy], robots, between)  # it gives way to nobody
    assert len(seen) == PIECES


def test_a_run_that_fails_between_its_pieces_leaves_turns_as_they_were(tiny: VLA, clock: Clock) -> None:
    served, _, often = one_calm_one_often(tiny, clock)
    batcher = Batcher(served.vla.engine)

    def broken() -> None:
        raise CrashError("between")

    with pytest.raises(CrashError):
        batcher.answer([served.request(often)], (), served.robots, broken)
    assert batcher.choose([request := served.request(often)], served.robots) == [request]


def test_the_deadline_learns_from_a_noisy_robots_run_unless_another_was_answered_inside(
    tiny: VLA, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    served, calm, often = one_calm_one_often(tiny, clock)
    batcher, robots, learned = served.batcher, served.robots, list[float]()
    monkeypatch.setattr(DeadlineController, "observe", lambda _, expected, took: learned.append(took))
    batcher.answer([served.request(often)], (), robots, lambda: None)
    assert len(learned) == 1
    asking = [served.request(calm)]

    def between() -> None:
        if asking:
            assert batcher.answer([asking.pop()], (), robots)

    batcher.answer([served.request(often)], asking, robots, between)
    assert len(learned) == 2  # the calm robot's batch


def test_what_is_between_two_episodes_is_no_pace(tiny: VLA, clock: Clock) -> None:
    [one] = Served(CachedVLA(tiny, Dense()), clock).warm(1)
    usual = [(0.1, {})] * FEWEST_PAUSES
    for pause, change in (*usual, (60.0, {}), (3.0, {"reset": True}), (0.1, {"prompt": TEXTS[1]})):
        ask(one, observation(1) | change, one.answered + pause)
    assert one.pause == pytest.approx(0.1)


def test_what_was_put_off_gives_way_no_more(tiny: VLA, clock: Clock) -> None:
    served, calm, often = one_calm_one_often(tiny, clock)
    waiting = [served.request(calm), served.request(often)]
    assert served.batcher.choose(waiting, served.robots) == waiting[:1]
    waiting[1].postponed = True
    assert served.batcher.choose(waiting, served.robots)[0] is waiting[1]


def test_a_robot_keeps_its_pace_where_others_make_it_wait(tiny: VLA, clock: Clock) -> None:
    served = Served(CachedVLA(tiny, Dense()), clock)
    calm, noisy = served.warm(2)
    for _ in range(12):
        ask(noisy, observation(1), noisy.answered)
        ask(calm, observation(1), calm.answered + 0.05)
    for _ in range(20):  # its time comes while it waits: it asks as soon as it is answered
        ask(noisy, observation(1), noisy.answered)
        ask(calm, observation(1), calm.answered)
    assert calm.pause == pytest.approx(0.05)
    waiting = [served.request(noisy), served.request(calm)]
    assert Batcher(served.vla.engine).choose(waiting, served.robots) == waiting[1:]


def test_whoever_asks_is_answered_in_the_middle_of_a_noisy_robots_run(
    tiny: VLA, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So it is in the server's own thread; and both answers are those of the robots alone."""
    vla = CachedVLA(tiny, Dense())
    calm, noisy = (RobotSession(vla, KEYS, SessionOptions()) for _ in range(2))
    calm.pause, noisy.pause = 1.0, 0.0
    reached, opened = threading.Event(), threading.Event()
    project = type(tiny.vision).project

    def held(vision: Any, features: torch.Tensor) -> torch.Tensor:
        reached.set()
        assert opened.wait(20)
        return project(vision, features)

    async def everything() -> list[tuple[RobotSession, Answer]]:
        executor, answers = ModelExecutor(Batcher(vla.engine), 4), []

        async def asks(robot: RobotSession, seed: int) -> None:
            answers.append((robot, await executor.answer(robot, observation(seed), time.perf_counter())))

        executor.join(noisy)
        executor.join(calm)
        first = asyncio.ensure_future(asks(noisy, 0))
        await asyncio.to_thread(reached.wait, 20)
        second = asyncio.ensure_future(asks(calm, 1))
        await asyncio.sleep(0.05)
        opened.set()
        await asyncio.gather(first, second)
        await executor.close()
        return answers

    with monkeypatch.context() as patch:
        patch.setattr(type(tiny.vision), "project", held)
        answers = asyncio.run(everything())
    assert [robot for robot, _ in answers] == [calm, noisy]
    for seed, (_, answer) in zip((1, 0), answers, strict=True):
        alone = CachedVLA(tiny, Dense()).session().act(KEYS.frame(observation(seed)))
        np.testing.assert_array_equal(answer.message["actions"][0], alone)


def test_the_largest_batch_that_can_keep_the_deadline() -> None:
    limits = {deadline: DeadlineController(deadline, TABLE, 4).largest_batch(8) for deadline in (5.0, 8.0, 14.0, 60.0)}
    assert limits == {5.0: 1, 8.0: 2, 14.0: 4, 60.0: 8}


@pytest.mark.parametrize("size", [0, -3])
def test_a_batch_of_nobody_is_refused(tiny: VLA, size: int) -> None:
    with pytest.raises(InputError, match="give at least 1"):
        Batcher(CachedVLA(tiny, Dense()).engine, max_batch=size)


def test_a_window_that_leaves_no_time_is_refused(tiny: VLA) -> None:
    batcher = Batcher(CachedVLA(tiny, Dense()).engine, DeadlineController(20.0, TABLE, 4))
    ModelExecutor(batcher, 4, 0.015)
    with pytest.raises(InputError, match="wait less, or give more time"):
        ModelExecutor(batcher, 4, 0.016)
    with pytest.raises(InputError, match="at least 0"):
        ModelExecutor(batcher, 4, -1e-3)
