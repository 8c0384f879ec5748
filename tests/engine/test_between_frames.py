"""What a session does between two frames, and a frame's budget: fresher slots, the same answers, no broken bound."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lac_vla import CachedVLA, Decision, Dense, InputError, Motion, PolicyInput, Random, random_vla
from lac_vla.engine.budget import must_refresh, smallest_budget
from lac_vla.engine.options import EngineOptions
from lac_vla.models.cogact.config import TINY_COGACT
from lac_vla.policies import CachePolicy
from lac_vla.session import Session
from tests.engine.scenes import Pruner, Staircase, frame

MODELS = {"tiny": lambda: random_vla("tiny"), "cogact": lambda: random_vla(TINY_COGACT, seed=1)}


def keys_of(session: Session) -> torch.Tensor:
    """The session's keys, (layers, kv_heads, slots, head_dim)."""
    region = session._region
    return session.engine.store.keys[:, :, region.start : region.start + region.size]


class Everything(CachePolicy):
    """Reuses every token it may."""

    def decide(self, inputs: PolicyInput) -> Decision:
        return Decision.reuse(np.ones(inputs.layout.n_visual, dtype=np.bool_), inputs.n_layers)


def started(policy: CachePolicy, frames: int = 3, model: str = "tiny", **options: object) -> Session:
    session = CachedVLA(MODELS[model](), policy, **options).session(seed=3)
    for i in range(frames):
        session.act(frame(i))
    return session


def test_refreshed_slots_are_those_of_the_last_frame() -> None:
    session, fresh = started(Random(0.7), 4), started(Dense(), 4)
    before, age = keys_of(session).clone(), session.memory.age.copy()
    count = session.refresh(8)
    assert count == 8
    chosen = (session.memory.age == 0) & (age > 0)
    assert chosen.sum() == 8
    assert age[chosen].min() >= age[~chosen].max()  # the stalest
    assert (session.memory.age[~chosen] == age[~chosen]).all()  # no time has passed
    slots = np.flatnonzero(~chosen) + 1
    torch.testing.assert_close(keys_of(session)[:, :, slots], before[:, :, slots])
    first = np.flatnonzero(chosen) + 1  # the first layer's depend on nothing but the token
    torch.testing.assert_close(keys_of(session)[0][:, first], keys_of(fresh)[0][:, first])
    for camera, image in session.memory.reference.items():
        grid = next(c for c in session.last_info.layout.cameras if c.name == camera)
        side = image.shape[0] // grid.rows
        mask = np.kron(chosen[grid.tokens].reshape(grid.rows, grid.cols), np.ones((side, side))).astype(bool)
        assert (image[mask] == session.last_info.pixels[camera][mask]).all()


@pytest.mark.parametrize("model", MODELS)
def test_refreshing_everything_leaves_nothing_stale(model: str) -> None:
    session = started(Everything(), model=model)
    dense = started(Dense(), model=model)
    session.refresh(10**6)
    assert session.memory.age.max() == 0
    np.testing.assert_allclose(session.act(frame(2)), dense.act(frame(2)), atol=1e-5)
    assert session.last_info.ratio == 1


def test_refresh_draws_no_chance_and_keeps_the_record() -> None:
    one, other = started(Random(0.5)), started(Random(0.5))
    last = one.last_info
    one.refresh(5)
    assert one.last_info is last
    one.act(frame(3))
    other.act(frame(3))
    assert (one.last_info.cached == other.last_info.cached).all()


