"""SIMPLER's WidowX tasks in ManiSkill3, in this process: the port ``mani-skill`` 3.0.1 with ``sapien`` 3.0.3.

The port is not the original: its objects start where they came to rest in the original, its *eggplant* knows 64 layouts
of which the numbers 0 to 23 are others than the original's 24, and its contact test of success differs. Scores are
labelled so. Its controller reads rotations as Euler angles, into which they are turned here.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Mapping
from typing import Any, Final, Literal

import numpy as np

from lac_vla.errors import InputError, LacError, MissingExtraError
from lac_vla.sims.base import SimulatorError
from lac_vla.sims.simpler.actions import Action, euler_xyz
from lac_vla.sims.simpler.assets import vulkan_missing
from lac_vla.sims.simpler.backend import Backend, Observation
from lac_vla.sims.simpler.episode import EpisodeSpec

PACKAGES: Final = ("mani-skill", "sapien")


class Ms3Backend(Backend):
    """ManiSkill3's simulator, one environment at a time; the last one is kept open.

    Args:
        render: Where pictures are made: ``"cpu"`` or ``"gpu"``.

    Raises:
        MissingExtraError: If ManiSkill3 is not installed.
        LacError: If there is no Vulkan driver.
    """

    name = "ms3"
    ray_traced = False

    def __init__(self, render: Literal["cpu", "gpu"] = "cpu") -> None:
        if missing := vulkan_missing():
            raise LacError(missing)
        try:
            self._gym = importlib.import_module("gymnasium")
            importlib.import_module("mani_skill.envs")
        except ModuleNotFoundError as error:
            raise MissingExtraError("simpler", f"ManiSkill3 (no module {error.name!r})") from error
        self.render = render
        self._env: Any = None
        self._episode: EpisodeSpec | None = None

    def reset(self, episode: EpisodeSpec) -> Observation:
        """See :meth:`Backend.reset`."""
        if episode.port is None:
            raise InputError(f"{episode.name!r} is not in ManiSkill3's port: use the original (ms2)")
        try:
            if self._env is None or self._episode is None or self._episode.port != episode.port:
                self.close()
                self._env = self._gym.make(
                    episode.port,
                    num_envs=1,
                    obs_mode="rgb+segmentation",
                    control_mode=episode.robot.control_mode,
                    sim_backend="physx_cpu",
                    render_backend=self.render,
                    max_episode_steps=episode.horizon,
                )
            import torch

            options = {"episode_id": torch.tensor([episode.place])}
            observation, info = self._env.reset(seed=episode.number, options=options)
        except Exception as error:
            self.close()
            raise SimulatorError(f"ManiSkill3 failed on {episode.port}: {error}") from error
        self._episode = episode
        return self._look(episode, observation, info)

    def step(self, action: Action) -> Observation:
        """See :meth:`Backend.step`."""
        episode = self._episode
        if episode is None:
            raise InputError("reset the simulator before the first step")
        command = np.array([*action[:3], *euler_xyz(action[3:6]), action[6]], dtype=np.float32)
        try:
            observation, _, _, _, info = self._env.step(command)
        except Exception as error:
            self.close()
            raise SimulatorError(f"ManiSkill3 failed in mid-episode: {error}") from error
        return self._look(episode, observation, info)

    def metadata(self) -> Mapping[str, Any]:
        """See :meth:`Backend.metadata`."""
        versions = {package: importlib.metadata.version(package) for package in PACKAGES}
        return {"backend": self.name, "render": self.render, "numpy": np.__version__, **versions}

    def close(self) -> None:
        """See :meth:`Backend.close`."""
        if self._env is not None:
            self._env.close()
        self._env = self._episode = None

    def _look(self, episode: EpisodeSpec, observation: Any, info: Mapping[str, Any]) -> Observation:
        words = getattr(self._env.unwrapped, "get_language_instruction", None)
        rgb = observation["sensor_data"][episode.robot.camera]["rgb"]
        return Observation(
            image=np.ascontiguousarray(rgb[0].cpu().numpy(), dtype=np.uint8),
            instruction=str(words()[0]) if words else episode.name,
            success=bool(info.get("success", False)),
            grasped=bool(info.get("is_src_obj_grasped", False)),
        )
