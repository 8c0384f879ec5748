"""Turn actions as a VLA answers them into those that SIMPLER's simulators take.

====  ===================================================  ==========================================================
part  a VLA trained on the robots' data sets               the simulators
====  ===================================================  ==========================================================
0-2   change of the gripper's position, metres             the same
3-5   change of its orientation: roll, pitch, yaw, rad     axis × angle, rad
6     1 open, 0 closed                                     Google: change, + closes; WidowX: +1 open, −1 closed
====  ===================================================  ==========================================================

Google's gripper takes a change, and needs it repeated until the fingers arrive: a *sticky* command. The two released
evaluations differ in how; a policy is scored with its own. Sources: ``cogact_policy.py`` and ``openvla_model.py`` of
``simpler-env/SimplerEnv``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias, get_args

import cv2
import numpy as np
import numpy.typing as npt

from lac_vla.errors import InputError
from lac_vla.sims.base import check_action
from lac_vla.sims.simpler.episode import RobotSpec

Action: TypeAlias = npt.NDArray[np.float64]
Convention: TypeAlias = Literal["cogact", "openvla"]
SUDDEN: Final = 0.5
"""A change of the gripper's opening beyond which it is a command."""


class ActionConversion(ABC):
    """Turns a policy's actions into a simulator's, one episode at a time; reset with every instruction."""

    def reset(self) -> None:  # noqa: B027 - there may be nothing to forget
        """Forget the gripper."""

    def __call__(self, action: npt.ArrayLike) -> Action:
        """Convert the next action, (7,).

        Raises:
            InputError: If it is not a finite vector of seven numbers; nothing is remembered of it then.
        """
        checked = check_action(action)
        return np.array([*checked[:3], *axis_angle(*checked[3:6]), self.gripper(float(checked[6]))])

    @abstractmethod
    def gripper(self, opening: float) -> float:
        """Convert the next opening, 0 closed .. 1 open."""


class WidowXActions(ActionConversion):
    """For the WidowX: the gripper's command is absolute, and open or closed."""

    def gripper(self, opening: float) -> float:
        """See :meth:`ActionConversion.gripper`."""
        return 1.0 if opening > 0.5 else -1.0


@dataclass
class GoogleActions(ActionConversion):
    """For the Google robot: the gripper's command is a change, repeated for a while once it is sudden.

    Attributes:
        repeat: Steps for which a sudden change is repeated.
        since_command: A change is measured from the last sudden one, as in CogACT's evaluation; else from the
            preceding step, as in OpenVLA's.
    """

    repeat: int = 10
    since_command: bool = True
    _before: float | None = field(default=None, init=False)
    _command: float = field(default=0.0, init=False)
    _left: int = field(default=0, init=False)

    def reset(self) -> None:
        """Forget the gripper."""
        self._before, self._command, self._left = None, 0.0, 0

    def gripper(self, opening: float) -> float:
        """See :meth:`ActionConversion.gripper`."""
        change = 0.0 if self._before is None else self._before - opening
        sudden = abs(change) > SUDDEN and not self._left
        if self._before is None or sudden or not self.since_command:
            self._before = opening
        if sudden:
            self._command, self._left = change, self.repeat
        if self._left:
            change = self._command
            self._left -= 1
        return change


def conversion(robot: RobotSpec, convention: Convention) -> ActionConversion:
    """The conversion for a robot and a family of policies.

    Raises:
        InputError: If the family is unknown.
    """
    if convention not in get_args(Convention):
        raise InputError(f"unknown convention {convention!r}: choose one of {', '.join(get_args(Convention))}")
    if robot.name == "widowx":
        return WidowXActions()
    return GoogleActions() if convention == "cogact" else GoogleActions(repeat=15, since_command=False)


def axis_angle(roll: float, pitch: float, yaw: float) -> Action:
    """Rotation about the fixed x, then y, then z axis (radians) as axis × angle, (3,)."""
    (cr, cp, cy), (sr, sp, sy) = np.cos([roll / 2, pitch / 2, yaw / 2]), np.sin([roll / 2, pitch / 2, yaw / 2])
    w = cr * cp * cy + sr * sp * sy
    xyz = np.array([sr * cp * cy - cr * sp * sy, cr * sp * cy + sr * cp * sy, cr * cp * sy - sr * sp * cy])
    sine = float(np.linalg.norm(xyz))
    return np.zeros(3) if sine < 1e-12 else xyz * (2.0 * np.arctan2(sine, w) / sine)


def roll_pitch_yaw(r: npt.NDArray[np.float64]) -> Action:
    """Rotation matrix, (3, 3), as angles (rad) about the fixed x, then y, then z axis, (3,)."""
    return np.array([np.arctan2(r[2, 1], r[2, 2]), np.arcsin(np.clip(-r[2, 0], -1, 1)), np.arctan2(r[1, 0], r[0, 0])])


def euler_xyz(rotation: npt.NDArray[np.float64]) -> Action:
    """Axis × angle, (3,), as angles (rad) about the moving x, then y, then z axis, (3,).

    ManiSkill3's controller reads rotations so; SIMPLER's original reads axis × angle.
    """
    r, _ = cv2.Rodrigues(rotation)
    return np.array([np.arctan2(-r[1, 2], r[2, 2]), np.arcsin(np.clip(r[0, 2], -1, 1)), np.arctan2(-r[0, 1], r[0, 0])])
