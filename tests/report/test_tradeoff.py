"""The trade-off curve, and what a page says before its runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from lac_vla.report import build_report, tradeoff
from lac_vla.results.records import EpisodeRecord
from lac_vla.results.summary import summarize
from lac_vla.results.table import FLAG, TextTable
from tests.report.pages import Page, check_self_contained

SPECS = {
    "dense": "dense",
    "motion-0.5": "motion:ratio=0.5",
    "motion-0.9": "motion:ratio=0.9",
    "motion-wrist": "motion-wrist@motion:ratio=0.8,keep=wrist",
    "lac": "lac",
}


def episodes(*methods: str) -> list[EpisodeRecord]:
    """Two trials each, one solved; methods at .1, .2, … reused; 10, 11, 12 and 13 ms."""
    return [
        EpisodeRecord(
            method,
            "libero_spatial",
            0,
            "pick up the bowl",
            init,
            0,
            init == 0,
            2,
            220,
            metrics={"ratio_effective": [0.1 * number] * 2},
            latency_ms={"observation_to_action": [10.0 + 2 * init, 11.0 + 2 * init]},
        )
        for number, method in enumerate(methods)
        for init in range(2)
    ]


def marks(chart: str, kind: str) -> list[ElementTree.Element]:
    return [e for e in ElementTree.fromstring(chart).iter() if kind in (e.get("class") or "").split()]


def titles(chart: str) -> list[str]:
    """Texts that the points show under the pointer."""
    return [dot[0].text or "" for dot in marks(chart, "dot")]


def test_settings_that_are_no_ratio_are_joined_too() -> None:
    specs = {
        "sparsevlm": "sparsevlm",
        "less": "sparsevlm:keep=66+30+17",
        "released": "vla-cache:variant=released",
        "more": "vla-cache:variant=released,static=240,protect=16",
        "paper": "vla-cache:variant=paper",
        "wrist": "motion:ratio=0.8,keep=wrist",
    }
    played = episodes("dense", *specs)
    found = tradeoff(summarize(played), played, specs)
    assert found is not None
    names = ["sparsevlm", "vla-cache variant=released", "vla-cache variant=paper", "motion keep=wrist"]
    assert [family["name"] for family in found["families"]] == names
    assert len(marks(found["success"], "line")) == 2
    assert found["trials"] == "2"


def test_points_show_their_numbers_and_ratios_of_one_method_are_joined() -> None:
    played = episodes(*SPECS)
    found = tradeoff(summarize(played), played, SPECS)
    assert found is not None
    assert [family["name"] for family in found["families"]] == ["motion", "motion keep=wrist", "lac"]
    assert len({family["colour"] for family in found["families"]}) == 3
    success = found["success"]
    assert titles(success) == [
        "motion, motion-0.5: 10.0 % reused, 50.0 %",
        "motion, motion-0.9: 20.0 % reused, 50.0 %",
        "motion keep=wrist, motion-wrist: 30.0 % reused, 50.0 %",
        "lac, lac: 40.0 % reused, 50.0 %",
    ]
    across = [float(dot.get("cx") or "nan") for dot in marks(success, "dot")]
    assert np.diff(across) == pytest.approx([across[1] - across[0]] * 3), "equal steps of reuse, equal steps across"
    assert across[0] < across[1]
    (joined,) = marks(success, "line")
    assert len((joined.get("points") or "").split()) == 2, "the two ratios of motion, and nothing else"
    assert len(marks(success, "own")) == 1, "lac has no ratio to set"
    assert len(marks(success, "reference")) == 1
    assert len(marks(success, "whisker")) == 4
    latency = found["latency"]
    assert "lac, lac: 40.0 % reused, 11.5 ms" in titles(latency)
    for chart in (success, latency):
        for dot, bar in zip(marks(chart, "dot"), marks(chart, "whisker"), strict=True):
            low, middle, high = (float(value or "nan") for value in (bar.get("y1"), dot.get("cy"), bar.get("y2")))
            assert low > middle > high, "the bar spans the point, the larger value above"


def test_no_curve_of_one_point_or_of_runs_that_did_not_note_their_reuse() -> None:
    played = episodes("dense", "lac")
    assert tradeoff(summarize(played), played, SPECS) is None
    bare = [EpisodeRecord(**{**vars(e), "metrics": {}, "latency_ms": {}}) for e in episodes(*SPECS)]
    assert tradeoff(summarize(bare), bare, SPECS) is None
    timeless = [EpisodeRecord(**{**vars(e), "latency_ms": {}}) for e in episodes(*SPECS)]
    found = tradeoff(summarize(timeless), timeless, {"lac": "a policy: in words, not a spec"})
    assert found is not None
    assert found["latency"] == ""


def test_a_run_with_several_ratios_shows_its_curve(run_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(run_dir, tmp_path / "run")
    log = tmp_path / "run" / "episodes.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    more = [{**line, "method": "motion-0.9", "video": None} for line in lines if line["method"] == "motion-0.5"]
    log.write_text("".join(json.dumps(line) + "\n" for line in [*lines, *more]))
    alone = build_report([run_dir], tmp_path / "alone.html").read_text(encoding="utf-8")
    several = build_report([tmp_path / "run"], tmp_path / "several.html").read_text(encoding="utf-8")
    assert "against reuse" not in alone
    assert "against reuse" in several


def test_tables_over_all_runs_come_first(run_dir: Path, tmp_path: Path) -> None:
    rows = (("LAC *", "3/4"), ("Dense", "4/4"))
    table = TextTable("Table 1: of <this> model", ("method", "solved"), rows, ("* incomplete",), flagged=[1])
    played = episodes(*SPECS)
    curve = tradeoff(summarize(played), played, SPECS)
    html = build_report([run_dir], tmp_path / "report.html", tables=[table], curve=curve)
    page = Page(html.read_text(encoding="utf-8"))
    assert page.row("LAC *") == ["LAC *", "3/4"]
    assert page.row(f"Dense {FLAG}") == [f"Dense {FLAG}", "4/4"]
    assert html.read_text(encoding="utf-8").count('<tr class="flagged">') == 1
    places = [page.text.index(words) for words in ("of <this> model", "against reuse", "2 of 10")]
    assert places == sorted(places)
    check_self_contained(html)
