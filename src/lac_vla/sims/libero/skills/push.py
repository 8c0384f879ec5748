"""Slide a plate over the table."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lac_vla.sims.libero.scene import FloatArray
from lac_vla.sims.libero.skills.grasps import rim_grasp
from lac_vla.sims.libero.skills.hand import CLOSE, HOME_ROTATION, OPEN, Hand, yaw
from lac_vla.sims.phase import Phase


class Slide:
    """Take a flat object by its rim, and slide it to a region without lifting it.

    Args:
        hand: The gripper.
        object: Name of a movable object.
        place: Name of a region of the table.
    """

    def __init__(self, hand: Hand, object: str, place: str) -> None:
        self.object, self.place = object, place
        self._hand, self._scene = hand, hand.scene
        self._own = set(self._scene.geoms(object))

    def actions(self) -> Iterator[FloatArray]:
        """See :class:`Skill`."""
        scene, hand = self._scene, self._hand
        while np.hypot(*self._missing()[:2]) > 0.02:
            hand.phase = Phase.REACH
            spot, turn = rim_grasp(scene, self.object, self._own, self._missing())
            hand.rotation = yaw(turn) @ HOME_ROTATION
            offset = spot - scene.position(self.object)
            hover = hand.hover(scene.eef, spot, self._own, lowest=0.08, below=0.03)
            for _ in range(150):
                goal = scene.position(self.object) + offset
                if hand.arrived(goal):
                    break
                yield hand.funnel(goal, hover, OPEN)
            hand.phase = Phase.GRASP
            for _ in range(7):
                yield hand.servo(scene.position(self.object) + offset, CLOSE)
            hand.phase = Phase.CARRY
            height = scene.eef[2]
            for _ in range(120):
                missing = self._missing()
                away = float(np.hypot(*missing[:2]))
                if away < 0.012 or np.linalg.norm(scene.position(self.object) + offset - scene.eef) > 0.06:
                    break
                step = missing / away * min(0.03, away + 0.005)
                yield hand.servo(np.array([*(scene.eef + step)[:2], height]), CLOSE)
        yield from hand.release()

    def _missing(self) -> FloatArray:
        """Compute the way (m) that the object has still to go, (3,)."""
        missing = self._scene.position(self.place) - self._scene.position(self.object)
        missing[2] = 0.0
        return missing
