"""Buckets and graphs: few shapes, at addresses that stay, and no number that they should not change."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from lac_vla import VLA, CachedVLA, Decision, Random, Session, random_vla
from lac_vla.engine import cuda_graphs
from lac_vla.engine.budget import pad_to_bucket
from lac_vla.engine.cuda_graphs import CAPACITY_MULTIPLE
from lac_vla.engine.options import EngineOptions
from lac_vla.models.cogact.config import TINY_COGACT
from lac_vla.policies import CachePolicy, cache_lowest
from lac_vla.types import PolicyInput, SkippedTokens
from tests.engine.scenes import ALL_POLICIES, PRUNING, REUSING, frame
from tests.engine.test_invariants import bidirectional, capture_hidden, reference, sequence_of

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
FRAMES = [frame(0), frame(0), frame(1), frame(2, "put the mug on the plate, then stop"), frame(3), frame(4, "stop")]
STAGED = {"staircase", "vla-cache", "vla-cache-suffix", "vla-cache-paper"}


@pytest.fixture(scope="module")
def backbone() -> VLA:
    return random_vla("tiny", seed=3)


def act(session: Session, seed: int) -> None:
    session.act(frame(seed))
    assert session.last_info is not None


# Buckets.


def test_the_oldest_cached_tokens_fill_the_bucket() -> None:
    cached = np.array([1, 1, 0, 1, 1, 1, 0, 1], dtype=bool)
    age = np.array([1, 3, 9, 2, 3, 3, 9, 1])
    full = pad_to_bucket(Decision.reuse(cached, 4), age, 4)
    assert np.flatnonzero(full.active).tolist() == [1, 2, 4, 6]  # of three tokens of age 3 the first two
    assert full.recovered is not None
    assert np.flatnonzero(full.recovered).tolist() == [1, 4]
    assert pad_to_bucket(full, age, 4) is full


def test_a_bucket_larger_than_what_is_left_makes_the_frame_dense() -> None:
    cached = np.arange(10) < 3
    assert pad_to_bucket(Decision.reuse(cached, 2), np.zeros(10, dtype=np.int64), 16).active.all()


def test_what_was_recovered_stays_so() -> None:
    recovered = np.array([False, False, False, True])
    decision = Decision.reuse(~recovered, 2, recovered=recovered, nominal_ratio=1.0)
    full = pad_to_bucket(decision, np.array([0, 0, 5, 0]), 2)
    assert full.recovered is not None
    assert full.recovered.tolist() == [False, False, True, True]
    assert full.nominal_ratio == 1.0


@pytest.mark.parametrize(
    "decision",
    [
        Decision(np.array([0, 2, 2, 4, 4]), 4),
        Decision(np.array([0, 0, 4, 4, 4]), 4, SkippedTokens.PRUNE),
        Decision.dense(5, 4),
        Decision.reuse(np.ones(5, dtype=bool), 4),
    ],
    ids=["mid-depth", "pruning", "dense", "nothing active"],
)
def test_other_decisions_stay(decision: Decision) -> None:
    assert pad_to_bucket(decision, np.zeros(5, dtype=np.int64), 2) is decision


@pytest.mark.parametrize("name", sorted(set(REUSING) - {"dense"}))
def test_a_bucket_makes_the_cache_no_older(backbone: VLA, name: str) -> None:
    """Counts and ages over a session; and with max_age, whose forced tokens are rounded up as well."""
    session = CachedVLA(backbone, ALL_POLICIES[name](), max_age=3, options=EngineOptions(bucket=8)).session(seed=5)
    counts = set()
    for seed in range(8):
        before = session.memory.age.copy()
        act(session, seed)
        step = session.last_info
        assert step is not None
        if seed:
            assert (step.age <= before + 1).all()
            assert step.age.max() <= 3
            if name not in STAGED:
                counts.add(int(step.active.sum()))
    n = step.layout.n_visual
    assert all(count % 8 == 0 or count == n for count in counts)


def test_a_bucket_makes_the_cache_fresher(backbone: VLA) -> None:
    plain, full = (
        CachedVLA(backbone, Random(0.9), options=EngineOptions(bucket=bucket)).session(seed=1) for bucket in (1, 16)
    )
    ages: list[list[float]] = [[], []]
    for seed in range(12):
        for session, age in zip((plain, full), ages, strict=True):
            act(session, seed)
            age.append(float(session.memory.age.mean()))
    assert np.mean(ages[1]) < 0.7 * np.mean(ages[0])


@pytest.mark.parametrize("name", PRUNING)
def test_a_bucket_leaves_pruning_alone(backbone: VLA, name: str) -> None:
    plain, full = (
        CachedVLA(backbone, ALL_POLICIES[name](), options=EngineOptions(bucket=bucket)).session(seed=1)
        for bucket in (1, 7)
    )
    for seed in range(3):
        torch.testing.assert_close(capture_hidden(full, frame(seed)), capture_hidden(plain, frame(seed)))
        assert plain.last_info is not None
        assert full.last_info is not None
        assert (full.last_info.decision.exit_layer == plain.last_info.decision.exit_layer).all()


# Both options against the slow reference.


@pytest.mark.parametrize("options", ["bucket=8", "default+bucket=8+cuda_graphs"])
@pytest.mark.parametrize("name", ALL_POLICIES)
def test_static_shapes_equal_the_reference(backbone: VLA, name: str, options: str) -> None:
    session = CachedVLA(backbone, ALL_POLICIES[name](), options=EngineOptions.parse(options)).session(seed=5)
    expected = reference(backbone)
    for observation in FRAMES:
        captured, step = capture_hidden(session, observation), session.last_info
        assert step is not None
        embeddings = sequence_of(backbone, observation, step.metadata["tokens"])
        hidden = expected.run(embeddings, step.layout.n_prefix, step.decision)[step.layout.suffix.start :]
        torch.testing.assert_close(captured.double(), hidden, **CLOSE)


@pytest.mark.parametrize("name", REUSING)
def test_an_unchanged_frame_is_exact(backbone: VLA, name: str) -> None:
    options = EngineOptions.parse("bucket=8+cuda_graphs")
    session = CachedVLA(backbone, ALL_POLICIES[name](), options=options).session()
    dense = capture_hidden(CachedVLA(backbone).session(), frame(4))
    for _ in range(3):
        torch.testing.assert_close(capture_hidden(session, frame(4)), dense, **CLOSE)


# Graphs.


def test_a_head_without_tokens_runs_on_graphs() -> None:
    cogact = random_vla(TINY_COGACT, seed=3)
    plain, static = (
        CachedVLA(cogact, Random(0.5), options=EngineOptions.parse(t)).session(seed=2) for t in ("none", "cuda_graphs")
    )
    for seed in range(3):
        np.testing.assert_allclose(static.act(frame(seed)), plain.act(frame(seed)), atol=1e-4)
    assert static.engine.graphs is not None
    assert static.engine.graphs.static_runs == 3


def test_the_mask_of_a_bidirectional_model_hides_what_does_not_exist() -> None:
    both = bidirectional(random_vla("tiny", seed=3))
    plain, static = (
        CachedVLA(both, Random(0.5), options=EngineOptions.parse(t)).session(seed=2) for t in ("none", "cuda_graphs")
    )
    for observation in FRAMES:
        torch.testing.assert_close(capture_hidden(static, observation), capture_hidden(plain, observation), **CLOSE)


def test_buckets_make_few_shapes_and_the_cache_stays_where_it_is(backbone: VLA) -> None:
    @dataclass(frozen=True)
    class Restless(CachePolicy):
        """Another number of tokens in every frame."""

        def decide(self, inputs: PolicyInput) -> Decision:
            ratio = inputs.rng.uniform(0.3, 0.9)
            return Decision.reuse(cache_lowest(inputs.rng.random(inputs.layout.n_visual), ratio), inputs.n_layers)

    counts = set()
    for options in ("draft+cuda_graphs", "draft+cuda_graphs+bucket=16"):
        session = CachedVLA(backbone, Restless(), options=EngineOptions.parse(options)).session()
        addresses = set()
        for seed in range(24):
            act(session, seed % 5)
            addresses.add((session.engine.store.keys.data_ptr(), session.engine.store.values.data_ptr()))
            assert session.last_info is not None
            counts.add(int(session.last_info.active.sum()))
        assert len(addresses) == 1
        assert session.engine.graphs is not None
        assert session.engine.graphs.eager_runs == 0
        # rows are rounded up to multiples of 16 in any case: up to five of them with a draft, a dense frame without
        # one, and passes of one to six rows
        assert len(session.engine.graphs._entries) <= 5 + 1 + 6 < len(counts)
        assert len(session.engine.graphs._functions) <= 1 + 4  # the stem, and the projector of up to 52 rows


def test_a_longer_prompt_finds_room_and_a_far_longer_one_begins_anew(backbone: VLA) -> None:
    session = CachedVLA(backbone, Random(0.5), options=EngineOptions.parse("cuda_graphs")).session(seed=1)
    other = CachedVLA(backbone, Random(0.5), options=EngineOptions.parse("none")).session(seed=1)
    assert session.engine.graphs is not None
    homes = []
    for instruction in ("stop", "stop", "pick up the bowl, now", "go " * 2 * CAPACITY_MULTIPLE, "stop"):
        observation = frame(len(homes), instruction)
        torch.testing.assert_close(capture_hidden(session, observation), capture_hidden(other, observation), **CLOSE)
        keys = session.engine.store.keys
        assert keys.shape[2] % CAPACITY_MULTIPLE == 0
        homes.append(keys.data_ptr())
        assert {shape.size for shape in session.engine.graphs._entries} == {keys.shape[2]}
    assert homes[0] == homes[1] == homes[2] != homes[3] == homes[4]


@pytest.mark.parametrize("name", ALL_POLICIES)
def test_what_falls_back_says_so(backbone: VLA, name: str) -> None:
    session = CachedVLA(backbone, ALL_POLICIES[name](), options=EngineOptions.parse("cuda_graphs")).session()
    for seed in (0, 1):
        act(session, seed)
    assert session.last_info is not None
    # "watcher" looks at the last layer, which ends a run anyway
    assert (session.last_info.eager_runs > 0) == (name in STAGED | set(PRUNING))


def test_no_more_shapes_are_kept_than_the_limit(backbone: VLA, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "LIMIT", 2)
    session = CachedVLA(backbone, Random(0.5), options=EngineOptions.parse("cuda_graphs")).session()
    for seed in range(3):
        act(session, seed)
        assert session.engine.graphs is not None
        assert len(session.engine.graphs._entries) == 2


def test_a_limit_keeps_whole_buckets() -> None:
    """A deadline must not make a shape of every frame: the limit is rounded down, the decision up."""
    session = CachedVLA(random_vla("tiny"), Random(0.3), options=EngineOptions(bucket=8)).session()
    session.act(frame(0))
    for number, limit in enumerate((23, 17, 11, 9, 3), start=1):
        session.token_budget = limit
        session.act(frame(number))
        assert session.last_info is not None
        assert session.last_info.active.sum() == max(8, limit - limit % 8)
