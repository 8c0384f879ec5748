"""The analytic count against torch's own counter, and against the published figure of the 7B shape."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lac_vla import CachedVLA, Decision, TokenLayout, random_vla
from lac_vla.cost import CostModel, count_macs, layer_macs, prefill_macs
from lac_vla.models.base import DecoderShape
from tests.engine.scenes import ALL_POLICIES, frame

LLAMA_7B = DecoderShape(layers=32, width=4096, kv_width=4096, ffn=11008)


def test_dense_7b_prefill_is_the_published_figure() -> None:
    """Paper: 1.864 T for a prompt of 285 tokens (multiply-accumulates, named FLOPs there)."""
    assert LLAMA_7B.layers * layer_macs(LLAMA_7B, 285, 285) / 1e12 == pytest.approx(1.864, rel=0.01)


def test_the_last_layer_is_for_the_suffix_only() -> None:
    layout = TokenLayout.of({"agentview": (16, 16)}, n_prefix=1, n_suffix=28)
    prefill = prefill_macs(LLAMA_7B, layout, Decision.dense(256, 32))
    full, last = layer_macs(LLAMA_7B, 285, 285), layer_macs(LLAMA_7B, 285, 285, asking=28)
    assert prefill == 31 * full + last
    assert last < 0.3 * full


@pytest.mark.parametrize("name", sorted(set(ALL_POLICIES) - {"pruner", "watcher"}))
def test_analytic_count_equals_torchs(name: str) -> None:
    backbone = random_vla("tiny")
    session = CachedVLA(backbone, ALL_POLICIES[name]()).session()
    session.act(frame(0))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # the kernel that the counter can see into
        counted = count_macs(lambda: session.act(frame(1)))
    step = session.last
    assert step is not None
    analytic = CostModel.of(backbone, frame(0)).frame(step.layout, step.decision, step.policy_macs)
    assert sum(analytic.values()) == pytest.approx(counted, rel=0.01)


def test_reuse_pays_per_row() -> None:
    layout = TokenLayout.of({"agentview": (16, 16)}, n_prefix=1, n_suffix=28)
    dense = prefill_macs(LLAMA_7B, layout, Decision.dense(256, 32))
    half = prefill_macs(LLAMA_7B, layout, Decision.reuse(np.arange(256) < 128, 32))
    assert half / dense == pytest.approx(1 - 128 / 285, rel=0.01)
