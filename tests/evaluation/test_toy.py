"""A simulator of one's own takes a benchmark, its environment and one line in the registry: all else is there."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import pytest
from tests.engine.scenes import frame
from tests.evaluation.worlds import save_tiny

from lac_vla import Frame, InputError, load_vla
from lac_vla.cli import main
from lac_vla.evaluation.config import EvalConfig
from lac_vla.evaluation.runner import evaluate
from lac_vla.report import build_report
from lac_vla.results.records import read_episodes
from lac_vla.results.summary import summarize
from lac_vla.sims import BENCHMARKS
from lac_vla.sims.base import Benchmark, Env, SimulatorError

CRASHES: list[int] = []
"""Steps at which the next simulators die, once each."""


class ToyEnv(Env):
    """A task that is solved at the third step."""

    suite, task, instruction, horizon, no_op = "toy", 0, "pick up the bowl", 4, (0.0,) * 7

    def reset(self, init_state: int, seed: int = 0) -> Frame:
        self.steps = 0
        return frame(10 * init_state)

    def step(self, action: npt.ArrayLike) -> tuple[Frame, bool]:
        assert np.shape(action) == (7,)
        self.steps += 1
        if self.steps in CRASHES:
            CRASHES.remove(self.steps)
            raise SimulatorError("the toy broke")
        return frame(self.steps), self.steps == 3


@dataclass(frozen=True)
class Toy(Benchmark):
    """One task with two initial states.

    Attributes:
        suite: It has one.
        colour: An option of its own.
    """

    suite: str = "toy"
    colour: str = "red"
    suites: ClassVar[tuple[str, ...]] = ("toy",)
    trials = (2,)

    def make_env(self, task: int) -> ToyEnv:
        return ToyEnv()


@dataclass(frozen=True)
class Fragile(Toy):
    """A toy whose episodes may be begun again once."""

    retries = 1


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(save_tiny(tmp_path / "model"))


def test_a_toy_is_played_and_reported(model: str, tmp_path: Path) -> None:
    run = evaluate(EvalConfig(model, tmp_path / "run", ("dense", "random:ratio=0.5"), Toy(colour="blue")))
    episodes = read_episodes(run / "episodes.jsonl")
    assert [(e.method, e.suite, e.task, e.init_state, e.success, e.steps) for e in episodes] == [
        (method, "toy", 0, state, True, 3) for state in (0, 1) for method in ("dense", "random-0.5")
    ]
    assert [row.successes for row in summarize(episodes).methods] == [2, 2]
    settings, summary = (json.loads((run / name).read_text()) for name in ("config.json", "summary.json"))
    assert (settings["suite"], settings["colour"], settings["init_states"]) == ("toy", "blue", [0, 2])
    assert summary["simulator"] == {"suite": "toy", "colour": "blue", "stress": None}
    assert summary["notes"] == []
    assert len(list((run / "videos").glob("*.mp4"))) == 2
    assert "toy" in build_report((run,), run / "report.html").read_text()


def test_the_command_line_knows_a_registered_toy(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", "--model", model, "--out", str(tmp_path / "run"), "--policies", "dense", "--videos", "0"]
    toy = ["--suite", "toy", "--colour", "green", "--stress", "long"]
    with pytest.raises(SystemExit):
        main(arguments + toy)
    assert "unknown suite 'toy'; choose one of libero_spatial" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setitem(BENCHMARKS, "toy", Toy)
    main(arguments + toy)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["colour"] == "green"
    assert [e.steps for e in read_episodes(tmp_path / "run" / "episodes.jsonl")] == [3, 3]
    assert (tmp_path / "run" / "report.html").exists()


@dataclass(frozen=True)
class Renamed(Toy):
    """A toy whose cameras have names of their own."""

    def make_env(self, task: int) -> ToyEnv:
        class Other(ToyEnv):
            def reset(self, init_state: int, seed: int = 0) -> Frame:
                return other(super().reset(init_state, seed))

            def step(self, action: npt.ArrayLike) -> tuple[Frame, bool]:
                seen, success = super().step(action)
                return other(seen), success

        def other(seen: Frame) -> Frame:
            return replace(seen, images={f"the_{camera}": image for camera, image in seen.images.items()})

        return Other()


def test_cameras_of_other_names_are_told_apart(model: str, tmp_path: Path) -> None:
    config = EvalConfig(model, tmp_path / "run", ("dense",), Toy(), videos=0)
    names = list(load_vla(model).grids)
    mapped = replace(
        config, out=tmp_path / "mapped", benchmark=Renamed(), camera=tuple(f"{name}=the_{name}" for name in names)
    )
    runs = [read_episodes(evaluate(each) / "episodes.jsonl") for each in (config, mapped)]
    assert [[(e.init_state, e.success, e.steps) for e in run] for run in runs] == [[(0, True, 3), (1, True, 3)]] * 2
    assert json.loads((tmp_path / "mapped" / "config.json").read_text())["camera"] == list(mapped.camera)
    for camera, message in (("nose=x", "the model's cameras are"), (f"{names[0]}=eye", r"it has \['the_")):
        with pytest.raises(InputError, match=message):
            evaluate(replace(mapped, out=tmp_path / "not", camera=(camera,)))
        assert not (tmp_path / "not").exists()


def test_an_episode_whose_simulator_died_is_begun_again(model: str, tmp_path: Path) -> None:
    whole = evaluate(EvalConfig(model, tmp_path / "whole", ("dense",), Fragile()))
    CRASHES[:] = [2]
    again = evaluate(EvalConfig(model, tmp_path / "again", ("dense",), Fragile()))
    assert not CRASHES, "it did die"
    ratios = (
        [(e.steps, e.success, e.metrics["macs"]) for e in read_episodes(run / "episodes.jsonl")]
        for run in (whole, again)
    )
    assert next(ratios) == next(ratios)
    CRASHES[:] = [2, 1]
    with pytest.raises(SimulatorError, match="the toy broke"):
        evaluate(EvalConfig(model, tmp_path / "dead", ("dense",), Fragile()))
    CRASHES[:] = [2]
    with pytest.raises(SimulatorError, match="the toy broke"):
        evaluate(EvalConfig(model, tmp_path / "once", ("dense",), Toy()))


def test_what_a_model_refuses_leaves_nothing_behind(model: str, tmp_path: Path) -> None:
    config = EvalConfig(model, tmp_path / "run", ("dense",), Toy(), videos=0, actions_per_call=2)
    with pytest.raises(InputError, match="actions_per_call is 2, but the model answers with 1"):
        evaluate(config)
    assert not config.out.exists()
