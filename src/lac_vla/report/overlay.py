"""Pictures over the camera image: recomputed, reused and recovered visual tokens, and their saliency."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lac_vla.engine.step_info import StepInfo
from lac_vla.errors import InputError
from lac_vla.report.video import VideoFile, write_video
from lac_vla.types import BoolArray, FloatArray, Frame, UInt8Image

__all__ = [
    "EpisodeVideo",
    "caption",
    "filmstrip",
    "heat",
    "heat_colours",
    "overlay",
    "saliency_strip",
    "side_by_side",
    "stacked",
    "step_picture",
    "write_video",
]

RECOMPUTED = (86, 180, 233)
RECOVERED = (240, 150, 0)
"""Sky blue and orange: told apart with any kind of colour vision, RGB."""
INK, PAPER = (238, 238, 238), (24, 26, 30)

HEIGHT = 384
"""Least height of a camera's picture, pixels."""
_STRIP = 30
_GAP = 6


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
    size = (enlarged.shape[1], enlarged.shape[0])
    recovered = recovered & active
    shown = _spread(active, grid, size)
    tinted = _spread(recovered, grid, size)
    dim = 0.42 * (0.85 * _grey(enlarged) + 0.15 * enlarged)
    picture = np.where(shown[..., None], enlarged, dim)
    picture = np.where(tinted[..., None], 0.72 * picture + 0.28 * np.array(RECOVERED), picture)
    picture[_outline(shown & ~tinted)] = RECOMPUTED
    picture[_outline(tinted)] = RECOVERED
    return np.clip(picture.round(), 0, 255).astype(np.uint8)


def heat(image: UInt8Image, scores: FloatArray, scale: tuple[float, float], *, height: int = HEIGHT) -> UInt8Image:
    """Lay a score of every token of one camera over the grey image, dark to bright.

    Args:
        image: uint8, H×W×3, what the model saw.
        scores: (rows, cols).
        scale: The scores that are darkest and brightest; beyond them nothing changes.
        height: Least height of the picture, pixels.

    Returns:
        uint8, of the size of :func:`overlay`.
    """
    enlarged = _enlarged(image, scores.shape, height)
    low, high = scale
    levels = np.clip((scores - low) / (high - low if high > low else 1.0), 0, 1)
    cells = _paint((255 * levels).round().astype(np.uint8))
    size = (enlarged.shape[1], enlarged.shape[0])
    painted = cv2.resize(cells, size, interpolation=cv2.INTER_NEAREST)
    return np.asarray((0.4 * _grey(enlarged) + 0.6 * painted).round(), dtype=np.uint8)


def heat_colours(n: int = 8) -> list[tuple[int, int, int]]:
    """The colours of :func:`heat` from darkest to brightest, RGB."""
    ramp = _paint(np.linspace(0, 255, n).round().astype(np.uint8)[None])[0]
    return [(int(red), int(green), int(blue)) for red, green, blue in ramp]


