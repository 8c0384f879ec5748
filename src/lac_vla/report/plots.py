"""The report's plots as inline SVG: a few shapes, colours from the page's style, no plotting library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from lac_vla.evaluation.stats import percentiles
from lac_vla.evaluation.table import milliseconds


def interval_bar(rate: float, low: float, high: float, reference: float | None) -> str:
    """A success rate with its interval on a line from 0 to 100 %.

    Args:
        rate: In [0, 1].
        low: Lower end of the interval.
        high: Upper end.
        reference: Rate of dense, drawn as a thin upright line; ``None`` leaves it out.

    Returns:
        SVG.
    """
    x = [4 + 112 * value for value in (rate, low, high)]
    parts = [
        '<line class="axis" x1="4" x2="116" y1="9" y2="9"/>',
        f'<line class="range" x1="{x[1]:.1f}" x2="{x[2]:.1f}" y1="9" y2="9"/>',
        f'<circle class="dot" cx="{x[0]:.1f}" cy="9" r="4"/>',
    ]
    if reference is not None:
        at = 4 + 112 * reference
        parts.insert(1, f'<line class="reference" x1="{at:.1f}" x2="{at:.1f}" y1="1" y2="17"/>')
    label = f"{100 * rate:.1f} %, 95 % interval {100 * low:.1f} to {100 * high:.1f} %"
    return _svg(120, 18, parts, label, "bar")


def latency_panel(samples: Mapping[str, tuple[str, Sequence[float]]], label: str) -> str:
    """Distributions of one latency window, one above the other.

    Args:
        samples: Method → its colour (CSS) and milliseconds.
        label: What the panel shows, for readers who cannot see it.

    Returns:
        SVG; empty if there are no samples.
    """
    known = {name: (colour, np.asarray(values)) for name, (colour, values) in samples.items() if len(values)}
    if not known:
        return ""
    limit = max(float(np.quantile(values, 0.995)) for _, values in known.values()) * 1.05
    left, width, top, row = 8, 344, 4, 58
    scale = width / limit if limit > 0 else 1.0
    bottom = top + row * len(known)
    parts = []
    for tick in ticks(limit):
        x = left + tick * scale
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">{tick:g}</text>')
    for index, (name, (colour, values)) in enumerate(known.items()):
        base = top + row * (index + 1)
        counts, edges = np.histogram(values, bins=72, range=(0, limit))
        smooth = np.convolve(counts, [1, 2, 3, 2, 1], mode="same")
        heights = (row - 22) * smooth / max(1, smooth.max())
        centres = left + scale * (edges[:-1] + edges[1:]) / 2
        points = " ".join(f"{x:.1f},{base - y:.1f}" for x, y in zip(centres, heights, strict=True))
        shape = f'{left},{base} {points} {left + width},{base}'
        parts.append(f'<polygon class="density" style="--c:{colour}" points="{shape}"/>')
        found = percentiles(values)
        if found is None:
            continue
        for kind, value in (("p50", found.p50), ("p95", found.p95)):
            x = left + scale * min(value, limit)
            parts.append(
                f'<line class="{kind}" style="--c:{colour}" x1="{x:.1f}" x2="{x:.1f}" '
                f'y1="{base - row + 20}" y2="{base}"/>'
            )
        note = f"{milliseconds(found.p50)} / {milliseconds(found.p95)}"
        parts.append(f'<text class="name" x="{left + 2}" y="{base - row + 15}">{escape(name)}</text>')
        end = left + width
        parts.append(f'<text class="note" x="{end}" y="{base - row + 15}" text-anchor="end">{note}</text>')
    parts.append(f'<line class="axis" x1="{left}" x2="{left + width}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(
        f'<text class="tick" x="{left + width / 2}" y="{bottom + 31}" text-anchor="middle">milliseconds</text>'
    )
    return _svg(360, bottom + 36, parts, label, "panel")


def ratio_chart(
    effective: Mapping[str, tuple[str, Sequence[Sequence[float]]]],
    nominal: Mapping[str, Sequence[Sequence[float | None]]],
) -> str:
    """Effective cache ratio against time: the mean over the episodes that still run, and 10th to 90th percentile.

    Args:
        effective: Method → its colour (CSS), and per episode the ratio of every step, in [0, 1].
        nominal: Method → per episode the ratio aimed at in every step; its mean is drawn dashed.

    Returns:
        SVG; empty if there are no steps.
    """
    steps = max((len(run) for _, runs in effective.values() for run in runs), default=0)
    if steps < 2:
        return ""
    left, top, width, height = 46, 8, 844, 220
    span = steps - 1

    def point(step: float, ratio: float) -> str:
        return f"{left + width * step / span:.1f},{top + height * (1 - ratio):.1f}"

    parts = []
    for share in (0, 25, 50, 75, 100):
        y = top + height * (1 - share / 100)
        parts.append(f'<line class="grid" x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{share} %</text>')
    for tick in ticks(span):
        x = left + width * tick / span
        text = f'<text class="tick" x="{x:.1f}" y="{top + height + 16}" text-anchor="middle">{tick:g}</text>'
        parts.append(text)
    for name, (colour, runs) in effective.items():
        mean, low, high = _over_time(runs)
        band = [point(t, r) for t, r in enumerate(high)] + [point(t, low[t]) for t in reversed(range(len(low)))]
        style = f'style="--c:{colour}"'
        parts.append(f'<polygon class="band" {style} points="{" ".join(band)}"/>')
        aimed, _, _ = _over_time(nominal.get(name, ()))
        for kind, line in (("aim", aimed), ("line", mean)):
            drawn = " ".join(point(t, r) for t, r in enumerate(line) if not math.isnan(r))
            if drawn:
                parts.append(f'<polyline class="{kind}" {style} points="{drawn}"/>')
    middle = left + width / 2
    parts.append(
        f'<text class="tick" x="{middle}" y="{top + height + 33}" text-anchor="middle">step of the episode</text>'
    )
    return _svg(900, top + height + 38, parts, "share of the computation that is reused, over time", "wide")


def ticks(limit: float, wanted: int = 5) -> list[float]:
    """Round numbers from 0 to ``limit``, about ``wanted`` of them."""
    if limit <= 0:
        return [0.0]
    rough = limit / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    return [round(index * step, 10) for index in range(int(limit / step + 1e-9) + 1)]


def _over_time(runs: Sequence[Sequence[float | None]]) -> tuple[list[float], list[float], list[float]]:
    """Per step, mean, 10th and 90th percentile over the runs that have a number there; NaN where none has."""
    mean, low, high = [], [], []
    for step in range(max((len(run) for run in runs), default=0)):
        known = [value for run in runs if step < len(run) and (value := run[step]) is not None]
        mean.append(float(np.mean(known)) if known else math.nan)
        low.append(float(np.quantile(known, 0.1)) if known else math.nan)
        high.append(float(np.quantile(known, 0.9)) if known else math.nan)
    return mean, low, high


def _svg(width: float, height: float, parts: Sequence[str], label: str, kind: str) -> str:
    body = "".join(parts)
    return (
        f'<svg class="{kind}" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">'
        f"{body}</svg>"
    )
