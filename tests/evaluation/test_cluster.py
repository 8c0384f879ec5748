"""Episodes on Ray: those of one process, whatever the number of workers."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.evaluation.worlds import fake_worker, outcomes

from lac_vla import InputError
from lac_vla.errors import LacError, MissingExtraError
from lac_vla.evaluation import runner
from lac_vla.evaluation.cluster import run_on_ray
from lac_vla.evaluation.config import EvalConfig
from lac_vla.evaluation.runner import evaluate
from lac_vla.factory import ModelOptions

ROOT = Path(__file__).parents[2]


class ActorLostError(Exception):
    """Stands for Ray's error of that kind."""


class FakeRay:
    """Ray in one process: work is done when it is asked for, and finishes last first.

    Attributes:
        room: So many actors are placed.
    """

    def __init__(self) -> None:
        self.room = 100
        self.exceptions = SimpleNamespace(RayActorError=ActorLostError)
        self.actors: list[Any] = []
        self.up: dict[str, Any] | None = None

    def init(self, **options: Any) -> None:
        if options["address"] not in (None, "auto"):
            raise ConnectionError("nobody answers")
        self.up = options

    def shutdown(self) -> None:
        self.up = None

    def remote(self, **resources: Any) -> Callable[[type], Any]:
        def decorate(cls: type) -> Any:
            def make(*arguments: Any) -> Any:
                actor = cls(*arguments)
                self.actors.append(actor)
                placed = len(self.actors) <= self.room
                work = SimpleNamespace(remote=lambda job: (placed, job, lambda: actor.work(job)))
                return SimpleNamespace(work=work, ready=SimpleNamespace(remote=lambda: (placed, None, actor.ready)))

            return SimpleNamespace(remote=make)

        return decorate

    def wait(self, references: list[Any], num_returns: int, timeout: float | None) -> tuple[list[Any], list[Any]]:
        done = [reference for reference in references if reference[0]][-num_returns:]
        assert done or timeout is not None, "waits for ever"
        return done, [reference for reference in references if reference not in done]

    def get(self, reference: Any) -> Any:
        return reference[2]()


@pytest.fixture
def config(model: str, tmp_path: Path) -> EvalConfig:
    policies = ("dense", "random:ratio=0.5")
    return EvalConfig(
        model,
        tmp_path / "run",
        policies,
        tasks=(0, 3),
        init_states=(4, 8),
        videos=0,
        model_options=ModelOptions(threads=1),
    )


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", fake)  # type: ignore[arg-type]
    return fake


@pytest.mark.parametrize("workers", [1, 3, 20])
def test_the_results_are_those_of_one_process(config: EvalConfig, ray: FakeRay, workers: int) -> None:
    here = outcomes(evaluate(config))
    there = replace(config, out=config.out.with_name("there"), ray="local", workers=workers)
    assert outcomes(evaluate(there)) == here
    assert len(ray.actors) == min(workers, 8), "no more than there are jobs"
    assert ray.up is None, "left behind"
    assert "ray" not in (there.out / "config.json").read_text()


def test_a_run_may_move_to_a_cluster_and_back(config: EvalConfig, ray: FakeRay) -> None:
    evaluate(replace(config, init_states=(4, 6)))
    whole = outcomes(evaluate(replace(config, ray="auto")))
    assert len(whole) == 16
    assert outcomes(evaluate(config)) == whole


def test_a_lost_worker_stops_a_run_that_can_be_resumed(
    config: EvalConfig, ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = outcomes(evaluate(replace(config, out=config.out.with_name("whole"))))
    get, calls = ray.get, []

    def lose(reference: Any) -> Any:
        calls.append(reference)
        if len(calls) == 3:
            raise ActorLostError("node died")
        return get(reference)

    monkeypatch.setattr(ray, "get", lose)
    with pytest.raises(LacError, match=r"node died.*goes on"):
        evaluate(replace(config, ray="local", workers=2))
    assert ray.up is None
    assert 0 < len(outcomes(config.out)) < len(whole)
    assert outcomes(evaluate(replace(config, ray="local", workers=2))) == whole


@pytest.mark.parametrize("room", [1, 2])
def test_what_has_no_room_gets_nothing_to_do(config: EvalConfig, ray: FakeRay, room: int) -> None:
    here = outcomes(evaluate(config))
    ray.room = room
    assert outcomes(evaluate(replace(config, out=config.out.with_name("there"), ray="auto", workers=3))) == here


def test_a_worker_that_is_lost_before_its_first_job_is_done_without(
    config: EvalConfig, ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, get, asked = outcomes(evaluate(config)), ray.get, []

    def lose(reference: Any) -> Any:
        asked.append(reference)
        if reference[1] is None and (len(asked) == 1 or reference is asked[0]):
            raise ActorLostError("node died")
        return get(reference)

    monkeypatch.setattr(ray, "get", lose)
    assert outcomes(evaluate(replace(config, out=config.out.with_name("there"), ray="auto", workers=2))) == here
    asked.clear()
    with pytest.raises(LacError, match="node died"):
        evaluate(replace(config, out=config.out.with_name("alone"), ray="auto", workers=1))


@pytest.mark.parametrize(("device", "needs"), [("cpu", "needs a CPU:"), ("cuda:0", "needs a CPU and a GPU:")])
def test_a_cluster_without_room(config: EvalConfig, ray: FakeRay, device: str, needs: str) -> None:
    ray.room = 0
    with pytest.raises(LacError, match=needs):
        evaluate(replace(config, ray="auto", workers=2, model_options=ModelOptions(device=device)))
    assert ray.up is None


def test_no_cluster_and_no_ray(config: EvalConfig, ray: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"no Ray cluster at 'ray://nowhere:1'.*ray start"):
        evaluate(replace(config, ray="ray://nowhere:1"))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"lac-vla\[ray\]"):
        evaluate(replace(config, ray="local"))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"model_options": ModelOptions(unnorm_key="nowhere")}, "nowhere"),
        ({"model": "no-such-folder/at/all"}, "no-such-folder"),
    ],
)
def test_an_error_of_a_worker_is_that_of_one_process(
    config: EvalConfig, ray: FakeRay, wrong: dict[str, Any], said: str
) -> None:
    config = replace(config, **wrong)
    with pytest.raises(LacError, match=said) as here:
        evaluate(config)
    with pytest.raises(LacError) as there:
        evaluate(replace(config, ray="local", workers=2))
    assert (there.type, str(there.value)) == (here.type, str(here.value))
    assert ray.up is None


def test_a_node_without_the_folder(config: EvalConfig, ray: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getcwd", lambda: "/no/such/folder")
    with pytest.raises(InputError, match=r"no folder /no/such/folder.*share it"):
        evaluate(replace(config, ray="local"))


@pytest.mark.slow
def test_on_ray_itself(config: EvalConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    here = outcomes(evaluate(config))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *sys.path]))
    monkeypatch.setattr(runner, "run_on_ray", lambda _, *rest: run_on_ray(fake_worker, *rest))
    for workers in (1, 2):
        there = replace(config, out=config.out.with_name(f"there{workers}"), ray="local", workers=workers)
        assert outcomes(evaluate(there)) == here
