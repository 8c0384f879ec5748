"""The vision backbones: the cameras' images → features of every visual token. Batched and differentiable."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch import nn

from lac_vla.models.prismatic.config import PrismaticConfig
from lac_vla.models.prismatic.conv import ConvTower
from lac_vla.models.prismatic.towers import Keep, ViTConfig
from lac_vla.models.prismatic.vit import ViT, ViTTower
from lac_vla.models.transformer import FrameKVCache
from lac_vla.transfer import constant
from lac_vla.types import BoolArray

Stem: TypeAlias = Sequence[torch.Tensor]
"""Per camera or transformer, what a backbone's ``encode_stem`` returns and its ``encode_tokens`` goes on from."""


class VisionBackbone(nn.Module):
    """Towers over the images of all cameras.

    Attributes:
        grids: Camera → (rows, cols) of its tokens, in token order.
    """

    grids: dict[str, tuple[int, int]]

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Make pixel values of RGB images: uint8, (B, H, W, 3) → float32, (B, C, H, W)."""
        raise NotImplementedError

    def encode_stem(self, pixel_values: Mapping[str, torch.Tensor], *, whole: bool, **conditions: torch.Tensor) -> Stem:
        """Compute of one frame what does not depend on which tokens matter.

        Args:
            pixel_values: Camera → normalised images, (1, C, H, W); perhaps of some cameras alone.
            whole: Run the blocks of transformers, too: without a cache, they need all patches in any case.
            conditions: As in :meth:`encode_tokens`.
        """
        raise NotImplementedError

    def encode_stems(self, pixel_values: Mapping[str, torch.Tensor]) -> list[Stem]:
        """Compute the stems of several frames, ``whole`` and without conditions.

        Args:
            pixel_values: Camera → normalised images, (frames, C, H, W).
        """
        raise NotImplementedError

    def split_stem(self, stem: Stem) -> list[Stem]:
        """Take a stem of :meth:`encode_stem` apart: what is a camera's own, for every one of them."""
        raise NotImplementedError

    def join_stem(self, parts: Sequence[Stem]) -> Stem:
        """Put the stems of single cameras together, in order."""
        raise NotImplementedError

    def encode_tokens(
        self,
        stem: Stem,
        token_mask: BoolArray | None = None,
        cache: FrameKVCache | None = None,
        **conditions: torch.Tensor,
    ) -> torch.Tensor:
        """Compute the features of some tokens.

        A convolution runs its last layer, about half of its work, for these alone; a transformer with a cache all
        blocks.

        Args:
            stem: From :meth:`encode_stem`; ``whole`` without a cache, and not with one.
            token_mask: Which tokens, bool, (N,); ``None`` for all.
            cache: Keys and values of the transformers' other tokens; see :meth:`ViT.encode`.
            conditions: What the blocks are conditioned on: ``language``, see :meth:`ViT.encode`.

        Returns:
            (n, F): without a cache, the same numbers as in :meth:`forward`.
        """
        sizes = [rows * cols for rows, cols in self.grids.values()]
        masks = [None] * len(sizes) if token_mask is None else np.split(token_mask, np.cumsum(sizes)[:-1])
        cameras = []
        for camera, mask in enumerate(masks):
            towers = [
                tower.encode_tokens(x, mask, None if cache is None else cache.of(number, camera), **conditions)
                for number, (tower, x) in enumerate(self._towers(camera, stem))
            ]
            cameras.append(torch.cat(towers, dim=-1))
        return torch.cat(cameras)

    def encode_camera(self, camera: int, pixels: torch.Tensor, cache: Any) -> torch.Tensor:
        """Run the transformers over a batch of one camera's normalised images: (B, C, H, W) → (B, patches, F)."""
        raise NotImplementedError

    def _towers(self, camera: int, stem: Stem) -> Iterable[tuple[Any, torch.Tensor]]:
        """List a camera's towers, each with its part of the stem."""
        raise NotImplementedError


