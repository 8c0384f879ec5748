"""The trade-off curve: success and latency over the share of the computation that was really reused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lac_vla.drawing import svg
from lac_vla.drawing.plots import Area, Axis
from lac_vla.errors import InputError
from lac_vla.policies import PolicySpec
from lac_vla.results.records import WHOLE, EpisodeRecord
from lac_vla.results.summary import DENSE, MethodRow, Summary

SWEPT: Mapping[str, frozenset[str]] = {
    "vla-cache": frozenset({"static", "protect"}),
    "sparsevlm": frozenset({"keep"}),
}
"""Options that make a policy reuse more or less, where that is not ``ratio``."""
COLOURS = 6
"""The page's palette has so many colours beside dense's."""


@dataclass(frozen=True)
class Point:
    """One method.

    Attributes:
        name: Name of the method.
        x: Effective cache ratio, in [0, 1].
        y: The value shown over it.
        low: Lower end of the error bar.
        high: Upper end of the error bar.
        nominal: Whether the method can be set to reuse more or less: such points are joined.
    """

    name: str
    x: float
    y: float
    low: float
    high: float
    nominal: bool


Family = tuple[str, str, list[Point]]
"""Name, colour (CSS) and points of a method at several ratios."""


def tradeoff(summary: Summary, episodes: Sequence[EpisodeRecord], specs: Mapping[str, str]) -> dict[str, Any] | None:
    """Draw the two charts of a run.

    Args:
        summary: Its numbers.
        episodes: Its episodes.
        specs: Method → its policy as on a command line: methods that differ in nothing but their ratio are one line.

    Returns:
        ``families`` (name and colour), ``success`` and ``latency`` (SVG), ``trials`` (how many a point has, as a text);
        ``None`` with fewer than two points.
    """
    reusing = [row for row in summary.methods if row.method != DENSE and row.ratio is not None]
    if len(reusing) < 2:
        return None
    dense = summary.row(DENSE)
    grouped: dict[str, list[tuple[MethodRow, bool]]] = {}
    for row in reusing:
        name, nominal = _family(specs.get(row.method, row.method))
        grouped.setdefault(name, []).append((row, nominal))
    colours = {name: f"var(--m{1 + index % COLOURS})" for index, name in enumerate(grouped)}
    success: list[Family] = []
    latency: list[Family] = []
    for name, rows in grouped.items():
        success.append((name, colours[name], [_success(row, nominal) for row, nominal in rows]))
        timed = [_latency(row, nominal, episodes) for row, nominal in rows]
        latency.append((name, colours[name], [point for point in timed if point is not None]))
    before = dense.latency.get(WHOLE) if dense else None
    fewest, most = min(row.trials for row in reusing), max(row.trials for row in reusing)
    return {
        "trials": str(most) if fewest == most else f"{fewest} to {most}",
        "families": [{"name": name, "colour": colour} for name, colour in colours.items()],
        "success": tradeoff_chart(success, "solved", share=True, dense=dense.rate if dense else None),
        "latency": tradeoff_chart(latency, "ms", share=False, dense=before.p50 if before else None),
    }


def tradeoff_chart(families: Sequence[Family], unit: str, *, share: bool, dense: float | None) -> str:
    """Draw points with error bars over the effective cache ratio; those of a family with a nominal ratio are joined.

    Args:
        families: The methods.
        unit: Unit of the values.
        share: The values are shares: the axis goes from 0 to 100 %.
        dense: Dense's value, a dashed line; ``None`` leaves it out.

    Returns:
        SVG; empty if there are no points.
    """
    points = [point for _, _, family in families for point in family]
    if not points:
        return ""
    limit = 1.0 if share else 1.08 * max([point.high for point in points] + ([dense] if dense else []))
    area = Area((0.0, 1.0), Axis.of([0.0, limit], share=share), height=260, share=True)
    parts = area.axes("effective cache ratio")
    if dense is not None:
        parts += area.level("dense", dense)
    for name, colour, family in families:
        joined = sorted((point.x, point.y) for point in family if point.nominal)
        if len(joined) > 1:
            parts.append(area.path("polyline", "line", colour, joined))
        for point in family:
            (at, low), (_, high) = area.at(point.x, point.low), area.at(point.x, point.high)
            parts.append(svg.line("whisker", at, at, low, high, colour))
            words = f"{name}, {point.name}: {100 * point.x:.1f} % reused, "
            words += f"{100 * point.y:.1f} %" if share else f"{point.y:.3g} {unit}"
            kind, radius = ("dot", 4.0) if point.nominal else ("dot own", 5.5)
            parts.append(area.mark(kind, colour, point.x, point.y, words, radius))
    return area.picture(parts, f"{unit} over the effective cache ratio")


def _family(spec: str) -> tuple[str, bool]:
    """Strip a spec of options that set its ratio, and say if it has any: ``motion:ratio=.5``: ``motion``, yes."""
    try:
        parsed = PolicySpec.parse(spec)
    except InputError:  # a run of other software may describe its methods in words
        return spec, False
    swept = SWEPT.get(parsed.name, frozenset({"ratio"}))
    rest = [f"{key}={value}" for key, value in parsed.options.items() if key not in swept]
    return " ".join([parsed.name, *rest]), parsed.name in SWEPT or "ratio" in parsed.options


def _success(row: MethodRow, nominal: bool) -> Point:
    return Point(row.method, row.ratio or 0.0, row.rate, row.interval.low, row.interval.high, nominal)


def _latency(row: MethodRow, nominal: bool, episodes: Sequence[EpisodeRecord]) -> Point | None:
    """Give the median over all calls, with the range of their middle half."""
    samples = [ms for e in episodes if e.method == row.method for ms in e.latency_ms.get(WHOLE, ())]
    if not samples:
        return None
    low, middle, high = np.percentile(samples, [25, 50, 75])
    return Point(row.method, row.ratio or 0.0, float(middle), float(low), float(high), nominal)
