"""Episodes in several processes: those of one, its errors, and nothing left behind."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from tests.evaluation.worlds import fake_worker, outcomes

from lac_vla import InputError
from lac_vla.errors import CheckpointError, LacError, MissingExtraError
from lac_vla.evaluation import runner
from lac_vla.evaluation.config import EvalConfig
from lac_vla.evaluation.processes import run_on_processes
from lac_vla.evaluation.runner import evaluate
from lac_vla.evaluation.worker import Job
from lac_vla.factory import ModelOptions
from lac_vla.results.records import EpisodeRecord, read_episodes
from lac_vla.sims.libero.modules import RenderingLibraryError

ROOT = Path(__file__).parents[2]


class Fragile:
    """A worker that is killed in the last episodes, if a file ``die`` is there."""

    def __init__(self, config: EvalConfig) -> None:
        self.config, self.worker = config, fake_worker(config)

    def run(self, config: EvalConfig, method: str, task: int, init_state: int) -> EpisodeRecord:
        if (task, init_state) == (3, 5) and (self.config.out / "die").exists():
            while len(read_episodes(self.config.out / "episodes.jsonl")) < 2:
                time.sleep(0.05)  # the other process has finished something
            os.kill(os.getpid(), signal.SIGKILL)
        return self.worker.run(config, method, task, init_state)


class Endless:
    """A worker whose first episode alone ends: the others note their process and go on for ever."""

    def __init__(self, config: EvalConfig) -> None:
        self.worker, self.out = fake_worker(config), config.out

    def run(self, config: EvalConfig, method: str, task: int, init_state: int) -> EpisodeRecord:
        if init_state == 4:
            return self.worker.run(config, method, task, init_state)
        (self.out / f"pid-{os.getpid()}").touch()
        while True:
            time.sleep(1)


@pytest.fixture
def config(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EvalConfig:
    monkeypatch.setattr(runner, "run_on_processes", lambda _, *rest: run_on_processes(Fragile, *rest))
    policies = ("dense", "random:ratio=0.5")
    return EvalConfig(
        model,
        tmp_path / "run",
        policies,
        tasks=(0, 3),
        init_states=(4, 6),
        videos=0,
        workers=2,
        model_options=ModelOptions(threads=1),
    )


def test_the_results_are_those_of_one_process(config: EvalConfig) -> None:
    there = outcomes(evaluate(config))
    assert len(there) == 8
    assert outcomes(evaluate(replace(config, out=config.out.with_name("one"), workers=1))) == there
    assert not multiprocessing.active_children()


def test_a_killed_process_ends_a_run_that_goes_on(config: EvalConfig) -> None:
    config.out.mkdir()
    (config.out / "die").touch()
    with pytest.raises(LacError, match=r"was lost.*same command goes on"):
        evaluate(config)
    kept = outcomes(config.out)
    assert 2 <= len(kept) < 8
    (config.out / "die").unlink()
    whole = outcomes(evaluate(replace(config, workers=1)))
    assert len(whole) == 8
    assert all(episode in whole for episode in kept)


def test_an_error_of_loading_is_that_of_one_process(config: EvalConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "run_on_processes", run_on_processes)  # no simulator is reached
    config = replace(config, model_options=ModelOptions(unnorm_key="nowhere", threads=1))
    with pytest.raises(LacError, match="nowhere") as here:
        evaluate(replace(config, workers=1))
    with pytest.raises(LacError) as there:
        evaluate(config)
    assert (there.type, str(there.value)) == (here.type, str(here.value))
    assert not multiprocessing.active_children()
    right = replace(config, workers=1, model_options=ModelOptions(threads=1))
    assert len(outcomes(evaluate(right))) == 8, "a folder without an episode may be begun anew with other settings"


def test_what_is_given_up_ends_at_once(config: EvalConfig) -> None:
    config.out.mkdir()
    jobs = [Job(config, 0, state, ("dense",)) for state in (4, 5, 6, 7)]
    with closing(run_on_processes(Endless, config, jobs)) as records:
        assert next(records).init_state == 4
    assert not multiprocessing.active_children()
    assert len(list(config.out.glob("pid-*"))) <= 1, "more was begun than was asked for"


@pytest.mark.slow
def test_processes_end_with_a_killed_parent(config: EvalConfig) -> None:
    config.out.mkdir()
    program = (
        "import sys; from tests.evaluation.test_processes import *\n"
        f"c = EvalConfig({config.model!r}, Path({str(config.out)!r}), ('dense',), workers=2)\n"
        "if __name__ == '__main__': list(run_on_processes(Endless, c, [Job(c, 0, s, ('dense',)) for s in (5, 6)]))"
    )
    path = os.pathsep.join([str(ROOT), *sys.path])
    parent = subprocess.Popen((sys.executable, "-c", program), env={**os.environ, "PYTHONPATH": path})
    try:
        while len(pids := [int(found.name[4:]) for found in config.out.glob("pid-*")]) < 2:
            assert parent.poll() is None
            time.sleep(0.1)
    finally:
        parent.kill()
        parent.wait()
    limit = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < limit, "a process outlived its parent"
        time.sleep(0.1)


@pytest.mark.parametrize(
    "error",
    [
        InputError("an input"),
        CheckpointError("a", "b"),
        MissingExtraError("ray", "Running"),
        RenderingLibraryError("egl"),
    ],
)
def test_errors_travel_between_processes(error: LacError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert (str(again), again.args) == (str(error), error.args)