class ViTBackbone(VisionBackbone):
    """One or two vision transformers, shared by all cameras; the features of two are concatenated."""

    def __init__(self, config: PrismaticConfig) -> None:
        super().__init__()
        size = config.cameras[0].image_size
        side = size // config.vit_towers[0].patch
        self.grids = {camera.name: (side, side) for camera in config.cameras}
        self.featurizer = ViT(config.vit_towers[0], size)
        self.fused_featurizer = ViT(config.vit_towers[1], size) if len(config.vit_towers) == 2 else None
        self._mean = tuple(value for tower in config.vit_towers for value in tower.mean)
        self._std = tuple(value for tower in config.vit_towers for value in tower.std)

    @property
    def vits(self) -> list[ViT]:
        """The transformers, in the order of their features."""
        return [self.featurizer] if self.fused_featurizer is None else [self.featurizer, self.fused_featurizer]

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """See :meth:`VisionBackbone.normalize`: three channels for each transformer."""
        pixels = images.permute(0, 3, 1, 2).float() / 255.0
        mean, std = (constant(part, pixels.device, pixels.dtype).view(-1, 1, 1) for part in (self._mean, self._std))
        return (pixels.repeat(1, len(self._mean) // 3, 1, 1) - mean) / std

    def encode_stem(self, pixel_values: Mapping[str, torch.Tensor], *, whole: bool, **conditions: torch.Tensor) -> Stem:
        """See :meth:`VisionBackbone.encode_stem`; of every transformer, for all cameras together."""
        pixels = torch.cat([pixel_values[name] for name in self.grids if name in pixel_values])
        stem = [vit.embed(part) for vit, part in zip(self.vits, torch.split(pixels, 3, dim=1), strict=False)]
        if not whole:
            return stem
        language = conditions.get("language")
        return [vit.encode(x, language=language) for vit, x in zip(self.vits, stem, strict=True)]

    def encode_stems(self, pixel_values: Mapping[str, torch.Tensor]) -> list[Stem]:
        """See :meth:`VisionBackbone.encode_stems`; of every transformer, for all frames and cameras together."""
        pixels = torch.stack([pixel_values[name] for name in self.grids], dim=1).flatten(0, 1)
        parts = zip(self.vits, torch.split(pixels, 3, dim=1), strict=False)
        stems = [torch.split(vit.encode(vit.embed(part)), len(self.grids)) for vit, part in parts]
        return list(zip(*stems, strict=True))

    def split_stem(self, stem: Stem) -> list[Stem]:
        """See :meth:`VisionBackbone.split_stem`."""
        return list(zip(*(torch.split(tower, 1) for tower in stem), strict=True))

    def join_stem(self, parts: Sequence[Stem]) -> Stem:
        """See :meth:`VisionBackbone.join_stem`."""
        return [torch.cat(tower) for tower in zip(*parts, strict=True)]

    def encode_camera(self, camera: int, pixels: torch.Tensor, cache: Any) -> torch.Tensor:
        """See :meth:`VisionBackbone.encode_camera`."""
        parts = zip(self.vits, torch.split(pixels, 3, dim=1), strict=True)
        features = [vit.encode(vit.embed(three), cache.of(tower, camera)) for tower, (vit, three) in enumerate(parts)]
        return torch.cat(features, dim=-1)

    def _towers(self, camera: int, stem: Stem) -> Iterable[tuple[Any, torch.Tensor]]:
        return zip(self.vits, (x[camera : camera + 1] for x in stem), strict=True)

    def forward(self, pixel_values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Compute the features of all cameras: camera → normalised images, (B, C, H, W) → (B, N, F)."""
        pixels = torch.stack([pixel_values[name] for name in self.grids], dim=1)
        batch, pixels = len(pixels), pixels.flatten(0, 1)
        parts = zip(self.vits, torch.split(pixels, 3, dim=1), strict=False)
        features = torch.cat([vit(part) for vit, part in parts], dim=-1)
        return features.reshape(batch, -1, features.shape[-1])


class PerCameraBackbone(VisionBackbone):
    """A tower per camera, each a convolution or a vision transformer of its own.

    Attributes:
        towers: Camera → :class:`ConvTower` or :class:`ViTTower`.
    """

    def __init__(self, config: PrismaticConfig) -> None:
        super().__init__()
        self.grids, self.towers = {}, nn.ModuleDict()
        for camera in config.cameras:
            if camera.tower is not None:
                side = camera.image_size // camera.tower.stride
                self.grids[camera.name] = (side, side)
                self.towers[camera.name] = (
                    ViTTower(camera.tower, camera.image_size)
                    if isinstance(camera.tower, ViTConfig)
                    else ConvTower(camera.tower)
                )

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Scale RGB images to [-1, 1]: uint8, (B, H, W, 3) → float32, (B, 3, H, W)."""
        return images.permute(0, 3, 1, 2).float() / 127.5 - 1.0

    def encode_stem(self, pixel_values: Mapping[str, torch.Tensor], *, whole: bool, **conditions: torch.Tensor) -> Stem:
        """See :meth:`VisionBackbone.encode_stem`; of every camera, without conditions."""
        seen = [name for name in self.grids if name in pixel_values]
        return [cast(Any, self.towers[name]).encode_stem(pixel_values[name], whole=whole) for name in seen]

    def split_stem(self, stem: Stem) -> list[Stem]:
        """See :meth:`VisionBackbone.split_stem`."""
        return [(camera,) for camera in stem]

    def join_stem(self, parts: Sequence[Stem]) -> Stem:
        """See :meth:`VisionBackbone.join_stem`."""
        return [camera for (camera,) in parts]

    def encode_stems(self, pixel_values: Mapping[str, torch.Tensor]) -> list[Stem]:
        """See :meth:`VisionBackbone.encode_stems`; of every camera, for all frames together."""
        cameras = [cast(Any, self.towers[name]).encode_stem(pixel_values[name], whole=True) for name in self.grids]
        return list(zip(*(torch.split(stem, 1) for stem in cameras), strict=True))

    def encode_tokens_of(self, stems: Sequence[Stem], token_masks: Sequence[BoolArray]) -> list[torch.Tensor]:
        """Compute the features of tokens of several frames, (n, F) each: convolutions for all of them together."""
        masks, start = np.stack(token_masks), 0
        cameras: list[Sequence[torch.Tensor]] = []
        for (name, (rows, cols)), parts in zip(self.grids.items(), zip(*stems, strict=True), strict=True):
            own, tower = masks[:, start : start + rows * cols], cast(Any, self.towers[name])
            start += rows * cols
            if isinstance(tower, ConvTower):
                features = tower.encode_tokens(torch.cat(parts), None if own.all() else own)
                cameras.append(torch.split(features, own.sum(axis=1).tolist()))
            else:
                cameras.append([tower.encode_tokens(part, mask) for part, mask in zip(parts, own, strict=True)])
        return [torch.cat(frame) for frame in zip(*cameras, strict=True)]

    def encode_camera(self, camera: int, pixels: torch.Tensor, cache: Any) -> torch.Tensor:
        """See :meth:`VisionBackbone.encode_camera`."""
        tower = cast(ViTTower, self.towers[list(self.grids)[camera]])
        return tower.encode(tower.embed(tower.normalize(pixels)), cache.of(0, camera))

    def _towers(self, camera: int, stem: Stem) -> Iterable[tuple[Any, torch.Tensor]]:
        return [(self.towers[list(self.grids)[camera]], stem[camera])]

    def forward(
        self,
        pixel_values: Mapping[str, torch.Tensor],
        keep: Mapping[str, Keep] | None = None,
        shift: Mapping[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Compute the features of all cameras.

        Args:
            pixel_values: Camera → RGB in [-1, 1], (B, 3, H, W).
            keep: Camera → regular subset of its tokens; of a camera that is absent, all are kept.
            shift: Camera → pixels by which an augmentation moved the content down and right, (B, 2).

        Returns:
            Features, (B, N, F); fewer rows than N if ``keep`` leaves some out.
        """
        subsets, shifts = keep or {}, shift or {}
        features = [
            tower(pixel_values[name], subsets.get(name), shifts.get(name)) for name, tower in self.towers.items()
        ]
        return torch.cat(features, dim=1)
