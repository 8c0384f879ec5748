"""Vision transformers (DINOv2 with registers, SigLIP) under the parameter names of timm and OpenVLA."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from lac_vla.models.prismatic.towers import Keep, ViTConfig

LAYER_NORM_EPS = 1e-6


class Memory(Protocol):
    """What stands between a block's keys and values and its attention."""

    def update(
        self, block: int, keys: torch.Tensor, values: torch.Tensor, rows: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the new keys and values of some rows, and return those that attention is to see.

        Args:
            block: Number of the block.
            keys: (B, heads, rows, head_dim).
            values: As ``keys``.
            rows: Which of the tokens they are, int64; ``None`` for all.

        Returns:
            Keys and values of all tokens, each (B, heads, tokens, head_dim).
        """
        ...


@dataclass
class KeysValues:
    """What the blocks of a transformer remember of one image's tokens, each (1, heads, tokens, head_dim)."""

    blocks: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Memory that they take, bytes."""
        return sum(part.numel() * part.element_size() for block in self.blocks for part in block)

    def update(
        self, block: int, keys: torch.Tensor, values: torch.Tensor, rows: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put the ``rows`` (int64; ``None`` for all) in their places, and return the keys and values of all tokens."""
        if rows is None:  # copies: the projection's output, queries included, is not kept
            self.blocks[block : block + 1] = [(keys.contiguous(), values.contiguous())]
        else:
            for slots, new in zip(self.blocks[block], (keys, values), strict=True):
                slots.index_copy_(2, rows, new)
        return self.blocks[block]


class PatchEmbed(nn.Module):
    """Images → one row per patch."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.width, config.patch, stride=config.patch)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) → (B, patches, width), raster order."""
        embedded: torch.Tensor = self.proj(pixels)
        return embedded.flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Self-attention over all tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(
        self, x: torch.Tensor, memory: Memory | None = None, block: int = 0, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B, tokens, width) → the same; with a memory, ``x`` may be some ``rows`` of the tokens it remembers."""
        queries, keys, values = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if memory is not None:
            keys, values = memory.update(block, keys, values, rows)
        # Under autocast in the precision of the residual stream: on a CPU the backward pass is several times faster.
        with torch.autocast(x.device.type, enabled=False):
            attended = F.scaled_dot_product_attention(*(part.to(x.dtype) for part in (queries, keys, values)))
        out: torch.Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return out


class FeedForward(nn.Module):
    """Two linear layers with a GELU between them, exact or ``approximate="tanh"``."""

    def __init__(self, width: int, hidden: int, approximate: str = "none") -> None:
        super().__init__()
        self.approximate = approximate
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., width) → the same."""
        out: torch.Tensor = self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))
        return out


class LayerScale(nn.Module):
    """A learned gain per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale_factor = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., width) → the same."""
        return x * self.scale_factor


class Block(nn.Module):
    """Attention and feed-forward, each normalised before and added to its input."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.attn = Attention(config.width, config.heads)
        self.ls1 = LayerScale(config.width) if config.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.mlp = FeedForward(config.width, config.mlp_width)
        self.ls2 = LayerScale(config.width) if config.layer_scale else nn.Identity()

    def forward(
        self, x: torch.Tensor, memory: Memory | None = None, block: int = 0, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B, tokens, width) → the same; see :class:`Attention`."""
        x = x + self.ls1(self.attn(self.norm1(x), memory, block, rows))
        out: torch.Tensor = x + self.ls2(self.mlp(self.norm2(x)))
        return out


