"""Every preset and every published tower, in tiny sizes, runs two frames under every policy."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from lac_vla import VLA, CachedVLA, EngineOptions, Frame, LACConfig, LACPolicy, random_vla
from lac_vla.models import FAMILIES
from lac_vla.models.images import PIPELINES
from lac_vla.models.prismatic.config import CameraConfig, PrismaticConfig
from lac_vla.models.prismatic.presets import TINY
from lac_vla.models.prismatic.towers import TIMM_TOWERS, ViTConfig
from tests.engine.scenes import ALL_POLICIES, frame

PRESETS = {name: config for family in FAMILIES.values() for name, config in family.presets.items()}
SMALL = ("tiny", "mini")
"""Words in the names of presets that are small as they are."""


def shrunk(tower: ViTConfig) -> ViTConfig:
    """The same tower, with its patches, registers and class token, but narrow and shallow."""
    return replace(tower, width=16, depth=3, heads=2, mlp_width=16)


def with_towers(size: int, *names: str) -> PrismaticConfig:
    """A tiny model that sees images of a size by published towers."""
    towers = tuple(shrunk(TIMM_TOWERS[name]) for name in names)
    cameras = (CameraConfig("agentview", size),)
    return replace(TINY, vision_backbone_id="published", vit_towers=towers, cameras=cameras)


def shrunk_preset(config: Any) -> Any:
    """A large preset with its cameras and towers, but a tiny decoder."""
    vlm = config if isinstance(config, PrismaticConfig) else config.vlm
    vlm = replace(
        vlm, text_config=TINY.text_config, projector_hidden=(16,), vit_towers=tuple(map(shrunk, vlm.vit_towers)),
        prompt_template="{instruction}", prompt_end_id=None,
    )  # fmt: skip
    if vlm is config or isinstance(config, PrismaticConfig):
        return vlm
    head = replace(config.head, width=24, depth=2, heads=2, condition=vlm.width)
    return replace(config, vlm=vlm, head=head, prompt_end=(1, 2))


DINO, SIGLIP_224, SIGLIP_384 = TIMM_TOWERS
CONFIGS: dict[str, Any] = {
    **{
        name: config if any(word in name for word in SMALL) else shrunk_preset(config)
        for name, config in PRESETS.items()
        if isinstance(config, FAMILIES["openvla"].config | FAMILIES["cogact"].config)
    },
    **{f"{name}-224": with_towers(224, name) for name in (DINO, SIGLIP_224)},
    **{f"{name}-384": with_towers(384, name) for name in (DINO, SIGLIP_384)},
    "dinosiglip-384": with_towers(384, DINO, SIGLIP_384),
}


@cache
def made(name: str) -> VLA:
    return random_vla(CONFIGS[name], seed=2)


def observe(vla: VLA, seed: int) -> Frame:
    cameras = tuple(vla.grids)
    image = frame(seed, cameras=cameras)
    return Frame(image.images, image.instruction, np.zeros(vla.processor.state_dim or 1, np.float32))


@pytest.mark.parametrize("policy", ALL_POLICIES)
@pytest.mark.parametrize("name", CONFIGS)
def test_two_frames(name: str, policy: str) -> None:
    vla = made(name)
    make = ALL_POLICIES[policy]
    if policy.startswith("lac"):
        torch.manual_seed(0)
        session = CachedVLA(vla, LACPolicy(LACConfig(grids=dict(vla.grids)), ratio=0.5)).session()
    else:
        session = CachedVLA(vla, make()).session()
    for seed in range(2):
        assert np.isfinite(session.act(observe(vla, seed))).all()
    assert session.last_info is not None
    assert session.last_info.dense_reason is None
    assert session.last_info.age.shape == (sum(rows * cols for rows, cols in vla.grids.values()),)


@pytest.mark.parametrize("name", [name for name in CONFIGS if made(name).vision.kv_cache() is not None])
def test_two_frames_with_the_towers_own_reuse(name: str) -> None:
    session = CachedVLA(made(name), ALL_POLICIES["motion"](), options=EngineOptions(vision_kv_reuse=True)).session()
    for seed in range(2):
        assert np.isfinite(session.act(observe(made(name), seed))).all()
    assert session.last_info is not None
    assert session.last_info.ratio == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_384_pixels_are_cut_to_what_27_patches_see(pipeline: str) -> None:
    """The official convolution leaves the last 6 pixels out, too: features are those of the whole image."""
    if pipeline in ("libero", "aloha"):
        pytest.importorskip("simplejpeg")
    config = replace(with_towers(384, SIGLIP_384), image_resize_strategy=pipeline)
    vla = random_vla(config, seed=2)
    assert dict(vla.grids) == {"agentview": (27, 27)}
    seen = vla.processor.images(observe(vla, 0))["agentview"]
    assert seen.shape == (378, 378, 3)
    whole = PIPELINES[pipeline](observe(vla, 0).images["agentview"], 384)
    assert (seen == whole[:378, :378]).all()
    backbone = vla.module.vision_backbone
    with torch.inference_mode():
        ours, official = (
            backbone({"agentview": backbone.normalize(torch.tensor(image)[None])}) for image in (seen, whole)
        )
    assert torch.equal(ours, official)
