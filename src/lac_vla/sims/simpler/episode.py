"""The words of SIMPLER's protocol: robots, where they stand, variants of a scene, tasks, episodes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, get_args

Setup: TypeAlias = Literal["vm", "va", "widowx"]
SETUPS: Final[tuple[Setup, ...]] = get_args(Setup)
Option: TypeAlias = "str | bool"
Place: TypeAlias = "tuple[float, float] | int | Layout"


@dataclass(frozen=True)
class RobotSpec:
    """A robot as both simulators drive it.

    Attributes:
        name: ``google`` or ``widowx``.
        camera: The camera that the policy sees.
        control_mode: The simulator's controller.
        control_hz: Actions per second.
        sim_hz: Physics steps per second.
        image: Height and width of the picture, pixels.
        dataset: Statistics key of checkpoints trained on this robot's data.
    """

    name: str
    camera: str
    control_mode: str
    control_hz: int
    sim_hz: int
    image: tuple[int, int]
    dataset: str


GOOGLE: Final = RobotSpec(
    name="google",
    camera="overhead_camera",
    control_mode=(
        "arm_pd_ee_delta_pose_align_interpolate_by_planner_gripper_pd_joint_target_delta_pos_interpolate_by_planner"
    ),
    control_hz=3,
    sim_hz=513,
    image=(512, 640),
    dataset="fractal20220817_data",
)
WIDOWX: Final = RobotSpec(
    name="widowx",
    camera="3rd_view_camera",
    control_mode="arm_pd_ee_target_delta_pose_align2_gripper_pd_joint_pos",
    control_hz=5,
    sim_hz=500,
    image=(480, 640),
    dataset="bridge_orig",
)


@dataclass(frozen=True)
class Stand:
    """The place of the robot's base, and the photo behind the scene as seen from there.

    Attributes:
        x: Metres, world.
        y: Metres, world.
        yaw: Radians, added to the robot's own half turn.
        photo: File in ``real_inpainting``; ``None`` for a rendered background.
    """

    x: float
    y: float
    yaw: float = 0.0
    photo: str | None = None

    @property
    def quaternion(self) -> tuple[float, float, float, float]:
        """Orientation (w, x, y, z): half a turn about z, then ``yaw``."""
        return (-math.sin(self.yaw / 2), 0.0, 0.0, math.cos(self.yaw / 2))


@dataclass(frozen=True)
class Variant:
    """One look of a task: its episodes' mean is one entry of the mean in the table.

    Attributes:
        name: E.g. ``lighting: darker``.
        env_id: The original's gymnasium id.
        scene: Its scene.
        options: Further keyword arguments of the environment.
        stands: Where the robot stands.
        body: The original's name of the robot.
    """

    name: str
    env_id: str
    scene: str
    options: Mapping[str, Option]
    stands: tuple[Stand, ...]
    body: str = "google_robot_static"


@dataclass(frozen=True)
class TaskSpec:
    """One task of a setup, in all its variants.

    Attributes:
        name: In words, e.g. ``coke can horizontal``.
        robot: Which robot.
        horizon: Control steps of every episode: it is not ended by success.
        variants: Its looks.
        places: Where the object lies, metres, world; or the numbers of layouts that the environment itself holds.
        port: Gymnasium id in ManiSkill3, if it is there.
    """

    name: str
    robot: RobotSpec
    horizon: int
    variants: tuple[Variant, ...]
    places: tuple[Place, ...]
    port: str | None = None


@dataclass(frozen=True)
class Layout:
    """A layout of a WidowX task that is none of the benchmark's, for demonstrations; the object to take comes first.

    Attributes:
        positions: Of the two objects' origins before they settle, metres, world.
        orientations: Their quaternions (w, x, y, z).
    """

    positions: tuple[tuple[float, ...], ...]
    orientations: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class EpisodeSpec:
    """One episode: all that a simulator must be told.

    Attributes:
        setup: Its setup.
        task: Number of the task in the setup.
        number: Of the episode in the task.
        name: Of the task.
        variant: Its look.
        stand: Where the robot stands.
        place: Where the object lies, metres, world; the number of the environment's own layout; or one of ours.
        horizon: Control steps.
        robot: Which robot.
        port: Gymnasium id in ManiSkill3, if it is there.
    """

    setup: Setup
    task: int
    number: int
    name: str
    variant: Variant
    stand: Stand
    horizon: int
    robot: RobotSpec
    place: Place
    port: str | None

    @property
    def ray_traced(self) -> bool:
        """Return whether the protocol demands ray tracing: policies tell depth by the shadows."""
        return self.variant.options.get("shader_dir") == "rt"
