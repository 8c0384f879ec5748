"""A world that does not wait: what acts when, in every mode."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.scenes import ALL_POLICIES, frame

from lac_vla import CachedVLA, Frame, InputError, random_vla
from lac_vla.client.remote import RemoteReport
from lac_vla.engine.step_info import StepReport
from lac_vla.evaluation.answers import Constant, OnDevice, Virtual, Wall
from lac_vla.evaluation.clock import WorldClock, deadline_controller, sample_of
from lac_vla.evaluation.ensemble import AdaptiveEnsemble
from lac_vla.evaluation.realtime import Mode, RealTimeEpisode
from lac_vla.evaluation.rollout import EpisodeLog, rollout
from lac_vla.models.cogact.config import TINY_COGACT
from lac_vla.models.heads.base import HeadContext
from lac_vla.realtime.device import DeviceTable, Shape
from lac_vla.results.realtime import RealTime, delay
from lac_vla.results.records import EpisodeRecord
from lac_vla.sims.base import Env
from lac_vla.timing import STAGES
from lac_vla.types import FloatArray

MODES: tuple[Mode, ...] = get_args(Mode)
PICTURE = frame(0)
HZ = 20


class World(Env):
    """It remembers what was done at which tick; it is solved once the robot has moved so far."""

    suite, task, instruction, no_op, control_hz = "world", 3, "go", (0.0,) * 6 + (-1.0,), HZ

    def __init__(self, horizon: int = 40, goal: float = math.inf) -> None:
        self.horizon, self.goal = horizon, goal

    def reset(self, init_state: int, seed: int = 0) -> Frame:
        self.actions: list[npt.NDArray[np.float64]] = []
        return self._see()

    def step(self, action: npt.ArrayLike) -> tuple[Frame, bool]:
        self.actions.append(np.array(action, dtype=np.float64))
        return self._see(), sum(a[0] for a in self.actions) >= self.goal

    def _see(self) -> Frame:
        return Frame(PICTURE.images, "go", PICTURE.proprio, timestamp=float(len(self.actions)))


@dataclass
class Teller:
    """A session whose actions tell their observation's tick and their place in the chunk; each moves by one."""

    length: int = 1
    last_info: StepReport | None = None

    def reset(self, seed: int | None = None) -> None:
        self.calls: list[int] = []

    def act(self, frame: Frame) -> FloatArray:
        tick = int(frame.timestamp or 0)
        self.calls.append(tick)
        self.last_info = RemoteReport(0.0, None, None, dict.fromkeys(STAGES, 1.0), 1.0)
        rows = [(1.0, tick, index, 0, 0, 0, (-1.0) ** (tick + index)) for index in range(self.length)]
        return np.array(rows if self.length > 1 else rows[0], dtype=np.float32)


@dataclass
class Latencies:
    """Latencies, one after the other."""

    milliseconds: Sequence[float]
    told: list[float] = field(default_factory=list)

    def __call__(self, report: StepReport, chance: float) -> float:
        self.told.append(self.milliseconds[len(self.told) % len(self.milliseconds)])
        return self.told[-1]


def real_time(record: EpisodeRecord) -> RealTime:
    assert record.realtime is not None
    return record.realtime


def play(
    world: World, session: Any, mode: Mode, latency: Any, n: int = 1, ensemble: AdaptiveEnsemble | None = None
) -> EpisodeRecord:
    log = EpisodeLog(world, session, "any", 0, actions_per_call=n, ensemble=ensemble)
    return RealTimeEpisode(log, Virtual(latency, HZ, np.random.default_rng(0)), mode).play("test")


