"""The gripper under closed-loop control: every action is computed from the present state alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, TypeAlias

import numpy as np

from lac_vla.sims.libero.scene import FloatArray, LiberoScene, Simulation
from lac_vla.sims.phase import Phase

METRES_PER_UNIT = 0.05
RADIANS_PER_UNIT = 0.5
OPEN, CLOSE = -1.0, 1.0
HOME_ROTATION = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])
"""Gripper pointing down; its fingers open along the world's y axis."""
RETREAT = 0.08
"""Height (m) above the point of release at which the gripper counts as retreated."""

Hover: TypeAlias = Callable[[float], float]
"""Horizontal distance (m) to a goal → height (m) above it that the gripper needs."""


class World(Simulation, Protocol):
    """A simulation whose target may slide."""

    @property
    def target_velocity(self) -> FloatArray:
        """Velocity of the target's support, (3,) m/s."""


class Skill(Protocol):
    """Something that the hand can do.

    Attributes:
        object: Name of the body or site that is moved.
        place: Name of the body or site that it is moved to.
    """

    object: str
    place: str

    def actions(self) -> Iterator[FloatArray]:
        """Clean actions, (7,) each, up to the moment at which the gripper has let go."""


def half_turn(angle: float) -> float:
    """Compute the least turn (rad) of the fingers to open along ``angle`` (rad): they are alike, so modulo half a turn.

    The fingers open along the world's y axis without a turn.
    """
    return (angle - np.pi / 2 + np.pi / 2) % np.pi - np.pi / 2


