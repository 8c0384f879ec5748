"""Every preset and every known vision tower, two frames under every policy; towers that end in mid-patch; FiLM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from lac_vla import VLA, CachedVLA, Dense, Frame, Random, random_vla
from lac_vla.engine.options import EngineOptions
from lac_vla.models import FAMILIES
from lac_vla.models.oft.config import OFTConfig, with_film
from lac_vla.models.prismatic.config import CameraConfig, PrismaticConfig
from lac_vla.models.prismatic.presets import TINY
from lac_vla.models.prismatic.towers import TIMM_TOWERS, ViTConfig
from lac_vla.policies import Motion
from tests.engine.scenes import ALL_POLICIES, frame

PRESETS: Mapping[str, Any] = {
    name: preset
    for family in FAMILIES.values()
    for name, preset in family.presets.items()
    if name == family.tiny or name.startswith("mini")
}


def small(towers: tuple[ViTConfig, ...], size: int) -> PrismaticConfig:
    """Known towers, made narrow and shallow, over pictures of their size."""
    narrow = tuple(replace(tower, width=8, depth=3, heads=2, mlp_width=16) for tower in towers)
    cameras = tuple(CameraConfig(name, size) for name in ("agentview", "wrist"))
    return replace(TINY, vision_backbone_id="vit", vit_towers=narrow, cameras=cameras, image_resize_strategy="area")


DINO, SIGLIP = TIMM_TOWERS["vit_large_patch14_reg4_dinov2.lvd142m"], TIMM_TOWERS["vit_so400m_patch14_siglip_224"]
TOWERS: dict[str, Any] = {
    "dinosiglip": small((DINO, SIGLIP), 224),
    "siglip-384": small((TIMM_TOWERS["vit_so400m_patch14_siglip_384"],), 384),
    "dinov2": small((DINO,), 224),
    "film": OFTConfig(with_film(small((DINO, SIGLIP), 56)), 7, 3),
}
MODELS = {**PRESETS, **TOWERS}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> VLA:
    return random_vla(MODELS[request.param], seed=3)


def seen(vla: VLA, number: int, instruction: str = "pick up the bowl") -> Frame:
    cameras = tuple(vla.grids)
    state = None if vla.processor.state_dim is None else np.zeros(vla.processor.state_dim, np.float32)
    return replace(frame(number, instruction, cameras), proprio=state)


@pytest.mark.parametrize("name", ALL_POLICIES)
def test_two_frames_under_every_policy(model: VLA, name: str) -> None:
    session = CachedVLA(model, ALL_POLICIES[name]()).session()
    for number in range(2):
        action = session.act(seen(model, number))
        assert np.isfinite(action).all()
    assert session.last_info is not None
    assert session.last_info.dense_reason is None


def test_all_towers_are_known_here() -> None:
    configs = [getattr(config, "vlm", config) for config in TOWERS.values()]
    shapes = {(tower.patch, tower.registers) for config in configs for tower in config.vit_towers}
    assert {(tower.patch, tower.registers) for tower in TIMM_TOWERS.values()} <= shapes
    assert 384 in {config.cameras[0].image_size for config in configs}


@torch.inference_mode()
def test_pixels_that_no_patch_covers_are_left_out_and_nothing_changes() -> None:
    """384 is no multiple of 14: the policies see what the 27 × 27 patches see."""
    vla = random_vla(TOWERS["siglip-384"], seed=1)
    rng = np.random.default_rng(0)
    full = {name: rng.integers(0, 256, (384, 384, 3)).astype(np.uint8) for name in vla.grids}
    images = vla.processor.images(Frame(full, "go"))
    assert {image.shape for image in images.values()} == {(378, 378, 3)}
    pixels = {name: vla.module.vision_backbone.normalize(torch.tensor(image)[None]) for name, image in full.items()}
    whole = vla.module.vision_backbone(pixels)[0]
    cut = vla.vision.encode_tokens(vla.vision.encode_stem(Frame(full, "go"), images))
    torch.testing.assert_close(cut, whole)


@pytest.mark.parametrize("name", ["dinosiglip", "siglip-384", "film"])
def test_towers_reuse_what_did_not_change(name: str) -> None:
    """Unchanged frames: exact, whatever is reused."""
    vla = random_vla(TOWERS[name], seed=1)
    options = EngineOptions(vision_kv_reuse=True)
    session = CachedVLA(vla, Random(0.6), options=options).session()
    truth = CachedVLA(vla, Dense()).session().act(seen(vla, 0))
    for _ in range(3):
        np.testing.assert_allclose(session.act(seen(vla, 0)), truth, rtol=1e-4, atol=1e-5)
    assert session.last_info is not None
    assert session.last_info.encoded is not None
    assert session.last_info.encoded.mean() < 0.5


def test_film_looks_with_the_instruction_in_mind() -> None:
    """Another instruction is another picture: nothing of the old one is reused, in the towers neither."""
    vla = random_vla(TOWERS["film"], seed=1)
    one, other = (vla.encode_image(seen(vla, 0, text)) for text in ("pick up the bowl", "open the drawer"))
    assert (one - other).abs().max() > 0.01
    session = CachedVLA(vla, Motion(0.9), options=EngineOptions(vision_kv_reuse=True)).session()
    session.act(seen(vla, 0))
    session.act(seen(vla, 0))
    action = session.act(seen(vla, 0, "open the drawer"))
    assert session.last_info is not None
    assert session.last_info.dense_reason == "new instruction"
    expected = CachedVLA(vla).session().act(seen(vla, 0, "open the drawer"))
    np.testing.assert_allclose(action, expected, rtol=1e-4, atol=1e-5)
