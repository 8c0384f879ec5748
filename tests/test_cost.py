"""The analytic count against torch's own counter, and against the published figure of the 7B shape."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lac_vla import CachedVLA, Decision, TokenLayout, random_vla
from lac_vla.cost import CostModel, count_macs, layer_macs, prefill_macs
from lac_vla.models import CogACTConfig, PrismaticConfig
from lac_vla.models.base import DecoderShape
from lac_vla.models.cogact.config import COGACT_7B, TINY_COGACT, Sampling
from lac_vla.models.prismatic.presets import TINY
from lac_vla.models.prismatic.towers import ViTConfig
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
@pytest.mark.parametrize("model", [TINY, TINY_COGACT], ids=["openvla", "cogact"])
def test_analytic_count_equals_torchs(model: PrismaticConfig | CogACTConfig, name: str) -> None:
    backbone = random_vla(model)
    session = CachedVLA(backbone, ALL_POLICIES[name]()).session()
    session.act(frame(0))
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


def test_cogact_7b_is_the_published_figure() -> None:
    """Paper, CogACT in SIMPLER, visual matching: 1.847 T.

    Its accounting is OpenVLA's: every row of every decoder layer; neither tower nor projector nor action head. The
    number of tokens is not given; 282 (BOS, 256 visual, 25 of text) are those of the figure. The engine computes less:
    in its last layer the suffix alone.
    """
    shape = random_vla(COGACT_7B, device="meta").shape
    layout = TokenLayout.of({"agentview": (16, 16)}, n_prefix=1, n_suffix=25)
    assert shape.layers * layer_macs(shape, layout.length, layout.length) / 1e12 == pytest.approx(1.847, rel=0.001)
    dense = prefill_macs(shape, layout, Decision.dense(256, shape.layers))
    assert dense / 1e12 == pytest.approx(1.847, rel=0.03)
    half = prefill_macs(shape, layout, Decision.reuse(np.arange(256) < 128, shape.layers))
    assert half / dense == pytest.approx(1 - 128 / 282, rel=0.01)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(guidance=1.0), Sampling(steps=5), Sampling("ddpm")])
def test_a_diffusion_head_is_counted_with_its_steps_and_guidance(sampling: Sampling) -> None:
    backbone = random_vla(TINY_COGACT)
    backbone.sampling = sampling
    dit = TINY_COGACT.head
    tokens = 1 + dit.horizon
    block = tokens * (12 * dit.width**2 + 2 * tokens * dit.width)
    embeddings = (
        2 * dit.horizon * dit.width * dit.action_dim + dit.width * dit.action_dim
    )  # the condition's is not used
    condition = dit.width * (256 + dit.width) + dit.condition * dit.width
    passes = (100 if sampling.method == "ddpm" else sampling.steps) * (2 if sampling.guidance > 1 else 1)
    cost = CostModel.of(backbone, frame(0))
    assert cost.head == passes * (dit.depth * block + embeddings + condition)
    assert cost.frame(backbone.layout(frame(0)), Decision.dense(52, 2))["decode"] == 0


def test_a_token_head_is_the_output_matrix() -> None:
    backbone = random_vla("tiny")
    assert CostModel.of(backbone, frame(0)).head == 7 * 32 * (512 + 64)


def test_the_towers_attention_is_counted() -> None:
    vit = ViTConfig(32, 3, 2, 64)
    camera = replace(TINY.cameras[0], image_size=42, tower=None)
    backbone = random_vla(replace(TINY, vision_backbone_id="siglip", vit_towers=(vit,), cameras=(camera,)))
    blocks, patches = vit.depth - 1, 9
    patch = 3 * vit.patch**2 * vit.width
    block = 4 * vit.width**2 + 2 * vit.width * vit.mlp_width + 2 * patches * vit.width
    assert CostModel.of(backbone, frame(0)).tower == patches * (patch + blocks * block)
