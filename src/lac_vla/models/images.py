"""From a camera's image to the square image that the model sees: geometry only, uint8 in, uint8 out.

The visual tokens' grid lies exactly over the result, which never shares memory with the camera's image.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image

from lac_vla.errors import InputError, MissingExtraError
from lac_vla.types import UInt8Image

Pipeline: TypeAlias = Callable[[UInt8Image, int], UInt8Image]
"""(H, W, 3) and a size → (size, size, 3)."""

LETTERBOX_GREY = (127, 127, 127)
LIBERO_CROP_AREA = 0.9
LIBERO_JPEG_QUALITY = 95
ALOHA_SIDE = 256


def resize_naive(image: UInt8Image, size: int) -> UInt8Image:
    """Resize bicubically, whatever the aspect ratio: what the published OpenVLA models were trained with."""
    return _resize(image, (size, size), Image.Resampling.BICUBIC)


def letterbox(image: UInt8Image, size: int, fill: tuple[int, int, int] = LETTERBOX_GREY) -> UInt8Image:
    """Pad to a square, the image in the middle; then bicubic.

    Both sides are padded alike, as in the official code: an odd difference leaves the result one pixel short of a
    square, which the resizing stretches.

    Args:
        image: (H, W, 3).
        size: Side of the result.
        fill: Colour of the border.
    """
    height, width = image.shape[:2]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    padded = np.empty((height + 2 * top, width + 2 * left, 3), dtype=np.uint8)
    padded[:] = fill
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
    """Do what OpenVLA's and OpenVLA-OFT's LIBERO evaluations do to the simulator's (already upright) image.

    A JPEG round trip and Lanczos, as the training data were stored; then the middle 90 % of the area, resized back
    bilinearly, the counterpart of random crops in training. An image that has the size already is taken to have been
    through the first two, as the official policy does. Equal to the official code, which runs on TensorFlow, but for
    single levels in less than 1 of 5,000 values.

    Raises:
        MissingExtraError: If ``simplejpeg`` is not installed.
    """
    if image.shape[:2] != (size, size):
        image = _lanczos(_jpeg(image), size)
    return _centre_crop(image, LIBERO_CROP_AREA)


def aloha(image: UInt8Image, size: int) -> UInt8Image:
    """Do what OpenVLA-OFT's ALOHA client does: 256 × 256 bicubically, then as for LIBERO."""
    return libero(image if image.shape[:2] == (size, size) else resize_naive(image, ALOHA_SIDE), size)


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


def fit_image(image: UInt8Image, size: int) -> UInt8Image:
    """Do the same to the image itself, with antialiasing, as openpi does: black around it, the image in the middle."""
    height, width = image.shape[:2]
    ratio = max(width, height) / size
    inner = _resize(image, (int(width / ratio), int(height / ratio)), Image.Resampling.BILINEAR)
    padded = np.zeros((size, size, 3), dtype=np.uint8)
    top, left = (size - inner.shape[0]) // 2, (size - inner.shape[1]) // 2
    padded[top : top + inner.shape[0], left : left + inner.shape[1]] = inner
    return padded


PIPELINES: dict[str, Pipeline] = {
    "resize-naive": resize_naive,
    "letterbox": letterbox,
    "resize-crop": resize_crop,
    "libero": libero,
    "aloha": aloha,
    "area": area,
}


def make_pipeline(name: str, fill: tuple[int, int, int] = LETTERBOX_GREY) -> Pipeline:
    """Look up a pipeline.

    Args:
        name: A key of :data:`PIPELINES`.
        fill: Colour of the border of ``letterbox``.

    Raises:
        InputError: If there is none of that name.
    """
    if name not in PIPELINES:
        raise InputError(f"unknown image pipeline '{name}': choose one of {list(PIPELINES)}")
    return partial(letterbox, fill=fill) if name == "letterbox" else PIPELINES[name]


def require_pipeline(name: str) -> None:
    """Check, before a model is loaded, that what a pipeline needs is installed.

    Raises:
        MissingExtraError: If it is not.
    """
    if name in ("libero", "aloha"):
        _simplejpeg()


def _simplejpeg() -> Any:
    try:
        import simplejpeg
    except ImportError as error:
        raise MissingExtraError(
            "jpeg", "The image pipeline 'libero' or 'aloha', which decodes as TensorFlow,"
        ) from error
    return simplejpeg


def _jpeg(image: UInt8Image) -> UInt8Image:
    """Make a JPEG and decode it by the fast integer transform, TensorFlow's default; the accurate one is brighter."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format="JPEG", quality=LIBERO_JPEG_QUALITY)
    decoded: UInt8Image = _simplejpeg().decode_jpeg(stream.getvalue(), "RGB", fastdct=True)
    return decoded


def _lanczos(image: UInt8Image, size: int) -> UInt8Image:
    """Resize to a square by Lanczos-3 in float32, not rounded between the two directions as uint8 would be."""
    channels = [Image.fromarray(image[..., i].astype(np.float32)) for i in range(3)]
    resized = [np.asarray(channel.resize((size, size), Image.Resampling.LANCZOS)) for channel in channels]
    rounded: UInt8Image = np.rint(np.stack(resized, axis=-1)).clip(0, 255).astype(np.uint8)
    return rounded


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
