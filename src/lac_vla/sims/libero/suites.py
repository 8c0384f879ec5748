"""LIBERO's evaluation protocol as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

NO_OP: Final[tuple[float, ...]] = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)
"""The robot stays where it is, with its gripper open."""
FIRST_HELD_OUT: Final = 40
"""First initial state of every task that no demonstration used: demonstrations start from states 0 to 39."""


@dataclass(frozen=True)
class Suite:
    """The evaluation protocol of one task suite.

    Attributes:
        horizon: Control steps after which an episode has failed (those of OpenVLA's evaluation).
        settle_steps: No-op steps after the initial state is set, before the policy sees anything.
        n_tasks: Number of tasks.
        trials: Initial states per task, one trial each.
    """

    horizon: int
    settle_steps: int = 10
    n_tasks: int = 10
    trials: int = 50


SUITES: Final[dict[str, Suite]] = {
    "libero_spatial": Suite(horizon=220),
    "libero_object": Suite(horizon=280),
    "libero_goal": Suite(horizon=300),
    "libero_10": Suite(horizon=520),
}
