"""Attention and feed-forward of vision and diffusion transformers, and the cache in the attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

LAYER_NORM_EPS = 1e-6
Encode: TypeAlias = Callable[..., torch.Tensor]
""":meth:`lac_vla.models.siglip.SiglipTower.encode`, or another transformer's."""


class KVCache(Protocol):
    """Takes a block's new keys and values, and gives those that its attention sees."""

    def update(
        self, block: int, rows: torch.Tensor | None, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the new keys and values of some rows, and return those that attention is to see.

        Args:
            block: Number of the block.
            rows: Which of the tokens they are, int64; ``None`` for all.
            keys: (B, heads, rows, head_dim).
            values: As ``keys``.

        Returns:
            Keys and values of all tokens, each (B, heads, tokens, head_dim).
        """
        ...


@dataclass
class ImageKVCache:
    """Caches the keys and values of one image's tokens in every block, each (1, heads, tokens, head_dim)."""

    blocks: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Memory that they take, bytes."""
        return sum(part.numel() * part.element_size() for block in self.blocks for part in block)

    def update(
        self, block: int, rows: torch.Tensor | None, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put the ``rows`` (int64; ``None`` for all) in their places, and return the keys and values of all tokens."""
        if rows is None:  # copies: the projection's output, queries included, is not kept
            self.blocks[block : block + 1] = [(keys.contiguous(), values.contiguous())]
        else:
            for slots, new in zip(self.blocks[block], (keys, values), strict=True):
                slots.index_copy_(2, rows, new)
        return self.blocks[block]

    def run(
        self, encode: Encode, x: torch.Tensor, rows: torch.Tensor | None, *conditions: torch.Tensor
    ) -> torch.Tensor:
        """Run a transformer's blocks over this cache.

        Args:
            encode: A method of it, which takes ``x``, this cache, ``rows`` and the conditions.
            x: Embedded tokens, (1, tokens, width).
            rows: Which of them to compute, int64; ``None`` for all.
            conditions: What the blocks are conditioned on.

        Returns:
            Features, (1, n, features).
        """
        return encode(x, self, rows, *conditions)


@dataclass
class FrameKVCache:
    """Keys and values that the vision transformers keep from one frame to the next.

    Attributes:
        images: (Number of the transformer, number of the camera) → its keys and values.
    """

    images: dict[tuple[int, int], ImageKVCache] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Memory that they take, bytes."""
        return sum(image.nbytes for image in self.images.values())

    def of(self, tower: int, camera: int) -> ImageKVCache:
        """Get those of a transformer and a camera's image."""
        return self.images.setdefault((tower, camera), ImageKVCache())


class Attention(nn.Module):
    """Self-attention over all tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(
        self, x: torch.Tensor, cache: KVCache | None = None, block: int = 0, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run (B, tokens, width) → the same; with a cache, ``x`` may be some ``rows`` of the tokens that it holds."""
        queries, keys, values = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if cache is not None:
            keys, values = cache.update(block, rows, keys, values)
        out: torch.Tensor = self.proj(attend_all(queries, keys, values, x.dtype))
        return out


def attend_all(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Let every row see every token: (B, heads, rows, head_dim) → (B, rows, heads · head_dim).

    Under autocast in ``dtype``, the residual stream's: on a CPU the backward pass is several times faster.
    """
    with torch.autocast(queries.device.type, enabled=False):
        attended = F.scaled_dot_product_attention(queries.to(dtype), keys.to(dtype), values.to(dtype))
    return attended.transpose(1, 2).flatten(2)


class FeedForward(nn.Module):
    """Two linear layers with a GELU between them, exact or ``approximate="tanh"``."""

    def __init__(self, width: int, hidden: int, approximate: str = "none") -> None:
        super().__init__()
        self.approximate = approximate
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run both layers: (..., width) → the same."""
        out: torch.Tensor = self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))
        return out
