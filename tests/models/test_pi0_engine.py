"""What π0 and π0.5 do not compute twice, and what it costs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.engine.scenes import frame
from tests.engine.test_batches import make, together

from lac_vla import CachedVLA, Decision, Random, TokenLayout, random_vla
from lac_vla.cost import CostModel, count_macs, decode_macs, layer_macs, prefill_macs
from lac_vla.engine.engine import Engine
from lac_vla.models.heads.base import ActionHead
from lac_vla.models.pi0.config import PI0, PI05
from lac_vla.models.pi0.gemma import AdaptiveNorm, GemmaLayer

FAMILIES = ("pi0", "pi05")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_count_is_torchs_own(family: str) -> None:
    """Of whole frames, dense and sparse; what is computed once for all frames is not in it, whoever counts first."""
    vla = random_vla(f"{family}-tiny", seed=3)
    cost, session = CostModel.of(vla, frame(0)), CachedVLA(vla, Random(0.5)).session()
    for number in range(3):
        total = count_macs(lambda number=number: session.act(frame(number)))  # type: ignore[misc]
        assert session.last_info is not None
        assert sum(cost.step(session.last_info).values()) == total


def test_figures_of_the_real_size() -> None:
    """Two cameras, 12 text tokens, without masked rows: 1058 G for the prefix, 58 less in its last layer; 181 G for the
    expert, 1.7 % less for the state. With lerobot's third, empty camera and 48 text slots, 1667 G."""
    layout = TokenLayout.of({"base": (16, 16), "wrist": (16, 16)}, 0, 12)
    dense, shape = Decision.dense(512, 18), PI0.prefix.shape
    assert prefill_macs(shape, layout, dense) / 1e9 == pytest.approx(1058, rel=2e-3)
    assert prefill_macs(shape, layout, dense, n_queries=0) / 1e9 == pytest.approx(1058 - 58, rel=2e-3)
    assert 18 * layer_macs(shape, 816, 816) / 1e9 == pytest.approx(0.762 * 2188, rel=2e-3)
    passes = [(0, 51), *[(1, 51)] * 9]
    every, own = ((decode_macs(PI0.expert.shape, layout, dense, p)) / 1e9 for p in ([(0, 51)] * 10, passes))
    assert every == pytest.approx(181, rel=5e-3)
    assert own / every == pytest.approx(1 - 0.017, abs=2e-3)
    assert PI05.prefix == PI0.prefix


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layer_has_no_queries_and_the_state_runs_once(family: str) -> None:
    vla = random_vla(f"{family}-tiny", seed=3)
    session = CachedVLA(vla).session()
    session.act(frame(0))
    info = session.last_info
    assert info is not None
    assert info.n_queries == 0
    assert info.decode_passes == ()
    passes = [(start, stop) for _, start, stop in info.stack_passes]
    assert passes == ([(0, 5), (1, 5), (1, 5)] if family == "pi0" else [(0, 4)] * 3)


def test_modulations_are_computed_once_and_anew_with_other_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    vla = random_vla("pi05-tiny", seed=3)
    calls = []
    forward = torch.nn.Linear.forward
    dense = {norm.dense for norm in vla.module.modules() if isinstance(norm, AdaptiveNorm)}

    def counted(self: Any, x: torch.Tensor) -> torch.Tensor:
        if self in dense:
            calls.append(x.shape)
        return forward(self, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", counted)
    one, other = (CachedVLA(vla, Random(0.5)).session(seed) for seed in range(2))
    for number in range(3):
        first = one.act(frame(number))
        other.act(frame(number))
    assert calls == [(3, 16)] * len(dense) == [(3, 16)] * 5
    with torch.no_grad():
        vla.module.get_submodule("expert.norm.dense").bias.add_(0.5)  # type: ignore[operator, union-attr]
    again = one.shadow()
    assert len(calls) == 10
    assert np.abs(again - first).max() > 1e-3  # type: ignore[operator]


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_of_a_batch_run_as_one(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of different lengths, one run of every layer per Euler step."""
    vla = random_vla(f"{family}-tiny", seed=3)
    engine, rows = Engine(vla), []
    qkv = GemmaLayer.qkv

    def counted(self: GemmaLayer, hidden: torch.Tensor, *rest: Any) -> Any:
        if hidden.shape[-1] == 16:
            rows.append(len(hidden))
        return qkv(self, hidden, *rest)

    monkeypatch.setattr(GemmaLayer, "qkv", counted)
    sessions = [make(engine, Random(0.5), seed) for seed in range(3)]
    texts = ("stop", "put the mug on the plate, then stop", "pick it up")
    for number in range(2):
        rows.clear()
        together(engine, sessions, [frame(number, text) for text in texts])
        first = 3 * 5 if family == "pi0" else 3 * 4
        assert rows == [first] * 2 + [12] * 4  # two layers


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_state_drops_nothing_but_a_new_instruction_does(family: str) -> None:
    """π0.5's state is a part of its prompt: were a new prompt to drop the cache, nothing would ever be reused."""
    vla = random_vla(f"{family}-tiny", seed=3)
    session, moved = CachedVLA(vla, Random(0.5)).session(), frame(0)
    for step in range(3):
        session.act(replace(moved, proprio=np.full(8, step / 4, np.float32)))
        assert session.last_info is not None
        assert session.last_info.dense_reason == ("first frame" if step == 0 else None)
    session.act(replace(moved, instruction="stop"))
    assert session.last_info.dense_reason == "new instruction"


def test_seeds_mean_the_same_noise() -> None:
    vla = random_vla("pi0-tiny", seed=3)
    answers = [CachedVLA(vla).session(seed).act(frame(0)) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(answers[0], answers[1])
    assert np.abs(answers[0] - answers[2]).max() > 0.1
    assert isinstance(vla.head, ActionHead)
    assert vla.head.max_new_tokens == 5
