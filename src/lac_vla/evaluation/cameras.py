"""A simulator whose cameras are called as the model's are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy.typing as npt

from lac_vla.errors import InputError
from lac_vla.sims.base import Env
from lac_vla.types import Frame


class RenamedCameras(Env):
    """A simulated task whose frames hold the model's cameras under their own names.

    Args:
        env: The task.
        cameras: The model's camera → the simulator's.
    """

    def __init__(self, env: Env, cameras: Mapping[str, str]) -> None:
        self.env, self.cameras = env, dict(cameras)
        self.suite, self.task, self.no_op = env.suite, env.task, env.no_op
        self.instruction, self.horizon, self.control_hz = env.instruction, env.horizon, env.control_hz

    def reset(self, init_state: int, seed: int = 0) -> Frame:
        """Start an episode; see :class:`Env`.

        Raises:
            InputError: If the simulator has no such camera.
        """
        frame = self.env.reset(init_state, seed)
        self.instruction = self.env.instruction
        if missing := [key for key in self.cameras.values() if key not in frame.images]:
            raise InputError(f"the simulator has no cameras {missing}; it has {list(frame.images)}: --camera NAME=KEY")
        return self._renamed(frame)

    def step(self, action: npt.ArrayLike) -> tuple[Frame, bool]:
        """Execute an action; see :class:`Env`."""
        frame, success = self.env.step(action)
        return self._renamed(frame), success

    def tick(self, action: npt.ArrayLike) -> tuple[Callable[[], Frame], bool]:
        """Execute an action where perhaps nobody looks; see :class:`Env`."""
        look, success = self.env.tick(action)
        return lambda: self._renamed(look()), success

    def outcome(self) -> Mapping[str, Any]:
        """See :class:`Env`."""
        return self.env.outcome()

    def close(self) -> None:
        """See :class:`Env`."""
        self.env.close()

    def _renamed(self, frame: Frame) -> Frame:
        return replace(frame, images={camera: frame.images[key] for camera, key in self.cameras.items()})
