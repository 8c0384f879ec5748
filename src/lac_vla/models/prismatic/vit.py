"""Vision transformers (DINOv2 with registers, SigLIP) under the parameter names of timm and OpenVLA."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from lac_vla.models.prismatic.towers import Keep, ViTConfig
from lac_vla.models.transformer import LAYER_NORM_EPS, Attention, FeedForward, ImageKVCache, KVCache
from lac_vla.transfer import constant, upload
from lac_vla.types import BoolArray


class PatchEmbed(nn.Module):
    """Images → one row per patch."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.width, config.patch, stride=config.patch)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Embed (B, 3, H, W) → (B, patches, width), raster order."""
        embedded: torch.Tensor = self.proj(pixels)
        return embedded.flatten(2).transpose(1, 2)


class LayerScale(nn.Module):
    """A learned gain per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale_factor = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scale (..., width) → the same."""
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
        film = config.language
        self.scale = None if film is None else nn.Linear(film, config.width)
        self.shift = None if film is None else nn.Linear(film, config.width)

    def forward(
        self,
        x: torch.Tensor,
        cache: KVCache | None = None,
        block: int = 0,
        rows: torch.Tensor | None = None,
        language: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the block: (B, tokens, width) → the same; see :class:`Attention` and :meth:`ViT.encode`."""
        x = x + self.ls1(self.attn(self.norm1(x), cache, block, rows))
        if self.scale is not None and self.shift is not None:
            x = x * (1 + self.scale(language)) + self.shift(language)
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
        """Encode normalised images: (B, 3, H, W) → (B, patches, features)."""
        return self.encode(self.embed(pixels))

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        """Embed normalised images: (B, 3, H, W) → (B, class and register tokens + patches, width)."""
        x = self.patch_embed(pixels) + self.pos_embed
        extra = [token for token in (self.cls_token, self.reg_token) if token is not None]
        return torch.cat([*(token.expand(len(x), -1, -1) for token in extra), x], dim=1)

    def encode(
        self,
        x: torch.Tensor,
        cache: KVCache | None = None,
        rows: torch.Tensor | None = None,
        language: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the blocks.

        Args:
            x: From :meth:`embed`, (B, tokens, width); B = 1 with :class:`ImageKVCache`.
            cache: Keys and values of the same image's predecessors: they take the place of the tokens that are not in
                ``rows``, and are brought up to date where they are. A new one is filled.
            rows: Tokens to compute, int64, class and register tokens first and all of them; ``None`` for all.
            language: What blocks with FiLM are conditioned on, (language,).

        Returns:
            Features of their patches, (B, patches, features).
        """
        extra = self._extra
        if rows is not None:
            x = x[:, rows]
        for index, block in enumerate(self.blocks):
            x = block(x, cache, index, rows, language)
        features: torch.Tensor = self.neck(x[:, extra:])
        return features

    @property
    def _extra(self) -> int:
        """Number of class and register tokens."""
        return sum(token.shape[1] for token in (self.cls_token, self.reg_token) if token is not None)

    def encode_tokens(
        self,
        stem: torch.Tensor,
        token_mask: BoolArray | None = None,
        cache: ImageKVCache | None = None,
        language: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute the features of some patches of one image, (n, features).

        Args:
            stem: With a cache, from :meth:`embed`, (1, tokens, width); else all features, (1, patches, features).
            token_mask: Which patches, bool, (patches,); ``None`` for all. Class and register tokens always are.
            cache: Keys and values of the others; see :meth:`encode`.
            language: See :meth:`encode`; not needed of features.
        """
        if cache is not None:
            rows = None
            if token_mask is not None:
                computed = np.concatenate([np.ones(self._extra, dtype=np.bool_), token_mask])
                rows = upload(np.flatnonzero(computed), stem.device)
            return cache.run(self.encode, stem, rows, *(() if language is None else (language,)))[0]
        return stem[0] if token_mask is None else stem[0, upload(np.flatnonzero(token_mask), stem.device)]


class ViTTower(ViT):
    """A vision transformer as the tower of one camera; it takes images as the convolutional one does.

    Args:
        config: Its shape.
        image_size: Side of its images, pixels.
    """

    def __init__(self, config: ViTConfig, image_size: int) -> None:
        super().__init__(config, image_size)
        self._centre = tuple(2 * value - 1 for value in config.mean)
        self._spread = tuple(2 * value for value in config.std)

    def forward(
        self, pixels: torch.Tensor, keep: Keep | None = None, shift: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute the tokens of a batch of images as :meth:`lac_vla.models.prismatic.conv.ConvTower.forward` does.

        All tokens are computed, and those of ``keep`` returned. ``shift`` is not needed: patches know their places in
        the image, whatever was moved.
        """
        features = self.encode(self.embed(self.normalize(pixels)))
        if keep is None:
            return features
        row, column, stride = keep
        side = math.isqrt(features.shape[1])
        grid = features.view(len(features), side, side, -1)
        return grid[:, row::stride, column::stride].flatten(1, 2)

    def encode_stem(self, pixels: torch.Tensor, *, whole: bool) -> torch.Tensor:
        """Compute the blocks' input, (1, tokens, width); if ``whole``, their output, (1, patches, features)."""
        stem = self.embed(self.normalize(pixels))
        return self.encode(stem) if whole else stem

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """Give RGB in [-1, 1] the mean and deviation that this transformer wants."""
        centre, spread = (
            constant(part, pixels.device, pixels.dtype).view(3, 1, 1) for part in (self._centre, self._spread)
        )
        return (pixels - centre) / spread
