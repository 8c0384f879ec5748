from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lac_vla.errors import InputError
from lac_vla.results import table as write
from lac_vla.results.records import EpisodeRecord, read_episodes
from lac_vla.results.stats import Percentiles, wilson
from lac_vla.results.summary import summarize


def record(method: str, task: int, init: int, success: bool, **more: object) -> EpisodeRecord:
    base = {"suite": "libero_spatial", "instruction": f"task {task}", "seed": 0, "steps": 2, "horizon": 220}
    return EpisodeRecord.from_json(
        {"method": method, "task": task, "init_state": init, "success": success, **base, **more}
    )


def episodes() -> list[EpisodeRecord]:
    """Pairs: 1 both, 2 only dense, 1 only motion, 1 neither; one motion episode that dense did not run."""
    outcomes = {(0, 0): (1, 1), (0, 1): (1, 0), (1, 0): (1, 0), (1, 1): (0, 1), (1, 2): (0, 0)}
    records = []
    for (task, init), (_, success) in outcomes.items():
        costs = {
            "ratio_effective": [0.0, 0.5],
            "ratio_nominal": [None, 0.6],
            "macs": [100.0, 50.0],
            "oldest_age": [0, init + 1],
            "latency_ms": {"model_call": [10.0, 20.0], "flow": [1.0, 3.0]},
            "peak_memory_mb": 100.0 + init,
        }
        records.append(record("motion-0.6", task, init, bool(success), **costs))
    records.append(record("motion-0.6", 0, 2, True))
    for (task, init), (success, _) in outcomes.items():
        records.append(record("dense", task, init, bool(success), macs=[100.0, 100.0]))
    return records


def test_rows_by_hand() -> None:
    summary = summarize(episodes())
    dense, motion = summary.methods
    assert (dense.method, dense.successes, dense.trials, dense.paired) == ("dense", 3, 5, None)
    assert (dense.macs, dense.flops, dense.ratio_effective, dense.latency) == (100.0, 200.0, None, {})
    assert (motion.method, motion.successes, motion.trials, motion.frames) == ("motion-0.6", 3, 6, 12)
    assert motion.interval == wilson(3, 6)
    assert motion.paired is not None
    assert (motion.paired.pairs, motion.paired.both) == (5, 1)
    assert (motion.paired.only_dense, motion.paired.only_method) == (2, 1)
    assert motion.paired.difference == pytest.approx(-1 / 5)
    assert motion.paired.p == 1.0
    assert motion.ratio_effective == pytest.approx(0.25)
    assert motion.ratio_nominal == pytest.approx(0.6)
    assert motion.macs == pytest.approx(75.0)
    assert motion.latency["model_call"] == Percentiles(15.0, 20.0, 10)
    assert (motion.oldest_age, dense.oldest_age) == (3, None)
    assert motion.peak_memory_mb == 102.0
    assert [(task.task, task.outcomes) for task in summary.tasks] == [
        (0, {"dense": (2, 2), "motion-0.6": (2, 3)}),
        (1, {"dense": (1, 3), "motion-0.6": (1, 3)}),
    ]


@pytest.mark.parametrize("ages", [[0, None, None], [0, 0, 0], []])
def test_a_method_that_reuses_nothing_has_no_oldest_token(ages: list[int | None]) -> None:
    """First frames, and scene cuts, are dense; the others prune."""
    (row,) = summarize([record("fastv-0.5", 0, 0, True, oldest_age=ages)]).methods
    assert row.oldest_age is None
    again = EpisodeRecord.from_json(
        json.loads(json.dumps(dataclasses.asdict(record("fastv-0.5", 0, 0, True, oldest_age=ages))))
    )
    assert again.oldest_age == ages


@pytest.mark.parametrize("other", [{"seed": 1}, {"stress": "drift"}])
def test_other_seeds_and_stresses_are_no_pair(other: dict[str, Any]) -> None:
    episodes = [record("dense", 0, 0, True), record("lac", 0, 0, True, **other)]
    assert summarize(episodes).methods[1].paired is None


def test_summary_is_json() -> None:
    content = json.loads(json.dumps(summarize(episodes()).to_json()))
    assert content["methods"][1]["latency"]["model_call"] == {"p50": 15.0, "p95": 20.0, "n": 10}
    assert content["methods"][1]["rate"] == 0.5


def test_decoding_is_reported_where_it_was_recorded() -> None:
    first = dataclasses.replace(record("dense", 0, 0, True), passes=(6, 2, 0), accepted=(None, 1, 6))
    summary = summarize([first, record("lac", 0, 0, True)])
    assert (summary.methods[0].passes, summary.methods[0].accepted) == (pytest.approx(8 / 3), 3.5)
    assert write.decoding(summary) == "dense 2.7 (3.5 of the draft stood)"


def test_nothing_to_summarise() -> None:
    with pytest.raises(InputError, match="no finished episode"):
        summarize([])


def test_terminal_table_shows_the_numbers() -> None:
    out = io.StringIO()
    Console(file=out, width=100).print(*write.terminal_tables(summarize(episodes())))
    text = out.getvalue()
    for part in (
        "motion-0.6",
        "3/6  50.0 %",
        "\N{MINUS SIGN}20.0 [\N{MINUS SIGN}80.0, +40.0] (p 1.000)",
        "60 % / 25.0 %",
        "15.0 / 20.0",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (write.percent(None), "-"),
        (write.percent(0.256), "25.6 %"),
        (write.points(0.0), "±0.0"),
        (write.points(-0.0001), "±0.0"),
        (write.points(0.021), "+2.1"),
        (write.p_value(0.0004), "<0.001"),
        (write.count(2.5e9), "2.50 G"),
        (write.count(12.0), "12"),
        (write.milliseconds(8.254), "8.25"),
        (write.milliseconds(82.54), "82.5"),
        (write.milliseconds(825.4), "825"),
    ],
)
def test_numbers_are_written_alike_everywhere(text: str, expected: str) -> None:
    assert text == expected


def line(**changes: object) -> str:
    base = {"method": "dense", "suite": "s", "task": 0, "instruction": "x", "init_state": 0, "seed": 0}
    return json.dumps({**base, "success": True, "steps": 1, "horizon": 2, **changes}) + "\n"


def test_a_killed_runs_last_line_is_not_counted(tmp_path: Path) -> None:
    path = tmp_path / "episodes.jsonl"
    path.write_text(line() + line(init_state=1) + line(init_state=2)[:-9])
    assert [episode.init_state for episode in read_episodes(path)] == [0, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{nonsense\n" + line(), "line 1"),
        (line() + line(), "line 2.*twice"),
        ('{"method": "dense"}\n', "lacks suite, task"),
        ("[1, 2]\n", "line 1"),
    ],
)
def test_damaged_records_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "episodes.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_episodes(path)


def test_no_record_at_all(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_episodes(tmp_path / "episodes.jsonl")