@settings(max_examples=150, deadline=None)
@given(
    mode=st.sampled_from(MODES),
    milliseconds=st.lists(st.integers(0, 400_000).map(lambda us: us / 1000), min_size=1, max_size=6),
    length=st.integers(1, 8),
    n=st.integers(1, 8),
)
def test_no_answer_acts_before_its_observation_plus_latency(
    mode: Mode, milliseconds: list[float], length: int, n: int
) -> None:
    n, world, session, latency = min(n, length), World(), Teller(length), Latencies(milliseconds)
    record = play(world, session, mode, latency, n)
    real = real_time(record)
    assert record.steps == len(world.actions) == world.horizon
    assert list(real.observed) == session.calls
    assert list(real.answer_ms) == [round(ms, 4) for ms in latency.told]
    waits = zip(session.calls, latency.told, strict=True)
    there = {tick: tick * 1e3 / HZ + ms for tick, ms in waits}
    driven = [(tick, int(a[1]), int(a[2])) for tick, a in enumerate(world.actions) if a[0]]
    for tick, observed, _ in driven:
        assert tick * 1e3 / HZ >= there[observed] - 1e-6, "it acts early"
    assert [d[1:] for d in driven] == sorted(d[1:] for d in driven), "world time is monotone"
    assert len({d[1:] for d in driven}) == len(driven), "no action acts twice"
    for before, after in pairwise(session.calls):
        assert after > before
        assert after * 1e3 / HZ >= there[before] - 1e-6, "one observation at a time"
    for observed, acted in zip(real.observed, real.acted, strict=True):
        first = math.ceil(there[observed] * HZ / 1e3 - 1e-6)
        assert acted == (first if first < world.horizon else None), "and it is not late either"
    assert real.held == sum(not a[0] for a in world.actions)
    assert real.stale == sum(tick - observed > 1 for tick, observed, _ in driven)
    gripper = world.no_op[-1]
    for action in world.actions:
        assert action[0] or (not action[:6].any() and action[6] == gripper), "a null action keeps the gripper"
        gripper = action[6]
    if mode == "hold":
        thinking = {t for o, ms in zip(session.calls, latency.told, strict=True) for t in range(o, o + delay(ms, HZ))}
        assert not thinking & {tick for tick, _, _ in driven}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("length", "n"), [(1, 1), (8, 1), (8, 3), (8, 8)])
def test_no_latency_is_the_episode_of_a_world_that_waits(mode: Mode, length: int, n: int) -> None:
    for goal in (7.0, math.inf):
        waiting, ticking = World(30, goal), World(30, goal)
        before = rollout(EpisodeLog(waiting, Teller(length), "any", 0, actions_per_call=n))
        after = play(ticking, Teller(length), mode, Constant(0.0), n)
        np.testing.assert_array_equal(ticking.actions, waiting.actions)
        assert (after.steps, after.success, after.metrics) == (before.steps, before.success, before.metrics)
        assert real_time(after).held == 0


def test_no_latency_with_an_ensemble_is_the_waiting_worlds_episode() -> None:
    waiting, ticking = World(10), World(10)
    rollout(EpisodeLog(waiting, Teller(4), "any", 0, ensemble=AdaptiveEnsemble(3)))
    play(ticking, Teller(4), "hold", Constant(0.0), ensemble=AdaptiveEnsemble(3))
    np.testing.assert_array_equal(ticking.actions, waiting.actions)


@pytest.mark.parametrize("mode", MODES)
def test_a_latency_beyond_the_horizon_solves_nothing(mode: Mode) -> None:
    world = World(goal=1.0)
    record = play(world, Teller(4), mode, Constant(1e3 * world.horizon / HZ))
    assert (record.success, record.steps) == (False, world.horizon)
    assert (real_time(record).held, real_time(record).acted) == (world.horizon, [None])
    solved = play(world, Teller(4), mode, Constant(1e3 * (world.horizon - 1) / HZ))
    assert (solved.success, solved.steps) == (True, world.horizon), "one tick less, and it is solved in the last one"


