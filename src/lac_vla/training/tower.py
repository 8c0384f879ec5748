"""Mixes keys and values in vision transformers, too: their pass in training when only active patches are recomputed.

As in :mod:`lac_vla.training.mixed`, all patches are computed, and in every block K = M·K_new + (1 − M)·K_old, and V
alike. With a hard M the active patches are exactly those of the option ``vision_kv_reuse`` (tested against the engine),
and both networks learn what a patch that grows stale does to the features of the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch

from lac_vla.engine.engine import Engine
from lac_vla.engine.options import EngineOptions
from lac_vla.errors import InputError
from lac_vla.models import VLA
from lac_vla.training.mixed import LayerKV, MixedKV
from lac_vla.types import TokenLayout


@dataclass(frozen=True, eq=False)
class VisionOutput:
    """The vision encoder's output for a batch of frames.

    Attributes:
        visual: Projected visual tokens, (B, N, width).
        slots: (Transformer, camera) → its patches' keys and values as the next frame finds them.
    """

    visual: torch.Tensor
    slots: Mapping[tuple[int, int], LayerKV]


class MixedTower:
    """Runs the frozen vision transformers of a model, and its projector.

    Args:
        vla: The model.

    Attributes:
        cameras: Those that transformers see.

    Raises:
        InputError: If there are none: the model sees by convolutions.
    """

    def __init__(self, vla: VLA) -> None:
        Engine(vla, EngineOptions(vision_kv_reuse=True))  # what the option refuses is refused here
        self._vision = cast(Any, vla.vision)
        if not hasattr(self._vision, "encode_camera"):
            raise InputError(f"{vla.name} has a vision tower that `lac train --vision-kv-reuse` does not know")
        self._layout = TokenLayout.of(vla.grids, 0, 0)
        self.cameras: tuple[str, ...] = self._vision.transformer_cameras
        if not self.cameras:
            raise InputError(f"{vla.name}'s vision tower depends on the instruction: leave out --vision-kv-reuse")

    def encode(
        self,
        images: Mapping[str, torch.Tensor],
        visual: torch.Tensor,
        mask: torch.Tensor | None = None,
        old: Mapping[tuple[int, int], LayerKV] | None = None,
    ) -> VisionOutput:
        """Run the transformers.

        Args:
            images: Each of ``cameras`` → what its tower sees, uint8, (B, H, W, 3).
            visual: Projected tokens of whole towers, (B, N, width); they stand for the other cameras: a convolution's
                features do not depend on what else is computed.
            mask: M, 1 = active, (B, N); ``None`` for a dense pass.
            old: The preceding frame's slots; needed with a mask.
        """
        slots: dict[tuple[int, int], LayerKV] = {}
        parts = []
        for camera in self._layout.cameras:
            if camera.name not in self.cameras:
                parts.append(visual[:, camera.tokens])
                continue
            patches = self._vision.token_patches(camera.name)
            caches = _MixedCaches(patches, None if mask is None else mask[:, camera.tokens], old)
            parts.append(self._vision.encode_camera(camera.name, images[camera.name], caches))
            slots |= {key: cache.slots for key, cache in caches.used.items()}
        return VisionOutput(torch.cat(parts, dim=1), slots)


class _MixedCaches:
    """Stands for the cache of a camera's transformers; see :class:`lac_vla.models.transformer.KVCache`."""

    def __init__(
        self, patches: torch.Tensor, mask: torch.Tensor | None, old: Mapping[tuple[int, int], LayerKV] | None
    ) -> None:
        # The patches stand behind class and register tokens, which are always new.
        self._visual, self._mask, self._old = slice(-patches.numel(), None), mask, old or {}
        if mask is not None and patches.shape[1] > 1:
            own = mask[:, :, None].expand(-1, -1, patches.shape[1])
            self._mask = own.flatten(1)[:, patches.flatten().argsort().to(mask.device)]
        self.used: dict[tuple[int, int], MixedKV] = {}

    def of(self, tower: int, camera: int) -> MixedKV:
        key = (tower, camera)
        return self.used.setdefault(key, MixedKV(self._visual, self._mask, self._old.get(key)))
