"""Choose where to take an object, and how to turn the hand for it."""

from __future__ import annotations

import numpy as np

from lac_vla.sims.libero.scene import WRIST_HEIGHT, FloatArray, LiberoScene
from lac_vla.sims.libero.skills.hand import half_turn, yaw

EASY_REACH = 0.645
"""Distance (m) from shoulder to wrist beyond which the elbow nears its limit and the arm gets stuck."""


def rim_grasp(scene: LiberoScene, name: str, own: set[int], carried: FloatArray | None) -> tuple[FloatArray, float]:
    """Straddle the rim of a bowl, plate or mug at the free place that needs the least turning; −y before +y.

    The fingers open along the radius. A place is free if no other surface reaches higher than the
    fingertips under the outer finger, nor higher than the palm under the hand, here and where it lets go, and no
    handle is there.

    Args:
        scene: The world.
        name: The object.
        own: Its geoms.
        carried: How far it will be carried, (3,) m, if the hand's body is to have room here and there.

    Returns:
        The fingertips' place, (3,) m, and the turn of the hand, rad.
    """
    points = scene.points(name)
    top, low = float(points[:, 2].max()), float(points[:, 2].min())
    rim = points[points[:, 2] > top - 0.012]
    handled = "mug" in name
    around = rim if handled else points
    centre = (around.max(0) + around.min(0))[:2] / 2.0
    radius = float(np.percentile(np.linalg.norm(rim[:, :2] - centre, axis=1), 90)) - 0.004
    handle = (points[np.argmax(np.linalg.norm(points[:, :2] - centre, axis=1))][:2] - centre) * handled
    handle /= max(1e-6, float(np.linalg.norm(handle)))
    tip = max(top - 0.024, low + 0.008)
    best: tuple[float, FloatArray, float] = (np.inf, np.zeros(3), 0.0)
    for degrees in range(0, 360, 15):
        angle = float(np.deg2rad(degrees))
        out = np.array([np.cos(angle), np.sin(angle)])
        turn = half_turn(angle)
        cost = abs(turn) + 0.02 * (out[1] > 1e-6) + 0.01 * (turn > 1e-6)
        spot = np.array([*(centre + out * radius), tip])
        cost += 10.0 * _blocked(scene, spot, out, own)
        if carried is not None:
            cost += sum(10.0 * _hits(scene, place, out, own, BODY) / len(BODY) for place in (spot, spot + carried))
        cost += 10.0 * (out @ handle > 0.6)
        if cost < best[0] - 1e-9:
            best = (cost, spot, turn)
    return best[1:]


FINGER = [(r, w, -0.006) for r in (0.025, 0.04, 0.055) for w in (-0.012, 0.0, 0.012)]
PALM = [(r, w, 0.05) for r in (-0.11, -0.09, -0.06, 0.06, 0.09, 0.11) for w in (-0.03, 0.0, 0.03)]
BODY = [(r, w, 0.09) for r in (-0.13, -0.11, -0.08, 0.08, 0.11, 0.13) for w in (-0.045, 0.0, 0.045)]
"""Points of the hand that holds a rim: outwards, along the rim, and up from the fingertips, m."""


def _blocked(scene: LiberoScene, spot: FloatArray, out: FloatArray, own: set[int]) -> float:
    """Share of the hand's footprint at a rim point that other things occupy, 0..1; the palm may touch."""
    finger, palm = (_hits(scene, spot, out, own, samples) for samples in (FINGER, PALM))
    return (finger + max(0, palm - 1)) / (len(FINGER) + len(PALM))


def _hits(
    scene: LiberoScene, spot: FloatArray, out: FloatArray, own: set[int], samples: list[tuple[float, float, float]]
) -> int:
    """Count the samples above which there is something else."""
    across = np.array([-out[1], out[0]])
    return sum(scene.height(spot[:2] + out * r + across * w, own) > spot[2] + z for r, w, z in samples)


def handle_grasp(scene: LiberoScene, name: str) -> tuple[FloatArray, FloatArray]:
    """Take a mug by its handle.

    Returns:
        The handle's middle, (3,) m, and the unit vector (3,) from there to the mug, which is horizontal.
    """
    points = scene.points(name)
    rim = points[points[:, 2] > points[:, 2].max() - 0.012]
    centre = (rim.max(0) + rim.min(0))[:2] / 2.0
    away = np.linalg.norm(points[:, :2] - centre, axis=1)
    handle = points[away > away.max() - 0.02]
    spot = (handle.max(0) + handle.min(0)) / 2.0
    inwards = np.array([*(centre - spot[:2]), 0.0])
    return spot, inwards / np.linalg.norm(inwards)


def side_grasp(scene: LiberoScene, name: str) -> tuple[FloatArray, float]:
    """Take a box across its thinner horizontal side, and without a turn what is round.

    Returns:
        The fingertips' place, (3,) m, and the turn of the hand, rad.
    """
    body = scene.body_of[name]
    origin, points = scene.position(name), scene.points(name)
    axes = np.array(scene.data.xmat[body]).reshape(3, 3)
    local = (points - origin) @ axes
    size = np.ptp(local, axis=0)
    centre = axes @ ((local.max(0) + local.min(0)) / 2.0)
    flat = [i for i in range(3) if abs(axes[2, i]) < 0.7]
    thin = min(flat, key=lambda i: size[i])
    wide = max(flat, key=lambda i: size[i])
    turn = 0.0
    if size[thin] < 0.9 * size[wide]:
        turn = half_turn(float(np.arctan2(axes[1, thin], axes[0, thin])))
    top, low = float(points[:, 2].max()), float(points[:, 2].min())
    height = top - low
    depth = min(0.035, height * 0.55) if height > 0.04 else height * 0.75
    return np.array([*(origin + centre)[:2], top - depth]), turn


def top_grasp(scene: LiberoScene, name: str) -> tuple[FloatArray, float]:
    """Take a pot by the knob of its lid, without a turn.

    Returns:
        The fingertips' place, (3,) m, and the turn of the hand, rad.
    """
    points = scene.points(name)
    top = float(points[:, 2].max())
    knob = points[points[:, 2] > top - 0.008]
    return np.array([*((knob.max(0) + knob.min(0)) / 2.0)[:2], top - 0.01]), 0.0


def lean(scene: LiberoScene, spot: FloatArray, release: FloatArray, turn: float) -> FloatArray:
    """Lean the hand towards the robot, about the axis of its fingers, as far as easy reach demands, (3, 3).

    With the gripper straight down, places at the far side of the table would need a straight arm: a
    singularity that the controller does not come out of.

    Args:
        scene: The world.
        spot: Where the hand grasps, (3,) m.
        release: Where it lets go, (3,) m.
        turn: Turn of the hand, rad.
    """
    excess = max(scene.reach(spot), scene.reach(release)) - EASY_REACH
    angle = float(np.arcsin(np.clip(excess / WRIST_HEIGHT, 0.0, 0.5)))
    axis = yaw(turn)[:, 1]
    if np.cross(axis, [0.0, 0.0, 1.0]) @ (scene.base - spot) < 0:
        axis = -axis
    k = np.array([[0.0, -axis[2], axis[1]], [axis[2], 0.0, -axis[0]], [-axis[1], axis[0], 0.0]])
    return np.asarray(np.eye(3) + np.sin(angle) * k + (1.0 - np.cos(angle)) * k @ k)
