"""Open and close drawers, turn knobs, close doors: the hand follows the joint, whose position it sees."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lac_vla.sims.libero.scene import COLLISION_GROUP, FloatArray
from lac_vla.sims.libero.skills.hand import CLOSE, HOME_ROTATION, OPEN, Hand, facing, yaw
from lac_vla.sims.phase import Phase

UP = np.array([0.0, 0.0, 1.0])


class Joint:
    """A joint of a fixture, and the part that moves with it.

    Args:
        hand: The gripper.
        name: Name of the joint.
    """

    def __init__(self, hand: Hand, name: str) -> None:
        model = hand.scene.model
        self._data = hand.scene.data
        self._id = int(model.joint(name).id)
        self._address = int(model.jnt_qposadr[self._id])
        body = int(model.jnt_bodyid[self._id])
        self._geoms = [g for g in range(model.ngeom) if model.geom_bodyid[g] == body]
        self._geoms = [g for g in self._geoms if model.geom_group[g] == COLLISION_GROUP]

    @property
    def position(self) -> float:
        """Metres or radians."""
        return float(self._data.qpos[self._address])

    @property
    def axis(self) -> FloatArray:
        """Unit vector, (3,): the part moves along it, or turns about it, as the position grows."""
        return np.array(self._data.xaxis[self._id])

    @property
    def anchor(self) -> FloatArray:
        """A point of the axis, (3,) m."""
        return np.array(self._data.xanchor[self._id])

    def farthest(self, direction: FloatArray) -> FloatArray:
        """Centre of the part's geom that lies farthest along ``direction`` (3,), (3,) m."""
        centres = np.array(self._data.geom_xpos[self._geoms])
        return np.asarray(centres[int(np.argmax(centres @ direction))])


class Drawer:
    """The base of what is done to a drawer.

    Args:
        hand: The gripper.
        region: Name of the drawer's inside.
    """

    def __init__(self, hand: Hand, region: str) -> None:
        self.object = self.place = region
        self._hand = hand
        self.drawer = Joint(hand, region.replace("_region", "_level"))


class PullDrawer(Drawer):
    """Open a drawer: take its handle's bar from before it, and pull."""

    def actions(self) -> Iterator[FloatArray]:
        """See :class:`Skill`."""
        hand, out = self._hand, -self.drawer.axis
        tilt = 0.25
        approach = -np.cos(tilt) * out - np.sin(tilt) * UP
        while self.drawer.position > -0.15:
            hand.phase = Phase.REACH
            hand.rotation = facing(approach, np.sin(tilt) * out - np.cos(tilt) * UP)
            for _ in range(120):
                goal = self.drawer.farthest(out) + 0.004 * approach
                if hand.arrived(goal, 0.01):
                    break
                yield hand.cone(goal, approach, 0.10, OPEN)
            hand.phase = Phase.GRASP
            for _ in range(7):
                yield hand.servo(self.drawer.farthest(out) + 0.004 * approach, CLOSE)
            hand.phase = Phase.CARRY
            for _ in range(60):
                away = np.linalg.norm(self.drawer.farthest(out) - hand.scene.eef)
                if self.drawer.position <= -0.152 or away > 0.04:
                    break
                yield hand.servo(self.drawer.farthest(out) + 0.04 * out, CLOSE)
        yield from hand.release()
        yield from hand.back_off(approach)


class PushDrawer(Drawer):
    """Close a drawer: push its handle with a fist that points down at it."""

    def actions(self) -> Iterator[FloatArray]:
        """See :class:`Skill`."""
        hand, out = self._hand, -self.drawer.axis
        approach = -(out + UP) / np.sqrt(2.0)
        side = np.cross(UP, out)
        hand.phase = Phase.REACH
        first, second = facing(approach, side), facing(approach, -side)
        hand.rotation = max(first, second, key=lambda rotation: float(np.trace(rotation @ hand.scene.eef_rotation.T)))
        for _ in range(120):
            goal = self.drawer.farthest(out) + 0.05 * out
            if hand.arrived(goal, 0.02, 0.25):
                break
            yield hand.cone(goal, approach, 0.15, CLOSE)
        hand.phase = Phase.CARRY
        for _ in range(80):
            if self.drawer.position > 0.001:
                break
            handle = self.drawer.farthest(out)
            aside = handle - hand.scene.eef
            aside -= out * (aside @ out)
            yield hand.servo(hand.scene.eef - 0.04 * out + aside, CLOSE)
        yield from hand.release()
        yield from hand.back_off(-out)


class TurnKnob:
    """Turn on a stove: take its knob from above, and turn it with the hand.

    Args:
        hand: The gripper.
        stove: Name of the fixture.
    """

    def __init__(self, hand: Hand, stove: str) -> None:
        self.object = self.place = stove
        self._hand = hand
        self.knob = Joint(hand, f"{stove}_button")
        self._own = set(hand.scene.geoms(stove))

    def actions(self) -> Iterator[FloatArray]:
        """See :class:`Skill`."""
        hand = self._hand
        top = self.knob.farthest(UP)[2]
        goal = np.array([*self.knob.anchor[:2], top + 0.004])
        while self.knob.position < 0.7:
            hand.phase = Phase.REACH
            hand.rotation = yaw(self.knob.position) @ HOME_ROTATION
            hover = hand.hover(hand.scene.eef, goal, self._own, lowest=0.10, below=0.03)
            for _ in range(120):
                if hand.arrived(goal):
                    break
                yield hand.funnel(goal, hover, OPEN)
            hand.phase = Phase.GRASP
            for _ in range(7):
                yield hand.servo(goal, CLOSE)
            hand.phase = Phase.CARRY
            for _ in range(40):
                if self.knob.position > 0.8:
                    break
                hand.rotation = yaw(self.knob.position + 0.35) @ HOME_ROTATION
                yield hand.servo(goal, CLOSE)
        yield from hand.release()


class PushDoor:
    """Close a door that hangs on a vertical hinge: push its far edge around with a fist.

    Args:
        hand: The gripper.
        fixture: Name of the fixture.
    """

    def __init__(self, hand: Hand, fixture: str) -> None:
        self.object = self.place = fixture
        self._hand = hand
        self.door = Joint(hand, f"{fixture}_microjoint")

    def actions(self) -> Iterator[FloatArray]:
        """See :class:`Skill`."""
        hand = self._hand
        hand.phase = Phase.REACH
        hand.rotation = HOME_ROTATION
        start = self._outside(0.07)
        hover = hand.hover(hand.scene.eef, start, set(), lowest=0.08, below=0.05)
        for _ in range(150):
            goal = self._outside(0.07)
            if hand.arrived(goal, 0.02, 0.25):
                break
            yield hand.funnel(goal, hover, CLOSE)
        hand.phase = Phase.CARRY
        for _ in range(150):
            if self.door.position > -0.003:
                break
            yield hand.servo(self._outside(-0.03), CLOSE)
        yield from hand.release()

    def _outside(self, distance: float) -> FloatArray:
        """Compute the point at a distance (m) outside of the door, near its far edge, (3,) m."""
        turned = yaw(self.door.position)
        along, out = turned[:, 0], -turned[:, 1]
        return np.asarray(self.door.anchor + 0.2 * along + (distance + 0.03) * out + 0.02 * UP)
