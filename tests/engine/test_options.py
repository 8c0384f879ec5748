"""Every option leaves every action as it is, but for the tower's reuse, which is held to a reference of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from lac_vla import VLA, CachedVLA, Decision, Dense, InputError, Motion, Random, random_vla
from lac_vla.engine.options import EngineOptions
from lac_vla.models.prismatic.presets import TINY
from lac_vla.models.prismatic.towers import ViTConfig
from lac_vla.models.prismatic.vit import ViT
from lac_vla.policies import CachePolicy
from lac_vla.types import PolicyInput, SkippedTokens
from tests.engine.scenes import ALL_POLICIES, frame
from tests.engine.test_invariants import capture_hidden

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
DINO = ViTConfig(32, 4, 2, 48, registers=2, class_token=True, layer_scale=True)
SIGLIP = ViTConfig(24, 3, 2, 40)
OWN = ViTConfig(16, 3, 2, 40, patch=8, neck=24, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))


@pytest.fixture(scope="module")
def conv() -> VLA:
    return random_vla("tiny", seed=3)


@pytest.fixture(scope="module")
def vit() -> VLA:
    """Two cameras, each through two transformers."""
    cameras = tuple(replace(camera, image_size=56, tower=None) for camera in TINY.cameras)
    return random_vla(
        replace(TINY, vision_backbone_id="dinosiglip", vit_towers=(DINO, SIGLIP), cameras=cameras), seed=4
    )


@pytest.fixture(scope="module")
def mixed() -> VLA:
    """A tower per camera: a transformer of its own, and a convolution."""
    first = replace(TINY.cameras[0], tower=OWN)
    return random_vla(replace(TINY, vision_backbone_id="towers", cameras=(first, TINY.cameras[1])), seed=5)


@pytest.fixture(params=["vit", "mixed"])
def remembering(request: pytest.FixtureRequest) -> VLA:
    """A model of which some tower can reuse."""
    backbone: VLA = request.getfixturevalue(request.param)
    return backbone


@pytest.mark.parametrize(
    ("model", "options"),
    [
        *(
            ("conv", text)
            for text in ("draft", "sparse-vision-head", "async_policy", "exact", "cuda_graphs", "exact+cuda_graphs")
        ),
        *(("mixed", text) for text in ("sparse-vision-head", "exact")),
    ],
)
@pytest.mark.parametrize("name", ALL_POLICIES)
def test_no_exact_option_changes_anything(request: pytest.FixtureRequest, model: str, name: str, options: str) -> None:
    """Decisions, hidden states of suffix and action tokens, actions."""
    backbone = request.getfixturevalue(model)
    plain, fast = (
        CachedVLA(backbone, ALL_POLICIES[name](), options=EngineOptions.parse(text)).session(seed=5)
        for text in ("none", options)
    )
    for observation in (frame(0), frame(0), frame(1), frame(2, "put the mug on the plate"), frame(3)):
        torch.testing.assert_close(capture_hidden(fast, observation), capture_hidden(plain, observation), **CLOSE)
        assert plain.last_info is not None
        assert fast.last_info is not None
        assert (fast.last_info.decision.exit_layer == plain.last_info.decision.exit_layer).all()
        assert (fast.last_info.age == plain.last_info.age).all()
        assert fast.last_info.metadata == plain.last_info.metadata


def test_an_unchanged_frames_draft_stands(conv: VLA) -> None:
    session = CachedVLA(conv).session()
    passes = []
    for seed in (0, 0, 1):
        session.act(frame(seed))
        assert session.last_info is not None
        passes.append((session.last_info.draft, len(session.last_info.decode_passes)))
    assert passes[:2] == [(0, 6), (6, 0)]
    assert passes[2][0] == 6


def test_a_new_episode_has_no_draft(conv: VLA) -> None:
    session = CachedVLA(conv).session()
    session.act(frame(0))
    session.reset()
    session.act(frame(0))
    assert session.last_info is not None
    assert session.last_info.draft == 0


def test_the_tower_computes_what_is_needed(conv: VLA) -> None:
    for options, share in (("sparse-vision-head", 0.5), ("none", 1.0)):
        session = CachedVLA(conv, Random(0.5), options=EngineOptions.parse(options)).session()
        session.act(frame(0))
        session.act(frame(1))
        assert session.last_info is not None
        assert session.last_info.encoded is not None
        assert session.last_info.encoded.mean() == share


@pytest.mark.parametrize("async_policy", [False, True])
def test_after_a_tower_that_fails_the_next_frame_is_computed_in_full(conv: VLA, async_policy: bool) -> None:
    session = CachedVLA(conv, Motion(0.5), options=EngineOptions(async_policy=async_policy)).session()
    session.act(frame(0))

    def fail(*_: object) -> None:
        raise RuntimeError("device lost")

    conv.vision.encode_stem = fail  # type: ignore[method-assign]
    try:
        with pytest.raises(RuntimeError, match="device lost"):
            session.act(frame(1))
    finally:
        del conv.vision.encode_stem
    again = CachedVLA(conv).session()
    again.act(frame(0))
    torch.testing.assert_close(capture_hidden(session, frame(1)), capture_hidden(again, frame(1)), **CLOSE)


# The tower's own reuse.


class ReferenceViT:
    """A transformer of which some patches' keys and values are remembered: every row computed, plain torch."""

    def __init__(self, vit: ViT, config: ViTConfig) -> None:
        self.w = {name: value.double() for name, value in vit.state_dict().items()}
        self.config, self.extra = config, config.registers + int(config.class_token)
        self.old: list[tuple[torch.Tensor, torch.Tensor]] = []

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * self.w[name + ".weight"] + self.w[name + ".bias"]

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ self.w[name + ".weight"].T + self.w[name + ".bias"]

    def run(self, x: torch.Tensor, cached: torch.Tensor) -> torch.Tensor:
        """The blocks' input (tokens, width), cached patches (bool) → features of all patches."""
        x, heads, remembered = x.double(), self.config.heads, []
        stale = torch.cat([torch.zeros(self.extra, dtype=torch.bool), cached])
        for index in range(self.config.depth - 1):
            p = f"blocks.{index}."
            q, k, v = self.linear(self.norm(x, p + "norm1"), p + "attn.qkv").chunk(3, dim=-1)
            if self.old:
                k = torch.where(stale[:, None], self.old[index][0], k)
                v = torch.where(stale[:, None], self.old[index][1], v)
            remembered.append((k, v))
            parts = []
            for a, b, c in zip(*(part.chunk(heads, dim=-1) for part in (q, k, v)), strict=True):
                parts.append((a @ b.T / math.sqrt(a.shape[-1])).softmax(-1) @ c)
            branch = self.linear(torch.cat(parts, -1), p + "attn.proj")
            x = x + branch * self.w.get(p + "ls1.scale_factor", torch.ones(1).double())
            hidden = self.linear(self.norm(x, p + "norm2"), p + "mlp.fc1")
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
            x = x + self.linear(hidden, p + "mlp.fc2") * self.w.get(p + "ls2.scale_factor", torch.ones(1).double())
        self.old = remembered
        x = x[self.extra :]
        return x if self.config.neck is None else self.linear(x, "neck")


