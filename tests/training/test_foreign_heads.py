"""A head that brings no loss is distilled: from its hidden states, or from keys and values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.training.worlds import losses_of, store_of, tiny

from lac_vla import VLA, InputError
from lac_vla.models.heads.base import ActionHead, Decoding, HeadContext
from lac_vla.models.heads.distill import relative_error
from lac_vla.training import precision
from lac_vla.training import train as module
from lac_vla.training.config import TrainConfig
from lac_vla.training.lac import Temperatures

WARM = Temperatures(ratio=1.0, score=0.1)


class Hidden(ActionHead):
    def decode(self, context: HeadContext) -> Decoding:
        return context.hidden[-1, :7].float().numpy(), {}
        yield


class KeysAndValues(ActionHead):
    reads = "kv"

    def decode(self, context: HeadContext) -> Decoding:
        return context.keys(0)[0, :7, 0].float().numpy(), {}
        yield


@pytest.fixture(params=[Hidden, KeysAndValues])
def vla(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> VLA:
    monkeypatch.setattr(precision, "AUTOCAST", False)
    return replace(tiny(), head=request.param())


def test_the_loss_is_nothing_where_all_is_fresh_and_something_where_it_is_stale(vla: VLA) -> None:
    store = store_of(vla)
    losses, frames = losses_of(vla, store), np.array([1, 9])
    n = store.visual.shape[1]
    with torch.no_grad():
        old = losses.decode(frames - 1).store.slots
        teacher = losses.decode(frames).context()
        found = []
        for share in (0, n // 2, n):
            mask = (torch.arange(n) >= share).float().expand(2, n)
            context = losses.decode(frames, mask=mask, old=old).context()
            found.append(vla.head.loss(context, torch.zeros(2, 1), torch.Generator(), teacher))
    torch.testing.assert_close(found[0], torch.zeros(2), atol=1e-9, rtol=0)
    assert (torch.stack(found[1:]) > 1e-6).all()


def test_the_loss_alone_moves_both_networks(vla: VLA) -> None:
    losses = losses_of(vla, store_of(vla))
    losses.window(np.array([0, 8]), 3, WARM, torch.Generator().manual_seed(0), lam=0.0)
    for network in (losses.policy.selector, losses.policy.predictor):
        assert sum(float(w.grad.abs().sum()) for w in network.parameters() if w.grad is not None) > 0


def test_padding_does_not_count() -> None:
    states, dense = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    real = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    error = relative_error([states], [dense], real)
    short = relative_error([states[1:, :, :3]], [dense[1:, :, :3]], real[1:, :3])
    torch.testing.assert_close(error[1:], short)
    assert relative_error([2 * states], [2 * dense], real).allclose(error)  # whatever the scale


def test_demonstrations_need_a_loss_of_the_heads_own(vla: VLA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "load_vla", lambda *_, **__: vla)
    with pytest.raises(InputError, match="no loss on recorded actions: train with --loss distill"):
        module.train(TrainConfig("mini", tmp_path / "data", tmp_path / "run", loss="demo"))
    assert not (tmp_path / "run").exists()
