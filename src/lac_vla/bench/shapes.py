"""Decoders of the section ``engine``: shapes without a purpose but to be timed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lac_vla.models import PrismaticConfig
from lac_vla.models.prismatic.config import CameraConfig
from lac_vla.models.prismatic.presets import NO_STATS, OPENVLA_7B
from lac_vla.models.prismatic.towers import ConvTowerConfig
from lac_vla.types import TokenLayout

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "llama-8x512": {
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": 768 + 64,
        "pad_token_id": 0,
    },
    "llama-32x4096": OPENVLA_7B.text_config,
}
"""Name (layers × width) → ``LlamaConfig`` arguments. The second is OpenVLA's Llama 2 7B."""

LAYOUT = TokenLayout.of({"camera": (16, 16)}, n_prefix=1, n_suffix=25)
"""OpenVLA's prompt with a LIBERO instruction: BOS, 256 visual tokens, 25 of text."""


def decoder_config(text_config: Mapping[str, Any]) -> PrismaticConfig:
    """A model around a decoder; its tower is a stub with the right number of tokens."""
    tower = ConvTowerConfig((8, 8, 8, 8), norm_groups=4)
    return PrismaticConfig(
        text_config=text_config,
        norm_stats=NO_STATS,
        vision_backbone_id="conv",
        vit_towers=(),
        cameras=(CameraConfig("camera", 16 * tower.stride, tower),),
        projector_hidden=(8,),
    )
