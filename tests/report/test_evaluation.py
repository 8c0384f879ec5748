from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from lac_vla.cli import main
from lac_vla.errors import InputError
from lac_vla.report import build_report
from tests.report.conftest import METADATA
from tests.report.pages import Page, check_self_contained, dump_dom, needs_browser

MEASURED = ("ratio_effective", "ratio_nominal", "oldest_age", "macs", "latency_ms", "peak_memory_mb", "video")


@pytest.fixture(scope="module")
def html(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_report([run_dir], tmp_path_factory.mktemp("report") / "deep" / "report.html")


@pytest.fixture(scope="module")
def page(html: Path) -> Page:
    return Page(html.read_text(encoding="utf-8"))


def test_the_table_shows_the_numbers_added_up_by_hand(page: Page) -> None:
    minus = "\N{MINUS SIGN}"
    assert page.row("dense") == [
        "dense",
        "3/4 75.0 % [30.1, 95.4]",
        "-",
        "-",
        "0 %",
        "0.0 %",
        "-",
        "2.00 G 4.00 G",
        "-",
        "-",
        "0 %: 100 %",
        "-",
        "-",
        "4.00 / 4.00 1.00 ×",
        "20.0 / 30.0 1.00 ×",
        "12.0 / 12.0 1.00 ×",
        "100 MB",
    ]
    assert page.row("motion-0.5") == [
        "motion-0.5",
        "2/4 50.0 % [15.0, 85.0]",
        f"{minus}25.0 (p 1.000) [{minus}75.0, ±0.0]",
        "2.00 ×",
        "50 %",
        "40.0 %",
        "2",
        "1.20 G 2.40 G",
        "-",
        "-",
        "50 %: 100 %",
        "0.200",
        "-",
        "1.50 / 1.50 2.67 ×",
        "8.00 / 8.00 2.50 ×",
        "6.00 / 7.00 2.00 ×",
        "121 MB",
    ]
    text = " ".join(page.text.split())
    assert "Pairs: motion-0.5 2." in text
    assert "actions per call of the model: 1" in text
    assert page.row("0")[2:] == ["2/2", "1/2"]
    assert page.row("1")[2:] == ["1/2", "1/2"]


def test_what_was_run_is_said(page: Page) -> None:
    text = " ".join(page.text.split())
    for part in (
        "lac eval mini --policies",
        "A Processor",
        "2 threads",
        "2.13.0",
        "9,876,543",
        "2 of 10 tasks.",
        "seed 7",
    ):
        assert part in text


def test_altered_rendering_stands_in_the_same_table(page: Page) -> None:
    foot = page.paragraph("Rendering")
    assert foot.startswith("Rendering: fast. Altered")


def test_official_rendering_is_not_called_altered(run_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(run_dir, tmp_path / "run")
    metadata = json.loads((run_dir / "summary.json").read_text())
    metadata["simulator"]["rendering"] = "official"
    (tmp_path / "run" / "summary.json").write_text(json.dumps(metadata))
    text = build_report([tmp_path / "run"], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "official" in text
    assert "ltered" not in text


def test_a_busy_machine_is_said_beside_its_times(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = {}
    for load in (0.5, 9.0):
        folder = tmp_path / str(load)
        shutil.copytree(run_dir, folder)
        (folder / "summary.json").write_text(json.dumps({**METADATA, "load": load}))
        main(["report", str(folder)])
        page = (folder / "report.html").read_text(encoding="utf-8")
        said[load] = [" ".join(text.split()) for text in (capsys.readouterr().out, page)]
    for text in said[9.0]:
        assert "achine was busy before the run (load 9.0 on 2 cores): absolute times mean little" in text
        assert "2 of 10 tasks." in text
    assert said[9.0][1].index("busy before") < said[9.0][1].index('class="tile"'), "above the cards of the methods"
    assert not [text for text in said[0.5] if "was busy" in text]


def test_nothing_is_loaded_from_elsewhere(html: Path, page: Page) -> None:
    assert page.addresses
    check_self_contained(html)


def test_words_of_a_run_cannot_become_markup(page: Page) -> None:
    assert page.row("1")[1] == 'open the <b>drawer</b> & "wait"'


def test_trials_with_videos_are_shown_and_disagreement_first(page: Page) -> None:
    assert page.tags.count("video") == 4
    assert "2 of 2 recorded trials" in " ".join(page.text.split())


def test_a_run_without_videos_dense_or_metadata(run_dir: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (run_dir / "episodes.jsonl").read_text().splitlines()]
    bare = [
        {key: value for key, value in line.items() if key not in MEASURED}
        for line in lines
        if line["method"] != "dense"
    ]
    (tmp_path / "episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in bare))
    page = Page(build_report([tmp_path], tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.row("motion-0.5")[2:] == ["-"] * 15
    assert "video" not in page.tags
    assert "Dense was not run" in page.text


def test_several_runs_on_one_page(run_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(run_dir, tmp_path / "second-run")
    page = Page(build_report([run_dir, tmp_path / "second-run"], tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.tags.count("article") == 2
    assert "second-run" in page.text


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no folder"):
        build_report([tmp_path / "nowhere"], tmp_path / "report.html")
    with pytest.raises(InputError, match=r"episodes\.jsonl cannot be read"):
        build_report([tmp_path], tmp_path / "report.html")
    with pytest.raises(InputError, match="no run is given"):
        build_report([], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_an_unwritable_place_is_named(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        build_report([run_dir], tmp_path / "file" / "report.html")


@needs_browser
def test_a_browser_shows_the_table_and_plays_the_videos(html: Path, tmp_path: Path) -> None:
    shown = dump_dom(html, tmp_path)
    page = Page(shown)
    assert page.row("motion-0.5")[1].startswith("2/4")
    marks = re.findall(r'<figure[^>]*data-video="(\w+)"', shown)
    assert marks == ["playable"] * 4
    assert re.search(r'<html[^>]*data-overflow="false"', shown), "the page is wider than 1280 pixels"
