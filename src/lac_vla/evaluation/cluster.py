"""Episodes on a Ray cluster: the same ones, with the same results, however many workers there are.

Every worker is an actor with its own model and simulator. Nodes share a file system: they see the folders of the
command (model, policies, ``--out``) under the same paths, and have this package and its extras installed.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias

from lac_vla.errors import InputError, LacError, MissingExtraError
from lac_vla.evaluation.config import EvalConfig
from lac_vla.evaluation.records import EpisodeRecord

LOCAL = "local"
"""In place of an address: a cluster on this machine alone, which ends with the run."""

Job: TypeAlias = tuple[int, int, tuple[str, ...]]
"""Task, initial state, methods still to run on it."""


class Runner(Protocol):
    """What runs one episode."""

    def run(self, method: str, task: int, init_state: int) -> EpisodeRecord:
        """Run it."""
        ...


class Actor:
    """A worker on some node.

    Args:
        make: Makes what runs the episodes.
        config: The evaluation.
        folder: The command's working folder, which relative paths start from.
    """

    def __init__(self, make: Callable[[EvalConfig], Runner], config: EvalConfig, folder: str) -> None:
        try:
            os.chdir(folder)
        except OSError as error:
            raise InputError(
                f"a node of the cluster has no folder {folder} ({error}): share it between them"
            ) from error
        self._runner = make(config)

    def work(self, job: Job) -> list[EpisodeRecord]:
        """Run the episodes of a job."""
        task, init_state, methods = job
        return [self._runner.run(method, task, init_state) for method in methods]


def run_on_ray(
    address: str, make: Callable[[EvalConfig], Runner], config: EvalConfig, jobs: Sequence[Job]
) -> Iterator[EpisodeRecord]:
    """Run the episodes of all jobs on ``config.workers`` actors; they finish in any order.

    Args:
        address: Of the cluster, e.g. ``auto`` or ``ray://host:10001``; or ``local``.
        make: Makes what runs the episodes, on a node.
        config: The evaluation.
        jobs: What to run.

    Raises:
        InputError: If there is no cluster at the address.
        LacError: If a worker is lost; the run can be resumed.
        MissingExtraError: If Ray is not installed.
    """
    try:
        ray: Any = importlib.import_module("ray")
    except ModuleNotFoundError as error:
        raise MissingExtraError("ray", "Running episodes on a Ray cluster") from error
    try:
        ray.init(
            address=None if address == LOCAL else address,
            num_cpus=config.workers if address == LOCAL else None,
            log_to_driver=False,
            include_dashboard=False if address == LOCAL else None,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(f"no Ray cluster at {address!r} ({error}): `ray start --head`, or --ray {LOCAL}") from error
    try:
        remote = ray.remote(num_cpus=1, num_gpus=int(config.device.startswith("cuda")))(Actor)
        todo = list(reversed(jobs))
        actors = [remote.remote(make, config, os.getcwd()) for _ in range(min(config.workers, len(jobs)))]
        busy = {actor.work.remote(todo.pop()): actor for actor in actors}
        while busy:
            (done,), _ = ray.wait(list(busy), num_returns=1)
            actor = busy.pop(done)
            if todo:
                busy[actor.work.remote(todo.pop())] = actor
            yield from ray.get(done)
    except ray.exceptions.RayActorError as error:
        raise LacError(f"a worker of the cluster was lost ({error}): the same command goes on from here") from error
    finally:
        ray.shutdown()
