"""Puts a SmolVLA together from its modules: processor, vision encoder, prefix, head."""

from __future__ import annotations

import torch

from lac_vla.models.lerobot_layout import ACTION, STATE
from lac_vla.models.siglip import SiglipVision
from lac_vla.models.smolvla.config import SmolVLAConfig
from lac_vla.models.smolvla.head import SmolVLAHead
from lac_vla.models.smolvla.model import SmolVLAModel
from lac_vla.models.smolvla.processor import SmolVLAProcessor
from lac_vla.models.smolvla.stacks import ExpertStack, PrefixStack
from lac_vla.models.tokenizer import Encode
from lac_vla.models.vla import VLA


def build_smolvla(
    config: SmolVLAConfig,
    model: SmolVLAModel,
    encode: Encode,
    *,
    name: str = "smolvla",
) -> VLA:
    """Build a VLA over the modules; it holds no weights of its own and follows them.

    Args:
        config: What the modules were built from.
        model: The modules.
        encode: The tokenizer: text → token ids.
        name: For tables and error messages.

    Raises:
        CheckpointError: If the statistics are incomplete.
    """
    state = config.normalization.units(STATE, config.state_dim)
    actions = config.normalization.units(ACTION, config.action_dim)
    processor = SmolVLAProcessor(model, config, encode, name, state)
    decoder = PrefixStack(model.text)
    expert = ExpertStack(model.expert, config.cross, config.flow.horizon)

    def project(features: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = model.connector(features) * config.text.width**0.5
        return rows

    vision = SiglipVision(model.vision, project, config.cameras, processor.picture, config.shuffle)
    head = SmolVLAHead(model, expert, config.flow, actions)
    return VLA(name, "smolvla", config, model, processor, vision, decoder, head, encode)
