"""LIBERO's evaluation protocol as data."""

from __future__ import annotations

from typing import Final

NO_OP: Final[tuple[float, ...]] = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)
"""The robot stays where it is, with its gripper open."""
FIRST_HELD_OUT: Final = 40
"""First initial state of every task that no demonstration used: demonstrations start from states 0 to 39."""

SETTLE_STEPS: Final = 10
"""No-op steps after the initial state is set, before the policy sees anything."""
N_TASKS: Final = 10
"""Tasks of every suite."""
TRIALS: Final = 50
"""Initial states of every task, one trial each."""
HORIZONS: Final = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520}
"""Suite → control steps after which an episode has failed (those of OpenVLA's evaluation)."""
