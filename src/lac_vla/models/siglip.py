"""SigLIP's vision transformer under its Hugging Face parameter names, and a vision encoder of one for all cameras."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from lac_vla.errors import CheckpointError
from lac_vla.models.protocols import StaticVision
from lac_vla.models.transformer import LAYER_NORM_EPS, FeedForward, FrameKVCache, KVCache, attend_all
from lac_vla.transfer import upload
from lac_vla.types import BoolArray, Frame, UInt8Image

Picture: TypeAlias = Callable[[UInt8Image], torch.Tensor]
"""A camera's image, (H, W, 3), uint8 → what the tower sees: RGB in about [-1, 1], float32, (3, size, size)."""
BATCHED_PATCHES = 512
"""On a CPU, images of more patches run one by one, to the bit the same: together they outgrow a core's cache."""


@dataclass(frozen=True)
class SiglipConfig:
    """A SigLIP vision transformer.

    Attributes:
        width: Channels.
        depth: Blocks.
        heads: Attention heads.
        mlp_width: Hidden channels of a block's feed-forward network.
        patch: Side of a patch, pixels.
        table: Patches per side that it has learned positions for.
        image_size: Side of its images, pixels; 0 for ``table`` · ``patch``. Smaller ones take the positions at the
            same fractions of the picture.

    Raises:
        CheckpointError: If the patches do not tile the image, or there are more of them than positions.
    """

    width: int
    depth: int
    heads: int
    mlp_width: int
    patch: int
    table: int
    image_size: int = 0

    def __post_init__(self) -> None:
        """Check that the parts fit together."""
        if min(self.width, self.depth, self.heads, self.mlp_width, self.patch, self.table) < 1:
            raise CheckpointError(f"a vision tower of {self}: give at least 1 of everything")
        if self.image_size % self.patch or not 0 < self.side <= self.table:
            raise CheckpointError(
                f"images of {self.image_size} pixels, patches of {self.patch}: give a multiple of {self.patch} up to "
                f"{self.patch * self.table}"
            )
        if self.width % self.heads:
            raise CheckpointError(f"a vision tower of width {self.width} cannot have {self.heads} heads")

    @property
    def side(self) -> int:
        """Patches per side of an image."""
        return self.image_size // self.patch if self.image_size else self.table

    @property
    def pixels(self) -> int:
        """Side of its images, pixels."""
        return self.side * self.patch


class SiglipAttention(nn.Module):
    """Self-attention over all patches."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.out_proj = nn.Linear(width, width)

    def forward(
        self, x: torch.Tensor, cache: KVCache | None = None, block: int = 0, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run (B, patches, width) → the same; with a cache, ``x`` may be some ``rows`` of the patches in it."""
        parts = (part(x).unflatten(-1, (self.heads, -1)) for part in (self.q_proj, self.k_proj, self.v_proj))
        queries, keys, values = (part.transpose(1, 2) for part in parts)
        if cache is not None:
            keys, values = cache.update(block, rows, keys, values)
        out: torch.Tensor = self.out_proj(attend_all(queries, keys, values, x.dtype))
        return out


class SiglipBlock(nn.Module):
    """Attention and feed-forward, each normalised before and added to its input."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.self_attn = SiglipAttention(config.width, config.heads)
        self.layer_norm2 = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.mlp = FeedForward(config.width, config.mlp_width, approximate="tanh")

    def forward(
        self, x: torch.Tensor, cache: KVCache | None = None, block: int = 0, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run the block: (B, patches, width) → the same; see :class:`SiglipAttention`."""
        x = x + self.self_attn(self.layer_norm1(x), cache, block, rows)
        out: torch.Tensor = x + self.mlp(self.layer_norm2(x))
        return out


class SiglipTower(nn.Module):
    """A SigLIP vision transformer, its last normalisation included.

    Args:
        config: Its shape.
    """

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = nn.ModuleDict(
            {
                "patch_embedding": nn.Conv2d(3, config.width, config.patch, stride=config.patch),
                "position_embedding": nn.Embedding(config.table**2, config.width),
            }
        )
        self._blocks = [SiglipBlock(config) for _ in range(config.depth)]
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(self._blocks)})
        self.post_layernorm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode RGB in [-1, 1]: (B, 3, size, size) → (B, patches, width), raster order."""
        return self.encode(self.embed(pixels))

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        """Embed RGB in [-1, 1]: (B, 3, size, size) → (B, patches, width)."""
        rows = self.embeddings["patch_embedding"](pixels).flatten(2).transpose(1, 2)
        at = torch.arange(self.config.side, device=pixels.device) * self.config.table // self.config.side
        places = (at[:, None] * self.config.table + at).flatten()
        embedded: torch.Tensor = rows + self.embeddings["position_embedding"](places)
        return embedded

    def encode(self, x: torch.Tensor, cache: KVCache | None = None, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Run the blocks.

        Args:
            x: From :meth:`embed`, (B, patches, width); B = 1 with ``rows``.
            cache: Keys and values of the same image's predecessors: they take the place of the patches that are not in
                ``rows``, and are brought up to date where they are. A new one is filled.
            rows: Patches to compute, int64, in any order; ``None`` for all.

        Returns:
            Features of these patches, (B, patches, width).
        """
        if cache is None and len(x) > 1 and x.shape[1] > BATCHED_PATCHES and x.device.type == "cpu":
            return torch.cat([self.encode(image) for image in torch.split(x, 1)])
        if rows is not None:
            x = x[:, rows]
        for index, block in enumerate(self._blocks):
            x = block(x, cache, index, rows)
        out: torch.Tensor = self.post_layernorm(x)
        return out


