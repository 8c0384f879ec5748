"""Put a mug into something that is open at its front."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import numpy as np

from lac_vla.sims.libero.scene import FloatArray
from lac_vla.sims.libero.skills.grasps import handle_grasp
from lac_vla.sims.libero.skills.hand import CLOSE, OPEN, Hand, facing
from lac_vla.sims.phase import Phase

TILT = 0.6
"""Angle (rad) below the horizontal at which the hand points forwards: its wrist stays clear of the table."""
INSIDE = 0.035
"""How far (m) behind the front of the region the mug's origin is brought."""


class Insert:
    """Take a mug by its handle from before it, push it through the front of a region, and let go.

    Args:
        hand: The gripper.
        object: Name of a mug whose handle points away from the region.
        place: Name of the region.
    """

    def __init__(self, hand: Hand, object: str, place: str) -> None:
        self.object, self.place = object, place
        self._hand, self._scene = hand, hand.scene
        self._size = np.array(hand.world.domain.object_sites_dict[place].size)

    def actions(self) -> Iterator[FloatArray]:
        """See :class:`Skill`."""
        hand, scene = self._hand, self._scene
        while True:
            hand.phase = Phase.REACH
            spot, inwards = handle_grasp(scene, self.object)
            offset = spot - scene.position(self.object)
            approach = np.cos(TILT) * inwards - np.sin(TILT) * np.array([0.0, 0.0, 1.0])
            side = np.array([-inwards[1], inwards[0], 0.0])
            turned = [facing(approach, side), facing(approach, -side)]
            hand.rotation = max(turned, key=lambda rotation: float(np.trace(rotation @ scene.eef_rotation.T)))
            for _ in range(150):
                goal = scene.position(self.object) + offset
                if hand.arrived(goal):
                    break
                yield hand.cone(goal, approach, 0.15, OPEN)
            hand.phase = Phase.GRASP
            for _ in range(8):
                yield hand.servo(scene.position(self.object) + offset, CLOSE)
            hand.phase = Phase.CARRY
            if (yield from self._carry(inwards)):
                break
        yield from hand.release()
        yield from hand.back_off(inwards)

    def _carry(self, inwards: FloatArray) -> Generator[FloatArray, None, bool]:
        """Bring the mug through the front; false if it was lost on the way."""
        hand, scene = self._hand, self._scene
        held = scene.position(self.object) - scene.eef
        for _ in range(150):
            if np.linalg.norm(scene.position(self.object) - scene.eef - held) > 0.05 or scene.opening < 0.0015:
                return False
            goal = self._destination(inwards) + scene.eef - scene.position(self.object)
            if (goal - scene.eef) @ inwards < 0.008:
                return True
            yield hand.cone(goal, inwards, 0.20, CLOSE)
        return True

    def _destination(self, inwards: FloatArray) -> FloatArray:
        """Compute the place of the mug's origin at which the gripper opens, (3,) m."""
        centre = self._scene.position(self.place)
        depth = float(np.abs(inwards) @ self._size) - INSIDE
        return np.asarray(centre - depth * inwards - np.array([0.0, 0.0, self._size[2] - 0.015]))
