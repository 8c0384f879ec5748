"""The report's plots as inline SVG: a few shapes, colours from the page's style, no plotting library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import ClassVar

import numpy as np

from lac_vla.drawing import svg
from lac_vla.results.format import milliseconds
from lac_vla.results.stats import percentiles


def interval_bar(rate: float, low: float, high: float, reference: float | None) -> str:
    """Draw a success rate in [0, 1] and its interval on a line to 100 %; dense's is a thin upright ``reference``."""
    x = [4 + 112 * value for value in (rate, low, high)]
    parts = [svg.line("axis", 4, 116, 9, 9)]
    if reference is not None:
        at = 4 + 112 * reference
        parts.append(svg.line("reference", at, at, 1, 17))
    parts += [svg.line("range", x[1], x[2], 9, 9), f'<circle class="dot" cx="{x[0]:.1f}" cy="9" r="4"/>']
    label = f"{100 * rate:.1f} %, 95 % interval {100 * low:.1f} to {100 * high:.1f} %"
    return svg.picture(120, 18, parts, label, "bar")


def latency_panel(samples: Mapping[str, tuple[str, Sequence[float]]], label: str) -> str:
    """Draw the distributions of one latency window, one above the other; empty if there are no samples.

    The samples are method → colour (CSS) and milliseconds; the label is for readers who cannot see the panel.
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
    """Draw the effective cache ratio over time: mean, and 10th to 90th percentile, of the episodes that still run.

    Both have per episode the ratio of every call, in [0, 1], ``effective`` the methods' colours (CSS), too. The mean of
    ``nominal``, the ratios aimed at, is dashed. Empty if there are fewer than two calls.
    """
    calls = max((len(run) for _, runs in effective.values() for run in runs), default=0)
    if calls < 2:
        return ""
    area = Area((0, calls - 1), Axis.of([0, 1], wanted=4, share=True), width=1106, height=240)
    parts = area.axes("call of the model in the episode")
    for name, (colour, runs) in effective.items():
        mean, low, high = _over_time(runs)
        parts.append(area.path("polygon", "band", colour, [*high, *reversed(low)]))
        aimed, _, _ = _over_time(nominal.get(name, ()))
        parts += [area.path("polyline", kind, colour, line) for kind, line in (("aim", aimed), ("line", mean)) if line]
    return area.picture(parts, "share of the computation that is reused, over time", "wide")


@dataclass(frozen=True)
class Curve:
    """One line of a :func:`curve_chart`: (step, value), by step; a ``measured`` one is strong, with marks."""

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
    across: str = "step",
    across_share: bool = False,
) -> str:
    """Draw metrics over the steps of a training run; logarithmic where positive values span a decade.

    Args:
        curves: The lines; without any points, the chart is empty.
        label: Describes the chart to readers who cannot see it.
        steps: First and last step shown.
        height: Height of the plotting area, pixels.
        share: The values are shares: the axis goes from 0 to 100 %.
        level: Name and value of a level aimed at.
        border: Name and step of a mark between two parts of the run.
        across: What the lower axis shows in place of steps.
        across_share: Whether that is a share, shown as a percentage.
    """
    values = [value for curve in curves for _, value in curve.points]
    if not values:
        return ""
    axis = Axis.of([0.0, 1.0] if share else values, wanted=max(2, round(height / 45)), share=share, decades=not share)
    area = Area(steps, axis, height=height, share=across_share)
    parts = area.axes(across)
    if level is not None:
        parts += area.level(*level)
    if border is not None and steps[0] < border[1] < steps[1]:
        at, top = area.at(border[1], axis.high)
        parts += [svg.line("reference", at, at, top, top + height), svg.text("tick", at + 5, top + 10, border[0])]
    for curve in curves:
        parts.append(area.path("polyline", "line" if curve.measured else "trace", curve.colour, curve.points))
        if curve.measured or len(curve.points) == 1:
            parts += [
                area.mark(
                    "dot", curve.colour, step, value, f"{curve.name}, {across} {_text(step, across_share)}: {value:.4g}"
                )
                for step, value in curve.points
            ]
    return area.picture(parts, label)


@dataclass(frozen=True)
class Axis:
    """An upright axis: it turns a value into a place in [0, 1]."""

    low: float
    high: float
    ticks: list[float]
    share: bool = False
    logarithmic: bool = False

    @classmethod
    def of(cls, values: Sequence[float], *, wanted: int = 5, share: bool = False, decades: bool = False) -> Axis:
        """Make an axis that shows 0 and all values, or with ``decades`` a logarithmic one if they span a decade."""
        low, high = min(values), max(values)
        if decades and low > 0 and high >= 10 * low:
            low, high = low / 1.2, high * 1.2
            powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
            factors = ((1, 2, 5), (1, 3), (1,))
            marks = [[f * 10.0**d for d in powers for f in some if low <= f * 10.0**d <= high] for some in factors]
            few = next((few for few in marks if len(few) <= wanted + 1), marks[-1])
            return cls(low, high, few, share, logarithmic=True)
        low = min(0.0, low)
        return cls(low, high if high > low else low + 1, svg.ticks(max(high, 0.0), wanted), share)

    def place(self, value: float) -> float:
        """Turn a value into its height, in [0, 1]."""
        if self.logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Area:
    """A plotting area: values are drawn at their places, within two axes.

    ``x`` are the first and last value of the lower axis, which shows percentages if ``share``; width and height, in
    pixels, are those without the axes' texts.
    """

    x: tuple[float, float]
    y: Axis
    width: float = 500.0
    height: float = 220.0
    share: bool = False
    left: ClassVar[float] = 52.0
    top: ClassVar[float] = 20.0

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Give the pixel of a value."""
        across = (x - self.x[0]) / max(1e-9, self.x[1] - self.x[0])
        return self.left + self.width * across, self.top + self.height * (1 - self.y.place(y))

    def axes(self, label: str) -> list[str]:
        """Draw grid, ticks and the lower axis's label."""
        first, last = self.x
        left, right, bottom = self.left, self.left + self.width, self.top + self.height
        parts = []
        for tick in self.y.ticks:
            _, y = self.at(first, tick)
            words = _text(tick, self.y.share)
            parts += [svg.line("grid", left, right, y, y), svg.text("tick", left - 6, y + 4, words, "end")]
        every = [*svg.ticks(last - first), max(1.0, last - first)][1]
        for number in range(math.ceil(first / every), math.floor(last / every) + 1):
            x, _ = self.at(number * every, self.y.high)
            parts.append(svg.text("tick", x, bottom + 16, _text(number * every, self.share), "middle"))
        return [*parts, svg.text("tick", left + self.width / 2, bottom + 32, label, "middle")]

    def level(self, name: str, value: float) -> list[str]:
        """Draw a named level across the area."""
        (left, y), right = self.at(self.x[0], value), self.left + self.width
        return [svg.line("reference", left, right, y, y), svg.text("tick", right - 4, y - 5, name, "end")]

    def path(self, tag: str, kind: str, colour: str, points: Sequence[tuple[float, float]]) -> str:
        """Draw a ``polyline`` or a ``polygon`` of a class through points."""
        drawn = " ".join("{:.1f},{:.1f}".format(*self.at(*point)) for point in points)
        return f'<{tag} class="{kind}" style="--c:{colour}" points="{drawn}"/>'

    def mark(self, kind: str, colour: str, x: float, y: float, words: str, radius: float = 3.5) -> str:
        """Draw a point of a class that says its ``words`` under the pointer."""
        at = 'cx="{:.1f}" cy="{:.1f}"'.format(*self.at(x, y))
        return f'<circle class="{kind}" style="--c:{colour}" {at} r="{radius}"><title>{escape(words)}</title></circle>'

    def picture(self, parts: Sequence[str], label: str, kind: str = "panel") -> str:
        """Put the parts together; see :func:`lac_vla.drawing.svg.picture`."""
        return svg.picture(self.left + self.width + 20, self.top + self.height + 38, parts, label, kind)


def _text(tick: float, share: bool) -> str:
    return f"{100 * tick:g} %" if share else f"{tick:g}"


def _over_time(runs: Sequence[Sequence[float | None]]) -> list[list[tuple[float, float]]]:
    """Give mean, 10th and 90th percentile as (call, value), over the runs that have a number there."""
    lines: list[list[tuple[float, float]]] = [[], [], []]
    for call in range(max((len(run) for run in runs), default=0)):
        known = [value for run in runs if call < len(run) and (value := run[call]) is not None]
        if known:
            for line, value in zip(lines, (np.mean(known), *np.quantile(known, [0.1, 0.9])), strict=True):
                line.append((call, float(value)))
    return lines
