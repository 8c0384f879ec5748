"""When an episode begins, what a frame may cost, and whether the cache is trusted."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from lac_vla import VLA, CachedVLA, Decision, Dense, InputError, Motion, PolicyInput, random_vla
from lac_vla.client.observation import ObservationKeys
from lac_vla.engine.engine import Engine
from lac_vla.engine.work import work_alone
from lac_vla.models.cogact.config import TINY_COGACT
from lac_vla.policies import CachePolicy
from lac_vla.realtime.deadline import DeadlineController, LatencyTable
from lac_vla.running_chunk import RealTimeChunk
from lac_vla.serving import sessions
from lac_vla.serving.batches import Batcher
from lac_vla.serving.sessions import RobotSession, SessionOptions
from tests.serving.conftest import KEYS, ask, observation

TABLE = LatencyTable((4, 26, 52), (5.0, 20.0, 40.0))


class Clock:
    """Time that passes when a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(sessions.time, "perf_counter", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The stopwatch of :mod:`lac_vla.timing` stands still as well; nothing here depends on it."""
    return Clock(monkeypatch)


class Stubborn(CachePolicy):
    """Reuses all that it may."""

    def decide(self, inputs: PolicyInput) -> Decision:
        return Decision.reuse(np.ones(inputs.layout.n_visual, dtype=np.bool_), inputs.n_layers)


def robot(backbone: VLA, policy: CachePolicy | None = None, **options: Any) -> RobotSession:
    return RobotSession(CachedVLA(backbone, policy or Motion(0.5)), KEYS, **{"options": SessionOptions(), **options})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"reset": True}, "reset"),
        ({"reset": False}, None),
        ({"episode_id": "b"}, "new episode"),
        ({"prompt": "open the drawer"}, "new instruction"),
        ({"observation/image": np.zeros((32, 48, 3), np.uint8)}, "other cameras"),
    ],
)
def test_what_begins_an_episode(backbone: VLA, clock: Clock, change: dict[str, Any], reason: str | None) -> None:
    one = robot(backbone)
    first = ask(one, observation(0) | {"episode_id": "a"}, clock.now)
    assert first.reset is None
    answer = ask(one, observation(1) | {"episode_id": "a"} | change, clock.now)
    assert answer.reset == answer.message["lac"]["reset"] == reason
    assert (answer.step.dense_reason == "first frame") == (reason is not None)
    again = ask(one, observation(2) | {"episode_id": "a"} | change | {"reset": False}, clock.now)
    assert (again.reset, again.step.dense_reason) == (None, None)  # only once


def test_a_request_that_is_planned_anew_still_begins_its_episode(backbone: VLA, clock: Clock) -> None:
    one = robot(backbone)
    ask(one, observation(0), clock.now)
    request = observation(1, "open the drawer")
    one.plan(one.prepare(request, clock.now))
    one.release()  # its room was given to another
    answers = [ask(one, observation(number, "open the drawer"), clock.now) for number in (1, 2)]
    assert [answer.reset for answer in answers] == ["new instruction", None]


def test_a_silence_begins_an_episode(backbone: VLA, clock: Clock) -> None:
    one = robot(backbone, options=SessionOptions(gap_s=3))
    ask(one, observation(0), clock.now)
    clock.now += 2.9
    assert ask(one, observation(1), clock.now).reset is None
    clock.now += 3.1
    assert ask(one, observation(2), clock.now).reset == "time gap"


def test_a_scene_cut_makes_a_frame_dense(backbone: VLA, clock: Clock) -> None:
    one = robot(backbone)
    ask(one, observation(0), clock.now)
    cut = observation(1) | {"observation/image": np.full((64, 64, 3), 255, np.uint8)}
    assert ask(one, cut, clock.now).message["lac"]["dense_reason"] == "scene cut"


def test_a_seed_is_that_of_the_episode(backbone: VLA, clock: Clock) -> None:
    one = robot(backbone)
    ask(one, observation(0) | {"reset": True, "seed": 5}, clock.now)
    assert one._session.seed == 5


@pytest.mark.parametrize(("actions", "frames"), [(0, 16), (1, 16), (4, 4), (99, 1)])
def test_the_maximum_age_is_one_of_control_steps(backbone: VLA, clock: Clock, actions: int, frames: int) -> None:
    one = RobotSession(CachedVLA(backbone, Stubborn(), max_age=16), KEYS, SessionOptions(actions_per_call=actions))
    ages = [int(ask(one, observation(number), clock.now).step.age.max()) for number in range(20)]
    assert max(ages) == frames


@pytest.mark.parametrize(
    ("waited_ms", "tokens"), [(0, 26), (12.5, 8), (19, 8), (100, 8)], ids=["all", "half", "floor", "late"]
)
def test_the_deadline_caps_the_tokens(backbone: VLA, clock: Clock, waited_ms: float, tokens: int) -> None:
    controller = DeadlineController(20.0, LatencyTable((8, 26, 52), (7.5, 20.0, 40.0)), 8)
    one = robot(backbone, Dense(), controller=controller)
    assert ask(one, observation(0), clock.now).message["lac"]["late"] is False
    controller.correction = 1.0
    answer = ask(one, observation(1), clock.now - waited_ms / 1e3)
    assert answer.step.active.sum() == tokens == answer.message["lac"]["token_budget"]
    assert answer.message["lac"]["late"] is (waited_ms > 20)


def test_the_table_knows_both_directions() -> None:
    assert [TABLE(n) for n in (0, 4, 15, 52, 90)] == [5, 5, 12.5, 40, 40]
    assert [TABLE.tokens_in(ms) for ms in (4.9, 5, 12.5, 39.9, 40, 1e6)] == [0, 4, 15, 51, 52, 52]
    level = LatencyTable((4, 26, 52), (5.0, 5.0, 5.0))
    assert level.tokens_in(5) == 52


def test_the_table_is_measured_on_the_model(backbone: VLA) -> None:
    table = LatencyTable.measure(CachedVLA(backbone, Motion(0.5), max_age=16), rounds=2)
    assert table.tokens == (4, 6, 13, 26, 39, 52)
    assert list(table.milliseconds) == sorted(table.milliseconds)
    assert table.milliseconds[0] > 0


def test_batches_are_measured_with_it(backbone: VLA) -> None:
    table = LatencyTable.measure(CachedVLA(backbone, Motion(0.5)), rounds=2, max_batch=4)
    assert table.batches == (1, 2, 4)
    assert table.factors[0] == 1
    assert 0 < min(table.factors[1:]) < 3
    assert table.factor(3) == pytest.approx((table.factors[1] + table.factors[2]) / 2)
    assert LatencyTable.measure(CachedVLA(backbone), rounds=2, max_batch=1).batches == (1,)


def test_the_controller_learns_from_what_frames_take() -> None:
    controller = DeadlineController(30.0, TABLE, 4)
    before = controller.token_budget(controller.left(0))
    for _ in range(40):  # the machine takes twice as long as the table says
        controller.observe(TABLE(26), 40.0)
    assert controller.token_budget(controller.left(0)) < before
    assert controller.correction > 2
    rng = np.random.default_rng(0)
    for _ in range(4000):
        controller.observe(TABLE(26), 20 * rng.lognormal(sigma=0.2))
    late = sum(20 * rng.lognormal(sigma=0.2) > 20 * controller.correction for _ in range(2000))
    assert late / 2000 < 0.1


def test_a_deadline_that_cannot_be_kept_is_refused() -> None:
    with pytest.raises(InputError, match=r"take 5\.0 ms here"):
        DeadlineController(4.0, TABLE, 4)


def drive(one: RobotSession, clock: Clock, frames: int = 12) -> list[float]:
    """A control loop of 10 Hz; the mean age that every frame starts from."""
    ages = []
    for i in range(frames):
        if i:
            ages.append(float(one._session.memory.age.mean()))
        ask(one, observation(i), clock.now)
        if (job := one.spare()) is not None:
            assert not Batcher(one.vla.engine).rest([job], math.inf)
        clock.now += 0.1
    return ages


def test_slack_refresh_starts_the_next_frame_fresher(backbone: VLA, clock: Clock) -> None:
    plain = drive(robot(backbone, Motion(0.8)), clock)
    clock.now += 100
    one = robot(backbone, Motion(0.8), options=SessionOptions(slack=True), table=TABLE)
    fresher = drive(one, clock)
    assert np.mean(fresher) < np.mean(plain) / 2
    # the first two gaps tell how much time there is; 50 ms of 100 suffice for all
    assert ask(one, observation(99), clock.now).message["lac"]["refreshed"] > 0


def test_slack_refresh_keeps_within_the_idle_time(backbone: VLA, clock: Clock) -> None:
    one = robot(backbone, Stubborn(), options=SessionOptions(slack=True), table=LatencyTable((4, 52), (10.0, 106.0)))
    ask(one, observation(0), clock.now)
    assert one.spare() is None  # nobody knows when the robot will ask again
    for i, idle in enumerate((0.1, 0.1, 0.1)):
        clock.now += idle
        ask(one, observation(i + 1), clock.now)
    assert work_alone(one.vla.engine, one.refresh()) == 24  # the tokens of 50 ms
    assert work_alone(one.vla.engine, one.refresh(quiet_s=0.05)) == 11  # 25 ms: another robot will ask before
    one.idle = 0.015
    assert work_alone(one.vla.engine, one.refresh()) == 0  # not even the fewest fit


def test_idle_work_of_several_robots_goes_together(
    backbone: VLA, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each refreshes its share of the time, exactly as it would alone; one that has nothing to do is left out."""
    table, sizes = LatencyTable((4, 52), (4.0, 52.0), (1, 8), (1.0, 0.5)), list[int]()
    vla = CachedVLA(backbone, Stubborn(), max_age=99)
    options = SessionOptions(slack=True, gap_s=1e9)
    robots = [RobotSession(vla, KEYS, options, table=table) for _ in range(4)]
    doubles = [CachedVLA(backbone, Stubborn(), max_age=99).session() for _ in range(4)]
    for step in range(5):
        for number, one in enumerate(robots):
            ask(one, observation(10 * number + step), clock.now)
            doubles[number].act(KEYS.frame(observation(10 * number + step)))
        clock.now += 0.1
    jobs = [job for one in robots if (job := one.spare()) is not None]
    batcher = Batcher(vla.engine)
    assert len(batcher.choose_idle(jobs, math.inf)) == 4
    assert len(batcher.choose_idle(jobs, 0.016)) == 2  # 8 ms are for refresh: more than two would get too few tokens
    assert len(batcher.choose_idle(jobs, 1e-6)) == 1
    robots[3]._session.release()
    run = Engine.run
    monkeypatch.setattr(Engine, "run", lambda own, plans: sizes.append(len(plans)) or run(own, plans))  # type: ignore[func-returns-value]
    assert not batcher.rest(jobs, math.inf)
    assert sizes == [3]
    counts = [one._refreshed for one in robots]
    assert counts == [15, 15, 15, 0]  # 50 ms among four, which take 0.79 of their times one by one
    for one, double, count in zip(robots[:3], doubles, counts, strict=False):
        double.refresh(count)
        assert (one._session.memory.age == double.memory.age).all()
        after = observation(5)
        np.testing.assert_allclose(
            ask(one, after, clock.now).message["actions"], np.atleast_2d(double.act(KEYS.frame(after))), atol=1e-5
        )


def test_slack_needs_a_table(backbone: VLA) -> None:
    with pytest.raises(InputError, match="latency table"):
        robot(backbone, options=SessionOptions(slack=True))


def test_the_watchdog_distrusts_a_cache_that_disagrees(clock: Clock) -> None:
    options = SessionOptions(shadow_every=3, shadow_threshold=1e-9, cooldown=2)
    one = robot(random_vla(TINY_COGACT, seed=1), Stubborn(), options=options)  # its actions are continuous
    reasons, shadows = [], []
    for i in range(8):
        answer = ask(one, observation(7 * i), clock.now)
        reasons.append(answer.message["lac"]["dense_reason"])
        shadows.append(answer.message["lac"]["shadow"])
        job = one.spare()
        assert (job is not None) == ((i + 1) % 3 == 0)
        if job is not None:
            assert not Batcher(one.vla.engine).rest([job], math.inf)
    assert shadows[3] > 0  # what disagreed is told with the next answer
    assert reasons[:3] == ["first frame", None, None]
    assert all(f"shadow pass disagreed by {shadows[3]:.3g}" == f for f in reasons[3:5])
    assert reasons[5] is None  # the cache gets another chance
    assert ask(one, observation(0) | {"reset": True}, clock.now).message["lac"]["dense_reason"] == "first frame"


def test_the_watchdog_trusts_a_cache_that_agrees(backbone: VLA, clock: Clock) -> None:
    one = robot(backbone, Dense(), options=SessionOptions(shadow_every=1, shadow_threshold=1e-4))
    for i in range(4):
        answer = ask(one, observation(i), clock.now)
        job = one.spare()
        assert job is not None
        assert work_alone(one.vla.engine, job.begin(1, math.inf)) < 1e-4
    assert answer.message["lac"]["dense_reason"] is None


CHUNKS = random_vla(TINY_COGACT, seed=3)


def test_a_running_chunk_goes_on_and_the_answer_is_whole(clock: Clock) -> None:
    """Its left-over comes with the request under LeRobot's names; what a stock client sends is answered as ever."""
    one = RobotSession(CachedVLA(CHUNKS, Dense()), KEYS, SessionOptions(actions_per_call=2))
    library = CachedVLA(CHUNKS, Dense()).session()
    plain = ask(one, observation(0), clock.now).message
    assert plain["actions"].shape == (2, 7)
    assert "inference_delay" not in plain
    left = library.act(KEYS.frame(observation(0)))[2:]
    rtc = {"prev_chunk_left_over": left, "inference_delay": 1, "execution_horizon": 8}
    answer = ask(one, observation(1) | rtc, clock.now).message
    expected = library.act(KEYS.frame(observation(1)), RealTimeChunk(left, 1, 8))
    np.testing.assert_array_equal(answer["actions"], expected)
    np.testing.assert_array_equal(answer["actions"][0], left[0])
    for nothing in ({}, {"prev_chunk_left_over": None, "inference_delay": 1}):
        assert ask(one, observation(2) | nothing, clock.now).message["actions"].shape == (2, 7)


def test_a_client_is_told_how_many_control_steps_its_answer_took(clock: Clock) -> None:
    one = robot(CHUNKS, Dense())
    clock.now += 0.12
    assert ask(one, observation(0) | {"control_hz": 20}, clock.now - 0.12).message["inference_delay"] == 3
    assert ask(one, observation(1) | {"control_hz": np.float64(5)}, clock.now - 0.12).message["inference_delay"] == 1


@pytest.mark.parametrize(
    ("sent", "complaint"),
    [
        ({"control_hz": 0}, "control_hz"),
        ({"control_hz": "fast"}, "control_hz"),
        ({"control_hz": float("nan")}, "control_hz"),
        ({"prev_chunk_left_over": "all"}, "prev_chunk_left_over"),
        ({"prev_chunk_left_over": np.zeros((2, 7), np.float32), "inference_delay": 3}, "only 2 actions"),
        ({"prev_chunk_left_over": np.zeros((2, 6), np.float32)}, "the model's chunks are"),
        ({"prev_chunk_left_over": np.zeros((2, 7), np.float32), "prefix_attention_schedule": 3}, "choose one of"),
        ({"prev_chunk_left_over": np.zeros((2, 7), np.float32), "inference_delay": [1]}, "whole number"),
        ({"prev_chunk_left_over": np.zeros((2, 7), np.float32), "max_guidance_weight": [1]}, "max_guidance_weight"),
    ],
)
def test_a_running_chunk_that_makes_no_sense_is_refused(clock: Clock, sent: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        ask(robot(CHUNKS, Dense()), observation(0) | sent, clock.now)


def test_keys_are_found_flat_and_nested() -> None:
    keys = ObservationKeys.parse(
        ["agentview", "wrist"], ["wrist=images/hand"], state="observation/state", prompt="task/text"
    )
    assert keys.cameras == {"agentview": "observation/image", "wrist": "images/hand"}
    image = np.zeros((4, 4, 3), np.uint8)
    frame = keys.frame({"observation": {"image": image}, "images/hand": image + 1, "task": {"text": "go"}})
    assert frame.instruction == "go"
    assert frame.images["wrist"].max() == 1
    request = keys.request(frame)
    assert keys.frame(request).shapes == frame.shapes


@pytest.mark.parametrize(
    ("cameras", "named", "complaint"),
    [
        (["a"], ["b=x"], "cannot use the camera"),
        (["a"], ["a="], "cannot use the camera"),
        (["a", "b", "c"], [], "--camera c=KEY"),
    ],
)
def test_cameras_that_do_not_fit(cameras: list[str], named: list[str], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        ObservationKeys.parse(cameras, named, state="s", prompt="p")


@pytest.mark.parametrize(
    "wrong", [{"gap_s": 0}, {"shadow_threshold": 0}, {"shadow_every": -1}, {"cooldown": 0}, {"actions_per_call": -1}]
)
def test_options_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        SessionOptions(**wrong)
