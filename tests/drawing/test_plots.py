from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from lac_vla.drawing import plots, svg


def numbers(element: ElementTree.Element, *names: str) -> list[float]:
    return [float(element.get(name) or "nan") for name in names]


def points(line: ElementTree.Element) -> list[tuple[float, float]]:
    pairs = (point.split(",") for point in (line.get("points") or "").split())
    return [(float(x), float(y)) for x, y in pairs]


def test_interval_bar_shows_rate_interval_and_reference_on_one_scale() -> None:
    tree = ElementTree.fromstring(plots.interval_bar(0.5, 0.25, 0.75, 1.0))
    lines = {line.get("class"): line for line in tree.iter("line")}
    start, end = numbers(lines["axis"], "x1", "x2")

    def share(x: float) -> float:
        return (x - start) / (end - start)

    assert share(numbers(next(tree.iter("circle")), "cx")[0]) == pytest.approx(0.5)
    assert [share(x) for x in numbers(lines["range"], "x1", "x2")] == pytest.approx([0.25, 0.75])
    assert share(numbers(lines["reference"], "x1")[0]) == pytest.approx(1.0)
    assert tree.get("aria-label") == "50.0 %, 95 % interval 25.0 to 75.0 %"
    assert 'class="reference"' not in plots.interval_bar(0.5, 0.25, 0.75, None)


def test_latency_panel_shows_every_method_that_has_samples() -> None:
    svg = plots.latency_panel(
        {"dense": ("red", [10.0] * 10), "a<b": ("blue", [1.0, 2.0, 3.0]), "none": ("green", [])}, "latency"
    )
    tree = ElementTree.fromstring(svg)
    assert [text.text for text in tree.iter("text") if text.get("class") == "name"] == ["dense", "a<b"]
    assert [text.text for text in tree.iter("text") if text.get("class") == "note"] == ["10.0 / 10.0", "2.00 / 2.90"]
    assert plots.latency_panel({"none": ("green", [])}, "latency") == ""


def test_ratio_chart_averages_the_episodes_that_still_run() -> None:
    svg = plots.ratio_chart({"motion": ("blue", [[0.0, 0.5, 1.0], [0.0, 0.0]])}, {"motion": [[None, 0.5, 0.5]]})
    tree = ElementTree.fromstring(svg)
    lines = {line.get("class"): points(line) for line in tree.iter("polyline")}
    grid = sorted(numbers(line, "y1")[0] for line in tree.iter("line") if line.get("class") == "grid")
    shares = [(grid[-1] - y) / (grid[-1] - grid[0]) for _, y in lines["line"]]
    assert shares == pytest.approx([0.0, 0.25, 1.0], abs=1e-3)
    assert len(lines["aim"]) == 2
    assert plots.ratio_chart({"motion": ("blue", [[0.0]])}, {}) == ""
    assert not re.search("nan", svg)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(10, [0, 2, 4, 6, 8, 10]), (33, [0, 10, 20, 30]), (0.9, [0, 0.2, 0.4, 0.6, 0.8]), (0, [0])],
)
def test_ticks_are_round(limit: float, expected: list[float]) -> None:
    assert svg.ticks(limit) == pytest.approx(expected)


def test_curve_chart_shows_its_points_and_the_level_on_one_scale() -> None:
    curves = [
        plots.Curve("a<b", "red", [(10, 0.0), (20, 1.0)]),
        plots.Curve("held out", "blue", [(20, 0.5)], measured=True),
    ]
    svg = plots.curve_chart(curves, "ratio", steps=(10, 20), height=100, share=True, level=("target", 0.75))
    tree = ElementTree.fromstring(svg)
    lines = {line.get("class"): points(line) for line in tree.iter("polyline")}
    (left, bottom), (right, top) = lines["trace"]
    assert left < right
    assert top < bottom
    ((x, y),) = lines["line"]
    assert (x, y) == pytest.approx((right, (top + bottom) / 2))
    assert [mark[0].text for mark in tree.iter("circle")] == ["held out, step 20: 0.5"]
    (level,) = (line for line in tree.iter("line") if line.get("class") == "reference")
    assert numbers(level, "y1")[0] == pytest.approx(bottom + 0.75 * (top - bottom))
    assert "target" in [text.text for text in tree.iter("text")]
    assert plots.curve_chart([plots.Curve("none", "red", [])], "nothing", steps=(0, 0)) == ""


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.01, 10.0], ["0.01", "0.1", "1", "10"]),
        ([0.02, 0.3], ["0.02", "0.05", "0.1", "0.2"]),
        ([0.0, 10.0], ["0", "2", "4", "6", "8", "10"]),
        ([3.0], ["0", "1", "2", "3"]),
        ([0.0], ["0"]),
    ],
)
def test_curve_chart_is_logarithmic_over_a_decade_of_positive_values(values: list[float], expected: list[str]) -> None:
    points = [(float(step), value) for step, value in enumerate(values)]
    svg = plots.curve_chart([plots.Curve("loss", "red", points)], "loss", steps=(0, 1))
    labels = [text.text for text in ElementTree.fromstring(svg).iter("text") if text.get("text-anchor") == "end"]
    assert labels == expected
