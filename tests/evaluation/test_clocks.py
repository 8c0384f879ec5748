"""Runs in worlds that do not wait: together, resumed, in any number of processes; their tables and reports."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.evaluation.worlds import FakeEnv, fake_worker, outcomes

from lac_vla import InputError
from lac_vla.cli import main
from lac_vla.evaluation import clock, runner
from lac_vla.evaluation.config import EvalConfig
from lac_vla.evaluation.paper_tables import paper_tables
from lac_vla.evaluation.reproduce import ReproduceConfig, reproduce
from lac_vla.evaluation.runner import evaluate, evaluate_together
from lac_vla.factory import ModelOptions
from lac_vla.realtime.device import DeviceTable, Shape
from lac_vla.results.clocks import WAITING, clock_rows
from lac_vla.results.records import EpisodeRecord, read_episodes
from lac_vla.results.summary import summarize


@pytest.fixture
def config(model: str, tmp_path: Path) -> EvalConfig:
    policies, options = ("dense", "random:ratio=0.5"), ModelOptions(threads=1)
    return EvalConfig(
        model, tmp_path / "run", policies, tasks=(0, 3), init_states=(3, 5), videos=0, clock="60", model_options=options
    )


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A table of a device on which a frame of half of the tokens takes one step less than a dense one."""
    shape = Shape("any", ("openvla",), 1, 1, 1, scaled=True)
    stages = {"prefill": {"fixed": 20.0, "per_share": 60.0}}
    made = DeviceTable("toy", "toy", "none", "none", "derived", "A test.", "none.", shape, stages)
    (tmp_path / "toy.json").write_text(json.dumps(made.to_json()))
    return tmp_path / "toy.json"


def timed(run: Path) -> list[Any]:
    return sorted((e.method, e.trial, e.realtime) for e in read_episodes(run / "episodes.jsonl"))


def test_a_run_does_not_depend_on_the_number_of_processes(
    config: EvalConfig, table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, clock=str(table))
    one = evaluate(config)
    monkeypatch.setattr(runner, "EpisodeWorker", fake_worker)
    two = evaluate(replace(config, out=config.out.with_name("two"), workers=2))
    assert outcomes(two) == outcomes(one)
    assert timed(two) == timed(one)
    assert {e.realtime.table for e in read_episodes(one / "episodes.jsonl") if e.realtime} == {"toy"}


