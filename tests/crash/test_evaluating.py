"""An evaluation is killed anywhere: the same command then ends with the run that was never broken."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lac_vla import InputError
from lac_vla.drawing.video import sample_frames
from lac_vla.evaluation import runner
from lac_vla.evaluation.config import EvalConfig
from lac_vla.evaluation.runner import evaluate
from lac_vla.factory import ModelOptions
from lac_vla.files import locked
from lac_vla.results.records import EpisodeRecord
from lac_vla.sims.libero.benchmark import Libero
from tests.crash.kills import counted, files, run_killed
from tests.evaluation.worlds import FakeEnv, outcomes, save_tiny

POINTS = 20
"""Changes to the disk of this evaluation."""


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Libero, "make_env", lambda self, task: FakeEnv(self.suite, task))
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("world") / "model"))


@pytest.fixture(scope="module")
def unbroken(model: str, tmp_path_factory: pytest.TempPathFactory) -> EvalConfig:
    """States 6 and 7: the first is solved, the second is not."""
    out = tmp_path_factory.mktemp("unbroken") / "run"
    config = EvalConfig(model, out, ("dense", "random:ratio=0.5"), tasks=(0,), init_states=(6, 8), videos=1)
    with counted() as count:
        evaluate(config)
    assert count.done == POINTS
    return config


def counting(run: Path) -> dict[str, Any]:
    """What counts: all but times."""
    found: dict[str, Any] = files(run)
    assert {name for name in found if name.startswith(("videos", "failures"))} == {
        *(f"videos/{method}_task00_init06.mp4" for method in ("dense", "random-0.5")),
        *(f"failures/{method}_task00_init07.jpg" for method in ("dense", "random-0.5")),
    }
    for name in found:
        if name.endswith("mp4"):
            found[name] = len(sample_frames(run / name, 1000))  # its captions have times
    lines = [json.loads(line) for line in found.pop("episodes.jsonl").splitlines()]
    order = [(line["method"], line["init_state"], line["video"], line["failure"]) for line in lines]
    summary = json.loads(found.pop("summary.json")) | {"created": None, "load": None}
    return {**found, "summary": summary, "order": order, "outcomes": outcomes(run)}


CASES = [(torn, at) for torn in (False, True) for at in range(POINTS + 4 * torn)]


@pytest.mark.parametrize(
    ("torn", "at"), [pytest.param(*case, marks=[] if case[1] % 7 == 5 else pytest.mark.slow) for case in CASES]
)
def test_killed_while_it_evaluates(unbroken: EvalConfig, tmp_path: Path, torn: bool, at: int) -> None:
    """Before any of the changes; or, torn, in the middle of a line as well."""
    config = replace(unbroken, out=tmp_path / "run")
    log = config.out / "episodes.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        if torn:
            patch.setattr(runner, "_log", log_in_two)
        assert run_killed(at, lambda: evaluate(config))
    before = log.read_bytes() if log.exists() else b""
    evaluate(config)
    assert log.read_bytes().startswith(before[: before.rfind(b"\n") + 1]), "no finished episode is lost"
    assert counting(config.out) == counting(unbroken.out)


def log_in_two(record: EpisodeRecord, path: Path) -> None:
    """Half a line is on the disk at the moment of a change."""
    line = json.dumps(record.to_json())
    with path.open("a") as file:
        file.write(line[:50])
        file.flush()
        os.fsync(file.fileno())
        file.write(line[50:] + "\n")
        file.flush()
        os.fsync(file.fileno())


def test_what_is_equal_is_not_written_again(unbroken: EvalConfig) -> None:
    before = {path: path.stat().st_mtime_ns for path in unbroken.out.rglob("*") if path.is_file()}
    assert not run_killed(0, lambda: evaluate(unbroken))
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_start_that_failed_binds_nobody(unbroken: EvalConfig, tmp_path: Path) -> None:
    config = replace(unbroken, out=tmp_path / "run", videos=0)
    other = replace(config, tasks=(3,), model_options=ModelOptions(seed=1))
    assert run_killed(0, lambda: evaluate(other))  # the settings would have been first
    (config.out / "config.json").write_text(json.dumps(config.settings() | {"seed": 1}, default=str))
    (config.out / "episodes.jsonl").write_text('{"method": "dense", "half": ')
    evaluate(config)
    assert json.loads((config.out / "config.json").read_text())["seed"] == 0
    with pytest.raises(InputError, match=r"other .*seed"):
        evaluate(replace(config, model_options=ModelOptions(seed=1)))


@pytest.mark.parametrize(
    "content", ["[1]", "{", '{"policies": 3}', '{"init_states": [1]}', "[" * 10**5, '{"a": ' + "1" * 5000 + "}"]
)
def test_settings_that_cannot_be_read(unbroken: EvalConfig, tmp_path: Path, content: str) -> None:
    (tmp_path / "run").mkdir()
    for name in ("episodes.jsonl", "config.json"):
        (tmp_path / "run" / name).write_bytes((unbroken.out / name).read_bytes())
    (tmp_path / "run" / "config.json").write_text(content)
    with pytest.raises(InputError, match="give another --out"):
        evaluate(replace(unbroken, out=tmp_path / "run"))
    assert (tmp_path / "run" / "config.json").read_text() == content


def test_one_writer(unbroken: EvalConfig, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(unbroken.out)
    with locked(unbroken.out / runner.LOCK, ""), pytest.raises(InputError, match="another process writes to"):
        evaluate(replace(unbroken, out=tmp_path / "link"))
