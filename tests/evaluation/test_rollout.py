"""One episode: what a robot executes of a model that answers with chunks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from tests.engine.scenes import frame

from lac_vla import CachedVLA, Frame, InputError, Random, random_vla
from lac_vla.engine.step_info import StepInfo
from lac_vla.evaluation.ensemble import AdaptiveEnsemble
from lac_vla.evaluation.rollout import EpisodeLog, rollout
from lac_vla.models.cogact.config import TINY_COGACT
from lac_vla.sims.base import Env
from lac_vla.types import FloatArray


class Film:
    """Shows the same pictures whatever is done, and remembers what that was."""

    suite, task, instruction, horizon = "film", 0, "watch", 5
    tick = Env.tick

    def reset(self, init_state: int, seed: int = 0) -> Frame:
        self.actions: list[np.ndarray] = []
        return frame(0)

    def step(self, action: np.ndarray) -> tuple[Frame, bool]:
        self.actions.append(action)
        return frame(len(self.actions)), False


@pytest.mark.parametrize("horizon", [None, 3])
def test_chunks_are_executed_one_action_per_frame(horizon: int | None) -> None:
    vla, film = CachedVLA(random_vla(TINY_COGACT, seed=1), Random(0.5)), Film()
    session = vla.session(seed=4)
    chunks = [session.act(frame(i)) for i in range(film.horizon)]
    single = AdaptiveEnsemble(horizon or 1)  # of one chunk: its first action
    expected = [single(chunk) for chunk in chunks]
    ensemble = None if horizon is None else AdaptiveEnsemble(horizon)
    for _ in range(2):  # a second episode knows nothing of the first
        rollout(EpisodeLog(film, vla.session(), "random", 0, seed=4, ensemble=ensemble))
        np.testing.assert_allclose(film.actions, expected, rtol=1e-6)


def test_a_picture_that_nobody_looks_at_is_not_rendered() -> None:
    """Of five steps, three actions a call, the model sees the first and the fourth."""

    class Lazy(Film):
        def tick(self, action: np.ndarray) -> tuple[Callable[[], Frame], bool]:
            self.actions.append(action)
            return partial(self.look, len(self.actions)), False

        def look(self, step: int) -> Frame:
            seen.append(step)
            return frame(step)

    seen: list[int] = []
    vla = CachedVLA(random_vla(TINY_COGACT, seed=1))
    eager, lazy = Film(), Lazy()
    rollout(EpisodeLog(eager, vla.session(), "dense", 0, actions_per_call=3))
    rollout(EpisodeLog(lazy, vla.session(), "dense", 0, actions_per_call=3))
    assert seen == [3]
    np.testing.assert_array_equal(eager.actions, lazy.actions)


def test_an_ensemble_needs_a_model_that_answers_with_chunks() -> None:
    vla = CachedVLA(random_vla("tiny"))
    with pytest.raises(InputError, match="needs that many actions"):
        rollout(EpisodeLog(Film(), vla.session(), "dense", 0, ensemble=AdaptiveEnsemble(2)))


def test_a_new_instruction_starts_the_ensemble_anew() -> None:
    class Changing(Film):
        def step(self, action: np.ndarray) -> tuple[Frame, bool]:
            seen, done = super().step(action)
            words = seen.instruction if len(self.actions) < 2 else "now something else"
            return Frame(seen.images, words), done

    vla = CachedVLA(random_vla(TINY_COGACT, seed=1))
    averaged, single = Changing(), Changing()
    rollout(EpisodeLog(averaged, vla.session(), "dense", 0, ensemble=AdaptiveEnsemble(3)))
    rollout(EpisodeLog(single, vla.session(), "dense", 0))
    same = [np.allclose(a, b) for a, b in zip(averaged.actions, single.actions, strict=True)]
    assert same == [True, False, True, False, False]


class Chunks:
    """A session that answers its n-th call with the chunk n, n + 0.1, n + 0.2, and reports what another one does."""

    def __init__(self, length: int = 3) -> None:
        self._inner = CachedVLA(random_vla("tiny"), Random(0.5)).session()
        self.length = length

    @property
    def last_info(self) -> StepInfo | None:
        return self._inner.last_info

    def reset(self, seed: int | None = None) -> None:
        self.calls = 0
        self._inner.reset(seed)

    def act(self, frame: Frame) -> FloatArray:
        self._inner.act(frame)
        self.calls += 1
        return np.array([[self.calls + 0.1 * k] * 7 for k in range(self.length)], np.float32)


class Calls:
    def __init__(self) -> None:
        self.frames: list[Frame] = []

    def add(self, frame: Frame, step: StepInfo) -> None:
        self.frames.append(frame)


@pytest.mark.parametrize(
    ("actions_per_call", "executed"),
    [(1, [1, 2, 3, 4, 5]), (2, [1, 1.1, 2, 2.1, 3]), (3, [1, 1.1, 1.2, 2, 2.1])],
)
def test_several_actions_of_a_chunk_are_executed_before_the_model_is_asked_again(
    actions_per_call: int, executed: list[float]
) -> None:
    film, session, watching = Film(), Chunks(), Calls()
    record = rollout(EpisodeLog(film, session, "random", 0, actions_per_call=actions_per_call, observers=[watching]))
    np.testing.assert_allclose([action[0] for action in film.actions], executed, rtol=1e-6)
    calls = len({int(action) for action in executed})
    assert (record.steps, record.actions_per_call, session.calls) == (5, actions_per_call, calls)
    assert {len(values) for values in (*record.latency_ms.values(), *record.metrics.values())} == {calls}
    assert len(watching.frames) == calls
    shown = frame(actions_per_call)  # the second call sees what the world became, not what the first call saw
    np.testing.assert_array_equal(watching.frames[1].images["agentview"], shown.images["agentview"])


def test_a_task_may_be_solved_within_a_chunk() -> None:
    class Solved(Film):
        def step(self, action: np.ndarray) -> tuple[Frame, bool]:
            seen, _ = super().step(action)
            return seen, len(self.actions) == 4

    record = rollout(EpisodeLog(Solved(), Chunks(), "random", 0, actions_per_call=3))
    assert (record.success, record.steps) == (True, 4)


def test_more_actions_than_a_chunk_has_are_refused_before_the_world_moves() -> None:
    film = Film()
    with pytest.raises(InputError, match="a chunk has 3"):
        rollout(EpisodeLog(film, Chunks(), "random", 0, actions_per_call=4))
    assert film.actions == []
    for wrong, ensemble in ((0, None), (2, AdaptiveEnsemble(2))):
        with pytest.raises(InputError, match=f"actions_per_call is {wrong}"):
            rollout(EpisodeLog(Film(), Chunks(), "random", 0, actions_per_call=wrong, ensemble=ensemble))


def test_a_maximum_age_is_counted_in_what_the_robot_did() -> None:
    """At three actions per call, a slot of two calls ago is six steps old."""
    ages: list[int] = []

    class Ages:
        def add(self, _: Frame, info: StepInfo) -> None:
            ages.append(int(info.age.max()))

    session = CachedVLA(random_vla(TINY_COGACT, seed=1), Random(0.9), max_age=3).session()
    for actions_per_call, expected in ((2, [0, 1, 1]), (1, [0, 1, 2, 3, 3])):
        ages.clear()
        rollout(EpisodeLog(Film(), session, "random", 0, actions_per_call=actions_per_call, observers=[Ages()]))
        assert ages == expected
