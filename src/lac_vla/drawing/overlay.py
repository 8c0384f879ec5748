"""Pictures over the camera image: recomputed, reused and recovered visual tokens, and their saliency."""

from __future__ import annotations

import cv2
import numpy as np

from lac_vla.drawing.picture import caption, side_by_side, stacked
from lac_vla.engine.step_info import StepInfo
from lac_vla.errors import InputError
from lac_vla.types import BoolArray, FloatArray, UInt8Image

RECOMPUTED = (86, 180, 233)
RECOVERED = (240, 150, 0)
"""Sky blue and orange, RGB: distinct with any kind of colour vision."""

HEIGHT = 384
"""Least height of a camera's picture, pixels."""


def overlay(
    image: UInt8Image,
    grid: tuple[int, int],
    active: BoolArray,
    recovered: BoolArray | None = None,
    *,
    height: int = HEIGHT,
) -> UInt8Image:
    """Show which tokens of one camera were computed.

    Reused tokens are grey and dim. Recomputed ones keep their colours, within a thin blue outline. Recovered
    ones (recomputed although the policy would have reused them) are tinted orange, with an orange outline.

    Args:
        image: uint8, H×W×3, what the model saw.
        grid: (rows, cols) of the camera's tokens.
        active: bool, (rows · cols,), row by row: recomputed, for whatever reason.
        recovered: bool, (rows · cols,): those among ``active`` that are recovered.
        height: Least height of the picture, pixels.

    Returns:
        uint8, ``height`` or a little more, of the image's proportions.

    Raises:
        InputError: If the shapes do not fit.
    """
    rows, cols = grid
    recovered = np.zeros_like(active) if recovered is None else recovered
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise InputError(f"image is {image.dtype} {image.shape}; give uint8, H×W×3")
    if active.shape != (rows * cols,) or recovered.shape != (rows * cols,):
        raise InputError(f"{rows}×{cols} tokens, but masks of {active.shape} and {recovered.shape}")
    enlarged = _enlarged(image, grid, height)
    masks = (active, recovered & active)
    shown, tinted = (_resized(mask.reshape(grid).astype(np.uint8), enlarged) > 0 for mask in masks)
    dim = 0.42 * (0.85 * _grey(enlarged) + 0.15 * enlarged)
    picture = np.where(shown[..., None], enlarged, dim)
    picture = np.where(tinted[..., None], 0.72 * picture + 0.28 * np.array(RECOVERED), picture)
    picture[_outline(shown & ~tinted)] = RECOMPUTED
    picture[_outline(tinted)] = RECOVERED
    return np.clip(picture.round(), 0, 255).astype(np.uint8)


def heat(image: UInt8Image, scores: FloatArray, scale: tuple[float, float], *, height: int = HEIGHT) -> UInt8Image:
    """Lay a score of every token of one camera, (rows, cols), over the grey image, dark to bright.

    Scores beyond ``scale`` look like its ends; image, height and size of the picture are those of :func:`overlay`.
    """
    enlarged = _enlarged(image, scores.shape, height)
    low, high = scale
    levels = np.clip((scores - low) / (high - low if high > low else 1.0), 0, 1)
    painted = _resized(_paint((255 * levels).round().astype(np.uint8)), enlarged)
    return np.asarray((0.4 * _grey(enlarged) + 0.6 * painted).round(), dtype=np.uint8)


def heat_colours(n: int = 8) -> list[tuple[int, int, int]]:
    """List the colours of :func:`heat` from darkest to brightest, RGB."""
    ramp = _paint(np.linspace(0, 255, n).round().astype(np.uint8)[None])[0]
    return [(int(red), int(green), int(blue)) for red, green, blue in ramp]


def saliency_strip(
    images: UInt8Image, scores: FloatArray, active: BoolArray, scale: tuple[float, float], *, height: int = 224
) -> UInt8Image:
    """Draw frames of one camera, uint8, (n, H, W, 3), a column each: the image, its saliency, and what is recomputed.

    Scores and ``active`` (recomputed) are (n, rows, cols); for scale and height see :func:`heat`.
    """
    columns = []
    for number, (image, score, mask) in enumerate(zip(images, scores, active, strict=True), start=1):
        pictures = [
            _enlarged(image, score.shape, height),
            heat(image, score, scale, height=height),
            overlay(image, score.shape, mask.reshape(-1), height=height),
        ]
        columns.append(caption(stacked(pictures), f"frame {number}", f"reused {100 * (1 - mask.mean()):.0f} %"))
    return side_by_side(columns)


def camera_overlays(step: StepInfo, height: int = HEIGHT) -> list[UInt8Image]:
    """Draw :func:`overlay` for every camera of a step, in the layout's order."""
    return [
        overlay(
            step.pixels[camera.name],
            (camera.rows, camera.cols),
            step.active[camera.tokens],
            step.recovered[camera.tokens],
            height=height,
        )
        for camera in step.layout.cameras
    ]


def reuse_text(step: StepInfo) -> str:
    """Say how much a step reused or pruned, e.g. ``62 % reused, oldest 3``."""
    what = "pruned" if step.oldest_age is None else f"reused, oldest {step.oldest_age}"
    return f"{100 * step.ratio:.0f} % {what}"


def step_picture(step: StepInfo, method: str, number: int) -> UInt8Image:
    """Draw a step of an episode: all cameras' overlays side by side, under a line that says what was done."""
    left = f"{method}   step {number}"
    if step.dense_reason is not None:
        left += f"   (dense: {step.dense_reason})"
    return caption(side_by_side(camera_overlays(step)), left, reuse_text(step))


def _enlarged(image: UInt8Image, grid: tuple[int, ...], height: int) -> UInt8Image:
    """Enlarge the image to ``height`` or a little more: a whole number of pixels per token, both ways."""
    rows, cols = grid
    cell = -(-height // rows)
    cell_width = max(1, round(cell * rows / cols * image.shape[1] / image.shape[0]))
    return np.asarray(cv2.resize(image, (cols * cell_width, rows * cell), interpolation=cv2.INTER_CUBIC))


def _grey(image: UInt8Image) -> UInt8Image:
    return np.asarray(cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB))


def _paint(levels: UInt8Image) -> UInt8Image:
    """Turn levels 0..255, (rows, cols), into colours, RGB."""
    return np.asarray(cv2.applyColorMap(levels, cv2.COLORMAP_INFERNO)[..., ::-1])


def _resized(cells: UInt8Image, picture: UInt8Image) -> UInt8Image:
    """Enlarge one value, or colour, per token to the size of a picture."""
    return np.asarray(cv2.resize(cells, picture.shape[1::-1], interpolation=cv2.INTER_NEAREST))


def _outline(mask: BoolArray, thickness: int = 2) -> BoolArray:
    """Find the rim of a region, within it; the picture's edge counts as an end."""
    kernel = np.ones((2 * thickness + 1, 2 * thickness + 1), dtype=np.uint8)
    inner = cv2.erode(mask.astype(np.uint8), kernel, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    return np.logical_and(mask, np.asarray(inner) == 0)
