"""SIMPLER's WidowX tasks in ManiSkill3, in this process: the port ``mani-skill`` 3.0.1 with ``sapien`` 3.0.3.

The port is not the original: its objects start where they came to rest in the original, its *eggplant* knows 64 layouts
of which the numbers 0 to 23 are others than the original's 24, its fingers have less friction, and its test of success
counts an object that is still held. Scores are labelled so. Its controller reads rotations as Euler angles, into which
they are turned here.

An episode begins the same whatever was played before: the port's classes remember what earlier environments showed, and
its objects settle with the robot where the last episode left it; both are undone here.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch

from lac_vla.errors import InputError, LacError, MissingExtraError
from lac_vla.sims.base import SimulatorError
from lac_vla.sims.simpler import assets
from lac_vla.sims.simpler.actions import Action, euler_xyz
from lac_vla.sims.simpler.backend import Backend, Matrix, Observation, Scene, check_heights
from lac_vla.sims.simpler.episode import EpisodeSpec, Layout

PACKAGES: Final = ("mani-skill", "sapien")


class Ms3Backend(Backend):
    """ManiSkill3's simulator, one environment at a time; the last one is kept open.

    Args:
        render: Where pictures are made: ``"cpu"`` or ``"gpu"``.
        folder: ManiSkill3's folder, which holds its ``data``.

    Raises:
        MissingExtraError: If ManiSkill3 is not installed.
        LacError: If there is no Vulkan driver.
        InputError: If this process has another folder already.
    """

    name = "ms3"
    ray_traced = False

    def __init__(self, render: Literal["cpu", "gpu"] = "cpu", folder: Path | None = None) -> None:
        if missing := assets.vulkan_missing():
            raise LacError(missing)
        self._folder = assets.port_folder(folder)
        if "mani_skill" not in sys.modules:
            os.environ["MS_ASSET_DIR"] = str(self._folder)  # read when the package is imported
        try:
            self._gym = importlib.import_module("gymnasium")
            package = importlib.import_module("mani_skill")
            self._twin = importlib.import_module("mani_skill.envs.tasks.digital_twins.base_env").BaseDigitalTwinEnv
            importlib.import_module("sapien")
        except ModuleNotFoundError as error:
            raise MissingExtraError("simpler", f"ManiSkill3 (no module {error.name!r})") from error
        if (other := Path(package.ASSET_DIR).parent.resolve()) != self._folder.resolve():
            raise InputError(
                f"this process has ManiSkill3 with the assets of {other}: start another for {self._folder}"
            )
        logging.getLogger("mani_skill ").setLevel(logging.ERROR)  # its name; it warns of every object
        self.render = render
        self._env: Any = None
        self._episode: EpisodeSpec | None = None
        self._layouts: tuple[Any, ...] = ()

    def reset(self, episode: EpisodeSpec) -> Observation:
        """See :meth:`Backend.reset`."""
        if episode.port is None:
            raise InputError(f"{episode.name!r} is not in ManiSkill3's port: use the original (ms2)")
        self._episode = None
        try:
            if self._env is None or self._env.spec.id != episode.port:
                self.close()
                self._make(episode)
            inner, place = self._env.unwrapped, episode.place
            inner.xyz_configs, inner.quat_configs = self._layouts
            if isinstance(place, Layout):
                inner.xyz_configs, inner.quat_configs = (
                    torch.tensor([part]) for part in (place.positions, place.orientations)
                )
                place = 0
            observation, info = self._restart(episode.number, episode_id=torch.tensor([place]))
            heights = {name: float(thing.pose.p[0, 2]) for name, thing in inner.objs.items()}
        except Exception as error:
            self.close()
            raise SimulatorError(f"ManiSkill3 failed on {episode.port}: {error}") from error
        check_heights(heights)
        self._episode = episode
        return self._look(episode, observation, info)

    def step(self, action: Action) -> Observation:
        """See :meth:`Backend.step`."""
        episode = self._playing()
        command = np.array([*action[:3], *euler_xyz(action[3:6]), action[6]], dtype=np.float32)
        try:
            observation, _, _, _, info = self._env.step(command)
        except Exception as error:
            self.close()
            raise SimulatorError(f"ManiSkill3 failed in mid-episode: {error}") from error
        return self._look(episode, observation, info)

    def scene(self) -> Scene:
        """See :meth:`Backend.scene`."""
        self._playing()
        inner = self._env.unwrapped
        arm, base = inner.agent.controller.controllers["arm"], _matrix(inner.agent.robot.pose)
        return Scene(
            tool=_matrix(arm.ee_link.pose),
            target=base @ _matrix(arm._target_pose),
            source=_matrix(inner.objs[inner.source_obj_name].pose),
            goal=_matrix(inner.objs[inner.target_obj_name].pose),
            base=base,
        )

    def layouts(self, episode: EpisodeSpec) -> tuple[Layout, ...]:
        """List the layouts that the environment of an episode holds.

        Raises:
            SimulatorError: If the simulator fails.
        """
        self.reset(episode)
        positions, orientations = (part.tolist() for part in self._layouts)
        return tuple(Layout(_tuples(p), _tuples(q)) for p in positions for q in orientations)

    def stand_ins(self, episode: EpisodeSpec) -> tuple[str, ...]:
        """See :meth:`Backend.stand_ins`."""
        return assets.stand_ins(assets.port_files(episode, self._folder))

    def metadata(self) -> Mapping[str, Any]:
        """See :meth:`Backend.metadata`."""
        versions = {package: importlib.metadata.version(package) for package in PACKAGES}
        return {"backend": self.name, "render": self.render, "numpy": np.__version__, **versions}

    def close(self) -> None:
        """See :meth:`Backend.close`."""
        if self._env is not None:
            self._env.close()
        self._env = self._episode = None

    def _make(self, episode: EpisodeSpec) -> None:
        """Make an episode's environment; what the class remembers of others' is forgotten, and kept to itself."""
        self._twin._objects_to_remove_from_greenscreen, self._twin._rgb_overlay_images = [], {}
        self._env = self._gym.make(
            episode.port,
            num_envs=1,
            obs_mode="rgb+segmentation",
            control_mode=episode.robot.control_mode,
            sim_backend="physx_cpu",
            render_backend=self.render,
            max_episode_steps=episode.horizon,
        )
        inner = self._env.unwrapped
        inner._rgb_overlay_images = self._twin._rgb_overlay_images
        self._restart(0)  # the second scene of an environment and all further ones are alike, the first is not
        self._layouts = inner.xyz_configs, inner.quat_configs

    def _restart(self, seed: int, **options: Any) -> Any:
        """Begin an episode in a scene built anew: the physics of one that was played in remembers contacts."""
        return self._env.reset(seed=seed, options={**options, "reconfigure": True})

    def _playing(self) -> EpisodeSpec:
        if self._episode is None:
            raise InputError("reset the simulator before the first step")
        return self._episode

    def _look(self, episode: EpisodeSpec, observation: Any, info: Mapping[str, Any]) -> Observation:
        inner = self._env.unwrapped
        rgb = observation["sensor_data"][episode.robot.camera]["rgb"]
        fingers, limits = inner.agent.robot.qpos[0, -2:], inner.agent.robot.qlimits[0, -2:]
        return Observation(
            image=np.ascontiguousarray(rgb[0].cpu().numpy(), dtype=np.uint8),
            instruction=str(inner.get_language_instruction()[0]),
            success=bool(info.get("success", False)),
            grasped=bool(info.get("is_src_obj_grasped", False)),
            opening=float(((fingers - limits[:, 0]) / (limits[:, 1] - limits[:, 0])).mean().clip(0, 1)),
        )


def _matrix(pose: Any) -> Matrix:
    return np.asarray(pose.to_transformation_matrix()[0].numpy(), dtype=np.float64)


def _tuples(rows: list[list[float]]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in rows)
