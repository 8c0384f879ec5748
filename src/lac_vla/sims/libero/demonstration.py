"""Demonstrations of LIBERO's tasks by the scripted expert.

They are perturbed as in DART (Laskey et al. 2017): the executed action is the clean one plus noise, the clean one is
recorded, and the states visited show how to recover.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from lac_vla.sims.libero.env import FloatArray, LiberoEnv
from lac_vla.sims.libero.expert import RETREAT, Phase, ScriptedExpert
from lac_vla.types import Frame, UInt8Image

STABLE_STEPS = 10
"""Steps for which success must hold before a demonstration counts as solved."""
PATIENCE = 3 * STABLE_STEPS
"""Steps after the release in which success must have become stable."""


@dataclass
class Demonstration:
    """One episode of the expert; arrays have one row per step, taken before the action of that step.

    Attributes:
        actions: Clean actions, (T, 7), what a policy should imitate.
        executed: The same with noise, (T, 7), what the robot did.
        states: Proprioception, (T, 8).
        success: Whether the goal held after the action, (T,).
        phases: :class:`Phase` of each step, (T,).
        objects: Position of the object to take, (T, 3) m.
        targets: Position of what it is put on or into, (T, 3) m.
        frames: Observations if they were asked for, else empty.
        solved: Whether the object was released, the gripper retreated, and success held for ``STABLE_STEPS``.
        sigma: Standard deviation of the noise on translation; half of it on rotation.
    """

    sigma: float
    actions: list[FloatArray] = field(default_factory=list)
    executed: list[FloatArray] = field(default_factory=list)
    states: list[npt.NDArray[np.float32]] = field(default_factory=list)
    success: list[bool] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)
    objects: list[FloatArray] = field(default_factory=list)
    targets: list[FloatArray] = field(default_factory=list)
    frames: list[Frame] = field(default_factory=list)
    solved: bool = False

    def __len__(self) -> int:
        """Number of steps."""
        return len(self.actions)


def episode_rng(env: LiberoEnv, init_state: int, seed: int) -> np.random.Generator:
    """Generator of an episode's noise, a function of suite, task, initial state and seed alone."""
    return np.random.default_rng([zlib.crc32(env.suite.encode()), env.task, init_state, seed])


def demonstrate(
    env: LiberoEnv,
    init_state: int,
    *,
    seed: int = 0,
    noise: tuple[float, float] = (0.05, 0.25),
    images: bool = True,
    max_steps: int | None = None,
) -> Demonstration:
    """Run the expert through one episode.

    The episode goes on after the first success until the object is released, the gripper has retreated, and
    success has held for ``STABLE_STEPS`` steps.

    Args:
        env: The task.
        init_state: Which initial state.
        seed: Seed of the fixtures and of the noise.
        noise: Range that the standard deviation of the noise on translation is drawn from, in units of the
            action; half of it on rotation, none on the gripper. ``(0, 0)`` for none.
        images: Render every step.
        max_steps: Longest episode; the suite's horizon by default.

    Returns:
        The episode, solved or not.
    """
    rng = episode_rng(env, init_state, seed)
    demo = Demonstration(sigma=float(rng.uniform(*noise)))
    env.restart(init_state, seed)
    expert = ScriptedExpert(env)
    stable, retreating, top = 0, 0, -np.inf
    for clean in expert.actions():
        if len(demo) >= (max_steps or env.horizon):
            break
        executed = clean.copy()
        executed[:6] += rng.normal(size=6) * demo.sigma * np.array([1.0] * 3 + [0.5] * 3)
        executed = np.clip(executed, -1.0, 1.0)
        if images:
            demo.frames.append(env.observe())
        demo.actions.append(clean)
        demo.executed.append(executed)
        demo.states.append(env.proprio())
        demo.phases.append(expert.phase)
        demo.objects.append(expert.scene.position(expert.object))
        demo.targets.append(expert.place_position())
        demo.success.append(env.advance(executed))
        if expert.phase is Phase.RETREAT:
            if top == -np.inf:
                top = expert.scene.eef[2] + RETREAT
            stable = stable + 1 if demo.success[-1] else 0
            retreating += 1
            if stable >= STABLE_STEPS and expert.scene.eef[2] >= top:
                demo.solved = True
                break
            if retreating > PATIENCE:
                break
    return demo


def stack_frames(frames: list[Frame]) -> dict[str, UInt8Image]:
    """Stack the images of an episode by camera, uint8, (T, H, W, 3)."""
    cameras = frames[0].images if frames else ()
    return {camera: np.stack([frame.images[camera] for frame in frames]) for camera in cameras}