def yaw(angle: float) -> FloatArray:
    """Rotation about the vertical axis by ``angle`` radians, (3, 3)."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


def facing(approach: FloatArray, fingers: FloatArray) -> FloatArray:
    """Orientation in which the gripper points along ``approach`` and opens along ``fingers``, both (3,), as (3, 3)."""
    ahead = approach / np.linalg.norm(approach)
    across = fingers - ahead * (fingers @ ahead)
    across /= np.linalg.norm(across)
    return np.stack([across, np.cross(ahead, across), ahead], axis=1)


def rotation_vector(rotation: FloatArray) -> FloatArray:
    """Axis × angle (rad) of a rotation matrix; angles near π do not occur here."""
    angle = np.arccos(np.clip((np.trace(rotation) - 1.0) / 2.0, -1.0, 1.0))
    skew = rotation - rotation.T
    axis = np.array([skew[2, 1], skew[0, 2], skew[1, 0]])
    norm = float(np.linalg.norm(axis))
    return axis / norm * angle if norm > 1e-8 else np.zeros(3)


class Hand:
    """The gripper.

    Attributes:
        world: The simulation.
        scene: Its geometry.
        rotation: The orientation that every action turns to, (3, 3).
        phase: What the hand is doing.
        released: Where it was when it last let go, (3,) m.
    """

    def __init__(self, world: World) -> None:
        self.world, self.scene = world, LiberoScene(world)
        self.rotation = HOME_ROTATION
        self.phase = Phase.REACH
        self.released = self.scene.eef

    # ---- what every skill ends with

    def release(self) -> Iterator[FloatArray]:
        """Open the fingers where the hand is."""
        self.phase = Phase.RELEASE
        self.released = self.scene.eef
        width = self.scene.opening
        for _ in range(8):
            if self.scene.opening > max(min(width + 0.025, 0.07), width + 0.004):
                break
            yield self.servo(self.released, OPEN)

    def retreat(self) -> Iterator[FloatArray]:
        """Rise from where the hand has let go; endless, it then stays there."""
        self.phase = Phase.RETREAT
        goal = self.released + np.array([0.0, 0.0, RETREAT + 0.04])
        while True:
            yield self.servo(goal, OPEN, turn=False)

    def back_off(self, approach: FloatArray) -> Iterator[FloatArray]:
        """Leave what was held against ``approach``, a unit vector (3,), before the hand rises."""
        goal = self.released - 0.07 * approach
        for _ in range(15):
            if (goal - self.scene.eef) @ approach > -0.01:
                break
            yield self.servo(goal, OPEN)
        self.released = self.scene.eef

    # ---- control

    def servo(self, point: FloatArray, grip: float, *, turn: bool = True) -> FloatArray:
        """Proportional step to a point, (3,) m, and to the hand's orientation, within the action's range."""
        action = np.zeros(7)
        action[:3] = np.clip((point - self.scene.eef) / METRES_PER_UNIT * 2.0, -1.0, 1.0)
        if turn:
            twist = rotation_vector(self.rotation @ self.scene.eef_rotation.T) / RADIANS_PER_UNIT * 2.0
            action[3:6] = twist / max(1.0, float(np.abs(twist).max()))
        action[6] = grip
        return action

    def funnel(self, goal: FloatArray, hover: Hover, grip: float, margin: float = 0.012) -> FloatArray:
        """One step towards ``goal`` through the cone above it; a function of the present state alone.

        Within ``margin`` metres of the cone's axis the hand goes all the way down.
        """
        eef = self.scene.eef
        away = float(np.hypot(*(goal - eef)[:2]))
        apart = away + 0.06 * max(0.0, self.turn_error() - 0.08)
        height = goal[2] + np.clip(2.5 * (apart - margin), 0.0, hover(away))
        too_low = height - eef[2] - 0.02
        sideways = float(np.clip(1.0 - too_low / 0.04, 0.0, 1.0))
        point = np.array([*(eef[:2] + (goal - eef)[:2] * sideways), height])
        return self.servo(point, grip)

    def cone(self, goal: FloatArray, approach: FloatArray, back: float, grip: float) -> FloatArray:
        """One step towards ``goal`` through the cone that opens against ``approach``, a unit vector (3,).

        Away from the cone's axis, or turned wrongly, the hand keeps up to ``back`` metres before the goal.
        """
        error = goal - self.scene.eef
        across = error - approach * (error @ approach)
        apart = float(np.linalg.norm(across)) + 0.06 * max(0.0, self.turn_error() - 0.08)
        before = float(np.clip(2.5 * (apart - 0.012), 0.0, back))
        too_deep = before - float(error @ approach) - 0.02
        sideways = float(np.clip(1.0 - too_deep / 0.04, 0.0, 1.0))
        point: FloatArray = self.scene.eef + across * sideways + approach * (float(error @ approach) - before)
        return self.servo(point, grip)

    def turn_error(self) -> float:
        """Angle (rad) between the gripper's orientation and the wanted one."""
        return float(np.linalg.norm(rotation_vector(self.rotation @ self.scene.eef_rotation.T)))

    def arrived(self, goal: FloatArray, tolerance: float = 0.008, turned: float = 0.12) -> bool:
        """Tell whether the hand is at a point, within ``tolerance`` metres sideways and upwards, and turned to it."""
        error = goal - self.scene.eef
        near = np.hypot(*error[:2]) < tolerance and abs(error[2]) < tolerance
        return bool(near) and self.turn_error() < turned

    def hover(self, a: FloatArray, b: FloatArray, own: set[int], *, lowest: float, below: float) -> Hover:
        """Heights that clear everything on the straight way from ``a`` to ``b``, (3,) m, but the geoms ``own``.

        They are at least ``lowest`` (m) above the goal, and ``below`` (m) above every surface.
        """
        along = (a - b)[:2]
        length = float(np.linalg.norm(along))
        ahead = along / max(length, 1e-6)
        side = np.array([-ahead[1], ahead[0]])
        distances = np.arange(-0.04, length + 0.02, 0.02)
        surface = [
            max(self.scene.height(b[:2] + ahead * s + side * w, own) for w in (-0.06, -0.03, 0.0, 0.03, 0.06))
            for s in distances
        ]
        needed = np.maximum.accumulate(np.array(surface)) + below - b[2]
        heights = np.maximum(needed, lowest)
        return lambda distance: float(np.interp(distance + 0.10, distances, heights))  # with room for the hand behind
