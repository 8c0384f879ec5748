"""The original SimplerEnv, in an interpreter of its own: this end of the pipe. The other is :mod:`ms2_server`."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt

from lac_vla.errors import InputError
from lac_vla.sims.base import SimulatorError
from lac_vla.sims.simpler import ms2_server
from lac_vla.sims.simpler.actions import Action
from lac_vla.sims.simpler.assets import original_files, photo, stand_ins
from lac_vla.sims.simpler.backend import Backend, Observation, Scene, check_heights
from lac_vla.sims.simpler.episode import EpisodeSpec, Layout

Array: TypeAlias = "npt.NDArray[Any] | None"
SERVER: Final = Path(ms2_server.__file__)
START_TIMEOUT_S: Final = 300.0
"""Longest wait for a start or a reset, in which scenes are loaded, seconds."""


class Ms2Backend(Backend):
    """A SimplerEnv process. It is started when it is needed, and again after it died, hung or failed.

    Args:
        command: How to start it, e.g. the interpreter that SimplerEnv is installed for and :data:`SERVER`.
        assets: Its data folder, ``MS2_REAL2SIM_ASSET_DIR``.
        timeout_s: Longest wait for a step, seconds; for a start or a reset it is :data:`START_TIMEOUT_S`.
        ray_tracing: Trace rays where the protocol demands it; without, scores are not SIMPLER's.
    """

    name = "ms2"

    def __init__(
        self, command: Sequence[str], assets: Path, *, timeout_s: float = 60.0, ray_tracing: bool = True
    ) -> None:
        self.command, self.assets, self.timeout_s, self.ray_traced = tuple(command), assets, timeout_s, ray_tracing
        self._process: subprocess.Popen[bytes] | None = None
        self._words: IO[bytes] | None = None
        self._playing: EpisodeSpec | None = None

    def reset(self, episode: EpisodeSpec) -> Observation:
        """See :meth:`Backend.reset`."""
        request = {
            "op": "reset",
            "env": episode.variant.env_id,
            "kwargs": self.kwargs(episode),
            "options": reset_options(episode),
            "camera": episode.robot.camera,
        }
        self._playing = None
        said = 0 if self._words is None else self._words.seek(0, os.SEEK_END)
        message, image = self._ask(request)
        observation = self._observation(message, image)
        self._check_log(said)
        heights = message.get("heights")
        if not isinstance(heights, dict) or not all(isinstance(height, float) for height in heights.values()):
            self._fail("answered without 'heights', object → float")
        check_heights(heights)
        self._playing = episode
        return observation

    def step(self, action: Action) -> Observation:
        """See :meth:`Backend.step`."""
        if not self._playing:
            raise InputError("reset the simulator before the first step")
        return self._observation(*self._ask({"op": "step"}, np.asarray(action, dtype=np.float64)))

    def scene(self) -> Scene:
        """See :meth:`Backend.scene`."""
        if self._playing is None:
            raise InputError("reset the simulator before the first step")
        if self._playing.robot.name != "widowx":
            raise InputError(f"the truth about a scene is read of a WidowX's alone, not of {self._playing.name!r}")
        _, poses = self._ask({"op": "scene"})
        if poses is None or poses.dtype != np.float64 or poses.shape != (5, 4, 4):
            self._fail("answered without five poses, float64 4×4")
        return Scene(*poses)

    def stand_ins(self, episode: EpisodeSpec) -> tuple[str, ...]:
        """See :meth:`Backend.stand_ins`."""
        return stand_ins(original_files(episode, self.assets))

    def metadata(self) -> Mapping[str, Any]:
        """See :meth:`Backend.metadata`."""
        message, _ = self._ask({"op": "hello"})
        versions = message.get("versions")
        if not isinstance(versions, dict):
            self._fail("answered without its versions")
        if message.get("assets") != os.path.abspath(self.assets):
            self._fail(f"uses the assets in {message.get('assets')}, not those in {self.assets}")
        return {"backend": self.name, "ray_tracing": self.ray_traced, **versions}

    def close(self) -> None:
        """See :meth:`Backend.close`."""
        process, self._process, self._playing = self._process, None, None
        words, self._words = self._words, None
        if process is not None:
            with process, contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # it has nothing to save, and may hang
        if words is not None:
            words.close()

    def kwargs(self, episode: EpisodeSpec) -> dict[str, Any]:
        """Keyword arguments of the episode's environment, as SIMPLER's own evaluation gives them."""
        robot, variant = episode.robot, episode.variant
        options = dict(variant.options)
        if not self.ray_traced:
            options.pop("shader_dir", None)
        overlay = None if episode.stand.photo is None else str(photo(self.assets, episode.stand.photo))
        return {
            "obs_mode": "rgbd",
            "robot": variant.body,
            "sim_freq": robot.sim_hz,
            "control_freq": robot.control_hz,
            "control_mode": robot.control_mode,
            "max_episode_steps": episode.horizon,
            "scene_name": variant.scene,
            "camera_cfgs": {"add_segmentation": True},
            "rgb_overlay_path": overlay,
            **({"rgb_overlay_cameras": [robot.camera]} if overlay else {}),
            **options,
        }

    # ---- the process

    def _start(self) -> subprocess.Popen[bytes]:
        self._words = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        try:
            return subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._words,
                bufsize=0,
                env={**os.environ, "MS2_REAL2SIM_ASSET_DIR": str(self.assets)},
                start_new_session=True,
            )
        except OSError as error:
            self.close()
            what = f"cannot start {self.command[0]!r} ({error}): give SimplerEnv's interpreter"
            raise SimulatorError(what) from error

    def _ask(self, request: dict[str, Any], array: Array = None) -> tuple[dict[str, Any], Array]:
        """Send a request and wait for the answer; whatever goes wrong ends the process."""
        timeout_s = self.timeout_s if request["op"] == "step" else START_TIMEOUT_S
        if self._process is None:
            self._process = self._start()
        process, deadline = self._process, time.monotonic() + timeout_s
        assert process.stdin is not None
        assert process.stdout is not None
        pipe = process.stdout.fileno()
        try:
            process.stdin.write(ms2_server.pack(request, array))
            message, answer = ms2_server.unpack(lambda n: _read(pipe, n, deadline))
        except TimeoutError:
            self._fail(f"did not answer {request['op']!r} within {timeout_s:g} s")
        except (OSError, EOFError):
            self._fail(f"died on {request['op']!r}")
        except ValueError as error:
            self._fail(f"sent something unintelligible ({error})")
        except BaseException:  # an interrupt in mid-message leaves half of one in the pipe
            self.close()
            raise
        if not message.get("ok"):
            self._fail(f"failed on {request['op']!r}: {message.get('error')}")
        return message, answer

    def _observation(self, message: Mapping[str, Any], image: Array) -> Observation:
        if image is None or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            self._fail("answered without a picture, uint8 H×W×3")
        kinds = {"instruction": str, "success": bool, "grasped": bool, "opening": float}
        for key, kind in kinds.items():
            if not isinstance(message.get(key), kind):
                self._fail(f"answered without {key!r}, {kind.__name__}")
        return Observation(image.copy(), **{key: message[key] for key in kinds})

    def _check_log(self, since: int) -> None:
        """Refuse what SAPIEN says it could not do, which it does not stop for: a mesh or stage that it cannot read."""
        assert self._words is not None
        self._words.seek(since)
        lines = self._words.read().decode("utf-8", "replace").splitlines()
        if wrong := [line for line in lines if "[error]" in line and "GLFW" not in line]:
            self._fail(f"noted an error: {wrong[0]}")

    def _fail(self, what: str) -> NoReturn:
        """End the process, and repeat the last 500 bytes that it wrote on standard error."""
        last = ""
        if self._words is not None:
            self._words.seek(max(0, self._words.seek(0, os.SEEK_END) - 500))
            last = self._words.read().decode("utf-8", "replace").strip()
        self.close()
        if "ErrorExtensionNotPresent" in what:
            what += " (Mesa's driver lacks what SAPIEN 2 asks for: make sim-simpler-original builds a layer for it)"
        raise SimulatorError(f"the SimplerEnv process {what}" + (f"; its last words: {last}" if last else ""))


def reset_options(episode: EpisodeSpec) -> dict[str, Any]:
    """Options of the environment's ``reset``: where the robot stands, and what lies where.

    Raises:
        InputError: If the layout is none of the benchmark's.
    """
    stand, place = episode.stand, episode.place
    if isinstance(place, Layout):
        raise InputError("layouts that are none of the benchmark's are for ManiSkill3's port: --backend ms3")
    return {
        "robot_init_options": {"init_xy": [stand.x, stand.y], "init_rot_quat": list(stand.quaternion)},
        "obj_init_options": {"episode_id": place} if isinstance(place, int) else {"init_xy": list(place)},
    }


def _read(pipe: int, n: int, deadline: float) -> bytes:
    """Exactly ``n`` bytes: a TimeoutError by ``deadline`` (``time.monotonic``), an EOFError if they will never come."""
    parts: list[bytes] = []
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while n:
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise TimeoutError
            part = os.read(pipe, min(n, 1 << 20))
            if not part:
                raise EOFError
            parts.append(part)
            n -= len(part)
    return b"".join(parts)