def test_what_the_modes_do_by_hand() -> None:
    """Three ticks of latency, chunks of five, two actions per call; observation's tick and place of every action."""
    expected = {
        "hold": "- - - 0.0 0.1 - - - 5.0 5.1 - - -",
        # at tick 5 two actions are done; the chunk goes on to its end at 8, where the answer's own fourth is due
        "chunk": "- - - 0.0 0.1 0.2 0.3 0.4 5.3 5.4 - - -",
        "async": "- - - 0.0 0.1 0.2 3.3 3.4 - 6.2 6.3 6.4 9.3",
    }
    for mode, actions in expected.items():
        world = World(13)
        play(world, Teller(5), mode, Constant(150.0), 2)  # type: ignore[arg-type]
        assert " ".join(f"{a[1]:.0f}.{a[2]:.0f}" if a[0] else "-" for a in world.actions) == actions, mode


def test_a_single_action_acts_once() -> None:
    world = World(9)
    record = play(world, Teller(), "async", Constant(100.0))
    assert [int(a[1]) if a[0] else None for a in world.actions] == [None, None, 0, None, 2, None, 4, None, 6]
    assert real_time(record).stale == 4


@pytest.mark.parametrize("name", sorted(ALL_POLICIES))
@pytest.mark.parametrize("mode", ["hold", "chunk", "async"])
def test_every_policy_is_played_in_every_mode(name: str, mode: Mode) -> None:
    session = CachedVLA(random_vla(TINY_COGACT, seed=1), ALL_POLICIES[name]()).session()
    record = play(World(6), session, mode, Constant(60.0), 2)
    assert len(real_time(record).observed) == len(record.metrics["ratio_effective"]) >= 2
    again = play(World(6), session, mode, Constant(60.0), 2)
    assert (again.metrics, again.realtime) == (record.metrics, record.realtime)


def test_a_guided_head_is_told_what_the_robot_executes_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    vla = random_vla(TINY_COGACT, seed=1)
    told: list[Any] = []
    decode = type(vla.head).decode

    def listen(self: Any, context: HeadContext) -> Any:
        told.append(context.running)
        return decode(self, context)

    monkeypatch.setattr(type(vla.head), "guided", True)
    monkeypatch.setattr(type(vla.head), "decode", listen)
    world = World(10)
    play(world, CachedVLA(vla).session(), "rtc", Constant(100.0))
    assert (told[0], told[1].frozen) == (None, 2), "the first has nothing to continue"
    np.testing.assert_array_equal(told[1].actions[:2], np.array(world.actions[2:4], dtype=np.float32))
    told.clear()
    play(world, CachedVLA(vla).session(), "rtc", Constant(0.0))
    assert told == [None] * 10


def table(**changes: Any) -> DeviceTable:
    stages = {"prefill": {"fixed": 10.0, "per_share": 90.0}, "policy": {"motion": 5.0}}
    content = {
        "name": "toy",
        "device": "toy",
        "hardware": "none",
        "precision": "none",
        "kind": "derived",
        "source": ".",
    }
    shape = Shape.of(random_vla("tiny"))
    return DeviceTable(**{**content, "baseline": ".", "shape": shape, "stages": stages, **changes})


def test_a_frame_takes_what_it_computed_and_the_jitter_is_the_seeds() -> None:
    vla = CachedVLA(random_vla("tiny", seed=3), ALL_POLICIES["motion"]())
    jittery = table(jitter=(0.5, 1.0, 3.0))
    records = []
    for _ in range(2):
        log = EpisodeLog(World(30), vla.session(), "motion", 0, seed=7)
        clock = WorldClock("50")
        object.__setattr__(clock, "__dict__", clock.__dict__ | {"tables": (jittery,), "constant": None})
        records.append(clock.episode(log, "motion", flow=True))
    first, second = map(real_time, records)
    assert first == second
    assert first.table == "toy"
    computed = [1 - ratio for ratio in records[0].metrics["ratio_effective"] if ratio is not None]
    typical = np.array([10 + 90 * share + 5 * (call > 0) for call, share in enumerate(computed)])
    factors = np.array(first.answer_ms) / typical
    assert 0.5 <= factors.min() <= factors.max() <= 3
    assert len(set(factors.round(3))) == len(factors)


