"""The chart of success over latency: what a faster policy is worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lac_vla.drawing import svg
from lac_vla.drawing.plots import Area, Axis

Point = tuple[float, float, float, float, str]
"""Milliseconds of an answer, success rate in [0, 1], the ends of its interval, and the clock in words."""


def success_chart(methods: Mapping[str, tuple[str, Sequence[Point]]], label: str) -> str:
    """Draw the success of every method over the time that its answers take; empty without two points.

    Args:
        methods: Method → colour (CSS) and points.
        label: Describes the chart to readers who cannot see it.
    """
    points = [point for _, found in methods.values() for point in found]
    if len(points) < 2:
        return ""
    slowest = max(point[0] for point in points)
    area = Area((0.0, 1.05 * slowest or 1.0), Axis.of([0.0, 1.0], share=True), height=260)
    parts = area.axes("milliseconds from observation to answer, median")
    for name, (colour, found) in methods.items():
        ordered = sorted(found)
        if len(ordered) > 1:
            parts.append(area.path("polyline", "line", colour, [point[:2] for point in ordered]))
        for latency, rate, low, high, clock in ordered:
            (at, bottom), (_, top) = area.at(latency, low), area.at(latency, high)
            parts.append(svg.line("whisker", at, at, bottom, top, colour))
            words = f"{name}, {clock}: {100 * rate:.1f} % solved, {latency:.0f} ms"
            parts.append(area.mark("dot", colour, latency, rate, words, 4.0))
    return area.picture(parts, label)
