"""What stands behind a SIMPLER task: one small interface, two simulators."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from lac_vla.sims.simpler.actions import Action
from lac_vla.sims.simpler.episode import EpisodeSpec
from lac_vla.types import UInt8Image


@dataclass(frozen=True, eq=False)
class Observation:
    """What a simulator shows after a reset or a step.

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


class Backend(Protocol):
    """A simulator that plays one episode at a time."""

    name: str

    @property
    def ray_traced(self) -> bool:
        """Whether episodes whose protocol demands ray tracing get it."""
        ...

    def reset(self, episode: EpisodeSpec) -> Observation:
        """Start an episode.

        Raises:
            SimulatorError: If the simulator fails.
        """
        ...

    def step(self, action: Action) -> Observation:
        """Execute an action in the simulator's own units, (7,): see :mod:`lac_vla.sims.simpler.actions`.

        Raises:
            SimulatorError: If the simulator fails.
        """
        ...

    def metadata(self) -> Mapping[str, Any]:
        """What a result must be reported with; JSON-serialisable."""
        ...

    def close(self) -> None:
        """End the simulator. May be called more than once."""
        ...
