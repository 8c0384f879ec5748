"""A run on SIMPLER: a tiny model, the real client and server around a fake simulator that crashes and hangs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.sims import fakes

from lac_vla import InputError, random_vla
from lac_vla.cli import main
from lac_vla.evaluation import methods, simpler
from lac_vla.evaluation.simpler import SimplerConfig, evaluate_simpler
from lac_vla.evaluation.simpler_table import tables, terminal_table
from lac_vla.models.cogact.config import TINY_COGACT
from lac_vla.report import build_report
from lac_vla.results.records import read_episodes
from lac_vla.sims.simpler.backend import SimulatorError
from lac_vla.sims.simpler.ms2 import Ms2Backend
from lac_vla.sims.simpler.protocol import episodes, tasks

APPLE = len(tasks("vm")) - 1
STEPS = 5
Make = Callable[[SimplerConfig], Ms2Backend]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    found = fakes.install(tmp_path / "fake")
    monkeypatch.setenv("PYTHONPATH", str(found))
    return found


@pytest.fixture
def make(folder: Path) -> Make:
    return lambda config: fakes.backend(folder, timeout_s=4.0, start_timeout_s=120.0)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimplerConfig:
    camera = replace(TINY_COGACT.vlm.cameras[0], name="overhead_camera")
    model = replace(TINY_COGACT, vlm=replace(TINY_COGACT.vlm, cameras=(camera,)))
    monkeypatch.setattr(methods, "load_vla", lambda *_, **__: random_vla(model))
    monkeypatch.setattr(simpler.SimplerEnv, "horizon", STEPS)
    return SimplerConfig(
        "a-model", tmp_path / "run", "vm", ("dense", "random:ratio=0.5"), tasks=(0, APPLE), limit=2, retries=1
    )


def outcomes(run: Path) -> list[Any]:
    """What a run decides, in its order."""
    lines = [json.loads(line) for line in (run / "episodes.jsonl").read_text().splitlines()]
    return [(e["method"], e["task"], e["init_state"], e["success"], e["ratio_effective"], e["simpler"]) for e in lines]


def test_every_method_plays_the_sweep(config: SimplerConfig, make: Make) -> None:
    records = read_episodes(evaluate_simpler(config, make) / "episodes.jsonl")
    keys = [(r.task, r.init_state) for r in records if r.method == "dense"]
    assert keys == [(0, 0), (0, 1), (APPLE, 0), (APPLE, 1)]
    assert keys == [(r.task, r.init_state) for r in records if r.method == "random-0.5"]
    for record in records:
        assert record.suite == "simpler-vm"
        assert record.steps == STEPS  # success at step 4 ended nothing
        assert record.success
        assert record.instruction == "open top drawer"
    apple = json.loads((config.out / "episodes.jsonl").read_text().splitlines()[-1])["simpler"]
    assert apple["instructions"] == [[0, "open top drawer"], [3, "place apple into top drawer"]]
    content = json.loads((config.out / "simpler.json").read_text())
    assert content["title"].startswith("not SIMPLER")
    assert content["reasons"][0].startswith("the sweep is not whole: dense lacks 860 of 864: coke can horizontal 98")
    cells = {cell["name"]: cell for cell in content["methods"]["dense"]["last_step"]}
    assert cells["apple in drawer"] == {"name": "apple in drawer", "value": 1.0, "played": 2, "of": 108}
    assert cells["average"]["value"] is None
    assert terminal_table(config.out).row_count == len(cells)
    facts = json.loads((config.out / "summary.json").read_text())
    assert facts["simulator"]["sapien"] == "2.2.2"
    assert "simpler-vm" in build_report((config.out,), config.out / "report.html").read_text()


@pytest.mark.parametrize("order", ["crash", "hang"])
def test_a_run_goes_on_after_a_simulator_died_in_mid_episode(
    config: SimplerConfig, make: Make, folder: Path, order: str, tmp_path: Path
) -> None:
    config = replace(config, limit=1)
    whole = outcomes(evaluate_simpler(config, make))
    (folder / order).touch()
    again = replace(config, out=tmp_path / "again")
    assert outcomes(evaluate_simpler(again, make)) == whole
    assert not (folder / order).exists()  # it did die


def test_finished_episodes_are_kept_when_simulators_keep_dying(config: SimplerConfig, make: Make, folder: Path) -> None:
    class Dying(Ms2Backend):
        fine = 4

        def reset(self, episode: Any) -> Any:
            self.fine -= 1
            if self.fine < 0:
                (folder / "crash").touch()
            return super().reset(episode)

    def dying(config: SimplerConfig) -> Ms2Backend:
        good = make(config)
        return Dying(good.command, good.assets, timeout_s=4.0, start_timeout_s=120.0)

    with pytest.raises(SimulatorError, match="died"):
        evaluate_simpler(config, dying)
    kept = (config.out / "episodes.jsonl").read_text()
    assert len(kept.splitlines()) == 3  # the first reset is for the cost model
    (config.out / "episodes.jsonl").write_text(kept + '{"method": "dense", "task"')  # and killed while writing
    evaluate_simpler(config, make)
    text = (config.out / "episodes.jsonl").read_text()
    assert text.startswith(kept)
    assert len(read_episodes(config.out / "episodes.jsonl")) == 8


def test_a_finished_run_can_be_widened_but_not_altered(config: SimplerConfig, make: Make) -> None:
    evaluate_simpler(replace(config, limit=1, tasks=(0,)), make)
    with pytest.raises(InputError, match=r"other .*convention.*another --out"):
        evaluate_simpler(replace(config, convention="openvla"), make)
    evaluate_simpler(replace(config, tasks=(0,)), make)
    assert len(read_episodes(config.out / "episodes.jsonl")) == 4
    assert tables(config.out)["setup"] == "vm"


def test_what_is_missing_is_listed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LAC_SIMPLER_PYTHON", "MS2_ASSET_DIR"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit) as status:
        main(["simpler", "--check"])
    said = capsys.readouterr().out
    assert status.value.code == 1
    assert f"{len(episodes('vm'))} episodes" in said
    assert "github.com/simpler-env/SimplerEnv" in said
    assert "CC BY-NC" in said
    with pytest.raises(InputError, match=r"(?s)cannot run here yet.*SimplerEnv's own interpreter.*SimplerEnv's assets"):
        evaluate_simpler(SimplerConfig("a-model", policies=("dense",)))


@pytest.mark.parametrize(
    ("versions", "said"),
    [
        ({"numpy": "2.1.0"}, r"has numpy 2\.1\.0.*numpy<2"),
        ({"numpy": "10.0"}, r"has numpy 10\.0.*numpy<2"),
        ({"numpy": "?"}, r"does not say.*\?.*numpy<2"),
        ({}, r"does not say.*numpy<2"),
    ],
)
def test_only_numpy_1_is_taken(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], said: str) -> None:
    monkeypatch.setattr(simpler, "missing", lambda config: [])
    monkeypatch.setattr(Ms2Backend, "metadata", lambda self: versions)
    with pytest.raises(InputError, match=said):
        simpler.make_backend(SimplerConfig("a-model", policies=("dense",)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"setup": "bridge"},
        {"model": ""},
        {"tasks": (11,)},
        {"limit": -1},
        {"timeout_s": 0},
        {"policies": ("x",)},
        {"flow": "raft"},
    ],
)
def test_bad_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        SimplerConfig(**{"model": "a-model", **wrong})
