from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lac_vla.errors import InputError
from lac_vla.results import format as write
from lac_vla.results.records import EpisodeRecord, read_episodes
from lac_vla.results.stats import Percentiles, wilson
from lac_vla.results.summary import MethodRow, summarize
from lac_vla.results.table import FLAG, SPEEDUP, SUCCESS, TextTable, method_tables


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
    assert (dense.metrics, dense.ratio, dense.latency) == ({"macs": 100.0}, None, {})
    assert (motion.method, motion.successes, motion.trials, motion.steps) == ("motion-0.6", 3, 6, 12)
    assert motion.interval == wilson(3, 6)
    assert motion.paired is not None
    assert (motion.paired.pairs, motion.paired.both) == (5, 1)
    assert (motion.paired.only_dense, motion.paired.only_method) == (2, 1)
    assert motion.paired.difference == pytest.approx(-1 / 5)
    assert motion.paired.p == 1.0
    assert motion.metrics == pytest.approx(
        {"ratio_effective": 0.25, "ratio_nominal": 0.6, "macs": 75.0, "oldest_age": 3}
    )
    assert motion.latency["model_call"] == Percentiles(15.0, 20.0, 10)
    assert motion.peak_memory_mb == 102.0
    assert [(task.task, task.outcomes) for task in summary.tasks] == [
        (0, {"dense": (2, 2), "motion-0.6": (2, 3)}),
        (1, {"dense": (1, 3), "motion-0.6": (1, 3)}),
    ]


@pytest.mark.parametrize("ages", [[0, None, None], [0, 0, 0], []])
def test_a_method_that_reuses_nothing_has_no_oldest_token(ages: list[int | None]) -> None:
    """First frames, and scene cuts, are dense; the others prune."""
    (row,) = summarize([record("fastv-0.5", 0, 0, True, oldest_age=ages)]).methods
    assert "oldest_age" not in row.metrics


def test_a_record_is_read_as_it_was_written() -> None:
    for episode in episodes():
        assert EpisodeRecord.from_json(json.loads(json.dumps(episode.to_json()))) == episode
    old = record("dense", 0, 0, True, passes=[2, 0], accepted=[None, 6], macs=[], unknown=3)
    assert old.metrics == {"decode_passes": [2, 0], "accepted": [None, 6]}
    assert old.actions_per_call == 1
    assert old.to_json()["decode_passes"] == [2, 0]


def timed(method: str, task: int, init: int, ms: list[float], *, success: bool = True) -> EpisodeRecord:
    return record(method, task, init, success, latency_ms={"observation_to_action": ms}, steps=len(ms))


def row_of(method: str, *episodes: EpisodeRecord) -> MethodRow:
    row = summarize(episodes).row(method)
    assert row is not None
    return row


def test_the_net_speed_up_is_the_time_of_what_both_solved() -> None:
    """A frame takes half as long, but the task takes half as long again: 4/3 times as fast, not twice."""
    row = row_of("lac", timed("dense", 0, 0, [10.0] * 4), timed("lac", 0, 0, [5.0] * 6))
    assert row.speedup is not None
    assert (row.speedup.pairs, row.speedup.ratio, row.speedup.interval) == (1, pytest.approx(4 / 3), None)
    more = [timed("dense", 0, 1, [20.0], success=False), timed("lac", 0, 1, [1.0])]  # one alone solved it
    more += [timed("dense", 0, 2, [20.0]), timed("lac", 0, 2, [1.0], success=False), timed("lac", 0, 3, [1.0])]
    more += [record("dense", 0, 4, True), timed("lac", 0, 4, [1.0])]  # nothing was timed
    same = row_of("lac", timed("dense", 0, 0, [10.0] * 4), timed("lac", 0, 0, [5.0] * 6), *more)
    assert same.speedup == row.speedup
    alone = row_of("lac", timed("dense", 0, 1, [20.0], success=False), timed("lac", 0, 1, [1.0]))
    assert alone.speedup is None
    assert row_of("dense", timed("dense", 0, 0, [10.0])).speedup is None


def test_the_net_speed_up_has_an_interval_and_its_pairs_are_told() -> None:
    pairs = [(timed("dense", 0, k, [10.0]), timed("lac", 0, k, [5.0 if k % 2 else 10.0])) for k in range(40)]
    summary = summarize([episode for pair in pairs for episode in pair])
    lac = summary.methods[1]
    assert lac.speedup is not None
    assert lac.speedup.interval is not None
    assert lac.speedup.ratio == pytest.approx(400 / 300)
    assert 1.1 < lac.speedup.interval.low < lac.speedup.ratio < lac.speedup.interval.high < 1.6
    table = method_tables(summary)[0]
    assert table.rows[1][table.headings.index("net speed-up")].startswith("1.33 ×\n[1.2")
    assert any("Pairs: lac 40." in note and "several processes" in note for note in table.notes)


def test_actions_per_call_stand_below_the_table() -> None:
    chunked = dataclasses.replace(record("lac", 0, 0, True), actions_per_call=4)
    assert "actions per call of the model: 4" in method_tables(summarize([chunked]))[0].notes
    both = method_tables(summarize([record("dense", 0, 0, True), chunked]))[0]
    assert "actions per call of the model: dense 1, lac 4" in both.notes


def test_flagged_rows_stand_out_and_empty_columns_are_left_out() -> None:
    rows = [(row.method, row) for row in summarize(episodes()).methods]
    table = TextTable.of("t", [*rows, ("never", None)], (*SUCCESS, SPEEDUP), (), flagged=[1])
    assert table.headings == ("method", "solved", "vs dense, points")
    assert [cells[0] for cells in table.rows] == ["dense", "motion-0.6", "never"]
    assert [cells[0] for _, cells in table.flagged_rows] == ["dense", f"motion-0.6 {FLAG}", "never"]
    assert table.rows[2][1:] == ("-", "-")


@pytest.mark.parametrize("other", [{"seed": 1}, {"stress": "drift"}])
def test_other_seeds_and_stresses_are_no_pair(other: dict[str, Any]) -> None:
    episodes = [record("dense", 0, 0, True), record("lac", 0, 0, True, **other)]
    assert summarize(episodes).methods[1].paired is None


def test_decoding_is_reported_where_it_was_recorded() -> None:
    first = record("dense", 0, 0, True, decode_passes=(6, 2, 0), accepted=(None, 1, 6))
    dense, lac = summarize([first, record("lac", 0, 0, True)]).methods
    assert dense.metrics == {"decode_passes": pytest.approx(8 / 3), "accepted": 3.5}
    assert lac.metrics == {}


def test_nothing_to_summarise() -> None:
    with pytest.raises(InputError, match="no finished episode"):
        summarize([])


def test_terminal_table_shows_the_numbers() -> None:
    out = io.StringIO()
    Console(file=out, width=100).print(*(table.to_terminal() for table in method_tables(summarize(episodes()))))
    text = out.getvalue()
    for part in (
        "motion-0.6",
        "3/6 50.0 %",
        "\N{MINUS SIGN}20.0 (p 1.000)",
        "[\N{MINUS SIGN}80.0, +40.0]",
        "60 %",
        "25.0 %",
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
