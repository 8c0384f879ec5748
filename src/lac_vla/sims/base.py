"""The two things that a simulator brings: a benchmark, and an environment for each of its tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from rich.console import RenderableType

from lac_vla.errors import InputError, LacError
from lac_vla.types import Frame


class SimulatorError(LacError, RuntimeError):
    """A simulator died, hung or failed. The episode is lost; the next ``reset`` starts a new simulator."""


class Env(ABC):
    """One simulated task: frames out, actions in.

    Attributes:
        suite: The suite of the task.
        task: Number of the task in the suite, from 0.
        instruction: The task in words, as the episode began with them.
        horizon: Control steps after which an episode that is not solved has failed.
        no_op: An action that leaves the robot where it is, as ``step`` takes it.
        control_hz: Control steps per second of the simulated world.
    """

    suite: str
    task: int
    instruction: str
    horizon: int
    no_op: tuple[float, ...]
    control_hz: float = 20

    @abstractmethod
    def reset(self, init_state: int, seed: int = 0) -> Frame:
        """Start an episode.

        Args:
            init_state: Which of the task's initial states, from 0.
            seed: Seed of whatever the initial state leaves open.

        Raises:
            InputError: If there is no such initial state.
            SimulatorError: If the simulator fails.
        """

    @abstractmethod
    def step(self, action: npt.ArrayLike) -> tuple[Frame, bool]:
        """Execute an action, in the units in which policies of this benchmark answer.

        Returns:
            The next observation, and whether the task is solved.

        Raises:
            InputError: If the action is malformed; nothing has moved then.
            SimulatorError: If the simulator fails.
        """

    def slide_target(self, speed: float, rng: np.random.Generator) -> None:
        """Let the object to take slide from now on, as ``step`` is called, until it is grasped or the next ``reset``.

        Args:
            speed: Metres a second of simulated time.
            rng: What is left open, e.g. the direction, is drawn from it.

        Raises:
            InputError: If the simulator cannot, or the task has no such object.
        """
        raise InputError(f"{self.suite} has no targets that can slide: choose a suite of LIBERO, or another stress")

    def tick(self, action: npt.ArrayLike) -> tuple[Callable[[], Frame], bool]:
        """Execute an action as :meth:`step` does, where perhaps nobody looks at what follows.

        Returns:
            What observes; it may be called before the next action alone. And whether the task is solved.

        Raises:
            InputError: As :meth:`step` does.
            SimulatorError: As :meth:`step` does.
        """
        frame, success = self.step(action)
        return lambda: frame, success

    def outcome(self) -> Mapping[str, Any]:
        """Report what the benchmark records of the last episode beside its success; JSON-serialisable."""
        return {}

    def close(self) -> None:  # noqa: B027 - there may be nothing to free
        """Free the simulator. May be called more than once."""


def check_action(action: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Validate an action: translation (3), rotation (3), gripper (1).

    Returns:
        A copy as float64, (7,).

    Raises:
        InputError: If it is not a finite vector of seven numbers.
    """
    try:
        array = np.array(action, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"the action is not numeric: {error}") from error
    if array.shape != (7,):
        raise InputError(f"the action has shape {array.shape}; give (7,): translation, rotation, gripper")
    if not np.isfinite(array).all():
        raise InputError(f"the action is not finite: {array.tolist()}")
    return array


@dataclass(frozen=True)
class Benchmark(ABC):
    """A suite of simulated tasks with the options it is played with: all that the runner needs of a simulator.

    A benchmark is a frozen dataclass that can be sent between processes. Its fields are options of ``lac eval`` and
    settings of a run; those that change no episode (folders, time limits) are declared with ``compare=False`` and are
    not recorded.

    Attributes:
        suite: One of ``suites``.
        suites: The names of all suites, unique among benchmarks.
        targets_slide: Whether its environments have :meth:`Env.slide_target`.

    Raises:
        InputError: If the suite is unknown.
    """

    suite: str = ""
    suites: ClassVar[tuple[str, ...]]
    targets_slide: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.suite not in self.suites:
            raise InputError(f"unknown suite {self.suite!r}; choose one of {', '.join(self.suites)}")

    @property
    @abstractmethod
    def trials(self) -> tuple[int, ...]:
        """The number of initial states of every task."""

    def task_ids(self, tasks: Collection[int] = ()) -> tuple[int, ...]:
        """Resolve a choice of tasks; empty for all.

        Raises:
            InputError: If there is no such task.
        """
        everything = range(len(self.trials))
        if not set(tasks) <= set(everything):
            raise InputError(f"tasks {tuple(tasks)}: {self.suite} has tasks 0..{everything[-1]}")
        return tuple(tasks or everything)

    @abstractmethod
    def make_env(self, task: int) -> Env:
        """Make the simulator of a task.

        Raises:
            MissingExtraError: If a package is missing.
            LacError: If the simulator cannot run here.
        """

    @property
    def init_states(self) -> tuple[int, int]:
        """First and one-past-last initial state of every task that an evaluation plays by default."""
        return 0, max(self.trials)

    @property
    def retries(self) -> int:
        """The number of times that an episode whose simulator died is begun again."""
        return 0

    def instructions(self) -> tuple[str, ...]:
        """Instructions of all tasks, for the stress that gives a robot another one; empty if they are not known."""
        return ()

    @property
    def cameras(self) -> tuple[str, ...] | None:
        """Names of the cameras in the model's order; ``None`` if they are the model's own names."""
        return None

    @property
    def unnorm_key(self) -> str | None:
        """Statistics key that checkpoints trained for this robot have; ``None`` if it is left to the checkpoint."""
        return None

    @property
    def ensemble(self) -> int | None:
        """Number of chunks that the protocol averages if a model's are that long; ``None`` for what the model says."""
        return None

    def settings(self) -> dict[str, Any]:
        """Options that change an episode, by name."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.compare}

    def metadata(self, tasks: Collection[int]) -> dict[str, Any]:
        """Describe the simulator of some tasks for ``summary.json``; JSON-serialisable.

        Raises:
            LacError: If it can be said already that they cannot be played here.
        """
        return self.settings()

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences that a reader of the results must know."""
        return ()

    def missing(self, tasks: Collection[int]) -> list[str]:
        """List what these tasks need and this machine does not have, with where to get it."""
        return []

    def prove(self, task: int) -> str:
        """Play what shows that a task can be played here, where nothing is missing; say in a sentence what was seen.

        Raises:
            LacError: If it cannot.
        """
        return ""

    def publish(self, run: Path) -> RenderableType | None:
        """Write the benchmark's own table into a run's folder, and return it for the terminal, if it has one."""
        return None