class SiglipVision(StaticVision):
    """Sees through one SigLIP tower for all cameras.

    A token's features are those of a block of patches, one behind the other in raster order.

    Args:
        tower: The transformer.
        project: Features row by row, (..., features) → (..., width).
        cameras: Names of the cameras in ``Frame.images``, in token order.
        picture: Makes what the tower sees.
        block: Side of a token, patches.

    Raises:
        CheckpointError: If blocks do not tile the patches.
    """

    def __init__(
        self,
        tower: SiglipTower,
        project: Callable[[torch.Tensor], torch.Tensor],
        cameras: Sequence[str],
        picture: Picture,
        block: int = 1,
    ) -> None:
        side = tower.config.side
        if side % block:
            raise CheckpointError(f"{side} × {side} patches do not make tokens of {block} × {block}")
        self._tower, self._project, self._names, self._picture = tower, project, tuple(cameras), picture
        self._patches = token_patches(side, block)

    @property
    def transformer_cameras(self) -> tuple[str, ...]:
        """Cameras that vision transformers see: all."""
        return self._names

    @property
    def _like(self) -> torch.Tensor:
        weight: torch.Tensor = self._tower.post_layernorm.weight
        return weight

    def token_patches(self, camera: str) -> torch.Tensor:
        """List the patches of every token of a camera, int64, (tokens, patches of a token)."""
        return self._patches

    def kv_cache(self) -> FrameKVCache:
        """Make an empty cache."""
        return FrameKVCache()

    def inputs(self, frames: Sequence[Frame], images: Sequence[Mapping[str, UInt8Image]]) -> list[torch.Tensor]:
        """Upload what the tower sees of all frames and cameras, (frames · cameras, 3, size, size), float32.

        The images are resized in floating point from the frames' own; ``images``, which are rounded, only name them.
        """
        pixels = torch.stack(
            [
                self._picture(frame.images[name])
                for frame, seen in zip(frames, images, strict=True)
                for name in self._names
                if name in seen
            ]
        )
        return [upload(pixels, self._like.device)]

    def stem(self, *inputs: torch.Tensor, whole: bool) -> torch.Tensor:
        """Embed the patches of all cameras, (cameras, patches, width); and run the blocks if ``whole``."""
        stem = self._tower.embed(inputs[0].to(self._like.dtype))
        return self._tower.encode(stem) if whole else stem

    def split_stem(self, stem: torch.Tensor) -> Sequence[torch.Tensor]:
        """Take a stem apart by cameras; see :class:`lac_vla.models.protocols.SplitsStems`."""
        return torch.split(stem, 1)

    def join_stem(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Put the cameras' parts together."""
        return torch.cat(list(parts))

    def encode_stems(self, frames: Sequence[Frame], images: Sequence[Mapping[str, UInt8Image]]) -> list[torch.Tensor]:
        """Embed the patches of all cameras of several frames, and run the blocks: each (cameras, patches, width)."""
        return list(torch.split(self.stem(*self.inputs(frames, images), whole=True), len(self._names)))

    def encode_tokens(
        self, stem: torch.Tensor, token_mask: BoolArray | None = None, kv_cache: FrameKVCache | None = None
    ) -> torch.Tensor:
        """Compute the features of the tokens in ``token_mask`` (all by default), (n, features)."""
        if self._patches.device != stem.device:  # once
            with torch.inference_mode(mode=False):  # it may meet a gradient later
                self._patches = self._patches.to(stem.device)
        table, mask = self._patches, None if token_mask is None or token_mask.all() else token_mask
        if kv_cache is None:
            features = stem[:, table].flatten(2).flatten(0, 1)
            return features if mask is None else features[upload(np.flatnonzero(mask), stem.device)]
        cameras = []
        for camera, own in enumerate(stem):
            chosen = None
            if mask is not None:
                chosen = table[upload(np.flatnonzero(mask.reshape(len(stem), -1)[camera]), stem.device)]
            rows = None if chosen is None else chosen.flatten()
            features = kv_cache.of(0, camera).run(self._tower.encode, own[None], rows)[0]
            cameras.append(features[table] if chosen is None else features)
        return torch.cat([part.reshape(-1, table.shape[1] * stem.shape[-1]) for part in cameras])

    def encode_camera(self, camera: str, images: torch.Tensor, kv_cache: Any) -> torch.Tensor:
        """Run the transformer over a batch of one camera's images, differentiably; they may be rounded.

        Args:
            camera: Its name in ``Frame.images``.
            images: uint8, (B, H, W, 3).
            kv_cache: ``of(tower, camera)`` gives the :class:`lac_vla.models.transformer.KVCache` of an image.

        Returns:
            Projected tokens, (B, tokens, width).
        """
        pixels = (images.permute(0, 3, 1, 2).float() / 127.5 - 1.0).to(self._like.dtype)
        features = self._tower.encode(self._tower.embed(pixels), kv_cache.of(0, self._names.index(camera)))
        return self.project(features[:, self._patches.to(features.device)].flatten(2))

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """Project features row by row: (..., features) → (..., width)."""
        return self._project(features)


def token_patches(side: int, block: int) -> torch.Tensor:
    """List the patches of every token of ``side`` × ``side`` patches, int64, (tokens, block²), all in raster order."""
    patches = torch.arange(side * side).view(side // block, block, side // block, block)
    return patches.transpose(1, 2).reshape(-1, block * block)


def as_uint8(picture: torch.Tensor) -> UInt8Image:
    """Round what a tower sees, RGB in [-1, 1], (3, H, W), to an image, uint8, (H, W, 3); what is below −1 is black."""
    pixels = ((picture + 1.0) * 127.5).round().clamp(0.0, 255.0)
    image: UInt8Image = pixels.to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    return image
