"""Shapes of inline SVG; their colours and strokes come from the page's style."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape


def ticks(limit: float, wanted: int = 5) -> list[float]:
    """Round numbers from 0 to ``limit``, about ``wanted`` of them."""
    if limit <= 0:
        return [0.0]
    rough = limit / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    return [round(index * step, 10) for index in range(int(limit / step + 1e-9) + 1)]


def line(kind: str, x1: float, x2: float, y1: float, y2: float, colour: str | None = None) -> str:
    """A line of a class of the page's style."""
    style = f' style="--c:{colour}"' if colour else ""
    return f'<line class="{kind}"{style} x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>'


def text(kind: str, x: float, y: float, words: str, anchor: str = "start") -> str:
    """Words at a place: their start, middle or end."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def picture(width: float, height: float, parts: Sequence[str], label: str, kind: str) -> str:
    """The whole picture; ``label`` says what it shows to readers who cannot see it."""
    body = "".join(parts)
    return (
        f'<svg class="{kind}" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">{body}</svg>'
    )
