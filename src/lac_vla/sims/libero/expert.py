"""A scripted pick-and-place expert for LIBERO with privileged state, made to be imitated.

It solves what ``libero_spatial`` and ``libero_object`` ask for: take a bowl by its rim or a box or can by its
sides, and put it on a plate or into a basket. Its actions are very nearly a function of the present state: a
closed-loop motion (``_funnel``) carries the gripper to a point through a cone above it, wherever noise has
taken it before; there are no waiting phases, and ties in the choice of a grasp are always broken alike.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import TypeAlias

import numpy as np

from lac_vla.errors import InputError
from lac_vla.sims.libero.env import CONTROL_HZ, LiberoEnv
from lac_vla.sims.libero.scene import WRIST_HEIGHT, FloatArray, LiberoScene
from lac_vla.sims.phase import Phase

METRES_PER_UNIT = 0.05
RADIANS_PER_UNIT = 0.5
OPEN, CLOSE = -1.0, 1.0
HOME_ROTATION = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])
"""Gripper pointing down; its fingers open along the world's y axis."""
EASY_REACH = 0.645
"""Distance (m) from shoulder to wrist beyond which the elbow nears its limit and the arm gets stuck."""
LAG = 0.15
"""Seconds by which the hand is behind a point that moves."""
RETREAT = 0.08
"""Height (m) above the point of release at which the gripper counts as retreated."""


Hover: TypeAlias = Callable[[float], float]
"""Horizontal distance (m) to a goal → height (m) above it that the gripper needs."""


def _half_turn(angle: float) -> float:
    """The least turn (rad) of the fingers to open along ``angle`` (rad): they are alike, so modulo half a turn."""
    return (angle - np.pi / 2 + np.pi / 2) % np.pi - np.pi / 2


