"""Configurations by name: the published OpenVLA, the small model of this library, one for tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lac_vla.models.prismatic.config import CameraConfig, PrismaticConfig
from lac_vla.models.prismatic.towers import DINOV2_LARGE, SIGLIP_SO400M, ConvTowerConfig, ViTConfig

NO_STATS = {"none": {"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7}}}
"""Statistics of a model that was trained on nothing: actions stay in [-1, 1]."""

OPENVLA_7B = PrismaticConfig(
    text_config={"vocab_size": 32064, "pad_token_id": 32000},
    norm_stats=NO_STATS,
    vision_backbone_id="dinosiglip-vit-so-224px",
    vit_towers=(DINOV2_LARGE, SIGLIP_SO400M),
    cameras=(CameraConfig("agentview", 224),),
    projector_hidden=(4 * (1024 + 1152), 4096),
)

MINI = PrismaticConfig(
    text_config={
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "vocab_size": 768 + 64,
        "pad_token_id": 0,
    },
    norm_stats={"none": {**NO_STATS["none"], "proprio": {"q01": [-1.0] * 8, "q99": [1.0] * 8}}},
    vision_backbone_id="conv",
    vit_towers=(),
    cameras=(
        CameraConfig("agentview", 112, ConvTowerConfig((32, 64, 128, 192))),
        CameraConfig("wrist", 64, ConvTowerConfig((16, 32, 64, 128, 192))),
    ),
    projector_hidden=(384,),
    image_resize_strategy="area",
    prompt_template="{instruction}",
    prompt_end_id=2,
    proprio_dim=8,
    edge_token=False,
    llm_backbone_id="llama",
)

MINI_VIT = replace(
    MINI,
    vision_backbone_id="towers",
    cameras=(CameraConfig("agentview", 112, ViTConfig(128, 5, 4, 256, patch=8, neck=192)), MINI.cameras[1]),
)
"""``mini`` whose first camera is seen by a vision transformer, over the same grid of tokens."""

TINY = PrismaticConfig(
    text_config={
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512 + 64,
        "pad_token_id": 0,
    },
    norm_stats=NO_STATS,
    vision_backbone_id="conv",
    vit_towers=(),
    cameras=(
        CameraConfig("agentview", 48, ConvTowerConfig((8, 8, 16, 24), norm_groups=4)),
        CameraConfig("wrist", 32, ConvTowerConfig((8, 8, 16, 24), norm_groups=4)),
    ),
    projector_hidden=(32,),
    image_resize_strategy="area",
    prompt_template="{instruction}",
    prompt_end_id=2,
    llm_backbone_id="llama",
)


def _decoder(text_config: Mapping[str, Any]) -> PrismaticConfig:
    """Put a decoder behind a tower that is a stub with the right number of tokens."""
    tower = ConvTowerConfig((8, 8, 8, 8), norm_groups=4)
    return PrismaticConfig(
        text_config=text_config,
        norm_stats=NO_STATS,
        vision_backbone_id="conv",
        vit_towers=(),
        cameras=(CameraConfig("camera", 16 * tower.stride, tower),),
        projector_hidden=(8,),
    )


LLAMA_8X512 = _decoder(
    {
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": 768 + 64,
        "pad_token_id": 0,
    }
)

PRESETS: dict[str, PrismaticConfig] = {
    "openvla-7b": OPENVLA_7B,
    "mini": MINI,
    "mini-vit": MINI_VIT,
    "tiny": TINY,
    "llama-8x512": LLAMA_8X512,
    "llama-32x4096": _decoder(OPENVLA_7B.text_config),
}
"""By name; the last two are decoders (layers × width) without a purpose but to be timed."""
