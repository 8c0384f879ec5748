"""The trade-off curve: success and latency over the share of the computation that was really reused."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from lac_vla.drawing import svg
from lac_vla.drawing.plots import Area, Axis
from lac_vla.errors import InputError
from lac_vla.policies import PolicySpec
from lac_vla.results.records import WHOLE, EpisodeRecord, latencies
from lac_vla.results.summary import DENSE, MethodRow, Summary

SWEPT: Mapping[str, Collection[str]] = {"vla-cache": ("static", "protect"), "sparsevlm": ("keep",)}
"""Options that make a policy reuse more or less, where that is not ``ratio``."""
COLOURS = 6
"""The page's palette has so many colours beside dense's."""

Family = tuple[str, str, list[tuple[MethodRow, bool]]]
"""Name, colour (CSS), and the methods at several ratios: whether one can be set to reuse more or less."""
Bar = tuple[float, float, float]
"""A value, and the ends of its error bar."""


def tradeoff(summary: Summary, episodes: Sequence[EpisodeRecord], specs: Mapping[str, str]) -> dict[str, Any] | None:
    """Draw the two charts of a run.

    The specs are method → its policy as on a command line: methods that differ in nothing but their ratio are one line.

    Returns:
        ``families`` (name and colour), ``success`` and ``latency`` (SVG), ``trials`` (how many a point has, as a text);
        ``None`` with fewer than two points.
    """
    reusing = [row for row in summary.methods if row.method != DENSE and row.ratio is not None]
    if len(reusing) < 2:
        return None
    grouped: dict[str, list[tuple[MethodRow, bool]]] = {}
    for row in reusing:
        name, nominal = _family(specs.get(row.method, row.method))
        grouped.setdefault(name, []).append((row, nominal))
    families = [(name, f"var(--m{1 + k % COLOURS})", rows) for k, (name, rows) in enumerate(grouped.items())]

    def latency(row: MethodRow) -> Bar | None:
        """Give the median over all calls, with the range of their middle half."""
        if not (samples := latencies(episodes, row.method, WHOLE)):
            return None
        low, middle, high = np.percentile(samples, [25, 50, 75])
        return float(middle), float(low), float(high)

    fewest, most = min(row.trials for row in reusing), max(row.trials for row in reusing)
    dense = summary.row(DENSE)
    return {
        "trials": str(most) if fewest == most else f"{fewest} to {most}",
        "families": [{"name": name, "colour": colour} for name, colour, _ in families],
        "success": _chart(families, lambda row: (row.rate, *row.interval), dense, share=True),
        "latency": _chart(families, latency, dense, share=False),
    }


def _chart(
    families: Sequence[Family], value: Callable[[MethodRow], Bar | None], dense: MethodRow | None, *, share: bool
) -> str:
    """Draw points with error bars over the effective cache ratio; those of a family with a nominal ratio are joined."""
    bars = {row.method: bar for _, _, rows in families for row, _ in rows if (bar := value(row)) is not None}
    if not bars:
        return ""
    unit = "solved" if share else "ms"
    level = value(dense) if dense else None
    limit = 1.0 if share else 1.08 * max([high for _, _, high in bars.values()] + ([level[0]] if level else []))
    area = Area((0.0, 1.0), Axis.of([0.0, limit], share=share), height=260, share=True)
    parts = area.axes("effective cache ratio") + (area.level("dense", level[0]) if level else [])
    for name, colour, rows in families:
        points = [(row, row.ratio or 0.0, nominal) for row, nominal in rows if row.method in bars]
        joined = sorted((ratio, bars[row.method][0]) for row, ratio, nominal in points if nominal)
        if len(joined) > 1:
            parts.append(area.path("polyline", "line", colour, joined))
        for row, ratio, nominal in points:
            middle, *ends = bars[row.method]
            (at, low), (_, high) = (area.at(ratio, end) for end in ends)
            parts.append(svg.line("whisker", at, at, low, high, colour))
            words = f"{name}, {row.method}: {100 * ratio:.1f} % reused, "
            words += f"{100 * middle:.1f} %" if share else f"{middle:.3g} {unit}"
            kind, radius = ("dot", 4.0) if nominal else ("dot own", 5.5)
            parts.append(area.mark(kind, colour, ratio, middle, words, radius))
    return area.picture(parts, f"{unit} over the effective cache ratio")


def _family(spec: str) -> tuple[str, bool]:
    """Strip a spec of options that set its ratio, and say if it has any: ``motion:ratio=.5``: ``motion``, yes."""
    try:
        parsed = PolicySpec.parse(spec)
    except InputError:  # a run of other software may describe its methods in words
        return spec, False
    swept = SWEPT.get(parsed.name, ("ratio",))
    rest = [f"{key}={value}" for key, value in parsed.options.items() if key not in swept]
    return " ".join([parsed.name, *rest]), parsed.name in SWEPT or "ratio" in parsed.options
