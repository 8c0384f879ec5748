"""A target that does not wait: what the object to take stands on slides over the table until it is grasped."""

from __future__ import annotations

from typing import Any, Final

import cv2
import numpy as np

from lac_vla.errors import InputError
from lac_vla.sims.libero.scene import FloatArray, LiberoScene, Simulation

LONGEST: Final = 0.25
"""The longest way (m) that a support slides before it turns back."""
ENOUGH: Final = 0.10
"""A way (m) that is long enough to need no better one."""
CLEARANCE: Final = 0.02
"""Distance (m) that is kept from what does not move, unless it is less from the beginning."""
SIDEWAYS: Final = 0.33
"""How far (m) to the robot's left or right a target may slide."""
NEAR, FAR = 0.38, 0.66
"""Horizontal distance from the robot's base, and reach of its arm (:meth:`LiberoScene.reach`), to stay within (m)."""
LIFTED: Final = 0.01
"""Height (m) at which a target counts as taken, whatever touches it."""


class Slide:
    """The way of one episode's target: back and forth on a straight line, at one speed, from the present instant on.

    An object on the table slides as on a conveyor belt; if it stands on something else (a box, a ramekin, a stove, a
    cabinet), that slides with all that it carries. It stops for good once both fingers touch the target, or once it is
    lifted. Time is the simulation's alone.

    Args:
        simulation: A scene at rest.
        speed: Metres a second.
        rng: The direction is drawn from it, among those in which nothing is in the way; if everywhere something is,
            the longest way of 32 draws is taken.

    Raises:
        InputError: If the task's goal moves no object.
    """

    def __init__(self, simulation: Simulation, speed: float, rng: np.random.Generator) -> None:
        self._model, self._data = simulation.model, simulation.data
        self._scene = scene = LiberoScene(simulation)
        goals = simulation.domain.parsed_problem["goal_state"]
        goal = next((goal for goal in goals if goal[1] in simulation.domain.objects_dict), None)
        if goal is None:
            raise InputError(f"no object is moved in this task, so none can slide (goal {goals}): choose other tasks")
        self.target = str(goal[1])
        place = scene.body_of.get(str(goal[-1]), -1)
        self._geoms = scene.geoms(self.target)
        pads = simulation.domain.robots[0].gripper.important_geoms
        self._pads = [
            [int(self._model.geom(name).id) for name in pads[f"{side}_fingerpad"]] for side in ("left", "right")
        ]
        self._bodies = self._carried({int(self._model.body_rootid[place])} if place >= 0 else set())
        self._rest = float(scene.position(self.target)[2])
        self.speed, self.held = speed, False
        self.travelled = 0.0
        self._along, self._sign = 0.0, 1.0
        self.length, self.heading = 0.0, np.zeros(2)
        for _ in range(32):
            angle = float(rng.uniform(0.0, 2.0 * np.pi))
            heading = np.array([np.cos(angle), np.sin(angle)])
            if (length := self._free_way(heading)) > self.length:
                self.length, self.heading = length, heading
            if self.length >= ENOUGH:
                break

    @property
    def velocity(self) -> FloatArray:
        """Velocity of the target's support, (3,) m/s; zeros once it is held."""
        moves = 0.0 if self.held else self._sign * self.speed
        return np.array([*(moves * self.heading), 0.0])

    def advance(self) -> None:
        """Move on by one step of the physics, unless the target is held."""
        self.held = self.held or self._grasped()
        step = self.velocity[:2] * float(self._model.opt.timestep)
        if self.held or self.length == 0.0:
            return
        for body in self._bodies:
            if self._model.body_jntnum[body]:
                start = int(self._model.jnt_qposadr[self._model.body_jntadr[body]])
                self._data.qpos[start : start + 2] += step
            else:
                self._model.body_pos[body, :2] += step
        self.travelled += float(np.linalg.norm(step))
        self._along += self._sign * self.speed * float(self._model.opt.timestep)
        if not 0.0 <= self._along <= self.length:
            self._sign = -1.0 if self._along > 0.0 else 1.0

    def report(self) -> dict[str, Any]:
        """Describe what has happened so far; JSON-serialisable."""
        return {
            "speed_m_s": self.speed,
            "heading_deg": round(float(np.rad2deg(np.arctan2(self.heading[1], self.heading[0]))), 1),
            "length_m": round(self.length, 3),
            "travelled_m": round(self.travelled, 4),
            "held": self.held,
        }

    def _grasped(self) -> bool:
        if self._scene.position(self.target)[2] > self._rest + LIFTED:
            return True
        pairs = np.stack([self._data.contact.geom1, self._data.contact.geom2], axis=1)
        touching = set(pairs[np.isin(pairs, self._geoms).any(axis=1)].ravel().tolist())
        return all(touching & set(pad) for pad in self._pads)

    def _carried(self, place: set[int]) -> list[int]:
        """Roots of the bodies that slide: the target, what it stands on, and what else stands on that."""
        roots = {int(self._model.body_rootid[body]) for body in self._scene.body_of.values()} - place
        owner = self._model.body_rootid[self._model.geom_bodyid]
        stacked = [
            {int(owner[contact.geom1]), int(owner[contact.geom2])}
            for contact in self._data.contact[: self._data.ncon]
            if abs(contact.frame[2]) > 0.7  # the normal is upright: one stands on the other
        ]
        group = {int(self._model.body_rootid[self._scene.body_of[self.target]])}
        while more := {root for pair in stacked if pair & group for root in pair & roots} - group:
            group |= more
        return sorted(group)

    def _free_way(self, heading: FloatArray) -> float:
        """Compute how far (m) the group can go without coming close to anything else, or out of the robot's reach."""
        scene = self._scene
        clouds = [(int(self._model.body_rootid[body]), scene.points(name)) for name, body in scene.body_of.items()]
        own = [cloud for root, cloud in clouds if root in self._bodies]
        others = [cloud for root, cloud in clouds if root not in self._bodies]
        pairs = [
            _outline(a)[:, None] - _outline(b)[None]
            for a in own
            for b in others
            if a[:, 2].min() < b[:, 2].max() and b[:, 2].min() < a[:, 2].max()
        ]
        origin = scene.position(self.target)

        def gaps(shift: FloatArray) -> FloatArray:
            return np.array([np.linalg.norm(apart + shift, axis=-1).min() for apart in pairs])

        def outside(shift: FloatArray) -> FloatArray:
            point = origin + np.array([*shift, 0.0])
            away = float(np.hypot(*(point - scene.base)[:2]))
            return np.array([abs(point[1]) - SIDEWAYS, NEAR - away, scene.reach(point) - FAR])

        least = np.minimum(gaps(np.zeros(2)), CLEARANCE) - 1e-6
        most = np.maximum(outside(np.zeros(2)), 0.0) + 1e-6
        way = 0.0
        for distance in np.arange(0.01, LONGEST + 0.005, 0.01):
            shift = heading * distance
            if (gaps(shift) < least).any() or (outside(shift) > most).any():
                break
            way = float(distance)
        return way


def _outline(points: FloatArray) -> FloatArray:
    """Outline of a cloud seen from above, a point at least every centimetre, (N, 2) m."""
    hull = cv2.convexHull(points[:, :2].astype(np.float32))[:, 0].astype(np.float64)
    edges = [
        np.linspace(a, b, 1 + int(np.linalg.norm(b - a) / 0.01), endpoint=False)
        for a, b in zip(hull, np.roll(hull, -1, axis=0), strict=True)
    ]
    return np.concatenate(edges)
