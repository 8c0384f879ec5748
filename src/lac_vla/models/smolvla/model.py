"""The modules of a SmolVLA, under the names of LeRobot's checkpoints."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel

from lac_vla.models.llama import reset_rotary
from lac_vla.models.siglip import SiglipTower
from lac_vla.models.smolvla.config import SmolVLAConfig


class SmolVLAModel(nn.Module):
    """All weights of a SmolVLA.

    Attributes:
        model: The parts, nested as their names in the file are.
        text: The language model's first layers, and its embedding.
        expert: The expert's layers.
        vision: The vision tower.
        connector: Features of a token's patches → embedding.
    """

    def __init__(self, config: SmolVLAConfig) -> None:
        super().__init__()
        width, expert = config.text.width, config.expert.width
        connector = nn.Linear(config.vision.width * config.shuffle**2, width, bias=False)
        vlm = {
            "vision_model": SiglipTower(config.vision),
            "connector": nn.ModuleDict({"modality_projection": nn.ModuleDict({"proj": connector})}),
            "text_model": LlamaModel(LlamaConfig(**config.text.llama())),
        }
        self.model = nn.ModuleDict(
            {
                "vlm_with_expert": nn.ModuleDict(
                    {
                        "vlm": nn.ModuleDict({"model": nn.ModuleDict(vlm)}),
                        "lm_expert": _expert(config),
                    }
                ),
                "state_proj": nn.Linear(config.state_width, width),
                "action_in_proj": nn.Linear(config.flow.width, expert),
                "action_time_mlp_in": nn.Linear(2 * expert, expert),
                "action_time_mlp_out": nn.Linear(expert, expert),
                "action_out_proj": nn.Linear(expert, config.flow.width),
            }
        )

    @property
    def text(self) -> LlamaModel:  # noqa: D102
        return self.get_submodule("model.vlm_with_expert.vlm.model.text_model")

    @property
    def expert(self) -> LlamaModel:  # noqa: D102
        return self.get_submodule("model.vlm_with_expert.lm_expert")

    @property
    def vision(self) -> SiglipTower:  # noqa: D102
        return cast(SiglipTower, self.get_submodule("model.vlm_with_expert.vlm.model.vision_model"))

    @property
    def connector(self) -> nn.Linear:  # noqa: D102
        name = "model.vlm_with_expert.vlm.model.connector.modality_projection.proj"
        return cast(nn.Linear, self.get_submodule(name))

    def linear(self, name: str) -> nn.Linear:
        """Get one of the projections that stand outside the transformers, e.g. ``state_proj``."""
        return cast(nn.Linear, self.model[name])

    def reset_rotary(self, device: torch.device) -> None:
        """Compute what is not stored, on ``device``: a model from ``meta`` has none."""
        reset_rotary(self.text, device)
        reset_rotary(self.expert, device)


def _expert(config: SmolVLAConfig) -> LlamaModel:
    """Make the expert: layers of cross-attention project the prefix's keys and values, not their own rows."""
    expert = LlamaModel(LlamaConfig(**config.expert.llama()))
    expert.embed_tokens = None
    kv_width = config.text.kv_heads * config.text.head_dim
    for index in config.cross:
        attention = expert.layers[index].self_attn
        attention.k_proj, attention.v_proj = (nn.Linear(kv_width, kv_width, bias=False) for _ in range(2))
    return expert
