"""The trade-off curve, and what a page says before its runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest

from lac_vla.report import Opening, build_report, tradeoff
from lac_vla.results.records import EpisodeRecord
from lac_vla.results.stats import wilson
from lac_vla.results.summary import summarize
from lac_vla.results.table import TextTable
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
            ratio_effective=[0.1 * number] * 2,
            latency_ms={"observation_to_action": [10.0 + 2 * init, 11.0 + 2 * init]},
        )
        for number, method in enumerate(methods)
        for init in range(2)
    ]


def marks(chart: str, kind: str) -> list[ElementTree.Element]:
    return [e for e in ElementTree.fromstring(chart).iter() if kind in (e.get("class") or "").split()]


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


def test_points_stand_where_their_numbers_are_and_ratios_of_one_method_are_joined() -> None:
    played = episodes(*SPECS)
    found = tradeoff(summarize(played), played, SPECS)
    assert found is not None
    assert [family["name"] for family in found["families"]] == ["motion", "motion keep=wrist", "lac"]
    assert len({family["colour"] for family in found["families"]}) == 3
    success = found["success"]
    assert [float(dot.get("cx")) for dot in marks(success, "dot")] == pytest.approx([102, 152, 202, 252])
    assert {float(dot.get("cy")) for dot in marks(success, "dot")} == {150.0}, "half solved: half way up"
    low, high = wilson(1, 2)
    ends = [(float(bar.get("y1")), float(bar.get("y2"))) for bar in marks(success, "whisker")]
    assert ends == [pytest.approx((20 + 260 * (1 - low), 20 + 260 * (1 - high)), abs=0.1)] * 4
    (joined,) = marks(success, "line")
    assert joined.get("points") == "102.0,150.0 152.0,150.0", "the two ratios of motion, and nothing else"
    assert len(marks(success, "own")) == 1, "lac has no ratio to set"
    assert len(marks(success, "reference")) == 1
    latency = found["latency"]
    bar = marks(latency, "whisker")[0]
    middle, top = 11.5, 1.08 * 12.25
    assert float(marks(latency, "dot")[0].get("cy")) == pytest.approx(20 + 260 * (1 - middle / top), abs=0.1)
    assert float(bar.get("y1")) == pytest.approx(20 + 260 * (1 - 10.75 / top), abs=0.1)
    assert "lac, lac: 40.0 % reused, 11.5 ms" in latency


def test_no_curve_of_one_point_or_of_runs_that_did_not_note_their_reuse() -> None:
    played = episodes("dense", "lac")
    assert tradeoff(summarize(played), played, SPECS) is None
    bare = [EpisodeRecord(**{**vars(e), "ratio_effective": (), "latency_ms": {}}) for e in episodes(*SPECS)]
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


def test_what_must_be_said_first_comes_first(run_dir: Path, tmp_path: Path) -> None:
    table = TextTable("Table 1: of <this> model", ("method", "solved"), (("LAC *", "3/4"),), ("* incomplete",))
    played = episodes(*SPECS)
    curve = tradeoff(summarize(played), played, SPECS)
    opening = Opening(["LAC does not lead."], [table], curve)
    html = build_report([run_dir], tmp_path / "report.html", opening=opening)
    page = Page(html.read_text(encoding="utf-8"))
    assert page.row("LAC *") == ["LAC *", "3/4"]
    places = [page.text.index(words) for words in ("LAC does not lead.", "of <this> model", "against reuse", "2 of 10")]
    assert places == sorted(places)
    check_self_contained(html)