def _yaw(angle: float) -> FloatArray:
    """Rotation about the vertical axis by ``angle`` radians."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


def _rotation_vector(rotation: FloatArray) -> FloatArray:
    """Axis × angle (rad) of a rotation matrix; angles near π do not occur here."""
    angle = np.arccos(np.clip((np.trace(rotation) - 1.0) / 2.0, -1.0, 1.0))
    skew = rotation - rotation.T
    axis = np.array([skew[2, 1], skew[0, 2], skew[1, 0]])
    norm = float(np.linalg.norm(axis))
    return axis / norm * angle if norm > 1e-8 else np.zeros(3)


class ScriptedExpert:
    """Solves the pick-and-place task that an environment is in.

        expert = ScriptedExpert(env)
        for action in expert.actions():
            env.advance(action)

    Args:
        env: An environment that has been reset.

    Raises:
        InputError: If the task's goal is not one "on" or "in" relation between a movable object and a place.
    """

    def __init__(self, env: LiberoEnv) -> None:
        goals = env.domain.parsed_problem["goal_state"]
        if len(goals) != 1 or goals[0][0] not in ("on", "in") or goals[0][1] not in env.domain.objects_dict:
            raise InputError(f"the scripted expert cannot solve {env.suite} task {env.task}: goal {goals}")
        _, self.object, self.place = goals[0]
        self.scene = LiberoScene(env)
        self._env = env
        self.phase = Phase.REACH
        self._rotation = HOME_ROTATION
        self._own = set(self.scene.geoms(self.object))

    # ---- the plan

    def actions(self) -> Iterator[FloatArray]:
        """Clean actions, (7,) each, every one computed from the state at the moment it is asked for.

        Endless after the gripper has retreated (it then stays where it is).
        """
        while True:
            self.phase = Phase.REACH
            offset = self._choose_grasp()
            yield from self._reach(offset)
            self.phase = Phase.GRASP
            yield from self._grasp(offset)
            self.phase = Phase.CARRY
            if (yield from self._carry()):
                break
        self.phase = Phase.RELEASE
        released = self.scene.eef
        width = self.scene.opening
        for _ in range(8):
            if self.scene.opening > min(width + 0.025, 0.07):
                break
            yield self._servo(released, OPEN)
        self.phase = Phase.RETREAT
        goal = released + np.array([0.0, 0.0, RETREAT + 0.04])
        while True:
            yield self._servo(goal, OPEN, turn=False)

    def destination(self) -> FloatArray:
        """Compute the place of the object's origin at which the gripper opens, (3,) m."""
        scene = self.scene
        bottom = float(scene.position(self.object)[2] - scene.points(self.object)[:, 2].min())
        origin = scene.position(self.place)
        if self.place in scene.body_of:
            points = scene.points(self.place)
            inner = points[np.linalg.norm(points[:, :2] - origin[:2], axis=1) < 0.03]
            top = float((inner if len(inner) else points)[:, 2].max())
            return np.array([origin[0], origin[1], top + bottom + 0.012])
        return np.array([origin[0], origin[1], origin[2] + bottom + 0.02])

    # ---- phases

    def _reach(self, offset: FloatArray) -> Iterator[FloatArray]:
        """Go to the grasp through the cone above it, fingers open."""
        scene = self.scene
        start = scene.position(self.object) + offset
        hover = self._hover(scene.eef, start, lowest=0.08, below=0.03)
        for _ in range(150):
            goal = scene.position(self.object) + offset
            error = goal - scene.eef
            if np.hypot(*error[:2]) < 0.008 and abs(error[2]) < 0.008 and self._turn_error() < 0.12:
                return
            yield self._funnel(goal + self._lead(), hover, OPEN)

    def _grasp(self, offset: FloatArray) -> Iterator[FloatArray]:
        """Close until the fingers have stopped."""
        goal = self.scene.position(self.object) + offset
        last = self.scene.opening
        for k in range(14):
            yield self._servo(goal + self._lead(), CLOSE)
            goal += self._env.target_velocity / CONTROL_HZ
            now = self.scene.opening
            if k >= 4 and abs(now - last) < 4e-4:
                return
            last = now

    def _carry(self) -> Generator[FloatArray, None, bool]:
        """Lift the object and bring it over its place; false if it was lost on the way."""
        scene = self.scene
        held = scene.position(self.object) - scene.eef
        below = float(scene.eef[2] - scene.points(self.object)[:, 2].min())
        hover = self._hover(scene.eef, self.destination() - held, lowest=0.06, below=below + 0.03)
        into = self.place not in scene.body_of
        for _ in range(150):
            if np.linalg.norm(scene.position(self.object) - scene.eef - held) > 0.05 or scene.opening < 0.0015:
                return False
            goal = self.destination() + scene.eef - scene.position(self.object)
            error = goal - scene.eef
            if np.hypot(*error[:2]) < (0.02 if into else 0.01) and error[2] > -0.012:
                return True
            yield self._funnel(goal, hover, CLOSE)
        return True

    # ---- control

    def _funnel(self, goal: FloatArray, hover: Hover, grip: float) -> FloatArray:
        """One step towards ``goal`` through the cone above it; a function of the present state alone."""
        eef = self.scene.eef
        away = float(np.hypot(*(goal - eef)[:2]))
        apart = away + 0.06 * max(0.0, self._turn_error() - 0.08)
        height = goal[2] + np.clip(2.5 * (apart - 0.012), 0.0, hover(away))
        too_low = height - eef[2] - 0.02
        sideways = float(np.clip(1.0 - too_low / 0.04, 0.0, 1.0))
        point = np.array([*(eef[:2] + (goal - eef)[:2] * sideways), height])
        return self._servo(point, grip)

    def _servo(self, point: FloatArray, grip: float, *, turn: bool = True) -> FloatArray:
        """Proportional step to a point and to the orientation of the grasp, within the action's range."""
        action = np.zeros(7)
        action[:3] = np.clip((point - self.scene.eef) / METRES_PER_UNIT * 2.0, -1.0, 1.0)
        if turn:
            twist = _rotation_vector(self._rotation @ self.scene.eef_rotation.T) / RADIANS_PER_UNIT * 2.0
            action[3:6] = twist / max(1.0, float(np.abs(twist).max()))
        action[6] = grip
        return action

    def _lead(self) -> FloatArray:
        """Compute how far (m) ahead of a sliding target to aim, (3,): that far behind the hand would follow."""
        return np.asarray(self._env.target_velocity * LAG)

    def _turn_error(self) -> float:
        """Angle (rad) between the gripper's orientation and the wanted one."""
        return float(np.linalg.norm(_rotation_vector(self._rotation @ self.scene.eef_rotation.T)))

    def _hover(self, a: FloatArray, b: FloatArray, *, lowest: float, below: float) -> Hover:
        """Heights that clear everything on the straight way from ``a`` to ``b``, (3,) m, what is held included.

        They are at least ``lowest`` (m) above the goal, and ``below`` (m) above every surface.
        """
        along = (a - b)[:2]
        length = float(np.linalg.norm(along))
        ahead = along / max(length, 1e-6)
        side = np.array([-ahead[1], ahead[0]])
        distances = np.arange(-0.04, length + 0.02, 0.02)
        surface = [
            max(self.scene.height(b[:2] + ahead * s + side * w, self._own) for w in (-0.06, -0.03, 0.0, 0.03, 0.06))
            for s in distances
        ]
        needed = np.maximum.accumulate(np.array(surface)) + below - b[2]
        heights = np.maximum(needed, lowest)
        return lambda distance: float(np.interp(distance + 0.10, distances, heights))  # with room for the hand behind

    # ---- choice of the grasp

    def _choose_grasp(self) -> FloatArray:
        """Turn to take a bowl's rim, or the sides of a box or can; the fingertips' offset from its origin, (3,) m."""
        spot, turn = self._rim_grasp() if "bowl" in self.object else self._side_grasp()
        self._rotation = self._lean(spot, turn) @ _yaw(turn) @ HOME_ROTATION
        return spot - self.scene.position(self.object)

    def _rim_grasp(self) -> tuple[FloatArray, float]:
        """Straddle the rim at the free place that needs the least turning; −y before +y.

        The fingers open along the radius. A place is free if no other surface reaches higher than the
        fingertips under the outer finger, nor higher than the palm under the hand.
        """
        points = self.scene.points(self.object)
        top, low = float(points[:, 2].max()), float(points[:, 2].min())
        centre = (points.max(0) + points.min(0))[:2] / 2.0
        rim = points[points[:, 2] > top - 0.012]
        radius = float(np.percentile(np.linalg.norm(rim[:, :2] - centre, axis=1), 90)) - 0.004
        tip = max(top - 0.024, low + 0.008)
        best: tuple[float, FloatArray, float] = (np.inf, np.zeros(3), 0.0)
        for degrees in range(0, 360, 15):
            angle = float(np.deg2rad(degrees))
            out = np.array([np.cos(angle), np.sin(angle)])
            turn = _half_turn(angle)
            cost = abs(turn) + 0.02 * (out[1] > 1e-6) + 0.01 * (turn > 1e-6)
            spot = np.array([*(centre + out * radius), tip])
            cost += 10.0 * self._blocked(spot[:2], out, tip)
            if cost < best[0] - 1e-9:
                best = (cost, spot, turn)
        return best[1:]

    def _blocked(self, spot: FloatArray, out: FloatArray, tip: float) -> float:
        """Share of the hand's footprint at a rim point that other things occupy, 0..1; the palm may touch."""
        across = np.array([-out[1], out[0]])
        finger = [(r, w, tip - 0.006) for r in (0.025, 0.04, 0.055) for w in (-0.012, 0.0, 0.012)]
        palm = [(r, w, tip + 0.05) for r in (-0.11, -0.09, -0.06, 0.06, 0.09, 0.11) for w in (-0.03, 0.0, 0.03)]

        def hits(samples: list[tuple[float, float, float]]) -> int:
            return sum(self.scene.height(spot + out * r + across * w, self._own) > z for r, w, z in samples)

        return (hits(finger) + max(0, hits(palm) - 1)) / (len(finger) + len(palm))

    def _side_grasp(self) -> tuple[FloatArray, float]:
        """Across the thinner horizontal side of a box, without a turn for what is round."""
        scene = self.scene
        body = scene.body_of[self.object]
        origin, points = scene.position(self.object), scene.points(self.object)
        axes = np.array(scene.data.xmat[body]).reshape(3, 3)
        local = (points - origin) @ axes
        size = np.ptp(local, axis=0)
        centre = axes @ ((local.max(0) + local.min(0)) / 2.0)
        flat = [i for i in range(3) if abs(axes[2, i]) < 0.7]
        thin = min(flat, key=lambda i: size[i])
        wide = max(flat, key=lambda i: size[i])
        turn = 0.0
        if size[thin] < 0.9 * size[wide]:
            turn = _half_turn(float(np.arctan2(axes[1, thin], axes[0, thin])))
        top, low = float(points[:, 2].max()), float(points[:, 2].min())
        height = top - low
        depth = min(0.035, height * 0.55) if height > 0.04 else height * 0.75
        return np.array([*(origin + centre)[:2], top - depth]), turn

    def _lean(self, spot: FloatArray, turn: float) -> FloatArray:
        """Lean the hand towards the robot, about the axis of its fingers, as far as easy reach demands.

        With the gripper straight down, places at the far side of the table would need a straight arm: a
        singularity that the controller does not come out of.
        """
        scene = self.scene
        release = spot - scene.position(self.object) + self.destination()
        excess = max(scene.reach(spot), scene.reach(release)) - EASY_REACH
        angle = float(np.arcsin(np.clip(excess / WRIST_HEIGHT, 0.0, 0.5)))
        axis = _yaw(turn)[:, 1]
        if np.cross(axis, [0.0, 0.0, 1.0]) @ (scene.base - spot) < 0:
            axis = -axis
        k = np.array([[0.0, -axis[2], axis[1]], [axis[2], 0.0, -axis[0]], [-axis[1], axis[0], 0.0]])
        return np.asarray(np.eye(3) + np.sin(angle) * k + (1.0 - np.cos(angle)) * k @ k)
