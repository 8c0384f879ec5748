"""The analytic count against torch's own counter, and against the published figure of the 7B shape."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from lac_vla import CachedVLA, Decision, EngineOptions, Random, TokenLayout, random_vla
from lac_vla.bench.stock import StockSession
from lac_vla.cost import CostModel, count_macs, decode_macs, layer_macs, prefill_macs, probe_macs
from lac_vla.engine.kv_cache import Region, SlotCache
from lac_vla.engine.layers import Segment, run_layers
from lac_vla.models.cogact.config import COGACT_7B, TINY_COGACT, CogACTConfig
from lac_vla.models.heads.base import ActionHead, AppendRows, Decoding, HeadContext
from lac_vla.models.heads.diffusion import DiffusionHead
from lac_vla.models.heads.sampler import Sampling
from lac_vla.models.llama import LlamaDecoder, build_llama
from lac_vla.models.prismatic.config import PrismaticConfig
from lac_vla.models.prismatic.presets import TINY
from lac_vla.models.prismatic.towers import ViTConfig
from lac_vla.models.protocols import DecoderShape
from lac_vla.policies import CachePolicy
from lac_vla.policies.vla_cache import EXIT_LAYERS, damped_schedule, exit_layers
from lac_vla.types import AttentionProbe, PolicyInput, SkippedTokens
from tests.engine.scenes import ALL_POLICIES, frame

LLAMA_7B = DecoderShape(layers=32, width=4096, kv_width=4096, ffn=11008)


def engine_macs(shape: DecoderShape, layout: TokenLayout, decision: Decision) -> int:
    """Count a prefill of our engine for a head that reads hidden states: in the last layer the suffix has queries."""
    return prefill_macs(shape, layout, decision, n_queries=layout.n_suffix)


def test_dense_7b_prefill_is_the_published_figure() -> None:
    """Paper: 1.864 T for a prompt of 285 tokens (multiply-accumulates, named FLOPs there)."""
    assert LLAMA_7B.layers * layer_macs(LLAMA_7B, 285, 285) / 1e12 == pytest.approx(1.864, rel=0.01)


def published_macs(decision: Decision, length: int = 285) -> int:
    """As VLA-Cache and LAC count: 4ND² + 2N²D + 3NDM for the N rows of every layer, of the last one, too."""
    rows = [length - 256 + int((decision.exit_layer > layer).sum()) for layer in range(LLAMA_7B.layers)]
    return sum(layer_macs(LLAMA_7B, n, length) for n in rows)


def test_the_published_dense_figure_is_of_a_mean_prompt_of_284_and_a_half_tokens() -> None:
    """4ND² + 2N²D + 3NDM over 32 layers: 1.8603 T, 1.8636 T and 1.8670 T for 284, 284.5 and 285 tokens."""
    dense = Decision.dense(256, 32)
    assert published_macs(dense, 284) < 1.864e12 < published_macs(dense, 285)
    assert published_macs(dense) == 32 * 285 * (4 * 4096**2 + 2 * 285 * 4096 + 3 * 4096 * 11008)


def vla_cache_7b(n_reusable: int) -> Decision:
    """VLA-Cache's released schedule over an assumed profile of entropies.

    Assumed, for no weights of the 7B model are at hand: the two first layers attend broadly, all the others mostly to
    the first token, as arXiv 2309.17453 finds in Llama 2. The four layers' shares are 0.55, 0.98, 1.00 and 1.00 then.
    """
    shares = damped_schedule(np.array([5.0] * 2 + [2.0] * 30, np.float32), 0.55)
    return Decision(exit_layers(256, np.arange(n_reusable), EXIT_LAYERS, shares, 1), 32)


def test_vla_caches_published_figure_is_within_the_reach_of_its_rule() -> None:
    """130 static and 120 protected tokens leave 10 to 130 to reuse; 1.355 T lies between, whatever was assumed."""
    least, most = published_macs(vla_cache_7b(130)), published_macs(vla_cache_7b(10))
    assert least < 1.355e12 < most
    # Static and protected independent of each other: 130 · (1 − 120/256) = 69. The published figure needs more.
    assert published_macs(vla_cache_7b(69)) > 1.05 * 1.355e12


def test_vla_caches_ratio_and_macs_agree_with_the_published_figures() -> None:
    """With 90 reusable tokens, a number fitted to the published 1.355 T: this shows that the counts are consistent.

    It is no reproduction. What is not fitted: the effective ratio that goes with it, and the saving in our own count.
    """
    decision = vla_cache_7b(90)
    layout = TokenLayout.of({"camera": (16, 16)}, n_prefix=1, n_suffix=28)
    assert published_macs(decision) == pytest.approx(1.355e12, rel=0.05)
    saved = 1 - 1.355 / 1.864
    assert decision.ratio * 256 / 285 == pytest.approx(saved, rel=0.05)
    ours, dense = (engine_macs(LLAMA_7B, layout, done) for done in (decision, Decision.dense(256, 32)))
    assert ours / dense == pytest.approx(1 - saved, rel=0.05)


def test_what_a_policy_probes_is_counted() -> None:
    layout = TokenLayout.of({"agentview": (2, 4)}, n_prefix=1, n_suffix=3)
    shape = DecoderShape(layers=4, width=16, kv_width=8, ffn=32)
    reuse = Decision(np.array([0, 2, 2, 4, 4, 4, 4, 4]), 4)
    assert probe_macs(shape, layout, reuse, None) == 0
    assert probe_macs(shape, layout, reuse, AttentionProbe((1, 2), "last")) == 2 * 12 * 16
    assert probe_macs(shape, layout, reuse, AttentionProbe((1,), "suffix")) == 3 * 12 * 16
    assert probe_macs(shape, layout, reuse, AttentionProbe((1, 3), "all")) == (11 + 9) * 12 * 16
    pruned = replace(reuse, skipped=SkippedTokens.PRUNE)
    assert probe_macs(shape, layout, pruned, AttentionProbe((1, 3), "suffix")) == 3 * (11 + 9) * 16
    # Whoever probes all rows of the last layer makes them be computed.
    extra = prefill_macs(shape, layout, reuse) - engine_macs(shape, layout, reuse)
    assert extra == (9 - 3) * (2 * 16**2 + 3 * 16 * 32 + 2 * 16 * 12)


def test_the_last_layer_is_for_the_suffix_only() -> None:
    layout = TokenLayout.of({"agentview": (16, 16)}, n_prefix=1, n_suffix=28)
    prefill = engine_macs(LLAMA_7B, layout, Decision.dense(256, 32))
    full, last = layer_macs(LLAMA_7B, 285, 285), layer_macs(LLAMA_7B, 285, 285, n_queries=28)
    assert prefill == 31 * full + last
    assert last < 0.3 * full


@pytest.mark.parametrize("name", sorted(ALL_POLICIES))
@pytest.mark.parametrize("model", [TINY, TINY_COGACT], ids=["openvla", "cogact"])
def test_analytic_count_equals_torchs(model: PrismaticConfig | CogACTConfig, name: str) -> None:
    vla = random_vla(model)
    session = CachedVLA(vla, ALL_POLICIES[name]()).session()
    session.act(frame(0))
    counted = count_macs(lambda: session.act(frame(1)))
    step = session.last_info
    assert step is not None
    analytic = CostModel.of(vla, frame(0)).step(step)
    assert sum(analytic.values()) == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("model", [TINY, TINY_COGACT], ids=["openvla", "cogact"])
def test_stock_is_counted_as_it_runs(model: PrismaticConfig | CogACTConfig) -> None:
    """Stock transformers runs its last layer for every row, our engine for the suffix: the same model, more MACs."""
    vla = random_vla(model)
    stock, shape = StockSession(vla), vla.decoder.shape
    counted = count_macs(lambda: stock.act(frame(0)))
    assert stock.last_info is not None
    cost, layout = CostModel.of(vla, frame(0)), stock.last_info.layout
    by_stage = cost.step(stock.last_info)
    assert sum(by_stage.values()) == pytest.approx(counted, rel=0.002)
    every_row = layer_macs(shape, layout.length, layout.length)
    assert by_stage["prefill"] == shape.layers * every_row
    ours = cost.step(replace(stock.last_info, n_queries=layout.n_suffix))
    suffix = layer_macs(shape, layout.length, layout.length, layout.n_suffix)
    assert by_stage["prefill"] - ours["prefill"] == every_row - suffix


@dataclass(frozen=True)
class Probing(Random):
    """Has the last layer probed, and cares for nothing that it sees."""

    rows: str = "suffix"

    def probe(self, n_layers: int) -> AttentionProbe:
        return AttentionProbe((n_layers - 1,), self.rows)


@pytest.mark.parametrize("rows", ["all", "suffix"])
def test_a_session_says_how_many_rows_had_queries_in_its_last_layer(rows: str) -> None:
    session = CachedVLA(random_vla("tiny"), Probing(rows=rows)).session()
    session.act(frame(0))
    assert session.last_info is not None
    assert session.last_info.n_queries == (None if rows == "all" else session.last_info.layout.n_suffix)


def test_reuse_pays_per_row() -> None:
    layout = TokenLayout.of({"agentview": (16, 16)}, n_prefix=1, n_suffix=28)
    dense = engine_macs(LLAMA_7B, layout, Decision.dense(256, 32))
    half = engine_macs(LLAMA_7B, layout, Decision.reuse(np.arange(256) < 128, 32))
    assert half / dense == pytest.approx(1 - 128 / 285, rel=0.01)


def test_cogact_7b_is_the_published_figure() -> None:
    """Paper, CogACT in SIMPLER, visual matching: 1.847 T.

    Its accounting is OpenVLA's: every row of every decoder layer; neither tower nor projector nor action head. The
    number of tokens is not given; 282 (BOS, 256 visual, 25 of text) are those of the figure. The engine computes less:
    in its last layer the suffix alone.
    """
    shape = random_vla(COGACT_7B, device="meta").decoder.shape
    layout = TokenLayout.of({"agentview": (16, 16)}, n_prefix=1, n_suffix=25)
    assert shape.layers * layer_macs(shape, layout.length, layout.length) / 1e12 == pytest.approx(1.847, rel=0.001)
    dense = engine_macs(shape, layout, Decision.dense(256, shape.layers))
    assert dense / 1e12 == pytest.approx(1.847, rel=0.03)
    half = engine_macs(shape, layout, Decision.reuse(np.arange(256) < 128, shape.layers))
    assert half / dense == pytest.approx(1 - 128 / 282, rel=0.01)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(guidance=1.0), Sampling(steps=5), Sampling("ddpm")])
def test_a_diffusion_head_is_counted_with_its_steps_and_guidance(sampling: Sampling) -> None:
    vla = random_vla(TINY_COGACT)
    assert isinstance(vla.head, DiffusionHead)
    vla.head.sampling = sampling
    dit = TINY_COGACT.head
    tokens = 1 + dit.horizon
    block = tokens * (12 * dit.width**2 + 2 * tokens * dit.width)
    embeddings = (
        2 * dit.horizon * dit.width * dit.action_dim + dit.width * dit.action_dim
    )  # the condition's is not used
    steps, predictions = 100 if sampling.method == "ddpm" else sampling.steps, 2 if sampling.guidance > 1 else 1
    once = steps * dit.width * (256 + dit.width) + predictions * dit.condition * dit.width
    cost = CostModel.of(vla, frame(0))
    assert cost.head == steps * predictions * (dit.depth * block + embeddings) + once
    session = CachedVLA(vla).session()
    session.act(frame(0))
    assert session.last_info is not None
    assert cost.step(session.last_info)["decode"] == 0
    assert cost.step(session.last_info)["head"] == cost.head


def test_a_token_head_is_the_output_matrix() -> None:
    vla = random_vla("tiny")
    cost = CostModel.of(vla, frame(0))
    assert cost.head == 32 * (512 + 64)
    session = CachedVLA(vla).session()
    session.act(frame(0))
    assert session.last_info is not None
    assert cost.step(session.last_info)["head"] == 7 * cost.head
    session.act(frame(0))  # the draft is right: one row of the prompt and six of the draft
    assert session.last_info.decode_passes == ()
    assert cost.step(session.last_info)["head"] == 7 * cost.head


def test_a_tower_costs_what_it_computes() -> None:
    """The convolution: all but its last layer on every frame, 9 · 32 · 48 MACs per token that is computed."""
    cost = CostModel.of(random_vla("tiny"), frame(0))
    widths = TINY.cameras[0].tower
    assert widths is not None
    assert cost.tokens == dict.fromkeys(("agentview", "wrist"), 9 * widths.widths[-2] * widths.widths[-1])


def test_the_towers_attention_is_counted() -> None:
    vit = ViTConfig(32, 3, 2, 64)
    camera = replace(TINY.cameras[0], image_size=42, tower=None)
    vla = random_vla(replace(TINY, vision_backbone_id="siglip", vit_towers=(vit,), cameras=(camera,)))
    blocks, patches = vit.depth - 1, 9
    patch = 3 * vit.patch**2 * vit.width
    block = 4 * vit.width**2 + 2 * vit.width * vit.mlp_width + 2 * patches * vit.width
    assert CostModel.of(vla, frame(0)).tower == patches * (patch + blocks * block)


SHARED = replace(
    TINY,
    vision_backbone_id="siglip",
    vit_towers=(ViTConfig(32, 3, 2, 64),),
    cameras=(replace(TINY.cameras[0], image_size=56, tower=None),),
)
OWN = replace(
    TINY,
    vision_backbone_id="towers",
    cameras=(replace(TINY.cameras[0], tower=ViTConfig(64, 4, 2, 128, patch=8, neck=24)), TINY.cameras[1]),
)


@dataclass(frozen=True)
class Mostly(CachePolicy):
    """Reuses much of the first camera, and little of another."""

    def decide(self, inputs: PolicyInput) -> Decision:
        chance, first = inputs.rng.random(inputs.layout.n_visual), np.arange(inputs.layout.n_visual) < 36
        return Decision(np.where(chance < np.where(first, 0.3, 0.9), inputs.n_layers, 0), inputs.n_layers)


@pytest.mark.parametrize("config", [SHARED, OWN], ids=["shared", "per-camera"])
def test_a_tower_that_reuses_costs_what_it_computes(config: PrismaticConfig) -> None:
    vla = random_vla(config)
    session = CachedVLA(vla, Mostly(), options=EngineOptions(vision_kv_reuse=True)).session()
    session.act(frame(0))
    counted = count_macs(lambda: session.act(frame(1)))
    assert session.last_info is not None
    exact, blind = (
        CostModel.of(vla, frame(0), vision_kv_reuse=reuse).step(session.last_info) for reuse in (True, False)
    )
    assert sum(exact.values()) == pytest.approx(counted, rel=0.01)
    assert exact["tower"] < 0.8 * blind["tower"]


# Stacks of other sizes, and heads that read keys and values.


@pytest.mark.parametrize("reuse", [False, True])
def test_an_expert_with_cross_attention_costs_what_torch_counts(reuse: bool) -> None:
    """The prefix's last layer leaves keys and values alone; cross-attention has no own, and is projected once."""
    vla = random_vla("smolvla-tiny")
    session = CachedVLA(vla, Random(0.5), options=EngineOptions(vision_kv_reuse=reuse)).session()
    session.act(frame(0))
    counted = count_macs(lambda: session.act(frame(1)))
    assert session.last_info is not None
    model = CostModel.of(vla, frame(0), vision_kv_reuse=reuse)
    assert sum(model.step(session.last_info).values()) == pytest.approx(counted, rel=1e-3)
    assert model.step(session.last_info)["decode"] > 0