def test_nothing_to_refresh() -> None:
    session = CachedVLA(random_vla("tiny")).session()
    assert session.refresh(5) == 0  # no frame yet
    assert session.shadow() is None
    assert started(Dense()).refresh(5) == 0  # nothing is stale
    assert started(Pruner()).refresh(5) == 0  # what is pruned is computed in every frame


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("options", ["default", "none"])
def test_the_shadow_is_what_the_dense_model_answers(model: str, options: str) -> None:
    session = started(Random(0.9), 5, model, options=EngineOptions.parse(options))
    dense = CachedVLA(MODELS[model]()).session(seed=3)
    for i in range(5):  # the action head's chance goes on frame by frame
        expected = dense.act(frame(i))
    np.testing.assert_allclose(session.shadow(), expected, atol=1e-5)
    np.testing.assert_allclose(session.shadow(), expected, atol=1e-5)  # it draws nothing itself
    assert session.memory.age.max() == 0
    np.testing.assert_allclose(session.act(frame(5)).shape, expected.shape)


def test_distrust_is_dense_and_says_why() -> None:
    session = started(Random(0.9))
    session.force_dense = "shadow pass"
    session.act(frame(3))
    assert (session.last_info.ratio, session.last_info.dense_reason) == (0, "shadow pass")
    session.reset()
    session.act(frame(0))
    session.act(frame(1))
    assert session.last_info.dense_reason is None


def test_a_frame_that_fails_between_frames_leaves_the_session_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    session = started(Random(0.9))

    def broken(*_: object) -> torch.Tensor:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(session.model.vision, "project", broken)
        with pytest.raises(RuntimeError):
            session.refresh(4)
    session.act(frame(3))
    assert session.last_info.dense_reason == "first frame"  # half a refresh is not built upon


@pytest.mark.parametrize("policy", [Everything(), Motion(0.3), Random(0.8), Staircase()])
@pytest.mark.parametrize("limit", [11, 20])
def test_a_budget_holds_and_so_does_the_maximum_age(policy: CachePolicy, limit: int) -> None:
    max_age = 4
    session = CachedVLA(random_vla("tiny"), policy, max_age=max_age).session()
    assert smallest_budget(52, max_age) == 11
    session.token_budget = limit
    for i in range(24):
        session.act(frame(i))
        step = session.last_info
        assert step.age.max() <= max_age
        if i:
            assert step.decision.exit_layer.sum() <= limit * step.decision.n_layers
    assert step.dense_reason is None


def test_the_budget_gives_way_to_the_maximum_age() -> None:
    session = CachedVLA(random_vla("tiny"), Everything(), max_age=3).session()
    session.token_budget = 1
    for i in range(12):
        session.act(frame(i))
        assert session.last_info.age.max() <= 3


def test_a_budget_keeps_what_changed_most() -> None:
    session = CachedVLA(random_vla("tiny"), Dense()).session()
    picture = frame(0)
    session.act(picture)
    images = {camera: image.copy() for camera, image in picture.images.items()}
    images["agentview"][: 64 // 6, : 64 // 6] = 255  # the first patch of 6 × 6
    session.token_budget = 4
    session.act(type(picture)(images, picture.instruction))
    assert session.last_info.active.sum() == 4
    assert session.last_info.active[0]


@given(
    st.lists(st.integers(0, 16), min_size=1, max_size=60),
    st.integers(1, 16),
    st.integers(0, 20),
)
def test_what_is_due_suffices_and_is_needed(ages: list[int], max_age: int, extra: int) -> None:
    age = np.minimum(np.array(ages, dtype=np.int64), max_age)
    limit = smallest_budget(age.size, max_age) + extra
    feasible = all((max_age - age <= wait).sum() <= limit * (wait + 1) for wait in range(max_age + 1))
    for _ in range(2 * max_age + 2):
        tokens = must_refresh(age, max_age, limit)
        assert tokens[age >= max_age].all()
        if feasible:
            assert tokens.sum() <= limit
        age = np.where(tokens, 0, age + 1)
        assert age.max() <= max_age


def test_nothing_is_recomputed_before_a_frame() -> None:
    with pytest.raises(InputError, match=r"session\.act"):
        next(CachedVLA(random_vla("tiny")).session()._recompute(np.ones(52, dtype=np.bool_)))
