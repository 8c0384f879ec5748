"""One small interface for the two simulators of SIMPLER's tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lac_vla.sims.simpler.actions import Action
from lac_vla.sims.simpler.episode import EpisodeSpec
from lac_vla.types import UInt8Image


@dataclass(frozen=True, eq=False)
class Observation:
    """The state that a simulator shows after a reset or a step.

    Attributes:
        image: The policy's camera, uint8, H×W×3.
        instruction: What to do now; it may change within an episode.
        success: Whether the goal holds now.
        grasped: Whether the object has been in the gripper at some time (WidowX).
    """

    image: UInt8Image
    instruction: str
    success: bool = False
    grasped: bool = False


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
    def metadata(self) -> Mapping[str, Any]:
        """Report the versions that a result must be reported with; JSON-serialisable.

        Raises:
            SimulatorError: If the simulator cannot be imported by its interpreter.
        """

    @abstractmethod
    def close(self) -> None:
        """End the simulator. May be called more than once."""
