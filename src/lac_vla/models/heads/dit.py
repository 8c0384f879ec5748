"""CogACT's diffusion transformer (DiT) under its official parameter names.

The sequence is the condition, cognition feature plus time, and behind it one token per noisy action.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from lac_vla.checks import check_fields
from lac_vla.errors import CheckpointError
from lac_vla.models.transformer import LAYER_NORM_EPS, Attention, FeedForward

FREQUENCIES = 256
LONGEST_PERIOD = 10000
MLP_RATIO = 4


@dataclass(frozen=True)
class DiTConfig:
    """Shape of the diffusion transformer.

    Attributes:
        width: Of its residual stream.
        depth: Blocks.
        heads: Attention heads of a block.
        action_dim: Values of an action; the last is the gripper.
        horizon: Actions of a chunk: the present one and CogACT's ``future_action_window_size``.
        condition: Width of the cognition feature.

    Raises:
        CheckpointError: If there is no such transformer.
    """

    width: int
    depth: int
    heads: int
    action_dim: int = 7
    horizon: int = 16
    condition: int = 4096

    def __post_init__(self) -> None:
        """Check the sizes."""
        check_fields(self, CheckpointError)
        if min(self.width, self.depth, self.heads, self.action_dim, self.horizon, self.condition) < 1:
            raise CheckpointError(f"{self}: every size must be at least 1")
        if self.width % self.heads:
            raise CheckpointError(f"action head: width {self.width} is no multiple of {self.heads} heads")


DIT: Mapping[str, DiTConfig] = {
    "DiT-S": DiTConfig(384, 6, 4),
    "DiT-B": DiTConfig(768, 12, 12),
    "DiT-L": DiTConfig(1024, 24, 16),
}
"""The published action heads, by CogACT's ``action_model_type``."""


class Embedder(nn.Module):
    """A linear layer."""

    def __init__(self, n_in: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(n_in, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., n_in) → (..., width)."""
        out: torch.Tensor = self.linear(x)
        return out


class ConditionEmbedder(Embedder):
    """Embeds the cognition feature; ``uncondition``, (1, n_in), stands for its absence in classifier-free guidance."""

    def __init__(self, n_in: int, width: int) -> None:
        super().__init__(n_in, width)
        self.uncondition = nn.Parameter(torch.zeros(1, n_in))


class TimeEmbedder(nn.Module):
    """Sines and cosines of the diffusion step, through two linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """Embed steps: (B,) → (B, width)."""
        half = FREQUENCIES // 2
        rates = torch.exp(-math.log(LONGEST_PERIOD) / half * torch.arange(half, device=t.device))
        angles = t[:, None].float() * rates
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        out: torch.Tensor = self.mlp(waves.to(cast(nn.Linear, self.mlp[0]).weight.dtype))
        return out


class Block(nn.Module):
    """Attention and feed-forward, each normalised before (without gains) and added to its input."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS, elementwise_affine=False)
        self.attn = Attention(config.width, config.heads)
        self.norm2 = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS, elementwise_affine=False)
        self.mlp = FeedForward(config.width, MLP_RATIO * config.width, approximate="tanh")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the block: (B, tokens, width) → the same."""
        x = x + self.attn(self.norm1(x))
        out: torch.Tensor = x + self.mlp(self.norm2(x))
        return out


class FinalLayer(Embedder):
    """Normalises, and maps tokens to noise."""

    def __init__(self, width: int, action_dim: int) -> None:
        super().__init__(width, action_dim)
        self.norm_final = nn.LayerNorm(width, eps=LAYER_NORM_EPS, elementwise_affine=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, tokens, width) → (B, tokens, action_dim)."""
        return super().forward(self.norm_final(x))


class DiT(nn.Module):
    """Predicts the noise in a chunk of actions."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.width
        self.x_embedder = Embedder(config.action_dim, width)
        self.t_embedder = TimeEmbedder(width)
        self.z_embedder = ConditionEmbedder(config.condition, width)
        self.positional_embedding = nn.Parameter(torch.zeros(1 + config.horizon, width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(width, config.action_dim)

    def forward(self, x: torch.Tensor, t: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Predict the noise in noisy actions, (B, horizon, action_dim).

        ``t`` are the diffusion steps, (B,); ``z`` the conditions, (B, 1, condition).
        """
        return self.denoise(x, self.t_embedder(t)[:, None] + self.z_embedder(z))

    def denoise(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Predict noise as :meth:`forward` does, given the sum of the embedded step and condition, (B, 1, width)."""
        tokens = torch.cat([condition, self.x_embedder(x)], dim=1) + self.positional_embedding
        for block in self.blocks:
            tokens = block(tokens)
        noise: torch.Tensor = self.final_layer(tokens)[:, 1:]
        return noise


def initialise(net: DiT) -> None:
    """Set starting weights as CogACT does: Xavier, small embeddings, and a last layer that predicts nothing."""
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for embedding in (net.z_embedder.linear, net.t_embedder.mlp[0], net.t_embedder.mlp[2]):
        nn.init.normal_(embedding.weight, std=0.02)  # type: ignore[arg-type]
    nn.init.normal_(net.z_embedder.uncondition, std=0.02)
    nn.init.normal_(net.positional_embedding, std=net.positional_embedding.shape[-1] ** -0.5)
    nn.init.zeros_(net.final_layer.linear.weight)
