"""SIMPLER as an evaluation plays it."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Collection
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import numpy as np
from rich.table import Table

from lac_vla.errors import InputError
from lac_vla.files import write_whole
from lac_vla.results.records import read_episodes
from lac_vla.sims.base import Benchmark, SimulatorError
from lac_vla.sims.simpler import assets
from lac_vla.sims.simpler.actions import Convention, conversion
from lac_vla.sims.simpler.backend import Backend
from lac_vla.sims.simpler.demonstration import demonstrate
from lac_vla.sims.simpler.env import SimplerEnv
from lac_vla.sims.simpler.episode import SETUPS, EpisodeSpec, RobotSpec, Setup
from lac_vla.sims.simpler.ms2 import SERVER, Ms2Backend
from lac_vla.sims.simpler.ms3 import Ms3Backend
from lac_vla.sims.simpler.protocol import episodes, tasks
from lac_vla.sims.simpler.published_table import PublishedTable, label

TABLE = "simpler.json"
"""File of a run that holds its table."""
ENSEMBLES = {"google": 2, "widowx": 7}
"""Robot → chunks that CogACT's evaluation averages."""
CLOSES = 0.5
"""The gripper's opening (1 open) below which it has closed."""


@dataclass(frozen=True)
class Simpler(Benchmark):
    """SIMPLER: policies for real robots, judged in simulation.

    Attributes:
        suite: ``simpler-vm`` (864 episodes of the Google robot, visual matching), ``simpler-va`` (1722, variant
            aggregation) or ``simpler-widowx`` (96).
        backend: ``ms2``, the original, in an interpreter of its own; ``ms3``, ManiSkill3's port: WidowX alone.
        convention: The released evaluation to follow in gripper and chunks: ``cogact`` or ``openvla``.
        ray_tracing: Trace rays in the drawer and apple tasks, as the protocol demands.
        render: Device on which the port renders: ``cpu`` or ``gpu``.
        python: The original's interpreter; by default ``LAC_SIMPLER_PYTHON`` of the environment.
        assets: The original's data, ``ManiSkill2_real2sim/data``, by default ``MS2_REAL2SIM_ASSET_DIR`` of the
            environment; the port's, ManiSkill3's folder, which holds ``data``, by default ``MS_ASSET_DIR``.
        timeout_s: Seconds after which a step that does not end means a simulator that hangs.
        retries: How often an episode whose simulator died is begun again.

    Raises:
        InputError: If an option makes no sense.
    """

    suite: str = "simpler-vm"
    backend: Literal["ms2", "ms3"] = "ms2"
    convention: Convention = "cogact"
    ray_tracing: bool = True
    render: Literal["cpu", "gpu"] = "cpu"
    python: str | None = field(default=None, compare=False)
    assets: Path | None = field(default=None, compare=False)
    timeout_s: float = field(default=60.0, compare=False)
    retries: int = field(default=2, compare=False)
    suites: ClassVar[tuple[str, ...]] = tuple(f"simpler-{setup}" for setup in SETUPS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.retries < 0 or self.timeout_s <= 0:
            raise InputError("retries must not be negative, and timeout_s must be positive")

    @property
    def setup(self) -> Setup:
        """The suite in SIMPLER's own words."""
        return cast(Setup, self.suite.removeprefix("simpler-"))

    @property
    def robot(self) -> RobotSpec:
        """The robot of all tasks."""
        return tasks(self.setup)[0].robot

    @property
    def trials(self) -> tuple[int, ...]:
        """See :meth:`Benchmark.trials`."""
        return tuple(Counter(episode.task for episode in episodes(self.setup)).values())

    def make_env(self, task: int) -> SimplerEnv:
        """See :meth:`Benchmark.make_env`."""
        return SimplerEnv(self.setup, task, self.make_backend((task,)), conversion(self.robot, self.convention))

    @property
    def cameras(self) -> tuple[str, ...]:
        """See :meth:`Benchmark.cameras`."""
        return (self.robot.camera,)

    @property
    def unnorm_key(self) -> str:
        """See :meth:`Benchmark.unnorm_key`."""
        return self.robot.dataset

    @property
    def ensemble(self) -> int:
        """See :meth:`Benchmark.ensemble`."""
        return ENSEMBLES[self.robot.name] if self.convention == "cogact" else 1

    @property
    def notes(self) -> tuple[str, ...]:
        """See :meth:`Benchmark.notes`."""
        wanted = assets.distinct(episodes(self.setup))
        names = {name for episode in wanted for name in assets.stand_ins(self._files(episode))}
        return (f"{label(self.setup, {self.backend}, names)}. {TABLE} says whether it is comparable.",)

    def metadata(self, tasks: Collection[int]) -> dict[str, Any]:
        """Ask the simulator for its versions; raises as :meth:`make_backend` does."""
        with closing(self.make_backend(tasks)) as backend:
            return {"suite": self.suite, "convention": self.convention, **backend.metadata()}

    def make_backend(self, tasks: Collection[int]) -> Backend:
        """Make the simulator of some tasks.

        Raises:
            InputError: If something is missing; the message lists all of it, and where it comes from.
            SimulatorError: If the original cannot be imported by its interpreter.
        """
        if lacking := self.missing(tasks):
            raise InputError("SIMPLER cannot run here yet.\n" + "\n".join(f"- {item}" for item in lacking))
        if self.backend == "ms3":
            return Ms3Backend(self.render, self.assets)
        command = (str(self._interpreter), str(SERVER))
        wanted = assets.distinct(episode for episode in episodes(self.setup) if episode.task in tasks)
        assets.drop_stale_caches(path for episode in wanted for path in self._files(episode).values())
        original = Ms2Backend(command, self._data or Path(), timeout_s=self.timeout_s, ray_tracing=self.ray_tracing)
        version = str(original.metadata().get("numpy"))
        if version.partition(".")[0] not in ("0", "1"):
            original.close()
            raise InputError(f"{self._interpreter} has numpy {version}: SimplerEnv's kinematics need 'numpy<2'")
        return original

    def missing(self, tasks: Collection[int]) -> list[str]:
        """See :meth:`Benchmark.missing`."""
        wanted = [episode for episode in episodes(self.setup) if episode.task in tasks]
        if self.backend == "ms3":
            return assets.missing_for_port(wanted, assets.port_folder(self.assets))
        return assets.missing_for_original(wanted, self._data, self._interpreter, ray_tracing=self.ray_tracing)

    def prove(self, task: int) -> str:
        """See :meth:`Benchmark.prove`: objects on the table, a gripper that closes, and a WidowX's expert."""
        with closing(self.make_env(task)) as env:
            env.reset(0)
            for opening in (1.0, *(0.0,) * 5):
                env.step([*(0.0,) * 6, opening])
            if env.opening > CLOSES:
                raise SimulatorError(
                    f"{env.instruction}: told to close, the gripper stays {env.opening:.0%} open: its files are "
                    "others than the benchmark's"
                )
            said = f"{env.instruction}: the objects lie on the table, the gripper closes"
            if self.robot.name != "widowx":
                return said
            demo = demonstrate(env, env.episodes[0], np.random.default_rng(0))
            if not demo.solved:
                raise SimulatorError(f"{said}, but the scripted expert does not solve it: objects or robot are foreign")
            return f"{said}, the scripted expert solves it in {len(demo)} steps"

    def publish(self, run: Path) -> Table:
        """Write SIMPLER's table of a run as ``simpler.json``.

        Raises:
            InputError: If the run holds an episode of another benchmark.
        """
        table = PublishedTable.of(self.setup, read_episodes(run / "episodes.jsonl"))
        write_whole(run / TABLE, json.dumps(asdict(table), indent=2) + "\n")
        return table.to_terminal()

    def _files(self, episode: EpisodeSpec) -> dict[str, Path]:
        if self.backend == "ms3":
            return assets.port_files(episode, assets.port_folder(self.assets))
        return assets.original_files(episode, self._data or Path())

    @property
    def _interpreter(self) -> str | None:
        return self.python or os.environ.get("LAC_SIMPLER_PYTHON")

    @property
    def _data(self) -> Path | None:
        found = self.assets or os.environ.get("MS2_REAL2SIM_ASSET_DIR")
        return Path(found).resolve() if found else None