def test_a_deadline_caps_the_tokens_in_virtual_time() -> None:
    vla = CachedVLA(random_vla("tiny", seed=3), ALL_POLICIES["dense"]())
    session = vla.session()
    sample, device = sample_of(session, frame(0)), OnDevice(table(), "dense", flow=False)
    assert sample is not None
    controller = deadline_controller(session, device, sample, 60.0)
    answers = Virtual(device, HZ, np.random.default_rng(0), session, controller)
    record = RealTimeEpisode(EpisodeLog(World(40), session, "dense", 0), answers, "hold").play("toy")
    first, *others = real_time(record).answer_ms
    assert (first, max(others) <= 60.0) == (100.0, True), "the first frame has nothing to reuse"
    assert session.token_budget is None, "it is not left behind"
    with pytest.raises(InputError, match="cannot be kept"):
        deadline_controller(session, device, sample, 12.0)


def test_the_wall_clock_ticks_in_real_time() -> None:
    class Slow(Teller):
        def act(self, frame: Frame) -> FloatArray:
            time.sleep(0.12)
            return super().act(frame)

    log = EpisodeLog(World(12), Slow(4), "any", 0)
    record = RealTimeEpisode(log, Wall(HZ), "async").play("wall")
    real = real_time(record)
    assert min(real.answer_ms) >= 120
    waited = [a - o for o, a in zip(real.observed, real.acted, strict=True) if a is not None]
    assert min(waited) >= 3, "three ticks at least: 120 ms are not over after two"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clock": "pdp-11"}, "no device 'pdp-11': choose one of agx-orin, cpu"),
        ({"clock": "-5"}, "-5.0 ms cannot be"),
        ({"clock": "nan"}, "nan ms cannot be"),
        ({"clock": "inf"}, "inf ms cannot be"),
        ({"clock": "missing.json"}, "missing.json"),
        ({"clock": "50", "deadline_ms": 40.0}, "needs a latency table"),
        ({"clock": "cpu", "deadline_ms": math.nan}, "finite time above 0"),
    ],
)
def test_a_clock_that_cannot_be_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        WorldClock(**arguments)


@pytest.mark.parametrize(
    ("clock", "mode", "model", "ensemble", "message"),
    [
        ("cpu", "hold", "tiny", False, "no latency table fits the model .*4 layers of 192"),
        ("rtx4090-cogact-7b", "hold", "tiny", False, "for the family cogact, and tiny is of openvla"),
        ("50", "rtc", "tiny", False, "TokenHead cannot be guided"),
        ("50", "async", TINY_COGACT, True, "an ensemble makes one action per call"),
    ],
)
def test_a_clock_refuses_what_it_cannot_play(clock: str, mode: Mode, model: Any, ensemble: bool, message: str) -> None:
    with pytest.raises(InputError, match=message):
        WorldClock(clock, mode).check(random_vla(model), 1, ensemble=ensemble)


def test_more_delay_than_a_chunk_is_long_is_refused_before_anything_moves() -> None:
    world, vla = World(), CachedVLA(random_vla(TINY_COGACT))
    late, log = vla.model.horizon * 1e3 / HZ, EpisodeLog(world, vla.session(), "dense", 0)
    with pytest.raises(InputError, match="every one would be too late"):
        WorldClock(f"{late}", "async").episode(log, "dense", flow=False)
    assert not hasattr(world, "actions")
    WorldClock(f"{late - 1e3 / HZ}", "async").episode(log, "dense", flow=False)


def test_a_server_needs_a_clock_that_does_not_ask_what_was_computed() -> None:
    with pytest.raises(InputError, match="does not tell what it computed"):
        WorldClock("cpu").check(None, 1, ensemble=False)
    WorldClock("wall").check(None, 1, ensemble=False)
