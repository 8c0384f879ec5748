"""Demonstrations of LIBERO's tasks by the scripted expert.

They are perturbed as in DART (Laskey et al. 2017): the executed action is the clean one plus noise, the clean one is
recorded, and the states visited show how to recover.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lac_vla.sims.libero.env import LiberoEnv
from lac_vla.sims.libero.expert import ScriptedExpert
from lac_vla.sims.libero.skills.hand import RETREAT
from lac_vla.types import Frame

STABLE_STEPS = 10
"""Steps for which success must hold before a demonstration counts as solved."""
PATIENCE = 3 * STABLE_STEPS
"""Steps after the release in which success must have become stable."""


@dataclass
class Demonstration:
    """One episode of the expert.

    Attributes:
        sigma: Standard deviation of the noise on translation; half of it on rotation.
        rows: Name → one value a step; those of a staging file, see :mod:`lac_vla.sims.libero.collect`.
        frames: Observations if they were asked for, else empty.
        solved: Whether the object was released, the gripper retreated, and success held for ``STABLE_STEPS``.
    """

    sigma: float
    rows: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))
    frames: list[Frame] = field(default_factory=list)
    solved: bool = False

    def __len__(self) -> int:
        """Number of steps."""
        return len(self.rows["action"])


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
    rng = np.random.default_rng([zlib.crc32(env.suite.encode()), env.task, init_state, seed])
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
        row = {
            "state": env.proprio(),
            "action": clean,
            "executed": executed,
            "phase": expert.phase,
            "object_position": expert.scene.position(expert.object),
            "target_position": expert.scene.position(expert.place),
            "success": env.advance(executed),
        }
        for name, value in row.items():
            demo.rows[name].append(value)
        if expert.finished:
            if top == -np.inf:
                top = expert.scene.eef[2] + RETREAT
            stable = stable + 1 if row["success"] else 0
            retreating += 1
            if stable >= STABLE_STEPS and expert.scene.eef[2] >= top:
                demo.solved = True
                break
            if retreating > PATIENCE:
                break
    return demo
