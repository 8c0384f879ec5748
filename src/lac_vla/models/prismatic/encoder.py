"""A Prismatic VLA's vision encoder: images → features → projected visual tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lac_vla.models.prismatic.model import PrismaticVLA
from lac_vla.models.prismatic.towers import ViTConfig
from lac_vla.models.prismatic.vision import PerCameraBackbone, Stem
from lac_vla.models.protocols import StaticVision
from lac_vla.models.transformer import FrameKVCache
from lac_vla.transfer import upload
from lac_vla.types import BoolArray, Frame, UInt8Image


class PrismaticVision(StaticVision):
    """Sees for OpenVLA and its relatives.

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

    def inputs(self, frames: Sequence[Frame], images: Sequence[Mapping[str, UInt8Image]]) -> list[torch.Tensor]:
        """Upload the pixels of every camera that the images are of, uint8, (frames, H, W, 3)."""
        names = [name for name in self._names if name in images[0]]
        return [self._upload(torch.from_numpy(np.stack([seen[name] for seen in images]))) for name in names]

    def stem(self, *inputs: torch.Tensor, whole: bool, names: Sequence[str] | None = None) -> Any:
        """Run what does not depend on which tokens matter; see :meth:`StaticVision.stem`.

        Args:
            inputs: From :meth:`inputs`.
            whole: Run the blocks of transformers, too.
            names: The cameras that they are of, in order; all by default.
        """
        return self._model.vision_backbone.encode_stem(self._pixels(inputs, names), whole=whole)

    def encode_stem(self, frame: Frame, images: Mapping[str, UInt8Image], kv_cache: Any = None) -> Any:
        """Run it for the cameras that the images are of; see :class:`lac_vla.models.protocols.VisionEncoder`."""
        names = [name for name in self._names if name in images]
        return self.stem(*self.inputs([frame], [images]), whole=kv_cache is None, names=names)

    def split_stem(self, stem: Any) -> Sequence[Any]:
        """Take a stem apart by cameras; see :class:`lac_vla.models.protocols.SplitsStems`."""
        return self._model.vision_backbone.split_stem(stem)

    def join_stem(self, parts: Sequence[Any]) -> Any:
        """Put the cameras' parts together."""
        return self._model.vision_backbone.join_stem(parts)

    def encode_stems(self, frames: Sequence[Frame], images: Sequence[Mapping[str, UInt8Image]]) -> list[Stem]:
        """Run it for several frames at once; see :class:`lac_vla.models.protocols.VisionEncoder`."""
        return self._model.vision_backbone.encode_stems(self._pixels(self.inputs(frames, images)))

    def encode_tokens(
        self, stem: Stem, token_mask: BoolArray | None = None, kv_cache: FrameKVCache | None = None
    ) -> torch.Tensor:
        """Compute the features of the tokens in ``token_mask`` (all by default), (n, features)."""
        return self._model.vision_backbone.encode_tokens(stem, some(token_mask), kv_cache)

    def encode_tokens_of(self, stems: Sequence[Any], token_masks: Sequence[BoolArray]) -> list[torch.Tensor]:
        """Run it for several frames at once; see :class:`lac_vla.models.protocols.VisionEncoder`."""
        backbone = self._model.vision_backbone
        if not isinstance(backbone, PerCameraBackbone):
            return super().encode_tokens_of(stems, token_masks)
        return backbone.encode_tokens_of(stems, token_masks)

    def encode_camera(self, camera: str, images: torch.Tensor, kv_cache: Any) -> torch.Tensor:
        """Run a camera's transformers differentiably: uint8, (B, H, W, 3) → projected tokens, (B, tokens, width).

        ``kv_cache.of(tower, camera)`` gives the :class:`lac_vla.models.transformer.KVCache` of an image.
        """
        number, pixels = list(self._names).index(camera), self._normalize(self._upload(images))
        return self.project(self._model.vision_backbone.encode_camera(number, pixels, kv_cache))

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """Project features row by row: (..., features) → (..., width)."""
        rows: torch.Tensor = self._model.projector(features)
        return rows

    def _upload(self, images: torch.Tensor) -> torch.Tensor:
        return upload(images, self._model.language_model.lm_head.weight.device)

    def _pixels(self, images: Sequence[torch.Tensor], names: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
        """Normalise images of some cameras, all by default, by the model's own names of them."""
        own = self._names.values() if names is None else [self._names[name] for name in names]
        return {name: self._normalize(seen) for name, seen in zip(own, images, strict=True)}

    def _normalize(self, images: torch.Tensor) -> torch.Tensor:
        return self._model.vision_backbone.normalize(images).to(self._model.language_model.lm_head.weight.dtype)


def some(token_mask: BoolArray | None) -> BoolArray | None:
    """Return the mask unless it holds every token."""
    return None if token_mask is None or token_mask.all() else token_mask
