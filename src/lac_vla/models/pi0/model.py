"""The modules of π0 and π0.5: a SigLIP tower, PaliGemma's language model, an action expert, projections around it."""

from __future__ import annotations

import torch
from torch import nn

from lac_vla.models.pi0.config import PiConfig
from lac_vla.models.pi0.gemma import AdaptiveNorm, GemmaStack
from lac_vla.models.siglip import SiglipTower

PRECISE = r"(state_proj|action_\w+|time_mlp_\w+)\.|(prefix|expert)\..*norm\."
"""Weights that stay in float32 whatever the model's dtype: what stands around the expert, and Gemma's norms."""


class PiModel(nn.Module):
    """All weights of a π0 or π0.5.

    Args:
        config: Its shape.

    Attributes:
        config: As given.
        vision: The tower.
        projector: Features → the prefix's width.
        prefix: The language model.
        expert: The action expert.
    """

    def __init__(self, config: PiConfig) -> None:
        super().__init__()
        self.config, width = config, config.expert.width
        self.vision = SiglipTower(config.vision)
        self.projector = nn.Linear(config.vision.width, config.prefix.width)
        self.prefix = GemmaStack(config.prefix, vocab_size=config.vocab_size)
        self.expert = GemmaStack(config.expert, adaptive=config.adaptive)
        self.action_in_proj = nn.Linear(config.flow.width, width)
        self.action_out_proj = nn.Linear(width, config.flow.width)
        if config.adaptive:
            self.time_mlp_in, self.time_mlp_out = nn.Linear(width, width), nn.Linear(width, width)
        else:
            self.state_proj = nn.Linear(config.state_width, width)
            self.action_time_mlp_in, self.action_time_mlp_out = nn.Linear(2 * width, width), nn.Linear(width, width)

    @property
    def around(self) -> list[nn.Module]:
        """The modules that stay in float32."""
        names = [name for name, _ in self.named_children() if name.startswith(("action_", "state_", "time_"))]
        return [*(self.get_submodule(name) for name in names), *self.prefix.norms, *self.expert.norms]

    def cast(self, dtype: torch.dtype) -> PiModel:
        """Give the weights a type, but for those that stay in float32."""
        self.to(dtype)
        for module in self.around:
            module.float()
        return self

    def reset_norms(self) -> None:
        """Let plain norms multiply by one: their weights are what is added to it."""
        for norm in self.modules():
            if type(norm).__name__ == "GemmaRMSNorm":
                nn.init.zeros_(norm.weight)  # type: ignore[arg-type]
            if isinstance(norm, AdaptiveNorm):
                nn.init.zeros_(norm.dense.bias)