def test_clocks_are_compared_with_the_world_that_waits(
    config: EvalConfig, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeEnv, "horizon", 30)
    config = replace(config, tasks=(0,), init_states=(28, 32))
    calm = evaluate(replace(config, clock=None))
    late = evaluate(replace(config, clock=str(table), out=tmp_path / "late"))
    episodes = [e for run in (calm, late) for e in read_episodes(run / "episodes.jsonl")]
    rows = {(found.clock, found.row.method): found for found in clock_rows(episodes)}
    assert list(rows) == [(name, method) for name in ("", "toy, hold") for method in ("dense", "random-0.5")]
    dense, reusing = (rows["toy, hold", method].row.pace for method in ("dense", "random-0.5"))
    assert dense is not None
    assert reusing is not None
    assert dense.answer_ms == (80.0, 80.0, 40)
    assert (dense.stale, dense.held) == pytest.approx((1 / 3, 2 / 3), abs=0.02), "two steps, and one to act"
    assert dense.effective_hz == pytest.approx(20 / 3, rel=0.05)
    assert reusing.effective_hz == pytest.approx(20 / 2, rel=0.1), "one step, and one to act"
    degraded = rows["toy, hold", "dense"].degradation
    assert degraded is not None
    assert (degraded.pairs, degraded.difference) == (4, 0.0), "this world is solved by its clock alone"
    assert rows["", "dense"].degradation is None
    assert rows["", "dense"].row.pace is None
    main(["report", str(calm), str(late), "--out", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    assert all(words in page for words in ("A world that does not wait", "Mode hold", WAITING))


def test_clocks_run_together_as_alone(config: EvalConfig) -> None:
    worlds = [("0", "hold"), ("60", "hold"), ("60", "async")]
    alone = [replace(config, clock=c, mode=m, out=config.out.with_name(f"alone{c}{m}")) for c, m in worlds]  # type: ignore[arg-type]
    together = [replace(one, out=one.out.with_name(one.out.name + "-together")) for one in alone]
    for one in alone:
        evaluate(one)
    FakeEnv.made = 0
    evaluate_together(together)
    assert FakeEnv.made == 2, "a simulator per task"
    for one, other in zip(alone, together, strict=True):
        assert (outcomes(one.out), timed(one.out)) == (outcomes(other.out), timed(other.out))
    calm = evaluate(replace(config, clock=None, out=config.out.with_name("calm")))
    assert [(*o[2:],) for o in outcomes(calm)] == [(*o[2:],) for o in outcomes(alone[0].out)], "no latency: the same"
    with pytest.raises(InputError, match="all else alike"):
        evaluate_together([together[0], replace(together[0], out=config.out)])


def test_clock_and_mode_bind_a_run_that_goes_on(config: EvalConfig, table: Path) -> None:
    config = replace(config, clock=str(table))
    evaluate(config)
    for wrong in ({"clock": "60"}, {"mode": "async"}, {"clock": None}, {"deadline_ms": 70.0}):
        with pytest.raises(InputError, match=r"holds a run with other|of another clock"):
            evaluate(replace(config, **wrong))  # type: ignore[arg-type]
    content = json.loads(table.read_text())
    content["stages"]["prefill"]["fixed"] = 21.0
    table.write_text(json.dumps(content))
    with pytest.raises(InputError, match="clock_digest"):
        evaluate(config)


def test_a_deadline_is_kept_in_virtual_time_and_one_that_cannot_be_is_refused(config: EvalConfig, table: Path) -> None:
    config = replace(config, clock=str(table), policies=("dense",), deadline_ms=50.0, init_states=(6, 8))
    for episode in read_episodes(evaluate(config) / "episodes.jsonl"):
        assert episode.clock == "toy, hold, 50 ms deadline"
        assert episode.realtime is not None
        first, *others = episode.realtime.answer_ms
        assert (first, others != [], all(ms <= 50 for ms in others)) == (80.0, True, True)
    with pytest.raises(InputError, match="cannot be kept"):
        evaluate(replace(config, deadline_ms=21.0, out=config.out.with_name("strict")))


def test_a_clock_that_does_not_fit_leaves_nothing_behind(config: EvalConfig) -> None:
    for name, mode, message in (("cpu", "hold", "no latency table fits"), ("60", "rtc", "single actions")):
        with pytest.raises(InputError, match=message):
            evaluate(replace(config, clock=name, mode=mode))  # type: ignore[arg-type]
        assert not config.out.exists()
    with pytest.raises(InputError, match="give --clock, too"):
        replace(config, clock=None, mode="async")


def test_a_record_comes_back_from_its_line(config: EvalConfig) -> None:
    [first, *_] = read_episodes(evaluate(config) / "episodes.jsonl")
    assert EpisodeRecord.from_json(json.loads(json.dumps(first.to_json()))) == first
    line = json.loads(json.dumps(first.to_json()))
    for wrong in (
        {"mode": "never"},
        {"observed": [-1]},
        {"answer_ms": [float("nan")]},
        {"control_hz": 0},
        {"acted": []},
    ):
        with pytest.raises(InputError, match="real time"):
            EpisodeRecord.from_json(line | {"realtime": line["realtime"] | wrong})


def test_the_wall_clock_stands_beside_its_prediction(
    config: EvalConfig, table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = [DeviceTable.read(table)]
    monkeypatch.setattr(clock, "find_tables", lambda name: tables)
    run = evaluate(replace(config, clock="wall", tasks=(0,), init_states=(6, 7), policies=("dense",)))
    [episode] = read_episodes(run / "episodes.jsonl")
    real = episode.realtime
    assert real is not None
    assert (real.clock, real.table, set(real.predicted_ms)) == ("wall", "", {80.0})
    pace = summarize([episode]).methods[0].pace
    assert pace is not None
    cycles = [after - before for before, after in pairwise(real.observed)]
    predicted = [
        cycle - acted + seen + 2
        for cycle, seen, acted in zip(cycles, real.observed, real.acted, strict=False)
        if acted is not None
    ]
    assert pace.predicted_hz == pytest.approx(20 / np.mean(predicted)) if predicted else pace.predicted_hz is None


def test_reproduce_plays_all_clocks_and_makes_their_table(model: str, tmp_path: Path) -> None:
    config = ReproduceConfig(
        tmp_path / "out", model, tasks=(0,), first=4, trials=2, policies=("random:ratio=0.5",), videos=0,
        clocks=("60", "120"), modes=("hold", "async"), clock_trials=1,
    )  # fmt: skip
    done = reproduce(config)
    assert len(done.clocked) == 2 * 4
    found = next(t for t in paper_tables(done) if t.title == "A world that does not wait")
    assert [(row[0], row[1]) for row in found.rows] == [
        (name, method)
        for name in (WAITING, "60 ms, hold", "60 ms, async", "120 ms, hold", "120 ms, async")
        for method in ("dense", "random-0.5")
    ]
    assert any("virtual time" in note for note in found.notes)
    with pytest.raises(InputError, match="give every one once"):
        replace(config, clocks=("60", "60"))