def saliency_strip(
    images: UInt8Image, scores: FloatArray, active: BoolArray, scale: tuple[float, float], *, height: int = 224
) -> UInt8Image:
    """Consecutive frames of one camera, a column each: the image, its saliency, and what is recomputed.

    Args:
        images: uint8, (n, H, W, 3), n at least 1.
        scores: (n, rows, cols).
        active: Recomputed, (n, rows, cols).
        scale: As in :func:`heat`.
        height: Least height of every picture, pixels.

    Returns:
        uint8, H×W×3.
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


def stacked(pictures: Sequence[UInt8Image], gap: int = _GAP) -> UInt8Image:
    """As :func:`side_by_side`, from top to bottom."""
    turned = side_by_side([picture.swapaxes(0, 1) for picture in pictures], gap)
    return np.ascontiguousarray(turned.swapaxes(0, 1))


def side_by_side(pictures: Sequence[UInt8Image], gap: int = _GAP) -> UInt8Image:
    """Pictures from left to right on a dark ground, aligned at their tops.

    Args:
        pictures: uint8, H×W×3, of any sizes; at least one.
        gap: Pixels between two.

    Returns:
        uint8, as high as the highest.
    """
    height = max(picture.shape[0] for picture in pictures)
    width = sum(picture.shape[1] for picture in pictures) + gap * (len(pictures) - 1)
    canvas = np.full((height, width, 3), PAPER, dtype=np.uint8)
    left = 0
    for picture in pictures:
        canvas[: picture.shape[0], left : left + picture.shape[1]] = picture
        left += picture.shape[1] + gap
    return canvas


def caption(picture: UInt8Image, left: str, right: str = "") -> UInt8Image:
    """The picture under a dark strip with one line of text, at its left and right end.

    Args:
        picture: uint8, H×W×3.
        left: Text; cut off where the right one begins.
        right: Text.

    Returns:
        uint8, (H + 30)×W×3.
    """
    width = picture.shape[1]
    strip = Image.new("RGB", (width, _STRIP), PAPER)
    draw = ImageDraw.Draw(strip)
    font = _font()
    end = width - 8 - draw.textlength(right, font=font)
    while left and draw.textlength(left, font=font) > end - 16:
        left = left[:-1]
    draw.text((8, _STRIP // 2), left, font=font, fill=INK, anchor="lm")
    draw.text((end, _STRIP // 2), right, font=font, fill=INK, anchor="lm")
    return np.concatenate([np.asarray(strip, dtype=np.uint8), picture])


def step_picture(step: StepInfo, method: str, number: int) -> UInt8Image:
    """One step of a session: all cameras' overlays side by side, under a line that says what was done.

    Args:
        step: What the session did.
        method: Name of the method.
        number: Of the step in the episode.

    Returns:
        uint8, H×W×3.
    """
    pictures = [
        overlay(
            step.pixels[camera.name],
            (camera.rows, camera.cols),
            step.active[camera.tokens],
            step.recovered[camera.tokens],
        )
        for camera in step.layout.cameras
    ]
    left = f"{method}   step {number}"
    if step.dense_reason is not None:
        left += f"   (dense: {step.dense_reason})"
    what = "pruned" if step.oldest_age is None else f"reused   oldest {step.oldest_age}"
    right = f"{100 * step.ratio:.0f} % {what}"
    return caption(side_by_side(pictures), left, right)


def filmstrip(frames: Sequence[UInt8Image], n: int = 6) -> UInt8Image:
    """Some frames of an episode, evenly spread, the first and the last among them.

    Args:
        frames: uint8, H×W×3; at least one.
        n: How many to show, if there are so many.

    Returns:
        uint8, the frames side by side.

    Raises:
        InputError: If there are no frames, or ``n`` is below 1.
    """
    if not len(frames) or n < 1:
        raise InputError(f"a filmstrip of {n} out of {len(frames)} frames: give at least one of each")
    picked = np.linspace(0, len(frames) - 1, min(n, len(frames))).round().astype(int)
    return side_by_side([frames[index] for index in picked])


class EpisodeVideo:
    """The overlay video of one episode: watches a rollout.

    Args:
        path: Of the ``.mp4`` file.
        method: Name of the method, for the caption.
        fps: Frames per second; 20 is real time in LIBERO.
    """

    def __init__(self, path: str | Path, method: str, fps: int = 20) -> None:
        self._file = VideoFile(path, fps)
        self._method, self._fps = method, fps
        self._steps = 0
        self._last: UInt8Image | None = None

    @property
    def path(self) -> Path:
        """Of the file."""
        return self._file.path

    def add(self, frame: Frame, step: StepInfo) -> None:
        """See one observation and what the session did with it."""
        self._last = step_picture(step, self._method, self._steps)
        self._file.add(self._last)
        self._steps += 1

    def close(self, *, success: bool) -> None:
        """Hold the last picture for a second, framed green if the task was solved, else red; finish."""
        if self._last is not None:
            framed = self._last.copy()
            colour = (0, 158, 115) if success else (213, 60, 60)
            for edge in (framed[:6], framed[-6:], framed[:, :6], framed[:, -6:]):
                edge[...] = colour
            for _ in range(self._fps):
                self._file.add(framed)
        self._file.close()


def _enlarged(image: UInt8Image, grid: tuple[int, ...], height: int) -> UInt8Image:
    """The image at ``height`` or a little more: a whole number of pixels per token, both ways."""
    rows, cols = grid
    cell = -(-height // rows)
    cell_width = max(1, round(cell * rows / cols * image.shape[1] / image.shape[0]))
    return np.asarray(cv2.resize(image, (cols * cell_width, rows * cell), interpolation=cv2.INTER_CUBIC))


def _grey(image: UInt8Image) -> UInt8Image:
    return np.asarray(cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB))


def _paint(levels: UInt8Image) -> UInt8Image:
    """0..255, (rows, cols) → colours, RGB."""
    return np.asarray(cv2.applyColorMap(levels, cv2.COLORMAP_INFERNO)[..., ::-1])


def _spread(mask: BoolArray, grid: tuple[int, int], size: tuple[int, int]) -> BoolArray:
    cells = mask.reshape(grid).astype(np.uint8)
    return np.asarray(cv2.resize(cells, size, interpolation=cv2.INTER_NEAREST), dtype=np.bool_)


def _outline(mask: BoolArray, thickness: int = 2) -> BoolArray:
    """The rim of a region, within it; the picture's edge counts as an end."""
    size = 2 * thickness + 1
    kernel = np.ones((size, size), dtype=np.uint8)
    inner = cv2.erode(mask.astype(np.uint8), kernel, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    return np.logical_and(mask, np.asarray(inner) == 0)


@functools.cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=16)
