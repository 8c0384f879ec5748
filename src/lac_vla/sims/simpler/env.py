"""One SIMPLER task, as an evaluation sees it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt

from lac_vla.errors import InputError
from lac_vla.sims.base import Env, SimulatorError
from lac_vla.sims.simpler.actions import ActionConversion
from lac_vla.sims.simpler.backend import Backend, Observation
from lac_vla.sims.simpler.episode import EpisodeSpec, Setup
from lac_vla.sims.simpler.protocol import episodes, tasks
from lac_vla.types import Frame


@dataclass
class SimplerEnv(Env):
    """A task whose initial states are the protocol's episodes.

    An episode always runs to its horizon: what counts is the goal at its last step, so ``step`` reports success there
    only. Whether the goal held at any step is in :meth:`outcome`.

    Attributes:
        setup: ``vm``, ``va`` or ``widowx``.
        task: Number of the task in the setup.
        backend: The simulator; it is closed with the environment.
        convert: From the policy's actions to the simulator's; it starts anew with every instruction.
        suite: Name of the setup among other benchmarks' suites.

    Raises:
        InputError: If there is no such task.
    """

    setup: Setup
    task: int
    backend: Backend
    convert: ActionConversion
    suite: str = field(init=False)
    no_op: tuple[float, ...] = field(default=(0.0,) * 6 + (1.0,), init=False)
    _episode: EpisodeSpec | None = field(default=None, init=False)
    _steps: int = field(default=-1, init=False)
    _success_any: bool = field(default=False, init=False)
    _grasped: bool = field(default=False, init=False)
    _instructions: list[tuple[int, str]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if not 0 <= self.task < len(tasks(self.setup)):
            raise InputError(f"{self.setup} has tasks 0..{len(tasks(self.setup)) - 1}, not {self.task}")
        self.suite = f"simpler-{self.setup}"
        self._all = [episode for episode in episodes(self.setup) if episode.task == self.task]

    @property
    def horizon(self) -> int:
        """Control steps of every episode."""
        return tasks(self.setup)[self.task].horizon

    @property
    def instruction(self) -> str:
        """The first instruction of the episode; before it, the task's name. The present one is in the frame."""
        return self._instructions[0][1] if self._instructions else tasks(self.setup)[self.task].name

    def reset(self, init_state: int, seed: int = 0) -> Frame:
        """See :meth:`Env.reset`. The seed is ignored: SIMPLER leaves nothing to chance."""
        if not 0 <= init_state < len(self._all):
            raise InputError(f"init_state must be in 0..{len(self._all) - 1}, not {init_state}")
        self._episode, self._steps, self._instructions = None, -1, []
        observation = self.backend.reset(self._all[init_state])
        self._episode, self._success_any, self._grasped = self._all[init_state], False, False
        return self._see(observation)

    def step(self, action: npt.ArrayLike) -> tuple[Frame, bool]:
        """See :meth:`Env.step`. Success is reported at the last step alone."""
        if self._episode is None or self._steps >= self.horizon:
            raise InputError("the episode is over, or has not begun: reset the environment")
        command = self.convert(action)
        try:
            observation = self.backend.step(command)
        except SimulatorError:
            self._episode = None
            raise
        self._success_any |= observation.success
        self._grasped |= observation.grasped
        return self._see(observation), self._steps == self.horizon and observation.success

    def outcome(self) -> dict[str, Any]:
        """See :meth:`Env.outcome`. ``instructions`` holds the step at which each was first seen, and its words."""
        if self._episode is None:
            raise InputError("no episode has been played to its end")
        return {
            "variant": self._episode.variant.name,
            "success_any": self._success_any,
            "grasped": self._grasped,
            "ray_traced": self._episode.ray_traced and self.backend.ray_traced,
            "backend": self.backend.name,
            "instructions": [list(change) for change in self._instructions],
        }

    def close(self) -> None:
        """See :meth:`Env.close`."""
        self.backend.close()

    def _see(self, observation: Observation) -> Frame:
        self._steps += 1
        if not self._instructions or self._instructions[-1][1] != observation.instruction:
            self._instructions.append((self._steps, observation.instruction))
            self.convert.reset()
        robot = tasks(self.setup)[self.task].robot
        time = self._steps / robot.control_hz
        return Frame({robot.camera: observation.image}, observation.instruction, timestamp=time)
