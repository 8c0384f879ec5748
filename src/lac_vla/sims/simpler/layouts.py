"""Layouts of the WidowX tasks that are none of the benchmark's: objects moved and turned, for demonstrations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from lac_vla.errors import LacError
from lac_vla.sims.simpler.backend import Matrix
from lac_vla.sims.simpler.episode import Layout

WIDER: Final = 1.25
"""Size of the area in which objects are put, by that of the benchmark's."""
MARGIN: Final = 0.015
"""Distance (m) by which the object to take may lie beyond that."""
TURN: Final = np.deg2rad(45.0)
"""Largest turn (rad) about the vertical."""
CLOSER: Final = 0.75
"""Least distance between the objects, by the least in the benchmark's layouts."""
APART: Final = 0.01
"""Distance (m) of an object from where it lies in each of the benchmark's layouts: one of the two keeps it."""


def draw_layout(known: Sequence[Layout], rng: np.random.Generator) -> Layout:
    """Draw a layout like the benchmark's, and none of them.

    Objects lie within the area of the benchmark's layouts, a little widened, and are turned away from one of those.
    What never moves there does not move here.

    Args:
        known: The benchmark's layouts.
        rng: Everything is drawn from it.

    Raises:
        LacError: If none is found.
    """
    places = np.array([layout.positions for layout in known])[..., :2]
    centre, half = (places.max(0) + places.min(0)) / 2, (places.max(0) - places.min(0)) / 2
    half = half * WIDER + np.array([[MARGIN], [0.0]])
    moved = half.any(axis=1)
    least = CLOSER * float(np.linalg.norm(places[:, 0] - places[:, 1], axis=-1).min())
    for _ in range(1000):
        model = known[int(rng.integers(len(known)))]
        spots = centre + half * rng.uniform(-1.0, 1.0, size=(2, 2))
        turns = rng.uniform(-TURN, TURN, size=2) * moved
        away = np.linalg.norm(places - spots, axis=-1).max(axis=1)
        if np.linalg.norm(spots[0] - spots[1]) >= least and away.min() >= APART:
            return Layout(
                tuple((*map(float, spot), at[2]) for spot, at in zip(spots, model.positions, strict=True)),
                tuple(_turned(np.array(q), turn) for q, turn in zip(model.orientations, turns, strict=True)),
            )
    raise LacError("no free layout was found: the benchmark's leave no room")


def _turned(quaternion: Matrix, angle: float) -> tuple[float, ...]:
    """Turn an orientation (w, x, y, z) about the vertical by an angle (rad)."""
    c, s = np.cos(angle / 2), np.sin(angle / 2)
    w, x, y, z = quaternion
    return tuple(float(part) for part in (c * w - s * z, c * x - s * y, c * y + s * x, c * z + s * w))
