from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from lac_vla.drawing import plots, svg


def test_interval_bar_places_its_marks() -> None:
    tree = ElementTree.fromstring(plots.interval_bar(0.5, 0.25, 0.75, 1.0))
    assert tree.find("circle").get("cx") == "60.0"
    lines = {line.get("class"): line for line in tree.iter("line")}
    assert (lines["range"].get("x1"), lines["range"].get("x2")) == ("32.0", "88.0")
    assert lines["reference"].get("x1") == "116.0"
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
    lines = {line.get("class"): line.get("points").split() for line in tree.iter("polyline")}
    heights = [float(point.split(",")[1]) for point in lines["line"]]
    top, bottom = 8, 8 + 240
    assert heights == pytest.approx([bottom, bottom - 0.25 * 240, top])
    assert len(lines["aim"]) == 2
    assert plots.ratio_chart({"motion": ("blue", [[0.0]])}, {}) == ""
    assert not re.search("nan", svg)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(10, [0, 2, 4, 6, 8, 10]), (33, [0, 10, 20, 30]), (0.9, [0, 0.2, 0.4, 0.6, 0.8]), (0, [0])],
)
def test_ticks_are_round(limit: float, expected: list[float]) -> None:
    assert svg.ticks(limit) == pytest.approx(expected)


def test_curve_chart_places_its_points() -> None:
    curves = [
        plots.Curve("a<b", "red", [(10, 0.0), (20, 1.0)]),
        plots.Curve("held out", "blue", [(20, 0.5)], measured=True),
    ]
    svg = plots.curve_chart(curves, "ratio", steps=(10, 20), height=100, share=True, level=("target", 0.75))
    tree = ElementTree.fromstring(svg)
    lines = {line.get("class"): line.get("points") for line in tree.iter("polyline")}
    assert lines == {"trace": "52.0,110.0 552.0,10.0", "line": "552.0,60.0"}
    assert [mark.find("title").text for mark in tree.iter("circle")] == ["held out, step 20: 0.5"]
    assert [line.get("y1") for line in tree.iter("line") if line.get("class") == "reference"] == ["35.0"]
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
