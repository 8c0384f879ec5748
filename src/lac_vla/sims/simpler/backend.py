"""One small interface for the two simulators of SIMPLER's tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from lac_vla.sims.base import SimulatorError
from lac_vla.sims.simpler.actions import Action
from lac_vla.sims.simpler.episode import EpisodeSpec
from lac_vla.types import UInt8Image

Matrix: TypeAlias = npt.NDArray[np.float64]
ON_THE_TABLE: Final = (0.8, 1.1)
"""Heights (m) between which everything lies when an episode begins."""


@dataclass(frozen=True, eq=False)
class Observation:
    """The state that a simulator shows after a reset or a step.

    Attributes:
        image: The policy's camera, uint8, H×W×3.
        instruction: What to do now; it may change within an episode.
        success: Whether the goal holds now.
        grasped: Whether the object has been in the gripper at some time (WidowX).
        opening: The gripper's, 0 closed .. 1 open.
    """

    image: UInt8Image
    instruction: str
    success: bool = False
    grasped: bool = False
    opening: float = 1.0


@dataclass(frozen=True, eq=False)
class Scene:
    """The truth about a WidowX's scene: for scripted experts, never for a policy.

    Attributes are poses, (4, 4), in the world's axes and metres:
        tool: Between the fingers.
        target: Where the controller drives the tool.
        source: The object to take.
        goal: What it is put on or into.
        base: The robot's base.
    """

    tool: Matrix
    target: Matrix
    source: Matrix
    goal: Matrix
    base: Matrix


class Backend(ABC):
    """A simulator that plays one episode at a time.

    Attributes:
        name: ``ms2`` or ``ms3``.
        ray_traced: Whether episodes whose protocol demands ray tracing get it.
    """

    name: str
    ray_traced: bool

    @abstractmethod
    def reset(self, episode: EpisodeSpec) -> Observation:
        """Start an episode.

        Raises:
            InputError: If the simulator has no such task.
            SimulatorError: If the simulator fails; the next call starts a new one.
        """

    @abstractmethod
    def step(self, action: Action) -> Observation:
        """Execute an action in the simulator's own units, (7,): see :mod:`lac_vla.sims.simpler.actions`.

        Raises:
            InputError: If no episode has begun.
            SimulatorError: If the simulator fails.
        """

    @abstractmethod
    def scene(self) -> Scene:
        """Look at the truth about a WidowX's scene.

        Raises:
            InputError: If no episode has begun, or it is another robot's.
            SimulatorError: If the simulator fails.
        """

    @abstractmethod
    def stand_ins(self, episode: EpisodeSpec) -> tuple[str, ...]:
        """Name the files of an episode that are not the benchmark's own."""

    @abstractmethod
    def metadata(self) -> Mapping[str, Any]:
        """Report the versions that a result must be reported with; JSON-serialisable.

        Raises:
            SimulatorError: If the simulator cannot be imported by its interpreter.
        """

    @abstractmethod
    def close(self) -> None:
        """End the simulator. May be called more than once."""


class NotOnTableError(SimulatorError):
    """An episode begins with something elsewhere than on the table."""


def check_heights(heights: Mapping[str, float]) -> None:
    """Refuse an episode that begins with something elsewhere than on the table: a mesh or a stage is wrong.

    Args:
        heights: Object → height of its origin, metres, world.

    Raises:
        NotOnTableError: If something fell, or hangs in the air.
    """
    low, high = ON_THE_TABLE
    if astray := [f"{name} at {height:.2f} m" for name, height in heights.items() if not low <= height <= high]:
        raise NotOnTableError(
            f"the episode begins with {', '.join(astray)}, not on the table ({low}..{high} m): a stage or a mesh is "
            "missing or foreign; lac check names it"
        )
