"""From a camera's image to the square image that the model sees: geometry only, uint8 in, uint8 out.

The visual tokens' grid lies exactly over the result, which never shares memory with the camera's image.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image

from lac_vla.errors import InputError
from lac_vla.types import UInt8Image

Pipeline: TypeAlias = Callable[[UInt8Image, int], UInt8Image]
"""(H, W, 3) and a size → (size, size, 3)."""

LETTERBOX_GREY = 127
LIBERO_CROP_AREA = 0.9
LIBERO_JPEG_QUALITY = 95


def resize_naive(image: UInt8Image, size: int) -> UInt8Image:
    """Resize bicubically, whatever the aspect ratio: what the published OpenVLA models were trained with."""
    return _resize(image, (size, size), Image.Resampling.BICUBIC)


def letterbox(image: UInt8Image, size: int) -> UInt8Image:
    """Pad to a square with grey, the image in the middle; then bicubic."""
    height, width = image.shape[:2]
    side = max(height, width)
    padded = np.full((side, side, 3), LETTERBOX_GREY, dtype=np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    padded[top : top + height, left : left + width] = image
    return resize_naive(padded, size)


def resize_crop(image: UInt8Image, size: int) -> UInt8Image:
    """Resize bicubically so that the shorter side fits, and cut out the middle square."""
    height, width = image.shape[:2]
    short = min(height, width)
    height, width = size * height // short, size * width // short
    resized = _resize(image, (width, height), Image.Resampling.BICUBIC)
    top, left = round((height - size) / 2), round((width - size) / 2)
    return resized[top : top + size, left : left + size].copy()


def area(image: UInt8Image, size: int) -> UInt8Image:
    """Take the mean over the area of each new pixel, whatever the aspect ratio."""
    return _resize(image, (size, size), Image.Resampling.BOX)


def libero(image: UInt8Image, size: int) -> UInt8Image:
    """Do what OpenVLA's LIBERO evaluation does to the simulator's (already upright) image.

    A JPEG round trip and Lanczos, as its training data were stored; then the middle 90 % of the area, resized
    back bilinearly, the counterpart of its random crops in training. The original runs on TensorFlow's JPEG
    and Lanczos code, from which Pillow's differ in rounding.
    """
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format="JPEG", quality=LIBERO_JPEG_QUALITY)
    stored = np.asarray(Image.open(stream))
    return _centre_crop(_resize(stored, (size, size), Image.Resampling.LANCZOS), LIBERO_CROP_AREA)


def fit(pixels: torch.Tensor, size: tuple[int, int], *, centred: bool, fill: float = 0.0) -> torch.Tensor:
    """Shrink or enlarge in floating point without changing the aspect ratio, and pad, as LeRobot's policies do.

    Bilinear without antialiasing; sides are rounded down.

    Args:
        pixels: RGB in [0, 1], float32, (3, H, W).
        size: (height, width) wanted.
        centred: Whether the image stands in the middle (an odd pixel behind it), or at the bottom right.
        fill: Value of the padding.

    Returns:
        (3, height, width).
    """
    height, width = pixels.shape[1:]
    ratio = max(width / size[1], height / size[0])
    inner = int(height / ratio), int(width / ratio)
    fitted = F.interpolate(pixels[None], size=inner, mode="bilinear", align_corners=False)[0].clamp(0.0, 1.0)
    down, right = size[0] - inner[0], size[1] - inner[1]
    top, left = (down // 2, right // 2) if centred else (down, right)
    return F.pad(fitted, (left, right - left, top, down - top), value=fill)


PIPELINES: dict[str, Pipeline] = {
    "resize-naive": resize_naive,
    "letterbox": letterbox,
    "resize-crop": resize_crop,
    "libero": libero,
    "area": area,
}


def make_pipeline(name: str) -> Pipeline:
    """Look up a pipeline.

    Raises:
        InputError: If there is none of that name.
    """
    if name not in PIPELINES:
        raise InputError(f"unknown image pipeline '{name}': choose one of {list(PIPELINES)}")
    return PIPELINES[name]


def _resize(image: UInt8Image, size: tuple[int, int], how: Image.Resampling) -> UInt8Image:
    """Resize to (width, height); always a new array."""
    if image.shape[1::-1] == size:
        return image.copy()
    return np.array(Image.fromarray(image).resize(size, how))


def _centre_crop(image: UInt8Image, share: float) -> UInt8Image:
    """Cut out the middle ``share`` of the area and resize it back: bilinear, corners upon corners."""
    height, width = image.shape[:2]
    half = share**0.5
    y, x = torch.linspace(-half, half, height), torch.linspace(-half, half, width)
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[None]
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255.0
    cropped = F.grid_sample(pixels, grid, mode="bilinear", align_corners=True)[0].permute(1, 2, 0)
    return (cropped.clamp(0.0, 1.0) * 255.5).to(torch.uint8).numpy()
