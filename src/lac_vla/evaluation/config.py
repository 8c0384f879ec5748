"""The settings of a paired evaluation."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from lac_vla.checks import check_device
from lac_vla.dataset_keys import DatasetKeys
from lac_vla.errors import InputError
from lac_vla.evaluation.clock import WALL, WorldClock
from lac_vla.evaluation.clock import settings as clock_settings
from lac_vla.evaluation.realtime import Mode
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
            ``occlusion``, ``instruction``, ``drops``, ``long``, or ``moving:speed=0.02``, where the object to take
            slides at so many metres a second; see :mod:`lac_vla.evaluation.disturbances`.
        clock: The world does not wait for the policy, but ticks at the benchmark's control rate: what an answer takes
            is read off the latency table of a device (``cpu``, ``rtx4090``, ``agx-orin``, ``thor``, ``h100``) or of a
            file, by what every frame really computed; or it is a number of milliseconds; or ``wall``, this machine's
            own time. Horizon and success are in world time. By default the world waits.
        mode: What the robot does while the policy thinks: ``hold``, nothing; ``chunk``, it goes on with its chunk;
            ``async``, as chunk, and the policy looks again as soon as it has answered; ``rtc``, as async, and the
            policy is told what will be executed meanwhile. See :mod:`lac_vla.evaluation.realtime`.
        deadline_ms: The controller of ``lac serve --deadline-ms`` caps the tokens per frame, in the clock's time.
        ensemble: For a model that answers in chunks of actions: over how many of the last chunks every action is
            averaged, by CogACT's adaptive ensemble; 1 for the newest chunk's first action. By default what the
            benchmark demands of models whose chunks are that long, or else what the model's ``config.json`` says.
        actions_per_call: For a model that answers in chunks of actions: how many of a chunk's actions are executed
            before the model is asked again; by default 1. More than 1 rules out an ensemble.
        videos: Per method and task, how many episodes get an overlay video; none where the world does not wait.
        server: ``ws://…`` of a policy server: it runs the one method of ``policies`` on its ``model``, which are named
            as the server names them. No MACs, no videos then.
        camera: The simulator's images for a camera of the model, ``NAME=KEY``; by default those of its own name.
        workers: Processes. Latencies are only worth reporting from one.
        envs: Simulators, each in a process of its own (about 1 GB), whose frames one model answers in one batch, in
            step with each other; the episodes are those of one at a time, their latencies those of a batch. Simulators
            that fill a CPU's cores gain nothing by it: it is for a GPU, or for cores that are free.
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
    clock: str | None = None
    mode: Mode = "hold"
    deadline_ms: float | None = None
    ensemble: int | None = None
    actions_per_call: int | None = None
    videos: int = 1
    server: str | None = None
    camera: tuple[str, ...] = ()
    workers: int = 1
    envs: int = 1
    ray: str | None = None
    model_options: Annotated[ModelOptions, tyro.conf.arg(name="")] = field(default_factory=ModelOptions)

    def __post_init__(self) -> None:
        trials = max(self.benchmark.trials[task] for task in self.task_ids)
        first, stop = self.states
        if not 0 <= first < stop <= trials:
            raise InputError(f"init_states {self.states}: give first and one-past-last in 0..{trials}")
        for name in ("workers", "envs"):
            if (number := getattr(self, name)) < 1:
                raise InputError(f"{name} is {number}; give at least 1")
        if self.envs > 1 and (self.workers > 1 or self.ray is not None or self.server is not None):
            raise InputError(
                "envs plays several simulators beside one model in this process: give no --workers, --ray "
                "or --server with it"
            )
        if self.envs > 1 and self.clock == WALL:
            raise InputError(
                "on the wall clock every simulator keeps this machine's time, which none can share: give "
                "--envs 1, or the clock of a device"
            )
        for name in ("ensemble", "actions_per_call"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise InputError(f"{name} is {number}; at least the newest chunk's first action must count")
        if self.camera and self.server is not None:
            raise InputError("a server has its own --camera: leave it out here")
        DatasetKeys(self.camera)
        if self.server is None and self.ray is None:  # which run on other machines
            check_device(self.model_options.device)
        if self.stress is not None and make_stress(self.stress).speed and not self.benchmark.targets_slide:
            raise InputError(
                f"{self.benchmark.suite} has no targets that can slide: choose a suite of LIBERO for moving"
            )
        if self.server is None:
            make_policies(self.policies, self.model)
        elif len(self.policies) != 1 or self.workers != 1 or self.ray is not None:
            raise InputError("a server runs one method, for one process: give one of --policies, and --workers 1")
        if (world := self.world) is None:
            if self.mode != "hold" or self.deadline_ms is not None:
                raise InputError("mode and deadline_ms are for a world that does not wait: give --clock, too")
        elif self.server is not None:
            world.check(None, self.actions_per_call or 1, ensemble=False)

    @property
    def world(self) -> WorldClock | None:
        """The clock of a world that does not wait; ``None`` for one that does."""
        return None if self.clock is None else WorldClock(self.clock, self.mode, self.deadline_ms)

    @property
    def clock_label(self) -> str:
        """Name the world's clock as records do; empty for a world that waits."""
        return "" if (world := self.world) is None else world.label

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
        plain |= clock_settings(self.world)
        plain["policies"] = [paths_by_name(spec) for spec in self.policies]
        plain["flow"] = plain["flow"] and paths_by_name(plain["flow"])
        return plain
