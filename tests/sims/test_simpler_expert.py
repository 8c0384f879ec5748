"""The expert of SIMPLER's WidowX tasks, its layouts and what is collected: in a world without physics."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from lac_vla.datasets import LeRobotDataset
from lac_vla.errors import InputError, LacError
from lac_vla.sims.base import SimulatorError
from lac_vla.sims.phase import Phase
from lac_vla.sims.simpler import collect as module
from lac_vla.sims.simpler.actions import Action, WidowXActions
from lac_vla.sims.simpler.backend import Backend, Observation, Scene, check_heights
from lac_vla.sims.simpler.benchmark import Simpler
from lac_vla.sims.simpler.collect import CollectConfig, collect
from lac_vla.sims.simpler.demonstration import AFTER, demonstrate
from lac_vla.sims.simpler.env import SimplerEnv
from lac_vla.sims.simpler.episode import EpisodeSpec, Layout
from lac_vla.sims.simpler.expert import GRASPS
from lac_vla.sims.simpler.layouts import APART, draw_layout
from lac_vla.sims.simpler.ms3 import Ms3Backend

UP = (1.0, 0.0, 0.0, 0.0)
KNOWN = tuple(
    Layout(((x, y, 0.887), (-0.16 - (x + 0.16), -y, 0.87)), (turn, UP))
    for x in (-0.235, -0.085)
    for y in (-0.075, 0.075)
    for turn in (UP, (np.sqrt(0.5), 0.0, 0.0, np.sqrt(0.5)))
)


def pose(place: Any, yaw: float = 0.0) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:2, :2] = [[np.cos(yaw), -np.sin(yaw)], [np.sin(yaw), np.cos(yaw)]]
    matrix[:3, 3] = place
    return matrix


class Toy(Ms3Backend):
    """A tool that is at once where it is sent, and an object that goes with it once the fingers close around it."""

    slips, jams = 0, False

    def __init__(self) -> None:
        self.render, self._folder = "cpu", Path("nowhere")

    def reset(self, episode: EpisodeSpec) -> Observation:
        layout = episode.place if isinstance(episode.place, Layout) else KNOWN[episode.place % len(KNOWN)]
        w, z = layout.orientations[0][0], layout.orientations[0][3]
        self.base = pose([0.147, 0.028, 0.87], np.pi)
        down = np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]])
        self.tool = pose([-0.1, 0.0, 1.0])
        self.tool[:3, :3] = down
        self.source, self.goal = pose(layout.positions[0], 2 * np.arctan2(z, w)), pose(layout.positions[1])
        self.held, self.opening, self.task, self.slips = False, 1.0, episode.task, type(self).slips
        return self.look()

    def step(self, action: Action) -> Observation:
        before = self.tool[:3, 3].copy()
        axes = self.base[:3, :3]
        self.tool[:3, 3] += axes @ action[:3]
        self.tool[:3, :3] = axes @ cv2.Rodrigues(action[3:6])[0] @ axes.T @ self.tool[:3, :3]
        if not self.jams:
            self.opening = max(0.0, self.opening - 0.4) if action[6] < 0 else 1.0
        near = np.linalg.norm(self.tool[:3, 3] - self.source[:3, 3]) < 0.035
        self.held = (self.held or bool(near)) if self.opening < 0.5 else False
        if self.slips and self.held and self.tool[2, 3] > 0.95:
            self.slips, self.held = self.slips - 1, False
            self.source[2, 3] = 0.887
        if self.held:
            self.source[:3, 3] += self.tool[:3, 3] - before
        return self.look()

    def look(self) -> Observation:
        away = self.source[:3, 3] - self.goal[:3, 3] - [0.0, 0.0, GRASPS[self.task].rest]
        on = np.linalg.norm(away[:2]) < 0.02 and abs(away[2]) < 0.03
        image = np.full((480, 640, 3), 90, dtype=np.uint8)
        return Observation(image, "put it there", bool(on and not self.held), self.held, self.opening)

    def scene(self) -> Scene:
        return Scene(*(each.copy() for each in (self.tool, self.tool, self.source, self.goal, self.base)))

    def layouts(self, episode: EpisodeSpec) -> tuple[Layout, ...]:
        return KNOWN

    def stand_ins(self, episode: EpisodeSpec) -> tuple[str, ...]:
        return ("table.glb",)

    def metadata(self) -> Mapping[str, Any]:
        return {"backend": "ms3"}

    def close(self) -> None:
        pass


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> type[Toy]:
    class Own(Toy):
        pass

    def make_backend(self: Simpler, tasks: Collection[int]) -> Backend:
        return Own()

    monkeypatch.setattr(Simpler, "make_backend", make_backend)
    return Own


def play(task: int, sigma: float = 0.0, number: int = 0) -> tuple[SimplerEnv, Any]:
    env = Simpler("simpler-widowx", "ms3").make_env(task)
    assert isinstance(env.convert, WidowXActions)
    return env, demonstrate(env, env.episodes[number], np.random.default_rng(3), (sigma, sigma))


@pytest.mark.parametrize("task", range(3))
@pytest.mark.parametrize("sigma", [0.0, 0.005])
def test_it_solves_the_tasks_and_stops_soon_after_the_release(toy: type[Toy], task: int, sigma: float) -> None:
    for number in (0, 5):
        _, demo = play(task, sigma, number)
        assert demo.solved
        phases = demo.rows["phase"]
        assert phases[:1] + phases[-AFTER:] == [Phase.REACH] + [Phase.RETREAT] * AFTER
        assert phases.count(Phase.RETREAT) == AFTER
        assert len({len(row) for row in demo.rows.values()} | {len(demo.frames)}) == 1
        clean, executed = np.array(demo.rows["action"]), np.array(demo.rows["executed"])
        fingers = np.isin(phases, (Phase.GRASP, Phase.RELEASE))
        assert (clean[fingers] == executed[fingers]).all()
        assert (clean[:, 6] == executed[:, 6]).all()
        assert ((clean != executed)[~fingers, :6].any()) == bool(sigma)
        assert np.linalg.norm(clean[:, :3], axis=1).max() <= 0.03 + 1e-9


def test_what_is_lost_is_taken_again(toy: type[Toy]) -> None:
    toy.slips = 1
    _, demo = play(0)
    assert demo.solved
    assert demo.rows["phase"].count(Phase.GRASP) == 8  # four steps, twice


def test_what_cannot_be_solved_ends_with_the_horizon(toy: type[Toy]) -> None:
    toy.slips = 99
    env, demo = play(0)
    assert (demo.solved, len(demo)) == (False, env.horizon)


def test_the_state_is_the_tool_in_the_bases_axes(toy: type[Toy]) -> None:
    _, demo = play(0)
    # The base is turned by half a turn: what is 0.247 m before it in the world's −x is its own +x.
    np.testing.assert_allclose(demo.rows["state"][0][:3], [0.247, 0.028, 0.13], atol=1e-9)
    assert demo.rows["state"][0][6] == 1.0


# ---- what lac check proves


def test_a_proof_says_what_was_seen(toy: type[Toy]) -> None:
    said = Simpler("simpler-widowx", "ms3").prove(1)
    assert "gripper closes" in said
    assert "the scripted expert solves it in" in said


def test_a_gripper_that_never_closes_is_named(toy: type[Toy]) -> None:
    toy.jams = True
    with pytest.raises(SimulatorError, match="gripper stays 100% open"):
        Simpler("simpler-widowx", "ms3").prove(1)


def test_objects_that_are_not_on_the_table_are_named() -> None:
    check_heights({"can": 0.88})
    with pytest.raises(SimulatorError, match=r"can at -18\.00 m, plate at 1\.20 m, not on the table"):
        check_heights({"can": -18.0, "plate": 1.2})


# ---- layouts


def test_layouts_are_like_the_benchmarks_and_none_of_them() -> None:
    rng = np.random.default_rng(0)
    places = np.array([layout.positions for layout in KNOWN])[..., :2]
    for _ in range(200):
        drawn = np.array(draw_layout(KNOWN, rng).positions)
        assert (np.linalg.norm(places - drawn[:, :2], axis=-1).max(axis=1) >= APART).all()
        assert abs(drawn[:, :2] - [-0.16, 0.0]).max() <= 0.075 * 1.25 + 0.015
        assert drawn[:, 2].tolist() == [0.887, 0.87]
        assert np.linalg.norm(drawn[0] - drawn[1]) > 0.1


def test_what_never_moves_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = [dataclasses.replace(layout, positions=(layout.positions[0], (-0.5, 0.0, 1.0))) for layout in KNOWN]
    drawn = draw_layout(fixed, np.random.default_rng(0))
    assert (drawn.positions[1], drawn.orientations[1]) == ((-0.5, 0.0, 1.0), UP)
    assert drawn.orientations[0] not in (UP, KNOWN[1].orientations[0])
    monkeypatch.setattr("lac_vla.sims.simpler.layouts.APART", 9.0)
    with pytest.raises(LacError, match="no free layout"):
        draw_layout(KNOWN, np.random.default_rng(0))


# ---- collecting


def test_a_dataset_of_what_was_solved(toy: type[Toy], tmp_path: Path) -> None:
    collect(CollectConfig(tmp_path / "demos", tasks=(0, 2), episodes=2, width=64))
    dataset = LeRobotDataset(tmp_path / "demos")
    assert dataset.fps == 5
    assert [(e.metadata["task"], e.metadata["attempt"]) for e in dataset] == [(0, 0), (2, 0), (0, 1), (2, 1)]
    first = next(iter(dataset))
    assert first.images["3rd_view_camera"].shape[1:] == (48, 64, 3)
    assert (first.state.shape[1], first.action.shape[1], first.instruction) == (7, 7, "put it there")
    assert (first.columns["executed_action"] != first.action).any()
    assert first.columns["next.success"][-1]
    assert first.metadata["stand_ins"] == ["table.glb"]
    assert first.metadata["layout"]["positions"][0] not in [list(layout.positions[0]) for layout in KNOWN]


def test_a_collection_goes_on_and_loses_nothing(
    toy: type[Toy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CollectConfig(tmp_path / "whole", tasks=(0, 1), episodes=2, width=64)
    collect(config)
    append, calls = module._append, [0]

    def killed(*args: Any) -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise KeyboardInterrupt
        append(*args)

    broken = dataclasses.replace(config, out=tmp_path / "broken")
    with monkeypatch.context() as patch:
        patch.setattr(module, "_append", killed)
        with pytest.raises(KeyboardInterrupt):
            collect(broken)
    assert len(LeRobotDataset(broken.out)) == 1
    collect(broken)
    whole, again = LeRobotDataset(config.out), LeRobotDataset(broken.out)
    assert [e.metadata for e in whole] == [e.metadata for e in again]
    for one, other in zip(whole, again, strict=True):
        np.testing.assert_array_equal(one.action, other.action)
    collect(dataclasses.replace(broken, episodes=3, tasks=(1,)))
    assert [e.metadata["attempt"] for e in LeRobotDataset(broken.out) if e.metadata["task"] == 1] == [0, 1, 2]
    with pytest.raises(InputError, match="another --out"):
        collect(dataclasses.replace(broken, seed=1))


def test_an_attempt_whose_object_falls_is_not_solved(
    toy: type[Toy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reset, fall = toy.reset, {0, 2}

    def falling(self: Toy, episode: EpisodeSpec) -> Observation:
        check_heights({"spoon": -1.9 if episode.number in fall else 0.9})
        return reset(self, episode)

    monkeypatch.setattr(toy, "reset", falling)
    config = CollectConfig(tmp_path / "demos", tasks=(0,), episodes=2)
    collect(config)
    assert [e.metadata["attempt"] for e in LeRobotDataset(config.out)] == [1, 3]
    fall |= set(range(99))
    with pytest.raises(LacError, match="20 attempts in a row were not solved") as raised:
        collect(dataclasses.replace(config, episodes=3))
    assert "spoon at -1.90 m" in str(raised.value.__cause__)
    assert len(LeRobotDataset(config.out)) == 2


def test_an_expert_that_solves_nothing_is_no_endless_run(
    toy: type[Toy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GIVE_UP", 2)
    toy.slips = 99
    with pytest.raises(LacError, match=r"put spoon on towel: 2 attempts in a row were not solved: .*lac check"):
        collect(CollectConfig(tmp_path / "demos", tasks=(0,), episodes=1))
    assert not (tmp_path / "demos").exists()


@pytest.mark.parametrize(
    "bad",
    [
        {"suite": "simpler-vm"},
        {"tasks": (4,)},
        {"episodes": 0},
        {"seed": -1},
        {"noise": (0.005, 0.0)},
        {"noise": (0.0, float("nan"))},
        {"width": 100},
        {"width": 1280},
    ],
)
def test_a_collection_that_makes_no_sense_is_refused(tmp_path: Path, bad: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        CollectConfig(tmp_path, **bad)
