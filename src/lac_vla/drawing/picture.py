"""Pictures are put together, captioned and encoded."""

from __future__ import annotations

import base64
import functools
from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lac_vla.errors import InputError
from lac_vla.types import UInt8Image

INK, PAPER = (238, 238, 238), (24, 26, 30)
_STRIP = 30
_GAP = 6
_LINE = 16
_font = functools.cache(functools.partial(ImageFont.load_default, size=16))
_small = functools.cache(functools.partial(ImageFont.load_default, size=12))


def stacked(pictures: Sequence[UInt8Image], gap: int = _GAP) -> UInt8Image:
    """Put pictures below each other; see :func:`side_by_side`."""
    turned = side_by_side([picture.swapaxes(0, 1) for picture in pictures], gap)
    return np.ascontiguousarray(turned.swapaxes(0, 1))


def side_by_side(pictures: Sequence[UInt8Image], gap: int = _GAP) -> UInt8Image:
    """Put pictures, uint8, H×W×3, side by side on a dark ground, aligned at their tops, ``gap`` pixels apart."""
    height = max(picture.shape[0] for picture in pictures)
    width = sum(picture.shape[1] for picture in pictures) + gap * (len(pictures) - 1)
    canvas = np.full((height, width, 3), PAPER, dtype=np.uint8)
    left = 0
    for picture in pictures:
        canvas[: picture.shape[0], left : left + picture.shape[1]] = picture
        left += picture.shape[1] + gap
    return canvas


def caption(picture: UInt8Image, left: str, right: str = "") -> UInt8Image:
    """Put a dark strip, 30 pixels high, with texts at its ends above a picture; the left one gives way to the right."""
    width = picture.shape[1]
    strip = Image.new("RGB", (width, _STRIP), PAPER)
    draw, font = ImageDraw.Draw(strip), _font()
    end = width - 8 - draw.textlength(right, font=font)
    while left and draw.textlength(left, font=font) > end - 16:
        left = left[:-1]
    draw.text((8, _STRIP // 2), left, font=font, fill=INK, anchor="lm")
    draw.text((end, _STRIP // 2), right, font=font, fill=INK, anchor="lm")
    return np.concatenate([np.asarray(strip, dtype=np.uint8), picture])


def footnote(picture: UInt8Image, words: str) -> UInt8Image:
    """Put a text, broken into lines, on a dark strip below a picture."""
    width, font = picture.shape[1], _small()
    lines = [""]
    for word in words.split():
        if font.getlength(f"{lines[-1]} {word}") > width - 16:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    strip = Image.new("RGB", (width, 8 + _LINE * len(lines)), PAPER)
    draw = ImageDraw.Draw(strip)
    for number, line in enumerate(lines):
        draw.text((8, 4 + _LINE * number), line, font=font, fill=INK)
    return np.concatenate([picture, np.asarray(strip, dtype=np.uint8)])


def filmstrip(frames: Sequence[UInt8Image], n: int) -> UInt8Image:
    """Put ``n`` frames (or all, if fewer) side by side, evenly spread, the first and the last among them.

    Raises:
        InputError: If there are no frames, or ``n`` is below 1.
    """
    if not len(frames) or n < 1:
        raise InputError(f"a filmstrip of {n} out of {len(frames)} frames: give at least one of each")
    picked = np.linspace(0, len(frames) - 1, min(n, len(frames))).round().astype(int)
    return side_by_side([frames[index] for index in picked])


def jpeg(image: UInt8Image, quality: int = 82) -> bytes:
    """Encode a picture, uint8, H×W×3, as JPEG; ``quality`` in 0..100."""
    _, data = cv2.imencode(".jpg", np.ascontiguousarray(image[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, quality])
    return data.tobytes()


def jpeg_base64(image: UInt8Image) -> str:
    """Encode a picture, uint8, H×W×3, as JPEG in base64, for a page."""
    return base64.b64encode(jpeg(image)).decode()


def css(colour: tuple[int, int, int]) -> str:
    """Write an RGB colour for a style sheet."""
    return "rgb({}, {}, {})".format(*colour)
