"""The report's plots as inline SVG: a few shapes, colours from the page's style, no plotting library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from lac_vla.drawing import svg
from lac_vla.results.format import milliseconds
from lac_vla.results.stats import percentiles


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
    parts = [svg.line("axis", 4, 116, 9, 9)]
    if reference is not None:
        at = 4 + 112 * reference
        parts.append(svg.line("reference", at, at, 1, 17))
    parts += [svg.line("range", x[1], x[2], 9, 9), f'<circle class="dot" cx="{x[0]:.1f}" cy="9" r="4"/>']
    label = f"{100 * rate:.1f} %, 95 % interval {100 * low:.1f} to {100 * high:.1f} %"
    return svg.picture(120, 18, parts, label, "bar")


def latency_panel(samples: Mapping[str, tuple[str, Sequence[float]]], label: str) -> str:
    """Distributions of one latency window, one above the other.

    Args:
        samples: Method → its colour (CSS) and milliseconds.
        label: What the panel shows, for readers who cannot see it.

    Returns:
        SVG; empty if there are no samples.
    """
    known = [
        (name, colour, np.asarray(values), found)
        for name, (colour, values) in samples.items()
        if (found := percentiles(values)) is not None
    ]
    if not known:
        return ""
    limit = max(float(np.quantile(values, 0.995)) for _, _, values, _ in known) * 1.05
    left, width, top, row = 8, 344, 4, 58
    scale = width / limit if limit > 0 else 1.0
    bottom, right = top + row * len(known), left + width
    parts = []
    for tick in svg.ticks(limit):
        x = left + tick * scale
        parts += [svg.line("grid", x, x, top, bottom), svg.text("tick", x, bottom + 15, f"{tick:g}", "middle")]
    for index, (name, colour, values, found) in enumerate(known):
        base = top + row * (index + 1)
        counts, edges = np.histogram(values, bins=72, range=(0, limit))
        smooth = np.convolve(counts, [1, 2, 3, 2, 1], mode="same")
        heights = (row - 22) * smooth / max(1, smooth.max())
        centres = left + scale * (edges[:-1] + edges[1:]) / 2
        points = " ".join(f"{x:.1f},{base - y:.1f}" for x, y in zip(centres, heights, strict=True))
        shape = f"{left},{base} {points} {right},{base}"
        parts.append(f'<polygon class="density" style="--c:{colour}" points="{shape}"/>')
        for kind, value in (("p50", found.p50), ("p95", found.p95)):
            x = left + scale * min(value, limit)
            parts.append(svg.line(kind, x, x, base - row + 20, base, colour))
        note = f"{milliseconds(found.p50)} / {milliseconds(found.p95)}"
        parts += [
            svg.text("name", left + 2, base - row + 15, name),
            svg.text("note", right, base - row + 15, note, "end"),
        ]
    parts.append(svg.line("axis", left, right, bottom, bottom))
    parts.append(svg.text("tick", left + width / 2, bottom + 31, "milliseconds", "middle"))
    return svg.picture(360, bottom + 36, parts, label, "panel")


def ratio_chart(
    effective: Mapping[str, tuple[str, Sequence[Sequence[float | None]]]],
    nominal: Mapping[str, Sequence[Sequence[float | None]]],
) -> str:
    """Effective cache ratio over time: mean, and 10th to 90th percentile, of the episodes that still run.

    Args:
        effective: Method → its colour (CSS), and per episode the ratio of every step, in [0, 1].
        nominal: Method → per episode the ratio aimed at in every step; its mean is drawn dashed.

    Returns:
        SVG; empty if there are no steps.
    """
    steps = max((len(run) for _, runs in effective.values() for run in runs), default=0)
    if steps < 2:
        return ""
    left, top, width, height = 46, 8, 1106, 240
    span = steps - 1

    def point(step: float, ratio: float) -> str:
        return f"{left + width * step / span:.1f},{top + height * (1 - ratio):.1f}"

    parts = []
    for share in (0, 25, 50, 75, 100):
        y = top + height * (1 - share / 100)
        parts += [
            svg.line("grid", left, left + width, y, y),
            svg.text("tick", left - 6, y + 4, f"{share} %", "end"),
        ]
    for tick in svg.ticks(span):
        parts.append(svg.text("tick", left + width * tick / span, top + height + 16, f"{tick:g}", "middle"))
    for name, (colour, runs) in effective.items():
        mean, low, high = _over_time(runs)
        rim = [*enumerate(high), *reversed(list(enumerate(low)))]
        band = [point(t, r) for t, r in rim if not math.isnan(r)]
        style = f'style="--c:{colour}"'
        parts.append(f'<polygon class="band" {style} points="{" ".join(band)}"/>')
        aimed, _, _ = _over_time(nominal.get(name, ()))
        for kind, line in (("aim", aimed), ("line", mean)):
            drawn = " ".join(point(t, r) for t, r in enumerate(line) if not math.isnan(r))
            if drawn:
                parts.append(f'<polyline class="{kind}" {style} points="{drawn}"/>')
    parts.append(svg.text("tick", left + width / 2, top + height + 33, "call of the model in the episode", "middle"))
    return svg.picture(1160, top + height + 38, parts, "share of the computation that is reused, over time", "wide")


@dataclass(frozen=True)
class Curve:
    """One line of a :func:`curve_chart`.

    Attributes:
        name: What it shows.
        colour: CSS.
        points: (step, value), by step.
        measured: Drawn strong, with a mark at every point; otherwise thin.
    """

    name: str
    colour: str
    points: Sequence[tuple[float, float]]
    measured: bool = False


def curve_chart(
    curves: Sequence[Curve],
    label: str,
    *,
    steps: tuple[float, float],
    height: float = 220,
    share: bool = False,
    level: tuple[str, float] | None = None,
    border: tuple[str, float] | None = None,
) -> str:
    """Metrics over the steps of a training run. The axis is logarithmic where positive values span a decade.

    Args:
        curves: The lines.
        label: What the chart shows, for readers who cannot see it.
        steps: First and last step shown.
        height: Of the plotting area.
        share: The values are shares: the axis goes from 0 to 100 %.
        level: Name and value of a level aimed at.
        border: Name and step of a mark between two parts of the run.

    Returns:
        SVG; empty if there are no points.
    """
    values = [value for curve in curves for _, value in curve.points]
    if not values:
        return ""
    left, top, width = 52.0, 10.0, 500.0
    bottom, right = top + height, left + width
    axis = _Axis.of([0.0, 1.0] if share else values, wanted=max(2, round(height / 45)), logarithmic=not share)
    first, last = steps
    span = max(1.0, last - first)

    def x(step: float) -> float:
        return left + width * (step - first) / span

    def y(value: float) -> float:
        return bottom - height * axis.place(value)

    parts = []
    for tick in axis.ticks:
        text = f"{100 * tick:g} %" if share else f"{tick:g}"
        parts += [svg.line("grid", left, right, y(tick), y(tick)), svg.text("tick", left - 6, y(tick) + 4, text, "end")]
    every = svg.ticks(span)[-1] / max(1, len(svg.ticks(span)) - 1)
    for number in range(math.ceil(first / every), math.floor(last / every) + 1):
        parts.append(svg.text("tick", x(number * every), bottom + 16, f"{number * every:g}", "middle"))
    if level is not None:
        at = y(level[1])
        parts += [svg.line("reference", left, right, at, at), svg.text("tick", right - 4, at - 5, level[0], "end")]
    if border is not None and first < border[1] < last:
        at = x(border[1])
        parts += [svg.line("reference", at, at, top, bottom), svg.text("tick", at + 5, top + 10, border[0])]
    for curve in curves:
        style = f'style="--c:{curve.colour}"'
        drawn = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in curve.points)
        parts.append(f'<polyline class="{"line" if curve.measured else "trace"}" {style} points="{drawn}"/>')
        if curve.measured or len(curve.points) == 1:
            parts += [
                f'<circle class="dot" {style} cx="{x(step):.1f}" cy="{y(value):.1f}" r="3.5">'
                f"<title>{escape(curve.name)}, step {step:g}: {value:.4g}</title></circle>"
                for step, value in curve.points
            ]
    parts.append(svg.text("tick", left + width / 2, bottom + 32, "step", "middle"))
    return svg.picture(right + 8, bottom + 38, parts, label, "panel")


@dataclass(frozen=True)
class _Axis:
    """An upright axis: from a value to its place in [0, 1]."""

    low: float
    high: float
    ticks: list[float]
    logarithmic: bool

    @classmethod
    def of(cls, values: Sequence[float], *, wanted: int, logarithmic: bool) -> _Axis:
        low, high = min(values), max(values)
        if logarithmic and low > 0 and high >= 10 * low:
            low, high = low / 1.2, high * 1.2
            decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
            factors = ((1, 2, 5), (1, 3), (1,))
            marks = [[f * 10.0**d for d in decades for f in some if low <= f * 10.0**d <= high] for some in factors]
            return cls(low, high, next((few for few in marks if len(few) <= wanted + 1), marks[-1]), True)
        low = min(0.0, low)
        return cls(low, high if high > low else low + 1, svg.ticks(max(high, 0.0), wanted), False)

    def place(self, value: float) -> float:
        if self.logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def _over_time(runs: Sequence[Sequence[float | None]]) -> tuple[list[float], list[float], list[float]]:
    """Per step, mean, 10th and 90th percentile over the runs that have a number there; NaN where none has."""
    mean, low, high = [], [], []
    for step in range(max((len(run) for run in runs), default=0)):
        known = [value for run in runs if step < len(run) and (value := run[step]) is not None]
        mean.append(float(np.mean(known)) if known else math.nan)
        low.append(float(np.quantile(known, 0.1)) if known else math.nan)
        high.append(float(np.quantile(known, 0.9)) if known else math.nan)
    return mean, low, high
