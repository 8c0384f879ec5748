"""Episodes on a Ray cluster: the same ones, with the same results, however many workers there are.

Every worker is an actor with its own model and simulator. Nodes share a file system: they see the folders of the
command (model, policies, ``--out``) under the same paths, and have this package and its extras installed.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Generator, Sequence
from typing import Any

from lac_vla.errors import InputError, LacError, MissingExtraError
from lac_vla.evaluation.config import EvalConfig
from lac_vla.evaluation.worker import EpisodeWorker, Job, MakeWorker
from lac_vla.results.records import EpisodeRecord

LOCAL = "local"
"""The address that stands for a cluster on this machine alone, which ends with the run."""

PATIENCE_S = 600.0
"""Longest time for a cluster to start the first worker, seconds: some start nodes on demand."""


class Actor:
    """A worker on some node; its relative paths start from ``folder``, the command's working folder."""

    def __init__(self, make: MakeWorker, config: EvalConfig, folder: str) -> None:
        self._make, self._config, self._folder = make, config, folder
        self._worker: EpisodeWorker | None = None

    def ready(self) -> None:
        """Answer once a node had room for this worker."""

    def work(self, job: Job) -> list[EpisodeRecord] | LacError:
        """Run the episodes of a job. An error that the user can act on is given back: Ray would bury its message."""
        try:
            self._worker = self._worker or self._start()
            return list(job.play(self._worker))
        except LacError as error:
            return error

    def _start(self) -> EpisodeWorker:
        """Load within the first job: an error in an actor's constructor looks like an actor that was lost."""
        try:
            os.chdir(self._folder)
        except OSError as error:
            raise InputError(
                f"a node of the cluster has no folder {self._folder} ({error}): share it between them"
            ) from error
        return self._make(self._config)


def run_on_ray(make: MakeWorker, config: EvalConfig, jobs: Sequence[Job]) -> Generator[EpisodeRecord, None, None]:
    """Run the episodes of all jobs on ``config.workers`` actors of ``config.ray``; they finish in any order.

    A worker that no node has room for gets nothing to do: the others run everything.

    Raises:
        InputError: If there is no cluster at the address.
        LacError: If no worker was started within ten minutes, or if one is lost at work; the run can be resumed. Or
            what a worker itself raised.
        MissingExtraError: If Ray is not installed.
    """
    try:
        ray: Any = importlib.import_module("ray")
    except ModuleNotFoundError as error:
        raise MissingExtraError("ray", "Running episodes on a Ray cluster") from error
    address, own = config.ray, {"address": None, "num_cpus": config.workers, "include_dashboard": False}
    try:
        ray.init(log_to_driver=False, **(own if address == LOCAL else {"address": address}))
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(f"no Ray cluster at {address!r} ({error}): `ray start --head`, or --ray {LOCAL}") from error
    try:
        gpus = int(config.model_options.device.startswith("cuda"))
        remote = ray.remote(num_cpus=1, num_gpus=gpus)(Actor)
        todo = list(reversed(jobs))
        actors = [remote.remote(make, config, os.getcwd()) for _ in range(min(config.workers, len(jobs)))]
        waiting = {actor.ready.remote(): actor for actor in actors}
        busy: dict[Any, Any] = {}
        while todo or busy:
            patience = PATIENCE_S if len(waiting) == len(actors) else None
            done, _ = ray.wait([*waiting, *busy], num_returns=1, timeout=patience)
            if not done:
                needs = "a CPU and a GPU" if gpus else "a CPU"
                raise LacError(f"no node of the cluster has started a worker, which needs {needs}: see `ray status`")
            try:
                answer = ray.get(done[0])
            except ray.exceptions.RayActorError:
                if waiting.pop(done[0], None) and (waiting or busy):
                    continue  # it had nothing to do yet
                raise
            if isinstance(answer, LacError):
                raise answer
            actor = waiting.pop(done[0], None) or busy.pop(done[0])
            if todo:
                busy[actor.work.remote(todo.pop())] = actor
            yield from answer or ()
    except ray.exceptions.RayActorError as error:
        raise LacError(f"a worker of the cluster was lost ({error}): the same command goes on from here") from error
    finally:
        ray.shutdown()
