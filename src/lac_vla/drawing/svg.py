"""The few shapes that plots are made of, as SVG. Their colours and strokes come from a style sheet, by class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape


def ticks(limit: float, wanted: int = 5) -> list[float]:
    """Choose round numbers from 0 to ``limit``, about ``wanted`` of them."""
    if limit <= 0:
        return [0.0]
    rough = limit / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    return [round(index * step, 10) for index in range(int(limit / step + 1e-9) + 1)]


def line(kind: str, x1: float, x2: float, y1: float, y2: float, colour: str | None = None) -> str:
    """Draw a straight line of a class, from (x1, y1) to (x2, y2)."""
    style = f' style="--c:{colour}"' if colour else ""
    return f'<line class="{kind}"{style} x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>'


def text(kind: str, x: float, y: float, words: str, anchor: str = "start") -> str:
    """Write words of a class, whose ``anchor`` (``start``, ``middle``, ``end``) is at x and whose baseline at y."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def box(colour: str, x: float, y: float, width: float, height: float, title: str) -> str:
    """Draw a filled rectangle that says its ``title`` under the pointer."""
    return (
        f'<rect fill="{colour}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}">'
        f"<title>{escape(title)}</title></rect>"
    )


def picture(width: float, height: float, parts: Sequence[str], label: str, kind: str, style: str = "") -> str:
    """Put shapes, the lowest first, together to a picture of a class; ``label`` is for readers who cannot see it.

    Unlike one in a page, a picture in a file needs a ``style``, a style sheet of its own.
    """
    head = f'xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" ' if style else ""
    sheet = f"<style>{style}</style>" if style else ""
    return (
        f'<svg {head}class="{kind}" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">'
        f"{sheet}{''.join(parts)}</svg>"
    )
