"""A stress is a disturbance between the simulator and the session, the same for every method."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import numpy.typing as npt

from lac_vla.errors import InputError
from lac_vla.evaluation import disturbances as kinds
from lac_vla.sims.base import Env
from lac_vla.types import Frame

_KINDS = (kinds.Shake, kinds.Lighting, kinds.Drift, kinds.Occlusion, kinds.Instruction, kinds.Drops, kinds.Long)
STRESSES: dict[str, type[kinds.Stress]] = {kind.__name__.lower(): kind for kind in _KINDS}
"""Name → stress at its usual strength."""


def make_stress(name: str) -> kinds.Stress:
    """Make a stress by its name; an unknown one is an :class:`InputError`."""
    if name not in STRESSES:
        raise InputError(f"unknown stress {name!r}; choose one of {', '.join(STRESSES)}")
    return STRESSES[name]()


def describe_stress(name: str) -> str:
    """Describe a stress in a sentence, with its strength."""
    stress = make_stress(name)
    sentence = (stress.__doc__ or "").split("\n", 1)[0]
    settings = ", ".join(f"{key} {value}" for key, value in asdict(stress).items())  # type: ignore[call-overload]
    return f"Stress '{name}' ({settings}): {sentence}"


class Stressed(Env):
    """A simulated task under stress, among a suite's instructions.

    The seed of the run, with suite, task and initial state, decides about everything that happens.
    """

    def __init__(self, env: Env, stress: kinds.Stress, seed: int, instructions: Sequence[str] = ()) -> None:
        self.env, self.stress, self.seed = env, stress, seed
        self.suite, self.task, self.no_op = env.suite, env.task, env.no_op
        self.instruction, self.control_hz = env.instruction, env.control_hz
        self.horizon = env.horizon + stress.hold  # those for which the robot is held among them
        self._others = [text for text in instructions if text != env.instruction]
        self._step = 0
        self._disturb: kinds.Disturbance | None = None

    def reset(self, init_state: int, seed: int = 0) -> Frame:
        """Start an episode; see :class:`Env`."""
        frame = self.env.reset(init_state, seed)
        self.instruction = self.env.instruction
        rng = np.random.default_rng([self.seed, zlib.crc32(self.suite.encode()), self.task, init_state])
        self._disturb = self.stress.begin(kinds.EpisodeDraw(rng, self.horizon + 1, self._others))
        self._step = 0
        return self._disturb(frame, 0)

    def step(self, action: npt.ArrayLike) -> tuple[Frame, bool]:
        """Execute an action, unless the robot is held; see :class:`Env`."""
        if self._disturb is None:
            raise InputError("reset the environment before the first step")
        frame, success = self.env.step(self.no_op if self._step < self.stress.hold else action)
        self._step += 1
        return self._disturb(frame, self._step), success
