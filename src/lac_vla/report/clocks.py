"""The section of the report about a world that does not wait: one chart of success over latency per mode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lac_vla.drawing.success_chart import Point, success_chart
from lac_vla.results.clocks import WAITING, ClockRow
from lac_vla.results.summary import DENSE

COLOURS = 6
"""The page's palette has so many colours beside dense's."""


def clock_charts(rows: Sequence[ClockRow]) -> dict[str, Any] | None:
    """Draw the charts of all clocks.

    Returns:
        ``methods`` (name and colour) and ``charts`` (mode and SVG); ``None`` if the world waited everywhere.
    """
    modes = list(dict.fromkeys(_mode(found.clock) for found in rows if found.clock))
    names = list(dict.fromkeys(found.row.method for found in rows))
    cached = [name for name in names if name != DENSE]
    colours = {name: f"var(--m{0 if name == DENSE else 1 + cached.index(name) % COLOURS})" for name in names}
    charts = []
    for mode in modes:
        methods: dict[str, tuple[str, list[Point]]] = {name: (colours[name], []) for name in names}
        for found in rows:
            if found.clock and _mode(found.clock) != mode:
                continue
            pace = found.row.pace
            latency = 0.0 if pace is None or pace.answer_ms is None else pace.answer_ms.p50
            point = (latency, found.row.rate, *found.row.interval, found.clock or WAITING)
            methods[found.row.method][1].append(point)
        if drawn := success_chart(methods, f"success over latency, mode {mode}"):
            charts.append({"mode": mode, "svg": drawn})
    if not charts:
        return None
    return {"methods": [{"name": name, "colour": colours[name]} for name in names], "charts": charts}


def _mode(clock: str) -> str:
    """Name mode and deadline of a clock's label."""
    return clock.partition(", ")[2]