@torch.inference_mode()
def test_the_towers_reuse_equals_the_reference(vit: VLA) -> None:
    vision, cache = vit.module.vision_backbone, vit.vision.kv_cache()
    references = [[ReferenceViT(tower, c) for tower, c in zip(vision.vits, (DINO, SIGLIP), strict=True)] for _ in "ab"]
    n = sum(rows * cols for rows, cols in vit.grids.values())
    rng = np.random.default_rng(0)
    for number in range(4):
        computed = rng.random(n) < (0.4 if number else 1)
        stem = vit.vision.encode_stem(frame(number), vit.processor.images(frame(number)), cache)
        features = vit.vision.encode_tokens(stem, computed, cache)
        expected = []
        for camera, cached in enumerate(torch.from_numpy(~computed).chunk(2)):
            towers = zip(references[camera], stem, strict=True)
            expected.append(torch.cat([tower.run(x[camera], cached) for tower, x in towers], dim=-1))
        torch.testing.assert_close(features.double(), torch.cat(expected)[torch.from_numpy(computed)], **CLOSE)


@torch.inference_mode()
def test_each_camera_of_its_own_tower_reuses_what_it_can(mixed: VLA) -> None:
    """The transformer as the reference, from its own pixels; the convolution's features are never stale."""
    vision, cache, dense = mixed.module.vision_backbone, mixed.vision.kv_cache(), random_vla("tiny")
    tower = vision.towers["agentview"]
    dense.module.vision_backbone.towers["wrist"].load_state_dict(vision.towers["wrist"].state_dict())
    reference, rng = ReferenceViT(tower, OWN), np.random.default_rng(0)
    for share in (1, 0.4, 0, 0.4):
        observation = frame(int(10 * share))
        computed = rng.random(36 + 16) < share
        pixels = mixed.processor.images(observation)
        features = mixed.vision.encode_tokens(mixed.vision.encode_stem(observation, pixels, cache), computed, cache)
        image = torch.from_numpy(pixels["agentview"]).permute(2, 0, 1).double() / 255
        normal = (image - torch.tensor(OWN.mean)[:, None, None]) / torch.tensor(OWN.std)[:, None, None]
        patches = normal.unfold(1, 8, 8).unfold(2, 8, 8).permute(1, 2, 0, 3, 4).reshape(36, -1)
        weight, bias = reference.w["patch_embed.proj.weight"].flatten(1), reference.w["patch_embed.proj.bias"]
        inputs = patches @ weight.T + bias + reference.w["pos_embed"][0]
        expected = reference.run(inputs, torch.from_numpy(~computed[:36]))
        own = dense.vision.encode_tokens(dense.vision.encode_stem(observation, dense.processor.images(observation)))[
            36:
        ]
        torch.testing.assert_close(
            features.double(), torch.cat([expected, own.double()])[torch.from_numpy(computed)], **CLOSE
        )