def stack(**config: Any) -> LlamaDecoder:
    """A stack of random layers over 2 key/value heads of width 8."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaDecoder(build_llama({**sizes, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 8, **config}))


def torchs_count(decoder: LlamaDecoder, rows: int, slots: int, n_queries: int | None = None) -> int:
    """Count what the last ``rows`` of ``slots`` cost, by torch's counter."""
    store = SlotCache(len(decoder.layers), decoder.kv_heads, decoder.head_dim, torch.float32, torch.device("cpu"))
    store.reserve(Region(), slots)
    positions = torch.arange(slots)
    mask = positions <= positions[slots - rows :, None]
    final = None if n_queries is None else mask[rows - n_queries :]
    segment = Segment(rows, slots - rows, slots, 0, slots, None, mask, False, n_queries, final)
    rotary = decoder.rotary(positions[slots - rows :])
    hidden = torch.zeros(rows, decoder.shape.width)
    return count_macs(lambda: run_layers(decoder.layers, hidden, rotary, [segment], store))


@pytest.mark.parametrize(
    ("config", "queries", "kv"),
    [({}, 32, 16), ({"head_dim": 16}, 64, 32), ({"hidden_size": 24}, 32, 16), ({"num_key_value_heads": 4}, 32, 32)],
)
def test_queries_may_be_wider_or_narrower_than_the_stream(config: dict[str, int], queries: int, kv: int) -> None:
    """D·D_q each for queries and output, D·D_kv each for keys and values, 3DM, and 2·D_q per slot."""
    decoder = stack(**config)
    width = config.get("hidden_size", 32)
    assert (decoder.shape.queries, decoder.shape.kv_width) == (queries, kv)
    one = 2 * width * queries + 2 * width * kv + 3 * width * 48 + 2 * queries * 20
    assert layer_macs(decoder.shape, 1, 20) == one
    for rows in (1, 5, 20):
        assert 2 * rows * one == torchs_count(decoder, rows, 20)
    layout = TokenLayout.of({"camera": (3, 4)}, n_prefix=1, n_suffix=7)
    half = Decision.reuse(np.arange(12) < 6, 2)
    probed = probe_macs(decoder.shape, layout, half, AttentionProbe((0, 1), "suffix"))
    assert probed == 2 * count_macs(lambda: torch.zeros(4, 7, queries // 4) @ torch.zeros(4, queries // 4, 20))


@pytest.mark.parametrize("n_queries", [0, 3, None])
def test_rows_without_queries_leave_keys_and_values_alone(n_queries: int | None) -> None:
    decoder, layout = stack(hidden_size=24), TokenLayout.of({"camera": (3, 4)}, n_prefix=1, n_suffix=7)
    row, asked = 2 * 24 * 16, 2 * 24 * 32 + 3 * 24 * 48 + 2 * 32 * 20
    for decision, rows in ((Decision.dense(12, 2), 20), (Decision.reuse(np.arange(12) < 6, 2), 14)):
        counted = prefill_macs(decoder.shape, layout, decision, n_queries=n_queries)
        assert counted == rows * (row + asked) + rows * row + (rows if n_queries is None else n_queries) * asked
        if rows == 20:
            assert counted == torchs_count(decoder, rows, 20, n_queries)


def test_a_decoding_pass_is_counted_exactly() -> None:
    """Three rows behind two that were appended before; 20 slots of the prompt exist, or what was not pruned."""
    decoder, layout = stack(hidden_size=24), TokenLayout.of({"camera": (3, 4)}, n_prefix=1, n_suffix=7)
    row = 2 * 24 * 16 + 2 * 24 * 32 + 3 * 24 * 48
    reuse = Decision(np.array([0] * 4 + [1] * 3 + [2] * 5), 2)
    assert decode_macs(decoder.shape, layout, reuse, [(2, 5)]) == 2 * 3 * (row + 2 * 32 * 25)
    assert decode_macs(decoder.shape, layout, reuse, [(2, 5)]) == torchs_count(decoder, 3, 25)
    pruned = replace(reuse, skipped=SkippedTokens.PRUNE)  # 16 and 13 slots are left
    assert decode_macs(decoder.shape, layout, pruned, [(2, 5)]) == 3 * (row + 2 * 32 * 21) + 3 * (row + 2 * 32 * 18)
    one_by_one = [(0, 1), (1, 2)]
    assert decode_macs(decoder.shape, layout, reuse, one_by_one) == 2 * (2 * row + 2 * 32 * (21 + 22))
    assert decode_macs(decoder.shape, layout, reuse, []) == 0


class Expert(ActionHead):
    """Reads keys and values alone, by a stack of its own whose rows it runs twice behind the prompt."""

    reads = "kv"
    max_new_tokens = 3

    def __init__(self) -> None:
        self.stack = stack(hidden_size=24)
        self.out = torch.nn.Linear(24, 7)

    def decode(self, context: HeadContext) -> Decoding:
        assert context.hidden.shape[0] == 0
        rows = torch.ones(3, 24)
        for _ in range(2):
            rows = yield AppendRows(rows, 0, self.stack)
        return self.out(rows[-1]).numpy(), {}


@pytest.mark.parametrize("policy", [Random(), Probing(), Probing(rows="last"), Probing(rows="all")], ids=repr)
def test_a_head_that_reads_keys_and_values_needs_no_queries_in_the_last_layer(policy: Random) -> None:
    """But those that a policy has probed. Its own stack is counted by its own sizes."""
    vla = replace(random_vla("tiny"), head=Expert())
    session = CachedVLA(vla, policy).session()
    session.act(frame(0))
    counted = count_macs(lambda: session.act(frame(1)))
    step = session.last_info
    assert step is not None
    layout, rows = step.layout, step.layout.length - 26
    assert step.ratio == 0.5
    expected = {"suffix": layout.n_suffix, "last": layout.n_suffix, "all": None}
    assert step.n_queries == (expected[policy.rows] if isinstance(policy, Probing) else 0)
    macs = CostModel.of(vla, frame(0)).step(step)
    last = layer_macs(vla.decoder.shape, rows, layout.length, step.n_queries)
    assert macs["prefill"] == layer_macs(vla.decoder.shape, rows, layout.length) + last
    own = 3 * (2 * 24 * 16 + 2 * 24 * 32 + 3 * 24 * 48 + 2 * 32 * (layout.length + 3))
    assert (macs["decode"], macs["head"]) == (2 * 2 * own, 24 * 7)
    assert sum(macs.values()) == counted
