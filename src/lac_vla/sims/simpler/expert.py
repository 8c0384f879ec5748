"""A scripted expert with privileged state for SIMPLER's four WidowX tasks, in both simulators.

It answers as a VLA trained on the robot's data does (:mod:`lac_vla.sims.simpler.actions`), so that its episodes go the
way of a policy's, and may be recorded as demonstrations. It steers the controller's *target*, to which the controller
adds every action, not the tool that lags behind it; but slows down where it arrives, so that the two are nearly the
same there: who imitates it sees the tool alone. What noise has pushed aside goes back through a cone above the object.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Final

import cv2
import numpy as np

from lac_vla.sims.phase import Phase
from lac_vla.sims.simpler.actions import Action, roll_pitch_yaw
from lac_vla.sims.simpler.backend import Matrix, Scene

OPEN, CLOSED = 1.0, 0.0
MOVE, TURN = 0.025, 0.35
"""Longest move (m) and largest turn (rad) of one step."""
GAIN = 0.6
"""Share of what is left that a step covers, where that is less."""
ABOVE: Final = 0.07
"""Height (m) above the grasp at which the fingers are moved sideways."""
SLOPE, TIP, UNTURNED = 2.5, 0.006, 0.06
"""Of the cone: rise by run; run (m) that is near enough to come down; run (m) that a radian yet to turn counts."""
RETREAT: Final = np.array([0.0, 0.0, 0.08])
"""From where the fingers let go to where they rise to (m)."""
LOST: Final = 0.04
"""Distance (m) that an object may slip within the fingers before it counts as lost."""
PATIENCE: Final = 9
"""Steps after which the fingers open without having arrived: something is in the way."""
REACH: Final = 24
"""Likewise, after which they close."""


@dataclass(frozen=True)
class Grasp:
    """Tells how a task's object is taken and put down; heights are the tool's, metres.

    Attributes:
        rest: The object's origin above the goal's, once it lies there.
        drop: Above that when it is let go.
        along: Where on the object, along its own x axis.
        above: Above the object's origin when it is taken.
        floor: Never below this, world.
        carry: On the way, world.
        square: Whether the object may be taken by any two of its four sides.
    """

    rest: float
    drop: float
    along: float = 0.0
    above: float = 0.0
    floor: float = 0.888
    carry: float = 0.99
    square: bool = False


GRASPS: Final = (
    Grasp(rest=0.018, drop=0.008, along=0.03),
    Grasp(rest=0.022, drop=0.008, along=-0.005),
    Grasp(rest=0.030, drop=0.003, above=0.004, square=True),
    Grasp(rest=0.020, drop=0.020, floor=0.90, carry=1.07),
)
"""One for each task of ``widowx``. The table's top is at 0.87 m; the fingertips reach 16 mm below the tool's centre."""


class WidowXExpert:
    """Solves a WidowX task: reach, grasp, carry, release, retreat; and from the beginning if the object is lost.

    Args:
        task: Number of the task in ``widowx``.
        look: Returns the present scene.

    Attributes:
        phase: The present phase.
    """

    def __init__(self, task: int, look: Callable[[], Scene]) -> None:
        self._grasp, self._look = GRASPS[task], look
        self._closing = np.zeros(3)
        self.phase = Phase.REACH

    def actions(self) -> Iterator[Action]:
        """Answer clean actions, (7,), each for the scene at the moment it is asked for; endless."""
        height = self._grasp.carry
        while True:
            self.phase = Phase.REACH
            self._closing = self._choose_closing(self._look())
            yield from self._reach()
            self.phase = Phase.GRASP
            yield from self._stay(CLOSED, 4)
            self.phase = Phase.CARRY
            lifted = np.array([*self._look().tool[:2, 3], height])
            if (
                (yield from self._go(_always(lifted), CLOSED, within=0.025))
                and (yield from self._go(lambda scene: self._release(scene, height), CLOSED, within=0.01))
                and (yield from self._go(lambda scene: self._release(scene), CLOSED, within=0.006, patience=PATIENCE))
            ):
                break
        self.phase = Phase.RELEASE
        yield from self._stay(OPEN, 3)
        self.phase = Phase.RETREAT
        top = self._look().tool[:3, 3] + RETREAT
        while True:
            yield self._towards(self._look(), top, OPEN)

    def _reach(self) -> Iterator[Action]:
        """Go to the grasp through the cone above it, until the tool is there and turned, or patience is at an end."""
        for _ in range(REACH):
            scene = self._look()
            place, tool, turn = self._grip(scene), scene.tool[:3, 3], self._to_turn(scene)
            if np.linalg.norm(place - tool) < 0.007 and turn < 0.12:
                break
            away = np.linalg.norm((place - tool)[:2]) + UNTURNED * max(0.0, turn - 0.12)
            height = place[2] + float(np.clip(SLOPE * (away - TIP), 0.0, ABOVE))
            # Too low within the cone, it rises before it is moved sideways.
            sideways = float(np.clip(1.0 - (height - tool[2] - 0.02) / 0.03, 0.0, 1.0))
            yield self._towards(scene, np.array([*(tool + sideways * (place - tool))[:2], height]), OPEN)

    def _go(
        self, goal: Callable[[Scene], Matrix], opening: float, *, within: float, patience: int = 60
    ) -> Generator[Action, None, bool]:
        """Go to a place until the tool is there, or patience (steps) is at an end.

        Returns:
            False if the object was lost on the way.
        """
        held = _offset(self._look())
        for _ in range(patience):
            scene = self._look()
            if opening == CLOSED and np.linalg.norm(_offset(scene) - held) > LOST:
                return False
            if np.linalg.norm(goal(scene) - scene.tool[:3, 3]) < within:
                break
            yield self._towards(scene, goal(scene), opening)
        return True

    def _stay(self, opening: float, steps: int) -> Iterator[Action]:
        """Let the fingers move."""
        place = self._look().target[:3, 3]
        for _ in range(steps):
            yield self._towards(self._look(), place, opening)

    # ---- geometry

    def _grip(self, scene: Scene) -> Matrix:
        """Compute where the tool takes the object, (3,) m."""
        place = scene.source[:3, 3] + self._grasp.along * scene.source[:3, 0]
        place[2] = max(scene.source[2, 3] + self._grasp.above, self._grasp.floor)
        return place

    def _release(self, scene: Scene, height: float | None = None) -> Matrix:
        """Compute where the tool is when the object is over the goal, (3,) m: at a height, or to let it go."""
        spot = scene.goal[:3, 3] + [0.0, 0.0, self._grasp.rest + self._grasp.drop] - _offset(scene)
        return spot if height is None else np.array([*spot[:2], height])

    def _choose_closing(self, scene: Scene) -> Matrix:
        """Choose the direction along which the fingers close: across the object, with the least turn."""
        along = np.array([*scene.source[:2, 0], 0.0])
        along /= np.linalg.norm(along)
        across = np.array([-along[1], along[0], 0.0])
        ways = [across, -across, *((along, -along) if self._grasp.square else ())]
        return max(ways, key=lambda way: float(way @ scene.target[:3, 1]))

    def _turned(self) -> Matrix:
        """Orientation of the tool, (3, 3): its x axis points down, its fingers close along y."""
        down = np.array([0.0, 0.0, -1.0])
        return np.stack([down, self._closing, np.cross(down, self._closing)], axis=1)

    def _to_turn(self, scene: Scene) -> float:
        """Compute how far the tool is from the grasp's orientation, rad."""
        return float(np.linalg.norm(_rotation_vector(self._turned() @ scene.tool[:3, :3].T)))

    def _towards(self, scene: Scene, goal: Matrix, opening: float) -> Action:
        """Move the controller's target towards a place and the grasp's orientation, in the axes of the robot's base."""
        axes = scene.base[:3, :3].T
        move = axes @ _at_most(GAIN * (goal - scene.target[:3, 3]), MOVE)
        turn = axes @ _at_most(GAIN * _rotation_vector(self._turned() @ scene.target[:3, :3].T), TURN)
        return np.array([*move, *roll_pitch_yaw(cv2.Rodrigues(turn)[0]), opening])


def _always(place: Matrix) -> Callable[[Scene], Matrix]:
    return lambda _: place


def _offset(scene: Scene) -> Matrix:
    """The object's origin as seen from the tool, (3,) m, world's axes."""
    return scene.source[:3, 3] - scene.tool[:3, 3]


def _rotation_vector(rotation: Matrix) -> Matrix:
    vector, _ = cv2.Rodrigues(rotation)
    return np.asarray(vector, dtype=np.float64).ravel()


def _at_most(vector: Matrix, length: float) -> Matrix:
    return vector * min(1.0, length / max(float(np.linalg.norm(vector)), 1e-9))
