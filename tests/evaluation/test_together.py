"""Episodes side by side: simulators in processes, one model for their frames, and the episodes of one at a time."""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.evaluation.chain import Chain, Retried
from tests.evaluation.worlds import save_tiny

from lac_vla import InputError
from lac_vla.bundled import MINI
from lac_vla.engine.engine import Engine
from lac_vla.engine.plan import FramePlan, FrameResult
from lac_vla.evaluation.config import EvalConfig
from lac_vla.evaluation.process_env import ProcessEnv
from lac_vla.evaluation.runner import evaluate
from lac_vla.evaluation.together import run_together
from lac_vla.evaluation.worker import Job
from lac_vla.factory import ModelOptions
from lac_vla.results.records import read_episodes
from lac_vla.sims.base import SimulatorError
from lac_vla.sims.libero.benchmark import Libero


def played(run: Path) -> list[Any]:
    """All that an evaluation decides, step for step."""
    return sorted(
        (
            e.method,
            e.trial,
            e.success,
            e.steps,
            str((e.outcome, e.realtime, {n: list(m) for n, m in e.metrics.items()})),
        )
        for e in read_episodes(run / "episodes.jsonl")
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> EvalConfig:
    """An evaluation that was played one episode at a time."""
    folder = tmp_path_factory.mktemp("alone")
    policies = ("dense", "random:ratio=0.5", "motion:ratio=0.6")
    config = EvalConfig(str(save_tiny(folder / "model")), folder / "one", policies, Chain(), videos=0)
    evaluate(config)
    return config


def test_episodes_equal_those_of_one_at_a_time(
    alone: EvalConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, run = list[int](), Engine.run

    def counted(engine: Engine, plans: list[FramePlan]) -> list[FrameResult]:
        sizes.append(len(plans))
        return run(engine, plans)

    monkeypatch.setattr(Engine, "run", counted)
    there = played(alone.out)
    assert len(there) == 15
    assert len({steps for _, _, _, steps, *_ in there}) > 2, "they are of different lengths"
    assert played(evaluate(replace(alone, out=tmp_path / "run", envs=3))) == there
    assert sizes[0] == 3
    assert sum(sizes) == sum(steps for _, _, _, steps, *_ in there)
    assert np.mean(sizes) > 1.8, "all that play are answered together"
    first, order = [*sizes], read_episodes(tmp_path / "run" / "episodes.jsonl")
    sizes.clear()
    again = read_episodes(evaluate(replace(alone, out=tmp_path / "again", envs=3)) / "episodes.jsonl")
    assert sizes == first, "what is computed together does not depend on how fast a simulator is"
    assert [(e.method, e.trial) for e in again] == [(e.method, e.trial) for e in order]
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("world", [{"clock": "120", "mode": "hold"}, {"clock": "70", "mode": "async"}])
def test_in_a_world_that_does_not_wait(alone: EvalConfig, tmp_path: Path, world: dict[str, Any]) -> None:
    config = replace(alone, policies=("dense", "random:ratio=0.5"), **world)
    there = [played(evaluate(replace(config, out=tmp_path / f"{envs}", envs=envs))) for envs in (1, 2)]
    assert there[0] == there[1]
    assert len(there[0]) == 10
    with pytest.raises(InputError, match="keeps this machine's time"):
        replace(config, clock="wall", envs=2)


def test_a_run_goes_on_with_more_simulators(alone: EvalConfig, tmp_path: Path) -> None:
    few = replace(alone, out=tmp_path / "run", tasks=(0,), init_states=(0, 2))
    evaluate(few)
    whole = replace(alone, out=tmp_path / "run", envs=2)
    assert played(evaluate(whole)) == played(alone.out)
    assert "2 simulators were answered together" in (tmp_path / "run" / "summary.json").read_text()


def test_a_killed_simulator_is_begun_again_as_often_as_allowed(alone: EvalConfig, tmp_path: Path) -> None:
    config = replace(alone, out=tmp_path / "run", envs=2, benchmark=Retried(trouble=str(tmp_path / "die")))
    assert played(evaluate(config)) == played(alone.out)
    assert (tmp_path / "die").exists(), "it did die"
    (tmp_path / "die").unlink()
    config = replace(config, out=tmp_path / "other", benchmark=Chain(trouble=str(tmp_path / "die")))
    with pytest.raises(SimulatorError, match="fewer --envs need less"):
        evaluate(config)
    assert not multiprocessing.active_children()
    kept = played(config.out)
    assert all(episode in played(alone.out) for episode in kept)
    assert played(evaluate(config)) == played(alone.out), "the same command goes on"


def test_an_error_in_one_simulator_ends_the_run(alone: EvalConfig, tmp_path: Path) -> None:
    config = replace(alone, out=tmp_path / "run", envs=2, benchmark=Chain(trouble=str(tmp_path / "raise")))
    with pytest.raises(InputError, match="the chain broke"):
        evaluate(config)
    assert not multiprocessing.active_children()


def test_what_is_given_up_ends_although_a_simulator_hangs(alone: EvalConfig, tmp_path: Path) -> None:
    config = replace(alone, out=tmp_path, envs=2, benchmark=Chain(trouble=str(tmp_path / "hang")))
    jobs = [Job(config, 1, 1, ("dense",)), Job(config, 0, 0, ("dense",))]
    with closing(run_together(config, jobs)) as records, ThreadPoolExecutor(1) as pool:
        run = pool.submit(list, records)
        while not (tmp_path / "hang").exists():
            time.sleep(0.02)
        time.sleep(0.2)
        assert not run.done()
        for process in multiprocessing.active_children():
            process.kill()
        with pytest.raises(SimulatorError, match="was lost"):
            run.result(60)
    assert not multiprocessing.active_children()


def test_a_simulator_in_a_process_is_an_environment() -> None:
    with closing(ProcessEnv(Chain(), 0)) as env:
        here = Chain().make_env(0)
        for init_state in (0, 2):
            mine, theirs = env.reset(init_state), here.reset(init_state)
            for _ in range(3):
                assert all((mine.images[camera] == image).all() for camera, image in theirs.images.items())
                (mine, solved), (theirs, too) = env.step(np.ones(7)), here.step(np.ones(7))
                assert solved == too
        assert env.outcome() == here.outcome()
        env.enter(1)
        assert (env.task, env.horizon, env.suite, env.instruction) == (1, 10, "chain", "pick up the bowl")
    with pytest.raises(SimulatorError, match="reset the environment"):
        env.step(np.ones(7))


@pytest.mark.parametrize("more", [{"workers": 2}, {"ray": "local"}, {"server": "ws://x"}])
def test_several_simulators_beside_several_models_are_refused(alone: EvalConfig, more: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="give no --workers, --ray or --server"):
        replace(alone, envs=2, policies=("dense",), **more)
    with pytest.raises(InputError, match="envs is 0; give at least 1"):
        replace(alone, envs=0)


@pytest.mark.sim
@pytest.mark.slow
def test_libero_episodes_equal_those_of_one_at_a_time(tmp_path: Path) -> None:
    config = EvalConfig(
        str(MINI), tmp_path / "one", ("lac",), Libero(), (0, 3), (40, 41), videos=0,
        model_options=ModelOptions(threads=1),
    )  # fmt: skip
    there = played(evaluate(config))
    assert len(there) == 2
    assert played(evaluate(replace(config, out=tmp_path / "two", envs=2))) == there
