"""A Prismatic VLA's vision encoder: images → features → projected visual tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lac_vla.models.prismatic.model import PrismaticVLA
from lac_vla.models.prismatic.towers import ViTConfig
from lac_vla.models.prismatic.vision import Stem
from lac_vla.models.transformer import FrameKVCache
from lac_vla.transfer import upload
from lac_vla.types import BoolArray, Frame, UInt8Image


class PrismaticVision:
    """Implements :class:`lac_vla.models.protocols.VisionEncoder` for OpenVLA and its relatives.

    Args:
        model: The modules.
        cameras: Names of the cameras in ``Frame.images``, in the model's order.
    """

    def __init__(self, model: PrismaticVLA, cameras: Sequence[str]) -> None:
        self._model = model
        self._names = dict(zip(cameras, model.vision_backbone.grids, strict=True))

    @property
    def transformer_cameras(self) -> tuple[str, ...]:
        """Cameras that vision transformers see."""
        config = self._model.config
        cameras = zip(self._names, config.cameras, strict=True)
        return tuple(name for name, own in cameras if own.tower is None or isinstance(own.tower, ViTConfig))

    def token_patches(self, camera: str) -> torch.Tensor:
        """List the patches of every token of a camera, one, int64, (tokens, 1)."""
        rows, cols = self._model.vision_backbone.grids[self._names[camera]]
        return torch.arange(rows * cols)[:, None]

    def kv_cache(self) -> FrameKVCache | None:
        """Make an empty cache; ``None`` if all towers are convolutions."""
        return FrameKVCache() if self.transformer_cameras else None

    def encode_stem(self, frame: Frame, images: Mapping[str, UInt8Image], kv_cache: FrameKVCache | None = None) -> Stem:
        """Run what does not depend on which tokens matter; see :class:`lac_vla.models.protocols.VisionEncoder`."""
        return self._model.vision_backbone.encode_stem(self._pixels(images), whole=kv_cache is None)

    def split_stem(self, stem: Any) -> Sequence[Any]:
        """Take a stem apart by cameras; see :class:`lac_vla.models.protocols.SplitsStems`."""
        return self._model.vision_backbone.split_stem(stem)

    def join_stem(self, parts: Sequence[Any]) -> Any:
        """Put the cameras' parts together."""
        return self._model.vision_backbone.join_stem(parts)

    def encode_stems(self, frames: Sequence[Frame], images: Sequence[Mapping[str, UInt8Image]]) -> list[Stem]:
        """Run it for several frames at once; see :class:`lac_vla.models.protocols.VisionEncoder`."""
        pixels = {
            own: self._normalize(torch.from_numpy(np.stack([seen[name] for seen in images])))
            for name, own in self._names.items()
        }
        return self._model.vision_backbone.encode_stems(pixels)

    def encode_tokens(
        self, stem: Stem, token_mask: BoolArray | None = None, kv_cache: FrameKVCache | None = None
    ) -> torch.Tensor:
        """Compute the features of the tokens in ``token_mask`` (all by default), (n, features)."""
        return self._model.vision_backbone.encode_tokens(stem, some(token_mask), kv_cache)

    def encode_camera(self, camera: str, images: torch.Tensor, kv_cache: Any) -> torch.Tensor:
        """Run a camera's transformers differentiably: uint8, (B, H, W, 3) → projected tokens, (B, tokens, width).

        ``kv_cache.of(tower, camera)`` gives the :class:`lac_vla.models.transformer.KVCache` of an image.
        """
        number, pixels = list(self._names).index(camera), self._normalize(images)
        return self.project(self._model.vision_backbone.encode_camera(number, pixels, kv_cache))

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """Project features row by row: (..., features) → (..., width)."""
        rows: torch.Tensor = self._model.projector(features)
        return rows

    def _pixels(self, images: Mapping[str, UInt8Image]) -> dict[str, torch.Tensor]:
        """Normalise one frame's images, by the model's own names of the cameras."""
        names = {name: own for name, own in self._names.items() if name in images}
        return {own: self._normalize(torch.from_numpy(images[name])[None]) for name, own in names.items()}

    def _normalize(self, images: torch.Tensor) -> torch.Tensor:
        weight = self._model.language_model.lm_head.weight
        return self._model.vision_backbone.normalize(upload(images, weight.device)).to(weight.dtype)


def some(token_mask: BoolArray | None) -> BoolArray | None:
    """Return the mask unless it holds every token."""
    return None if token_mask is None or token_mask.all() else token_mask
