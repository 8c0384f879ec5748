"""The phases of a scripted expert."""

from __future__ import annotations

from enum import IntEnum


class Phase(IntEnum):
    """A phase of an expert's plan; recorded for auxiliary targets and analysis, never seen by a policy."""

    REACH = 0
    GRASP = 1
    CARRY = 2
    RELEASE = 3
    RETREAT = 4
