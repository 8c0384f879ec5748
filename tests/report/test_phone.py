"""The pages on a phone, 390 pixels wide, in a real browser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from lac_vla.report import build_report, build_training_report, tradeoff
from lac_vla.results.summary import summarize
from lac_vla.results.table import TextTable
from tests.report.pages import needs_browser
from tests.report.test_tradeoff import SPECS, episodes
from tests.report.test_training import WHOLE, save
from tests.serving.chromium import Tab

pytestmark = needs_browser
SCREEN = 844
"""Pixels that a phone of this width is high."""
METHODS = 12


@pytest.fixture(scope="module")
def pages(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Addresses of reports of a run of twelve methods: with a wide table, a long note and a curve, and alone.

    And of two runs, one of them with videos, and of a training.
    """
    folder = tmp_path_factory.mktemp("phone")
    line = json.loads((run_dir / "episodes.jsonl").read_text(encoding="utf-8").splitlines()[0])
    names = ["dense", *(f"method-{number}" for number in range(1, METHODS))]
    lines = [json.dumps({**line, "method": name, "video": None}) for name in names]
    (folder / "episodes.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    note = "Intervals of 95 %: Wilson's; of a difference, the paired bootstrap by task. " * 3
    table = TextTable("Wide", ["method", *names], [["dense", *names]], notes=[note])
    played = episodes(*SPECS)
    curve = tradeoff(summarize(played), played, SPECS)
    trained = save(folder / "trained", WHOLE)
    return {
        "tables": build_report([folder], folder / "report.html", tables=[table], curve=curve).as_uri(),
        "alone": build_report([folder], folder / "alone.html").as_uri(),
        "runs": build_report([run_dir, folder], folder / "runs.html").as_uri(),
        "training": build_training_report(trained, folder / "training.html").as_uri(),
    }


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with Tab(tmp_path_factory.mktemp("profile"), width=390) as opened:
        yield opened


@pytest.mark.parametrize("name", ["tables", "alone", "runs", "training"])
def test_captions_are_whole_and_results_are_near(tab: Tab, pages: dict[str, str], name: str) -> None:
    tab.open(pages[name])
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    cut = """[...document.querySelectorAll('.notes, .notes p, .hint')].filter(note => {
        const {left, right} = note.getBoundingClientRect();
        return left < 0 || right > 390 || note.scrollWidth > note.clientWidth || note.closest('.scroll');
    }).map(note => note.innerText)"""
    assert tab.evaluate("document.querySelectorAll('.notes p, .hint').length") > 1
    assert tab.evaluate(cut) == []
    assert tab.evaluate("document.querySelector('table').getBoundingClientRect().top") <= 8 * SCREEN


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("tables", ["Wide", "Success and latency against reuse", "libero_spatial", "Results"]),
        ("runs", ["libero_spatial · spatial-run", "Results"]),
        ("training", ["How it went", "What it looks at"]),
    ],
)
def test_the_contents_name_every_section(tab: Tab, pages: dict[str, str], name: str, first: list[str]) -> None:
    tab.open(pages[name])
    links = "[...document.querySelectorAll('nav a')]"
    assert tab.evaluate(f"{links}.map(link => document.querySelector(link.getAttribute('href')).innerText)") == (
        tab.evaluate("[...document.querySelectorAll('h2')].map(heading => heading.innerText)")
    )
    assert tab.evaluate(f"{links}.map(link => link.innerText)")[: len(first)] == first
