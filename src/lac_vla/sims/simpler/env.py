"""One SIMPLER task, as an evaluation sees it."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

from lac_vla.errors import InputError
from lac_vla.sims.base import Env, SimulatorError
from lac_vla.sims.simpler.actions import ActionConversion
from lac_vla.sims.simpler.backend import Backend, Observation
from lac_vla.sims.simpler.episode import EpisodeSpec, Setup
from lac_vla.sims.simpler.protocol import episodes, tasks
from lac_vla.types import Frame


class SimplerEnv(Env):
    """A task whose initial states are the protocol's episodes.

    An episode always runs to its horizon: what counts is the goal at its last step, so ``step`` reports success there
    only. Whether the goal held at any step is in :meth:`outcome`. The present instruction is in the frame;
    ``instruction`` is the episode's first, and before it the task's name.

    Args:
        setup: ``vm``, ``va`` or ``widowx``.
        task: Number of the task in the setup.
        backend: The simulator; it is closed with the environment.
        convert: From the policy's actions to the simulator's; it starts anew with every instruction.

    Attributes:
        episodes: The protocol's episodes of the task: its initial states.
        success: Whether the goal holds now.
        opening: The gripper's now, 0 closed .. 1 open.

    Raises:
        InputError: If there is no such task.
    """

    no_op = (0.0,) * 6 + (1.0,)

    def __init__(self, setup: Setup, task: int, backend: Backend, convert: ActionConversion) -> None:
        if not 0 <= task < len(tasks(setup)):
            raise InputError(f"{setup} has tasks 0..{len(tasks(setup)) - 1}, not {task}")
        self.suite, self.task, self.backend, self.convert = f"simpler-{setup}", task, backend, convert
        self.instruction, self.horizon = tasks(setup)[task].name, tasks(setup)[task].horizon
        self.control_hz = tasks(setup)[task].robot.control_hz
        self.episodes = [episode for episode in episodes(setup) if episode.task == task]
        self.success, self.opening = False, 1.0
        self._episode: EpisodeSpec | None = None
        self._steps, self._success_any, self._grasped = 0, False, False
        self._instructions: list[tuple[int, str]] = []

    def reset(self, init_state: int, seed: int = 0) -> Frame:
        """See :meth:`Env.reset`. The seed is ignored: SIMPLER leaves nothing to chance."""
        if not 0 <= init_state < len(self.episodes):
            raise InputError(f"init_state must be in 0..{len(self.episodes) - 1}, not {init_state}")
        return self.begin(self.episodes[init_state])

    def begin(self, episode: EpisodeSpec) -> Frame:
        """Start an episode of this task, whose layout may be none of the protocol's.

        Raises:
            InputError: If the simulator cannot play it.
            SimulatorError: If the simulator fails.
        """
        self._episode = None
        observation = self.backend.reset(episode)
        self._episode, self.instruction = episode, observation.instruction
        self._steps, self._success_any, self._grasped, self._instructions = 0, False, False, []
        return self._see(episode, observation)

    def step(self, action: npt.ArrayLike) -> tuple[Frame, bool]:
        """See :meth:`Env.step`. Success is reported at the last step alone."""
        if self._episode is None or self._steps >= self.horizon:
            raise InputError("the episode is over, or has not begun: reset the environment")
        episode, command = self._episode, self.convert(action)
        try:
            observation = self.backend.step(command)
        except SimulatorError:
            self._episode = None
            raise
        self._steps += 1
        self._success_any |= observation.success
        self._grasped |= observation.grasped
        return self._see(episode, observation), self._steps == self.horizon and observation.success

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
            "stand_ins": list(self.backend.stand_ins(self._episode)),
            "instructions": [list(change) for change in self._instructions],
        }

    def close(self) -> None:
        """See :meth:`Env.close`."""
        self.backend.close()

    def _see(self, episode: EpisodeSpec, observation: Observation) -> Frame:
        if not self._instructions or self._instructions[-1][1] != observation.instruction:
            self._instructions.append((self._steps, observation.instruction))
            self.convert.reset()
        self.success, self.opening = observation.success, observation.opening
        images = {episode.robot.camera: observation.image}
        return Frame(images, observation.instruction, timestamp=self._steps / episode.robot.control_hz)
