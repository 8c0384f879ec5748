"""The modules of a Prismatic VLA under their official names: plain, batched, differentiable."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

from lac_vla.models.llama import build_llama
from lac_vla.models.prismatic.config import PrismaticConfig
from lac_vla.models.prismatic.vision import PerCameraBackbone, VisionBackbone, ViTBackbone


class MLP(nn.Module):
    """Linear layers ``fc1``, ``fc2``, … with exact GELUs between them, over the last dimension."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        for i, (n_in, n_out) in enumerate(pairwise(widths), start=1):
            self.add_module(f"fc{i}", nn.Linear(n_in, n_out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Project (..., widths[0]) → (..., widths[-1])."""
        for i, layer in enumerate(self.children()):
            x = layer(nn.functional.gelu(x) if i else x)
        return x


class PrismaticVLA(nn.Module):
    """Vision backbone, projector and language model (and, if configured, a projector of proprioception).

    A prompt is ``[BOS | visual tokens | proprio token, if any | text]``.

    Attributes:
        config: What it was built from.
        vision_backbone: ``forward(camera → (B, C, H, W)) -> (B, N, F)`` and ``normalize``.
        projector: (..., F) → (..., width).
        proprio_projector: (..., proprio_dim) → (..., width), or ``None``.
        language_model: A Hugging Face ``LlamaForCausalLM``.
    """

    def __init__(self, config: PrismaticConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_backbone: VisionBackbone = ViTBackbone(config) if config.vit_towers else PerCameraBackbone(config)
        self.projector = MLP(config.features, *config.projector_hidden, config.width)
        dim = config.proprio_dim
        self.proprio_projector = None if dim is None else MLP(dim, config.width, config.width)
        self.language_model = build_llama(config.text_config)
