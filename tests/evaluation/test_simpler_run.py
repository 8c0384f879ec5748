"""A run on SIMPLER: a tiny model, the real client and server around a fake simulator that crashes and hangs."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table
from tests.sims import fakes

from lac_vla import InputError, factory, random_vla
from lac_vla.cli import main
from lac_vla.evaluation.config import EvalConfig
from lac_vla.evaluation.runner import evaluate
from lac_vla.models.cogact.config import TINY_COGACT
from lac_vla.report import build_report
from lac_vla.results.records import read_episodes
from lac_vla.sims.base import SimulatorError
from lac_vla.sims.simpler.benchmark import Simpler
from lac_vla.sims.simpler.env import SimplerEnv
from lac_vla.sims.simpler.ms2 import Ms2Backend
from lac_vla.sims.simpler.protocol import episodes, tasks

APPLE = len(tasks("vm")) - 1
STEPS = 5


@dataclass(frozen=True)
class Fake(Simpler):
    """SIMPLER on a fake simulator behind the real client and server."""

    folder: Path = field(default=Path(), compare=False)

    def make_env(self, task: int) -> SimplerEnv:
        env = super().make_env(task)
        env.horizon = STEPS
        return env

    def make_backend(self, tasks: Collection[int]) -> Ms2Backend:
        return fakes.backend(self.folder, timeout_s=4.0)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    found = fakes.install(tmp_path / "fake")
    monkeypatch.setenv("PYTHONPATH", str(found))
    stage = found / "data/hab2_bench_assets/stages/google_pick_coke_can_1_v4.glb"
    stage.parent.mkdir(parents=True)
    stage.write_bytes(b"a box")
    return found


@pytest.fixture
def config(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> EvalConfig:
    camera = replace(TINY_COGACT.vlm.cameras[0], name="overhead_camera")
    model = replace(TINY_COGACT, vlm=replace(TINY_COGACT.vlm, cameras=(camera,)))
    monkeypatch.setattr(factory, "load_vla", lambda *_, **__: random_vla(model))
    return EvalConfig(
        "a-model",
        tmp_path / "run",
        ("dense", "random:ratio=0.5"),
        Fake(retries=1, folder=folder, assets=folder / "data"),
        tasks=(0, APPLE),
        init_states=(0, 2),
        videos=0,
    )


def outcomes(run: Path) -> list[Any]:
    """What a run decides, in its order."""
    lines = [json.loads(line) for line in (run / "episodes.jsonl").read_text().splitlines()]
    return [(e["method"], e["task"], e["init_state"], e["success"], e["ratio_effective"], e["outcome"]) for e in lines]


def test_every_method_plays_the_sweep(config: EvalConfig) -> None:
    records = read_episodes(evaluate(config) / "episodes.jsonl")
    keys = [(r.task, r.init_state) for r in records if r.method == "dense"]
    assert keys == [(0, 0), (0, 1), (APPLE, 0), (APPLE, 1)]
    assert keys == [(r.task, r.init_state) for r in records if r.method == "random-0.5"]
    for record in records:
        assert record.suite == "simpler-vm"
        assert record.steps == STEPS  # success at step 4 ended nothing
        assert record.success
        assert record.instruction == "open top drawer"
    apple = json.loads((config.out / "episodes.jsonl").read_text().splitlines()[-1])["outcome"]
    assert apple["instructions"] == [[0, "open top drawer"], [3, "place apple into top drawer"]]
    content = json.loads((config.out / "simpler.json").read_text())
    assert content["title"] == (
        "SIMPLER Google robot visual matching, original simulator, stand-ins: stages/google_pick_coke_can_1_v4.glb; "
        "not comparable with published tables"
    )
    assert content["reasons"][0].startswith("the sweep is not whole: dense lacks 860 of 864: coke can horizontal 98")
    cells = {cell["name"]: cell for cell in content["methods"]["dense"]["last_step"]}
    assert cells["apple in drawer"] == {"name": "apple in drawer", "value": 1.0, "played": 2, "of": 108}
    assert cells["average"]["value"] is None
    table = config.benchmark.publish(config.out)
    assert isinstance(table, Table)
    assert table.row_count == len(cells)
    facts = json.loads((config.out / "summary.json").read_text())
    assert facts["simulator"]["sapien"] == "2.2.2"
    named = "original simulator, stand-ins: stages/google_pick_coke_can_1_v4.glb"
    assert named in facts["notes"][0]
    assert named in build_report((config.out,), config.out / "report.html").read_text()


@pytest.mark.parametrize("order", ["crash", "hang"])
def test_a_run_goes_on_after_a_simulator_died_in_mid_episode(
    config: EvalConfig, folder: Path, order: str, tmp_path: Path
) -> None:
    config = replace(config, init_states=(0, 1))
    whole = outcomes(evaluate(config))
    (folder / order).touch()
    again = replace(config, out=tmp_path / "again")
    assert outcomes(evaluate(again)) == whole
    assert not (folder / order).exists()  # it did die


def test_finished_episodes_are_kept_when_simulators_keep_dying(
    config: EvalConfig, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dying(Ms2Backend):
        fine = 4

        def reset(self, episode: Any) -> Any:
            self.fine -= 1
            if self.fine < 0:
                (folder / "crash").touch()
            return super().reset(episode)

    def dying(self: Fake, tasks: Collection[int]) -> Ms2Backend:
        good = fakes.backend(folder)
        return Dying(good.command, good.assets, timeout_s=4.0)

    with monkeypatch.context() as patch:
        patch.setattr(Fake, "make_backend", dying)
        with pytest.raises(SimulatorError, match="died"):
            evaluate(config)
    kept = (config.out / "episodes.jsonl").read_text()
    assert len(kept.splitlines()) == 3  # the first reset is for the cost model
    (config.out / "episodes.jsonl").write_text(kept + '{"method": "dense", "task"')  # and killed while writing
    evaluate(config)
    text = (config.out / "episodes.jsonl").read_text()
    assert text.startswith(kept)
    assert len(read_episodes(config.out / "episodes.jsonl")) == 8


def test_a_finished_run_can_be_widened_but_not_altered(config: EvalConfig, folder: Path) -> None:
    small = replace(config, init_states=(0, 1), tasks=(APPLE,))
    evaluate(small)
    with pytest.raises(InputError, match=r"other .*convention.*another --out"):
        evaluate(replace(small, benchmark=Fake(convention="openvla", folder=folder)))
    evaluate(replace(config, tasks=(0,), benchmark=Fake(timeout_s=30, folder=folder)))
    assert {(e.task, e.init_state) for e in read_episodes(config.out / "episodes.jsonl")} == {
        (APPLE, 0),
        (0, 0),
        (0, 1),
    }
    settings = json.loads((config.out / "config.json").read_text())
    assert (settings["tasks"], settings["init_states"], settings["suite"]) == ([0, APPLE], [0, 2], "simpler-vm")
    assert not {"python", "assets", "timeout_s", "retries", "folder"} & set(settings), "the machine's, not the run's"


def test_what_is_missing_is_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LAC_SIMPLER_PYTHON", "MS2_REAL2SIM_ASSET_DIR"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit) as status:
        main(["check", "--suite", "simpler-vm"])
    said = capsys.readouterr().out
    assert status.value.code == 1
    assert f"{len(episodes('vm'))} episodes" in said
    assert "github.com/simpler-env/SimplerEnv" in said
    assert "CC BY-NC" in said
    with pytest.raises(InputError, match=r"(?s)cannot run here yet.*SimplerEnv's own interpreter.*SimplerEnv's assets"):
        evaluate(EvalConfig("a-model", tmp_path / "run", ("dense",), Simpler()))
    assert not (tmp_path / "run").exists(), "refused before anything was written"


@pytest.mark.parametrize("version", ["2.1.0", "10.0", "?", None])
def test_only_numpy_1_is_taken(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    monkeypatch.setattr(Simpler, "missing", lambda self, tasks: [])
    monkeypatch.setattr(Ms2Backend, "metadata", lambda self: {"numpy": version} if version else {})
    with pytest.raises(InputError, match=rf"has numpy {re.escape(str(version))}: .*numpy<2"):
        Simpler().make_backend((0,))


@pytest.mark.parametrize("wrong", [{"suite": "simpler-bridge"}, {"retries": -1}, {"timeout_s": 0}])
def test_bad_options(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Simpler(**wrong)


def test_tasks_and_states_are_those_of_the_suite(tmp_path: Path) -> None:
    benchmark = Simpler("simpler-widowx", "ms3")
    assert EvalConfig("a-model", tmp_path, ("dense",), benchmark).states == (0, 24)
    for wrong in ({"tasks": (4,)}, {"init_states": (0, 25)}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            EvalConfig("a-model", tmp_path, ("dense",), benchmark, **wrong)  # type: ignore[arg-type]
