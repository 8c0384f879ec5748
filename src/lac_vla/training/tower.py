"""Mixed keys and values one storey up: a vision transformer that recomputes the active patches alone, in training.

As in :mod:`lac_vla.training.mixed`, all patches are computed, and in every block K = M·K_new + (1 − M)·K_old, and V
alike. With a hard M the active patches are exactly those of the option ``vision_kv_reuse`` (tested against the
engine), and both networks learn what a patch that grows stale does to the features of the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from lac_vla.engine.options import EngineOptions
from lac_vla.errors import InputError
from lac_vla.models import CogACTBackbone, PrismaticBackbone
from lac_vla.models.base import Backbone
from lac_vla.models.prismatic.vision import PerCameraBackbone, ViTBackbone
from lac_vla.models.prismatic.vit import ViT, ViTTower
from lac_vla.session import CachedVLA
from lac_vla.training.mixed import Slots, mix
from lac_vla.types import TokenLayout


@dataclass(frozen=True, eq=False)
class Seen:
    """What the towers make of a batch of frames.

    Attributes:
        visual: Projected visual tokens, (B, N, width).
        slots: Of every camera's transformers, in order: their patches' keys and values as the next frame finds them.
    """

    visual: torch.Tensor
    slots: Sequence[Slots]


class MixedTower:
    """The frozen vision transformers of a model, and its projector.

    Args:
        backbone: The model.

    Attributes:
        cameras: Those that transformers see.

    Raises:
        InputError: If there are none: the model sees by convolutions.
    """

    def __init__(self, backbone: Backbone) -> None:
        CachedVLA(backbone, options=EngineOptions(vision_kv_reuse=True))  # what the option refuses is refused here
        if not isinstance(backbone, PrismaticBackbone | CogACTBackbone):
            raise InputError(f"{backbone.name} has a vision tower that `lac train --vision-kv-reuse` does not know")
        self._backbone, self._vision = backbone, backbone.model.vision_backbone
        cameras = TokenLayout.of(backbone.grids, 0, 0).cameras  # under the backbone's names, which may be other ones
        self._vits = {
            camera: _transformers(self._vision, name) for camera, name in zip(cameras, self._vision.grids, strict=True)
        }
        self.cameras = tuple(camera.name for camera, vits in self._vits.items() if vits)

    def see(
        self,
        images: Mapping[str, torch.Tensor],
        visual: torch.Tensor,
        mask: torch.Tensor | None = None,
        old: Sequence[Slots] | None = None,
    ) -> Seen:
        """Run the transformers.

        Args:
            images: Each of ``cameras`` → what its tower sees, uint8, (B, H, W, 3).
            visual: Projected visual tokens of the same frames when all is computed, (B, N, width); they stand for
                the other cameras: a convolution's features do not depend on what else is computed.
            mask: M, 1 = active, (B, N); ``None`` for a dense pass.
            old: The preceding frame's slots; needed with a mask.

        Returns:
            See :class:`Seen`.
        """
        slots: list[Slots] = []
        parts = []
        for camera, vits in self._vits.items():
            if not vits:
                parts.append(visual[:, camera.tokens])
                continue
            weight = None if mask is None else mask[:, None, camera.tokens, None]
            pixels = self._vision.normalize(images[camera.name]).to(self._backbone.dtype)
            features = []
            for vit, three in zip(vits, torch.split(pixels, 3, dim=1), strict=True):
                x = vit.look(three, whole=False) if isinstance(vit, ViTTower) else vit.embed(three)
                patches = slice(x.shape[1] - camera.size, x.shape[1])  # behind class and register tokens
                memory = _Mixing(None if old is None else old[len(slots)], weight, patches)
                features.append(vit.encode(x, memory))
                slots.append(memory.slots)
            parts.append(self._backbone.project(torch.cat(features, dim=-1)))
        return Seen(torch.cat(parts, dim=1), slots)


def _transformers(vision: ViTBackbone | PerCameraBackbone, camera: str) -> list[ViT]:
    """Those that see a camera, in the order of their features; none if a convolution does."""
    if isinstance(vision, ViTBackbone):
        return vision.vits
    tower = vision.towers[camera]
    return [tower] if isinstance(tower, ViTTower) else []


class _Mixing:
    """What a transformer's blocks take for the memory of an image; see :class:`lac_vla.models.prismatic.vit.Memory`."""

    def __init__(self, old: Slots | None, weight: torch.Tensor | None, patches: slice) -> None:
        self.old, self.weight, self.patches = old, weight, patches
        self.slots = Slots([], [])

    def update(
        self, block: int, keys: torch.Tensor, values: torch.Tensor, rows: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix the patches' keys and values, and keep the mixture. Class and register tokens are always new."""
        if self.weight is not None and self.old is not None:
            weight = self.weight.to(keys.dtype)
            keys = mix(keys, self.old.keys[block], weight, self.patches)
            values = mix(values, self.old.values[block], weight, self.patches)
        self.slots.keys.append(keys[:, :, self.patches].detach())
        self.slots.values.append(values[:, :, self.patches].detach())
        return keys, values
