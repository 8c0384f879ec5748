"""The vision backbones: the cameras' images → features of every visual token. Batched and differentiable."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from lac_vla.models.prismatic.config import PrismaticConfig
from lac_vla.models.prismatic.conv import ConvTower, Keep
from lac_vla.models.prismatic.vit import ViT


class ViTBackbone(nn.Module):
    """One or two vision transformers, shared by all cameras; the features of two are concatenated.

    Attributes:
        grids: Camera → (rows, cols) of its tokens, in token order.
    """

    def __init__(self, config: PrismaticConfig) -> None:
        super().__init__()
        size = config.cameras[0].image_size
        side = size // config.vit_towers[0].patch
        self.grids = {camera.name: (side, side) for camera in config.cameras}
        self.featurizer = ViT(config.vit_towers[0], size)
        self.fused_featurizer = ViT(config.vit_towers[1], size) if len(config.vit_towers) == 2 else None
        self._mean = [value for tower in config.vit_towers for value in tower.mean]
        self._std = [value for tower in config.vit_towers for value in tower.std]

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Make pixel values of RGB images.

        Args:
            images: uint8, (B, H, W, 3).

        Returns:
            float32, (B, C, H, W), three channels for each transformer.
        """
        pixels = images.permute(0, 3, 1, 2).float() / 255.0
        mean = torch.tensor(self._mean, device=images.device).view(-1, 1, 1)
        std = torch.tensor(self._std, device=images.device).view(-1, 1, 1)
        return (pixels.repeat(1, len(self._mean) // 3, 1, 1) - mean) / std

    def forward(self, pixel_values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Compute the features of all cameras.

        Args:
            pixel_values: Camera → normalised images, (B, C, H, W).

        Returns:
            Features, (B, N, F).
        """
        pixels = torch.stack([pixel_values[name] for name in self.grids], dim=1)
        batch, pixels = len(pixels), pixels.flatten(0, 1)
        features: torch.Tensor = self.featurizer(pixels[:, :3])
        if self.fused_featurizer is not None:
            features = torch.cat([features, self.fused_featurizer(pixels[:, 3:])], dim=-1)
        return features.reshape(batch, -1, features.shape[-1])


class ConvBackbone(nn.Module):
    """One convolutional tower per camera.

    Attributes:
        grids: Camera → (rows, cols) of its tokens, in token order.
        towers: Camera → :class:`ConvTower`.
    """

    def __init__(self, config: PrismaticConfig) -> None:
        super().__init__()
        self.grids: dict[str, tuple[int, int]] = {}
        self.towers = nn.ModuleDict()
        for camera in config.cameras:
            if camera.tower is not None:
                side = camera.image_size // camera.tower.stride
                self.grids[camera.name] = (side, side)
                self.towers[camera.name] = ConvTower(camera.tower)

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Scale RGB images to [-1, 1]: uint8, (B, H, W, 3) → float32, (B, 3, H, W)."""
        return images.permute(0, 3, 1, 2).float() / 127.5 - 1.0

    def forward(
        self,
        pixel_values: Mapping[str, torch.Tensor],
        keep: Mapping[str, Keep] | None = None,
        shift: Mapping[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Compute the features of all cameras.

        Args:
            pixel_values: Camera → RGB in [-1, 1], (B, 3, H, W).
            keep: Camera → regular subset of its tokens; a camera that is absent is computed in full.
            shift: Camera → pixels by which an augmentation moved the content down and right, (B, 2).

        Returns:
            Features, (B, N, F); fewer rows than N if ``keep`` leaves some out.
        """
        subsets, shifts = keep or {}, shift or {}
        features = [
            tower(pixel_values[name], subsets.get(name), shifts.get(name)) for name, tower in self.towers.items()
        ]
        return torch.cat(features, dim=1)
