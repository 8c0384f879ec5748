"""Take an object and put it on or into a place."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import numpy as np

from lac_vla.sims.libero.env import CONTROL_HZ
from lac_vla.sims.libero.scene import FloatArray
from lac_vla.sims.libero.skills.grasps import lean, rim_grasp, side_grasp, top_grasp
from lac_vla.sims.libero.skills.hand import CLOSE, HOME_ROTATION, OPEN, Hand, yaw
from lac_vla.sims.phase import Phase

LAG = 0.15
"""Seconds by which the hand is behind a point that moves."""
ROUND = ("bowl", "plate", "mug")
"""Words in the names of what is taken by its rim."""
KNOBBED = "moka_pot"
"""Name of what is wider than the fingers open, and is taken by the knob on its top."""


class PickPlace:
    """Take a bowl or mug by its rim, a box or can by its sides, and let go of it above a place.

    Args:
        hand: The gripper.
        object: Name of a movable object.
        place: Name of an object or of a region.
        shift: How far (m) from the place's centre to let go, (2,).
        roomy: Choose a grasp with room for the body of the hand at both ends of the way, and come down on it
            more exactly, so that no finger ends on top of a wide can.
    """

    def __init__(self, hand: Hand, object: str, place: str, shift: FloatArray, *, roomy: bool) -> None:
        self.object, self.place = object, place
        self._shift, self._roomy = shift, roomy
        self._hand, self._scene, self._world = hand, hand.scene, hand.world
        self._own = set(self._scene.geoms(object))
        site = self._world.domain.object_sites_dict.get(place)
        self._fixed = site is not None and site.parent_name not in self._world.domain.objects_dict

    def actions(self) -> Iterator[FloatArray]:
        """See :class:`Skill`."""
        hand = self._hand
        while True:
            hand.phase = Phase.REACH
            offset = self._choose_grasp()
            yield from self._reach(offset)
            hand.phase = Phase.GRASP
            yield from self._grasp(offset)
            hand.phase = Phase.CARRY
            if (yield from self._carry()):
                break
        yield from hand.release()

    def destination(self) -> FloatArray:
        """Compute the place of the object's origin at which the gripper opens, (3,) m."""
        scene = self._scene
        bottom = float(scene.position(self.object)[2] - scene.points(self.object)[:, 2].min())
        origin = scene.position(self.place)
        if self.place in scene.body_of:
            points = scene.points(self.place)
            inner = points[np.linalg.norm(points[:, :2] - origin[:2], axis=1) < 0.03]
            top = float((inner if len(inner) else points)[:, 2].max())
            return np.array([origin[0], origin[1], top + bottom + 0.012])
        origin[:2] += self._shift
        if self._fixed:
            surface = scene.height(origin[:2], self._own)
            if -0.08 < surface - origin[2] < 0.04:
                origin[2] = surface
        return np.array([origin[0], origin[1], origin[2] + bottom + 0.02])

    # ---- phases

    def _choose_grasp(self) -> FloatArray:
        """Turn to the grasp; the fingertips' offset from the object's origin, (3,) m."""
        scene, origin = self._scene, self._scene.position(self.object)
        if any(word in self.object for word in ROUND):
            carried = self.destination() - origin if self._roomy else None
            spot, turn = rim_grasp(scene, self.object, self._own, carried)
        elif self.object.startswith(KNOBBED):
            spot, turn = top_grasp(scene, self.object)
        else:
            spot, turn = side_grasp(scene, self.object)
        release = spot - origin + self.destination()
        self._hand.rotation = lean(scene, spot, release, turn) @ yaw(turn) @ HOME_ROTATION
        return spot - origin

    def _reach(self, offset: FloatArray) -> Iterator[FloatArray]:
        """Go to the grasp through the cone above it, fingers open."""
        scene, hand = self._scene, self._hand
        start = scene.position(self.object) + offset
        hover = hand.hover(scene.eef, start, self._own, lowest=0.08, below=0.03)
        for _ in range(150):
            goal = scene.position(self.object) + offset
            if hand.arrived(goal):
                return
            yield hand.funnel(goal + self._lead(), hover, OPEN, 0.005 if self._roomy else 0.012)

    def _grasp(self, offset: FloatArray) -> Iterator[FloatArray]:
        """Close until the fingers have stopped."""
        scene = self._scene
        goal = scene.position(self.object) + offset
        last = scene.opening
        for k in range(14):
            yield self._hand.servo(goal + self._lead(), CLOSE)
            goal += self._world.target_velocity / CONTROL_HZ
            now = scene.opening
            if k >= 4 and abs(now - last) < 4e-4:
                return
            last = now

    def _carry(self) -> Generator[FloatArray, None, bool]:
        """Lift the object and bring it over its place; false if it was lost on the way."""
        scene, hand = self._scene, self._hand
        held = scene.position(self.object) - scene.eef
        below = float(scene.eef[2] - scene.points(self.object)[:, 2].min())
        hover = hand.hover(scene.eef, self.destination() - held, self._own, lowest=0.06, below=below + 0.03)
        near = 0.01 if self.place in scene.body_of or self._fixed else 0.02
        for _ in range(150):
            if np.linalg.norm(scene.position(self.object) - scene.eef - held) > 0.05 or scene.opening < 0.0015:
                return False
            goal = self.destination() + scene.eef - scene.position(self.object)
            error = goal - scene.eef
            if np.hypot(*error[:2]) < near and error[2] > -0.012:
                return True
            yield hand.funnel(goal, hover, CLOSE)
        return True

    def _lead(self) -> FloatArray:
        """Compute how far (m) ahead of a sliding target to aim, (3,): that far behind the hand would follow."""
        return np.asarray(self._world.target_velocity * LAG)
