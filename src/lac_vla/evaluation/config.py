"""The settings of a paired evaluation."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from lac_vla.checks import check_device
from lac_vla.dataset_keys import DatasetKeys
from lac_vla.errors import InputError
from lac_vla.evaluation.stress import make_stress
from lac_vla.factory import ModelOptions, make_policies
from lac_vla.policies import paths_by_name
from lac_vla.sims import benchmark_of
from lac_vla.sims.base import Benchmark


@dataclass(frozen=True)
class EvalConfig:
    """A paired evaluation.

    Attributes:
        model: Name of a bundled model, checkpoint folder, hub id, or plug-in.
        out: Folder of the run. If it holds a run with the same settings, that run goes on.
        policies: Methods, e.g. ``dense``, ``motion:ratio=0.5``, ``lac`` (the policy that comes with the model),
            ``lac:path=FOLDER,recovery=0``, ``module:Class``; ``NAME@`` before one names it in tables. ``lac policies``
            lists them.
        benchmark: The tasks and their simulator. ``lac eval --suite SUITE --help`` shows the options of another one.
        tasks: Task ids; empty for all.
        init_states: First and one-past-last initial state of every task; by default those that the benchmark holds out.
        stress: What disturbs every episode, the same for all methods: ``shake``, ``lighting``, ``drift``,
            ``occlusion``, ``instruction``, ``drops`` or ``long``, see :mod:`lac_vla.evaluation.stress`.
        ensemble: For a model that answers in chunks of actions: over how many of the last chunks every action is
            averaged, by CogACT's adaptive ensemble; 1 for the newest chunk's first action. By default what the
            benchmark demands, or else what the model's ``config.json`` says.
        actions_per_call: For a model that answers in chunks of actions: how many of a chunk's actions are executed
            before the model is asked again; by default 1. More than 1 rules out an ensemble.
        videos: Per method and task, how many episodes get an overlay video.
        server: ``ws://…`` of a policy server: it runs the one method of ``policies`` on its ``model``, which are named
            as the server names them. No MACs, no videos then.
        camera: The simulator's images for a camera of the model, ``NAME=KEY``; by default those of its own name.
        workers: Processes. Latencies are only worth reporting from one.
        ray: Run the workers on the Ray cluster at this address (``auto``, ``ray://HOST:PORT``; ``local`` for this
            machine), whose nodes share the folders that are named here. The results do not depend on it, nor on the
            number of workers, if ``threads`` is set.
        model_options: How the model is loaded and run. ``seed`` is that of every session, and of what the initial
            states leave open in the scenes.

    Raises:
        InputError: If a setting makes no sense.
    """

    model: str
    out: Path
    policies: tuple[str, ...] = ("dense", "lac")
    benchmark: Benchmark = field(default_factory=lambda: benchmark_of(None)())
    tasks: tuple[int, ...] = ()
    init_states: tuple[int, int] | None = None
    stress: str | None = None
    ensemble: int | None = None
    actions_per_call: int | None = None
    videos: int = 1
    server: str | None = None
    camera: tuple[str, ...] = ()
    workers: int = 1
    ray: str | None = None
    model_options: Annotated[ModelOptions, tyro.conf.arg(name="")] = field(default_factory=ModelOptions)

    def __post_init__(self) -> None:
        trials = max(self.benchmark.trials[task] for task in self.task_ids)
        first, stop = self.states
        if not 0 <= first < stop <= trials:
            raise InputError(f"init_states {self.states}: give first and one-past-last in 0..{trials}")
        if self.workers < 1:
            raise InputError(f"workers is {self.workers}; give at least 1")
        for name in ("ensemble", "actions_per_call"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise InputError(f"{name} is {number}; at least the newest chunk's first action must count")
        if self.camera and self.server is not None:
            raise InputError("a server has its own --camera: leave it out here")
        DatasetKeys(self.camera)
        if self.server is None and self.ray is None:  # which run on other machines
            check_device(self.model_options.device)
        if self.stress is not None:
            make_stress(self.stress)
        if self.server is None:
            make_policies(self.policies, self.model)
        elif len(self.policies) != 1 or self.workers != 1 or self.ray is not None:
            raise InputError("a server runs one method, for one process: give one of --policies, and --workers 1")

    @property
    def task_ids(self) -> tuple[int, ...]:
        """The tasks to run."""
        return self.benchmark.task_ids(self.tasks)

    @property
    def states(self) -> tuple[int, int]:
        """First and one-past-last initial state of every task."""
        return self.init_states or self.benchmark.init_states

    @property
    def seed(self) -> int:
        """The seed of sessions and scenes."""
        return self.model_options.seed

    def settings(self) -> dict[str, Any]:
        """All settings that are written into the run's folder, flat, without folders of this machine."""
        plain = {**vars(self), **self.benchmark.settings(), **asdict(self.model_options), "init_states": self.states}
        for name in ("out", "ray", "benchmark", "model_options"):
            del plain[name]
        if not self.camera:  # as in the runs of before
            del plain["camera"]
        if Path(self.model).is_absolute():
            plain["model"] = Path(self.model).name
        plain["policies"] = [paths_by_name(spec) for spec in self.policies]
        plain["flow"] = plain["flow"] and paths_by_name(plain["flow"])
        return plain
