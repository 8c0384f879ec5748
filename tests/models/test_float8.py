"""Weights in float8: which, how far from bfloat16, and that reuse on top of them is exact."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from tests.engine.scenes import frame
from torch import nn

from lac_vla import CachedVLA, Dense
from lac_vla.errors import MissingExtraError
from lac_vla.factory import ModelOptions, load_methods
from lac_vla.models import random_vla
from lac_vla.models.float8 import store_in_float8
from lac_vla.policies import Random

torchao = pytest.importorskip("torchao", reason="torchao is not installed: pip install 'lac-vla[float8]'")
NAMES = ("tiny", "pi0-tiny", "pi05-tiny", "smolvla-tiny")


@pytest.mark.parametrize("name", NAMES)
def test_only_decoder_layers_and_within_four_percent(name: str) -> None:
    plain, small = (random_vla(name, seed=1, dtype=torch.bfloat16) for _ in range(2))
    store_in_float8(small)
    changed = {key for key, part in small.module.named_modules() if isinstance(part, nn.Linear) and is_float8(part)}
    assert changed
    assert not [key for key in changed if "vision" in key or "head" in key]
    rows = torch.randn(40, small.decoder.shape.width, dtype=torch.bfloat16)
    rotary = small.decoder.rotary(torch.arange(40))
    for ours, theirs in zip(small.decoder.layers, plain.decoder.layers, strict=True):
        with torch.inference_mode():
            for one, other in zip(ours.qkv(rows, rotary), theirs.qkv(rows, rotary), strict=True):
                assert 0.001 < (one - other).float().norm() / other.float().norm() < 0.05


@pytest.mark.parametrize("name", NAMES)
def test_reuse_of_an_unchanged_picture_is_exact_to_rounding(name: str) -> None:
    model = random_vla(name, seed=1, dtype=torch.bfloat16)
    store_in_float8(model)
    dense, reuse = (CachedVLA(model, policy).session() for policy in (Dense(), Random(0.5)))
    scene = frame(1, "pick up the bowl", tuple(model.grids))
    for _ in range(3):
        expected, action = dense.act(scene), reuse.act(scene)
    assert reuse.last_info is not None
    assert reuse.last_info.ratio > 0.4
    np.testing.assert_allclose(action, expected, atol=0.02)


def is_float8(part: nn.Linear) -> bool:
    return type(part.weight).__name__ == "Float8Tensor" and part.weight.qdata.dtype == torch.float8_e4m3fn


def test_a_bundled_model_acts_much_as_before() -> None:
    sessions = [
        load_methods("mini", ["dense"], ModelOptions(dtype="bfloat16", float8=float8))["dense"].session()
        for float8 in (False, True)
    ]
    assert is_float8(sessions[1].engine.model.module.language_model.model.layers[0].mlp.up_proj)
    names = tuple(sessions[0].engine.model.grids)
    frames = [frame(number, "pick up the black bowl", names) for number in range(3)]
    with_float8, without = ([session.act(one) for one in frames] for session in reversed(sessions))
    assert np.abs(np.array(with_float8) - np.array(without)).mean() < 0.2


def test_it_takes_half_the_memory_and_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_vla("tiny", dtype=torch.bfloat16)
    before = model.module.language_model.model.layers[0].mlp.up_proj.weight
    store_in_float8(model)
    after = model.module.language_model.model.layers[0].mlp.up_proj.weight
    assert after.qdata.nbytes + after.scale.nbytes < 0.6 * before.nbytes
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(MissingExtraError, match=r"lac-vla\[float8\]"):
        store_in_float8(random_vla("tiny"))