@pytest.mark.parametrize("name", ["dense", "random", "motion", "staircase"])
def test_both_storeys_are_exact_where_nothing_has_changed(remembering: VLA, name: str) -> None:
    """Invariants 1 and 2 with a tower that reuses: all recomputed, or the frame unchanged, is the uncached model."""
    session = CachedVLA(remembering, ALL_POLICIES[name](), options=EngineOptions(vision_kv_reuse=True)).session()
    dense = CachedVLA(remembering, Dense(), options=EngineOptions.parse("none")).session()
    for observation in [frame(0), frame(1), frame(2)] if name == "dense" else [frame(0)] * 3:
        torch.testing.assert_close(capture_hidden(session, observation), capture_hidden(dense, observation), **CLOSE)


def test_what_is_pruned_is_no_business_of_the_towers_memory(vit: VLA) -> None:
    """A token that is dropped within a frame has no age: the tower must not go on from what it once was."""

    @dataclass(frozen=True)
    class DropHalf(CachePolicy):
        def decide(self, inputs: PolicyInput) -> Decision:
            kept = inputs.rng.random(inputs.layout.n_visual) < 0.5
            return Decision(np.where(kept, inputs.n_layers, 0), inputs.n_layers, SkippedTokens.PRUNE)

    reusing, plain = (
        CachedVLA(vit, DropHalf(), options=EngineOptions(vision_kv_reuse=reuse)).session() for reuse in (True, False)
    )
    for number in range(3):
        torch.testing.assert_close(
            capture_hidden(reusing, frame(number)), capture_hidden(plain, frame(number)), **CLOSE
        )
        assert reusing.last_info is not None
        assert reusing.last_info.encoded is not None
        assert reusing.last_info.encoded.all()


def test_the_towers_memory_is_the_sessions_own(vit: VLA) -> None:
    vla = CachedVLA(vit, Random(0.5), options=EngineOptions(vision_kv_reuse=True))
    alone, one, other = vla.session(), vla.session(), vla.session()
    for i in range(4):
        other.act(frame(50 + i))
        torch.testing.assert_close(capture_hidden(one, frame(i)), capture_hidden(alone, frame(i)))
        size = one.nbytes
    one.reset()
    torch.testing.assert_close(capture_hidden(one, frame(9)), capture_hidden(CachedVLA(vit).session(), frame(9)))
    assert one.nbytes == size > CachedVLA(vit).session().nbytes


def test_the_towers_reuse_changes_features_of_a_changed_frame(remembering: VLA) -> None:
    """It is not exact, and is not sold as such."""
    stale, fresh = (
        CachedVLA(remembering, Random(0.5), options=EngineOptions(vision_kv_reuse=reuse)).session()
        for reuse in (True, False)
    )
    for i in range(2):
        a, b = capture_hidden(stale, frame(i)), capture_hidden(fresh, frame(i))
    assert not torch.allclose(a, b, atol=1e-4)
    assert "vision_kv_reuse" not in str(EngineOptions.parse("exact"))


def test_convolutions_have_no_memory(conv: VLA) -> None:
    with pytest.raises(InputError, match="vision transformer"):
        CachedVLA(conv, options=EngineOptions(vision_kv_reuse=True))


def test_options_by_name() -> None:
    none = EngineOptions.parse("none")
    assert none == EngineOptions(draft=False, sparse_vision_head=False, picture_reuse=False)
    assert EngineOptions.parse("default") == EngineOptions()
    assert EngineOptions.parse("async_policy+draft") == replace(none, draft=True, async_policy=True)
    assert EngineOptions.parse("draft+bucket=16") == replace(none, draft=True, bucket=16)
    assert EngineOptions.parse("default+cuda_graphs") == EngineOptions(cuda_graphs=True)
    assert str(EngineOptions.parse("exact")) == "draft+sparse_vision_head+picture_reuse+async_policy"
    many = (EngineOptions(), none, EngineOptions(bucket=8, cuda_graphs=True, async_policy=True))
    assert all(EngineOptions.parse(str(options)) == options for options in many)


@pytest.mark.parametrize("text", ["draft+turbo", "bucket", "bucket=", "bucket=-4", "bucket=two", "draft=2", "none=1"])
def test_options_that_do_not_exist_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"no option .*draft.*bucket=16"):
        EngineOptions.parse(text)


def test_a_bucket_must_hold_something() -> None:
    with pytest.raises(InputError, match="at least 1"):
        EngineOptions.parse("bucket=0")
