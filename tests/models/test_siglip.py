"""A SigLIP tower that reuses, with a block of patches to a token, against plain torch that computes every row."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from tests.engine.scenes import frame

from lac_vla import VLA, CachedVLA, EngineOptions, Frame, Random, random_vla
from lac_vla.models.siglip import token_patches
from lac_vla.models.smolvla.config import TINY_SMOLVLA
from lac_vla.training.tower import MixedTower

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
SIDE, BLOCK, PATCH = 16, 4, 4
TOKENS = 16


@pytest.fixture
def vla() -> VLA:
    return random_vla("smolvla-tiny", seed=3)


class ReferenceTower:
    """Tower, pixel shuffle and connector, written from the definition; some patches' keys and values are remembered."""

    def __init__(self, module: Any, heads: int) -> None:
        self.w = {name: value.double() for name, value in module.vision.state_dict().items()}
        self.connector, self.heads = module.connector.weight.double(), heads
        self.depth = len({name.split(".")[2] for name in self.w if name.startswith("encoder")})
        self.old: list[tuple[torch.Tensor, torch.Tensor]] = []

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"], 1e-6)

    def run(self, image: np.ndarray[Any, Any], computed: np.ndarray[Any, Any]) -> torch.Tensor:
        """Image, (64, 64, 3), uint8, and the tokens that are computed, bool, (16,) → embeddings of all, (16, width)."""
        weight = self.w["embeddings.patch_embedding.weight"].flatten(1)
        rows = []
        for row in range(SIDE):
            for col in range(SIDE):
                cut = image[PATCH * row : PATCH * row + PATCH, PATCH * col : PATCH * col + PATCH]
                pixels = torch.from_numpy(cut).double().permute(2, 0, 1).flatten() / 255 * 2 - 1
                place = self.w["embeddings.position_embedding.weight"][SIDE * row + col]
                rows.append(weight @ pixels + self.w["embeddings.patch_embedding.bias"] + place)
        x, remembered = torch.stack(rows), []
        stale = torch.tensor(
            [
                not computed[(row // BLOCK) * (SIDE // BLOCK) + col // BLOCK]
                for row in range(SIDE)
                for col in range(SIDE)
            ]
        )
        for index in range(self.depth):
            p = f"encoder.layers.{index}."
            y = self.norm(x, p + "layer_norm1")
            q, k, v = (self.linear(y, f"{p}self_attn.{part}_proj") for part in "qkv")
            if self.old:
                k, v = (torch.where(stale[:, None], old, new) for old, new in zip(self.old[index], (k, v), strict=True))
            remembered.append((k, v))
            heads = zip(*(part.chunk(self.heads, dim=-1) for part in (q, k, v)), strict=True)
            attended = [(a @ b.T / math.sqrt(a.shape[-1])).softmax(-1) @ c for a, b, c in heads]
            x = x + self.linear(torch.cat(attended, -1), p + "self_attn.out_proj")
            y = self.linear(self.norm(x, p + "layer_norm2"), p + "mlp.fc1")
            y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
            x = x + self.linear(y, p + "mlp.fc2")
        self.old, x = remembered, self.norm(x, "post_layernorm")
        tokens = []
        for row in range(0, SIDE, BLOCK):
            for col in range(0, SIDE, BLOCK):
                block = [x[SIDE * (row + i) + col + j] for i in range(BLOCK) for j in range(BLOCK)]
                tokens.append(self.connector @ torch.cat(block))
        return torch.stack(tokens) * math.sqrt(len(self.connector))


@torch.inference_mode()
@pytest.mark.parametrize("cameras", [None, "some"])
def test_computed_tokens_equal_the_reference(vla: VLA, cameras: str | None) -> None:
    """Over several frames, in each of which other tokens are computed, of one camera none at all."""
    references = {name: ReferenceTower(vla.module, 2) for name in vla.grids}
    cache, rng = vla.vision.kv_cache(), np.random.default_rng(0)
    for number in range(4):
        computed = rng.random(2 * TOKENS) < (0.4 if number else 1)
        if cameras == "some" and number:
            computed[:TOKENS] = False
        observation = frame(number)
        stem = vla.vision.encode_stem(observation, vla.processor.images(observation), cache)
        found = vla.vision.project(vla.vision.encode_tokens(stem, computed, cache))
        both = zip(references.items(), np.split(computed, 2), strict=True)
        expected = torch.cat(
            [reference.run(observation.images[name], own)[torch.from_numpy(own)] for (name, reference), own in both]
        )
        torch.testing.assert_close(found.double(), expected, **CLOSE)


@torch.inference_mode()
def test_without_a_cache_all_is_computed(vla: VLA) -> None:
    observation = frame(5)
    every = np.ones(TOKENS, dtype=bool)
    expected = [ReferenceTower(vla.module, 2).run(observation.images[name], every) for name in vla.grids]
    torch.testing.assert_close(vla.encode_image(observation).double(), torch.cat(expected), **CLOSE)
    some = np.arange(2 * TOKENS) % 3 == 0
    stem = vla.vision.encode_stem(observation, vla.processor.images(observation))
    picked = vla.vision.project(vla.vision.encode_tokens(stem, some))
    torch.testing.assert_close(picked.double(), torch.cat(expected)[torch.from_numpy(some)], **CLOSE)


@torch.inference_mode()
@pytest.mark.parametrize("block", [4, 2])
def test_training_with_a_tower_that_reuses_equals_the_engine(block: int) -> None:
    """The patches of a token are mixed together; two windows at once, each with its own decisions."""
    vla = random_vla(replace(TINY_SMOLVLA, shuffle=block), seed=3)
    n = 2 * (SIDE // block) ** 2
    tower, rng, old = MixedTower(vla), np.random.default_rng(0), None
    caches = [vla.vision.kv_cache() for _ in range(2)]
    for at in range(3):
        active = rng.random((2, n)) < (0.5 if at else 1)
        frames = [frame(at), frame(9 - at)]
        images = {
            name: torch.from_numpy(np.stack([vla.processor.images(each)[name] for each in frames]))
            for name in vla.grids
        }
        mask = torch.from_numpy(active).float() if at else None
        seen = tower.encode(images, torch.zeros(2, n, 32), mask, old)
        old = seen.slots
        for window, (observation, cache) in enumerate(zip(frames, caches, strict=True)):
            stem = vla.vision.encode_stem(observation, vla.processor.images(observation), cache)
            expected = vla.vision.project(vla.vision.encode_tokens(stem, active[window], cache))
            found = seen.visual[window][torch.from_numpy(active[window])]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)


def test_a_session_with_the_option_computes_the_active_tokens_alone(vla: VLA) -> None:
    session = CachedVLA(vla, Random(0.5), options=EngineOptions(vision_kv_reuse=True)).session()
    plain = CachedVLA(vla, Random(0.5)).session()
    for number in range(3):
        answers = session.act(frame(number)), plain.act(frame(number))
        assert session.last_info is not None
        assert session.last_info.encoded is not None
        assert (session.last_info.encoded == session.last_info.active).all()
        assert np.allclose(*answers, atol=1e-5) == (number == 0)
    still = Frame(frame(2).images, "pick up the bowl", frame(2).proprio)
    again = CachedVLA(vla, Random(0.5), options=EngineOptions(vision_kv_reuse=True)).session()
    kept = []
    for _ in range(3):
        again.act(still)
        assert again.memory.layout is not None
        kept.append(again.engine.store.keys[:, :, : again.memory.layout.length].clone())
    for found in kept[1:]:
        torch.testing.assert_close(found, kept[0], **CLOSE)


def test_tokens_and_their_patches() -> None:
    table = token_patches(8, 4)
    assert table.shape == (4, 16)
    assert table[1].tolist() == [4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31]
    assert token_patches(3, 1).flatten().tolist() == list(range(9))
