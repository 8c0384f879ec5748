"""A small convolutional vision tower whose output positions are the visual tokens."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from lac_vla.models.prismatic.towers import ConvTowerConfig, Keep
from lac_vla.models.transformer import ImageKVCache
from lac_vla.transfer import upload
from lac_vla.types import BoolArray


@cache  # without a limit: a CUDA graph reads it where it is
def _places(height: int, width: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Make the column and row of every pixel in [-1, 1], (2, H, W)."""
    with torch.inference_mode(mode=False):  # they may meet a gradient later
        y = torch.linspace(-1.0, 1.0, height, device=device, dtype=dtype)
        x = torch.linspace(-1.0, 1.0, width, device=device, dtype=dtype)
        return torch.stack(torch.meshgrid(x, y, indexing="xy"))


class ConvTower(nn.Module):
    """Strided convolutions over RGB and two coordinate channels, one feature vector per patch.

    The first convolution (4×4) and all further ones (3×3) but the last halve the resolution; the last (3×3,
    stride 1) mixes each token with its neighbours. Inner convolutions are followed by group normalisation.
    """

    def __init__(self, config: ConvTowerConfig) -> None:
        super().__init__()
        first, *inner, last = config.widths
        stages: list[nn.Module] = [nn.Conv2d(5, first, 4, stride=2, padding=1), nn.GELU()]
        before = first
        for width in inner:
            stages.append(nn.Conv2d(before, width, 3, stride=2, padding=1))
            if config.norm_groups:
                stages.append(nn.GroupNorm(config.norm_groups, width))
            stages.append(nn.GELU())
            before = width
        self.stem = nn.Sequential(*stages)
        self.head = nn.Conv2d(before, last, 3, padding=1)

    def forward(
        self, pixels: torch.Tensor, keep: Keep | None = None, shift: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute the tokens of a batch of images.

        Args:
            pixels: RGB in [-1, 1], (B, 3, H, W).
            keep: Compute only the tokens at rows ``keep[0]::keep[2]`` and columns ``keep[1]::keep[2]``.
            shift: Pixels by which an augmentation moved the content down and right, (B, 2): the coordinates
                move along, so that every pixel keeps its own.

        Returns:
            Features in raster order, (B, tokens, widths[-1]).
        """
        features = self.surroundings(pixels, shift)
        row, column, stride = keep or (0, 0, 1)
        padded = F.pad(features, (1, 1, 1, 1))[:, :, row:, column:]
        return F.conv2d(padded, self.head.weight, self.head.bias, stride=stride).flatten(2).transpose(1, 2)

    def encode_stem(self, pixels: torch.Tensor, *, whole: bool) -> torch.Tensor:
        """Run :meth:`surroundings`; ``whole`` is no matter here: a convolution has no keys and values."""
        return self.surroundings(pixels)

    def encode_tokens(
        self, surroundings: torch.Tensor, token_mask: BoolArray | None = None, cache: ImageKVCache | None = None
    ) -> torch.Tensor:
        """Run the last convolution for some tokens of several images, (B, C, rows, cols), alone; no cache is needed.

        ``token_mask`` is bool, (B, tokens) or of one image (tokens,), or ``None`` for all. The features are in raster
        order, image by image, (n, widths[-1]).
        """
        if token_mask is None:
            every: torch.Tensor = self.head(surroundings)
            return every.permute(0, 2, 3, 1).flatten(0, 2)
        channels, height, width = surroundings.shape[1:]
        cells = F.pad(surroundings.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)).reshape(-1, channels)
        image, row, col = np.nonzero(token_mask.reshape(-1, height, width))
        corner, lines = (image * (height + 2) + row) * (width + 2) + col, np.arange(3)
        around = (corner[:, None, None] + lines[:, None] * (width + 2) + lines).ravel()
        patches = cells.index_select(0, upload(around, cells.device)).view(len(corner), 9 * channels)
        # Where the weights are kept channels last, as the loader keeps them, this flattening copies nothing.
        return F.linear(patches, self.head.weight.permute(0, 2, 3, 1).flatten(1), self.head.bias)

    def surroundings(self, pixels: torch.Tensor, shift: torch.Tensor | None = None) -> torch.Tensor:
        """Run all but the last convolution: (B, 3, H, W) → (B, C, rows, cols); see :meth:`forward`."""
        batch, _, height, width = pixels.shape
        place = _places(height, width, pixels.device, pixels.dtype).expand(batch, -1, -1, -1)
        if shift is not None:
            step = torch.tensor([2 / (width - 1), 2 / (height - 1)], device=pixels.device, dtype=pixels.dtype)
            place = place - (shift.flip(1).to(pixels.dtype) * step)[:, :, None, None]
        features: torch.Tensor = self.stem(torch.cat((pixels, place), dim=1))
        return features
