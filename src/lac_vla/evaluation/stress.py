"""A stress is a disturbance between the simulator and the session, the same for every method."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict

import numpy as np
import numpy.typing as npt

from lac_vla.errors import InputError
from lac_vla.evaluation import disturbances as kinds
from lac_vla.plugins import make
from lac_vla.policies import PolicySpec
from lac_vla.sims.base import Env
from lac_vla.types import Frame

_KINDS = (
    kinds.Shake,
    kinds.Lighting,
    kinds.Drift,
    kinds.Occlusion,
    kinds.Instruction,
    kinds.Drops,
    kinds.Long,
    kinds.Moving,
)
STRESSES: dict[str, type[kinds.Stress]] = {kind.__name__.lower(): kind for kind in _KINDS}
"""Name → stress at its usual strength."""


def make_stress(text: str) -> kinds.Stress:
    """Make a stress of its name, and of settings behind it where one is not as usual: ``moving:speed=0.05``.

    Raises:
        InputError: If there is no such stress or setting.
    """
    spec = PolicySpec.parse(text)
    if spec.name not in STRESSES:
        raise InputError(f"unknown stress {spec.name!r}; choose one of {', '.join(STRESSES)}")
    kind = STRESSES[spec.name]
    if unknown := set(spec.options) - set(kind.settable):
        settable = ", ".join(kind.settable) or "nothing"
        raise InputError(f"the stress {spec.name!r} has no setting {sorted(unknown)[0]!r}; it has: {settable}")
    stress: kinds.Stress = make(f"stress {spec.name!r}", kind, spec.options)
    return stress


def describe_stress(text: str) -> str:
    """Describe a stress in a sentence, with its strength."""
    stress = make_stress(text)
    sentence = (stress.__doc__ or "").split("\n", 1)[0]
    settings = ", ".join(f"{key} {value}" for key, value in asdict(stress).items())  # type: ignore[call-overload]
    return f"Stress '{PolicySpec.parse(text).name}' ({settings}): {sentence}"


def episode_generator(seed: int, suite: str, task: int, init_state: int) -> np.random.Generator:
    """Make the generator of all that is drawn in one episode under stress."""
    return np.random.default_rng([seed, zlib.crc32(suite.encode()), task, init_state])


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
        rng = episode_generator(self.seed, self.suite, self.task, init_state)
        if self.stress.speed:
            self.env.slide_target(self.stress.speed, rng)
        self._disturb = self.stress.begin(kinds.EpisodeDraw(rng, self.horizon + 1, self._others))
        self._step = 0
        return self._disturb(frame, 0)

    def step(self, action: npt.ArrayLike) -> tuple[Frame, bool]:
        """Execute an action, unless the robot is held; see :class:`Env`."""
        look, success = self.tick(action)
        return look(), success

    def tick(self, action: npt.ArrayLike) -> tuple[Callable[[], Frame], bool]:
        """Execute an action without rendering, where the stress does not need every frame; see :meth:`Env.tick`."""
        if self._disturb is None:
            raise InputError("reset the environment before the first step")
        look, success = self.env.tick(self.no_op if self._step < self.stress.hold else action)
        self._step += 1
        if isinstance(self.stress, kinds.Physical):
            return look, success
        frame = self._disturb(look(), self._step)
        return lambda: frame, success
