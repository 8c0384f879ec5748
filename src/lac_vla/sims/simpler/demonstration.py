"""Demonstrations of the WidowX tasks by the scripted expert.

They are perturbed as in DART (Laskey et al. 2017): the executed action is the clean one plus noise, the clean one is
recorded, and the states visited show how to recover.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from lac_vla.sims.phase import Phase
from lac_vla.sims.simpler.actions import Action, roll_pitch_yaw
from lac_vla.sims.simpler.backend import Scene
from lac_vla.sims.simpler.env import SimplerEnv
from lac_vla.sims.simpler.episode import EpisodeSpec
from lac_vla.sims.simpler.expert import WidowXExpert
from lac_vla.types import Frame

AFTER: Final = 4
"""Steps after the release for which the goal must hold; the demonstration ends with them."""
RAD_PER_M: Final = 10.0
"""Noise on rotations (rad) by that on translations (m)."""


@dataclass
class Demonstration:
    """One episode of the expert.

    Attributes:
        sigma: Standard deviation of the noise on translations, metres; ten times as many radians on rotations.
        instruction: The task in words.
        rows: Name → one value a step: ``state``, ``action`` (clean), ``executed``, ``phase``, ``success`` (after the
            action), ``object_position`` and ``target_position`` (m, world).
        frames: What was observed before each action.
        solved: Whether the object was released, and the goal held for :data:`AFTER` steps.
    """

    sigma: float
    instruction: str = ""
    rows: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))
    frames: list[Frame] = field(default_factory=list)
    solved: bool = False

    def __len__(self) -> int:
        """Number of steps."""
        return len(self.frames)


def demonstrate(
    env: SimplerEnv, episode: EpisodeSpec, rng: np.random.Generator, noise: tuple[float, float] = (0.0, 0.0)
) -> Demonstration:
    """Run the expert through an episode until it is solved, or its horizon.

    Args:
        env: The task, of a WidowX.
        episode: One of the task's, of any layout.
        rng: The noise is drawn from it.
        noise: Range of its standard deviation (m), drawn for the episode. There is none while the fingers move.

    Raises:
        SimulatorError: If the simulator fails.
    """
    demo = Demonstration(sigma=float(rng.uniform(*noise)))
    frame = env.begin(episode)
    demo.instruction = frame.instruction
    expert = WidowXExpert(episode.task, env.backend.scene)
    held = 0
    for clean in expert.actions():
        scene, executed = env.backend.scene(), clean.copy()
        if expert.phase not in (Phase.GRASP, Phase.RELEASE):
            executed[:6] += rng.normal(size=6) * demo.sigma * np.repeat([1.0, RAD_PER_M], 3)
        demo.frames.append(frame)
        row = {"state": state(scene, env.opening), "action": clean, "executed": executed, "phase": expert.phase}
        frame, _ = env.step(executed)
        row |= {"object_position": scene.source[:3, 3], "target_position": scene.goal[:3, 3]}
        for name, value in (row | {"success": env.success}).items():
            demo.rows[name].append(value)
        held = held + 1 if expert.phase is Phase.RETREAT and env.success else 0
        demo.solved = held == AFTER
        if demo.solved or len(demo) == env.horizon:
            break
    return demo


def state(scene: Scene, opening: float) -> Action:
    """Proprioception, (7,): the tool's position (m), roll, pitch and yaw (rad) in the base's axes, and its opening."""
    tool = np.linalg.inv(scene.base) @ scene.tool
    return np.array([*tool[:3, 3], *roll_pitch_yaw(tool[:3, :3]), opening])