class ViT(nn.Module):
    """A vision transformer up to its last but one block, whose patch tokens are the features (no final norm).

    Args:
        config: Its shape.
        image_size: Side of its images, pixels.
    """

    def __init__(self, config: ViTConfig, image_size: int) -> None:
        super().__init__()
        width, registers = config.width, config.registers
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if config.class_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, registers, width)) if registers else None
        self.pos_embed = nn.Parameter(torch.zeros(1, (image_size // config.patch) ** 2, config.width))
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth - 1))
        self.neck = nn.Identity() if config.neck is None else nn.Linear(width, config.neck)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised images, (B, 3, H, W) → features, (B, patches, features)."""
        return self.encode(self.embed(pixels))

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised images, (B, 3, H, W) → the blocks' input, (B, class and register tokens + patches, width)."""
        x = self.patch_embed(pixels) + self.pos_embed
        extra = [token for token in (self.cls_token, self.reg_token) if token is not None]
        return torch.cat([*(token.expand(len(x), -1, -1) for token in extra), x], dim=1)

    def encode(self, x: torch.Tensor, memory: Memory | None = None, wanted: torch.Tensor | None = None) -> torch.Tensor:
        """Run the blocks.

        Args:
            x: From :meth:`embed`, (B, tokens, width); B = 1 with :class:`KeysValues`.
            memory: Keys and values of the same image's predecessors: they stand for the patches that are not wanted,
                and are brought up to date where they are. A new one is filled.
            wanted: Patches to compute, bool, (patches,); ``None`` for all. Class and register tokens always are.

        Returns:
            Features of these patches, (B, patches, features).
        """
        extra = x.shape[1] - self.pos_embed.shape[1]
        rows = None
        if wanted is not None:
            rows = torch.cat([wanted.new_ones(extra), wanted]).nonzero()[:, 0]
            x = x[:, rows]
        for index, block in enumerate(self.blocks):
            x = block(x, memory, index, rows)
        features: torch.Tensor = self.neck(x[:, extra:])
        return features


class ViTTower(ViT):
    """A vision transformer as the tower of one camera; it takes images as the convolutional one does.

    Args:
        config: Its shape.
        image_size: Side of its images, pixels.
    """

    def __init__(self, config: ViTConfig, image_size: int) -> None:
        super().__init__(config, image_size)
        self._centre = [2 * value - 1 for value in config.mean]
        self._spread = [2 * value for value in config.std]

    def forward(
        self, pixels: torch.Tensor, keep: Keep | None = None, shift: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute the tokens of a batch of images.

        Args:
            pixels: RGB in [-1, 1], (B, 3, H, W).
            keep: Return the tokens at rows ``keep[0]::keep[2]`` and columns ``keep[1]::keep[2]``; all are computed.
            shift: Not needed: patches know their places in the image, whatever was moved.

        Returns:
            Features in raster order, (B, tokens, features).
        """
        features = self.encode(self.embed(self.normalize(pixels)))
        if keep is None:
            return features
        row, column, stride = keep
        side = math.isqrt(features.shape[1])
        grid = features.view(len(features), side, side, -1)
        return grid[:, row::stride, column::stride].flatten(1, 2)

    def look(self, pixels: torch.Tensor, *, whole: bool) -> torch.Tensor:
        """The blocks' input, (1, tokens, width); if ``whole``, what comes out of them, (1, patches, features)."""
        glance = self.embed(self.normalize(pixels))
        return self.encode(glance) if whole else glance

    def tokens(
        self, glance: torch.Tensor, wanted: torch.Tensor | None = None, memory: KeysValues | None = None
    ) -> torch.Tensor:
        """Features of some tokens of one image.

        Args:
            glance: From :meth:`look`; ``whole`` without a memory, and not with one.
            wanted: Which tokens, bool, (patches,); ``None`` for all.
            memory: Keys and values of the other tokens; see :meth:`encode`.

        Returns:
            (n, features).
        """
        if memory is not None:
            return self.encode(glance, memory, wanted)[0]
        return glance[0] if wanted is None else glance[0, wanted]

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """RGB in [-1, 1] → with the mean and deviation that this transformer wants."""
        centre, spread = (pixels.new_tensor(part).view(3, 1, 1) for part in (self._centre, self._spread))
        return (pixels - centre) / spread
