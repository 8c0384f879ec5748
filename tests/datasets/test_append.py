"""Datasets that grow: whole after every episode, and whenever the process is killed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.datasets.test_lerobot import FPS, LENGTHS, episode

from lac_vla.datasets import DatasetAppender, DatasetError, DatasetWriter, LeRobotDataset, append


def grow(root: Path, indices: list[int], fps: int | None = FPS) -> DatasetAppender:
    appender = DatasetAppender(root, fps)
    for index in indices:
        appender.add_episode(**episode(index))
    return appender


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two episodes, and a third by a second process."""
    root = tmp_path_factory.mktemp("grown") / "log"
    assert len(grow(root, [0, 1])) == 2
    assert len(grow(root, [2], fps=None)) == 3
    return root


def test_episode_by_episode_it_is_the_dataset_written_at_once(grown: Path, tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "once", FPS) as writer:
        for index in range(3):
            writer.add_episode(**episode(index))
    once, dataset = LeRobotDataset(tmp_path / "once"), LeRobotDataset(grown)
    assert dataset.info == once.info
    assert dataset.tasks == once.tasks
    for index in range(3):
        one, other = once.episode(index), dataset.episode(index)
        assert (one.instruction, one.metadata) == (other.instruction, other.metadata)
        np.testing.assert_array_equal(one.state, other.state)
        np.testing.assert_array_equal(one.action, other.action)
        for name, values in one.columns.items():
            np.testing.assert_array_equal(values, other.columns[name])
        for camera, images in episode(index)["images"].items():
            assert np.abs(other.images[camera].astype(int) - images).mean() < 1.5
    for key, stats in once.stats.items():
        for name in ("min", "max", "mean", "std", "count"):
            np.testing.assert_allclose(dataset.stats[key][name], stats[name], atol=1e-6, err_msg=f"{key} {name}")
    parts = [np.quantile(episode(index)["state"], 0.1, axis=0) for index in range(3)]
    np.testing.assert_allclose(
        dataset.stats["observation.state"]["q10"], np.average(parts, axis=0, weights=LENGTHS), atol=1e-6
    )


def test_what_the_writer_wrote_is_continued(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "log", FPS, state_names=list("abcdefgh"), robot_type="panda") as writer:
        writer.add_episode(**episode(0))
        writer.add_episode(**episode(1))
    grow(tmp_path / "log", [2], fps=None)
    dataset = LeRobotDataset(tmp_path / "log")
    assert dataset.total_frames == sum(LENGTHS)
    assert dataset.features["observation.state"]["names"] == list("abcdefgh")
    assert dataset.info["robot_type"] == "panda"
    np.testing.assert_array_equal(dataset.episode(2).state, episode(2)["state"])
    assert dataset.episode(2).images["agentview"].shape[0] == LENGTHS[2]


@pytest.mark.parametrize("survived", range(7))
@pytest.mark.parametrize("before", [0, 1])
def test_whoever_is_killed_leaves_whole_episodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: int, survived: int
) -> None:
    """Every prefix of the renames that make an episode part of the dataset."""
    root, left = tmp_path / "log", [survived]

    def replace(source: Any, target: Any) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        os.rename(source, target)

    grow(root, list(range(before)))
    monkeypatch.setattr(append.os, "replace", replace)
    try:
        grow(root, [before])
        added = 1
    except KeyboardInterrupt:
        added = 0
    monkeypatch.undo()
    assert added == (survived >= (5 if before else 6))
    if before + added:
        dataset = LeRobotDataset(root)
        assert len(list(dataset)) == len(dataset) == before + added
    else:
        assert not root.exists()
    grow(root, [2, 1])
    dataset = LeRobotDataset(root)
    expected = [*range(before + added), 2, 1]
    for index, wrote in enumerate(expected):
        read = dataset.episode(index)
        np.testing.assert_array_equal(read.action, episode(wrote)["action"])
        assert read.instruction == episode(wrote)["task"]
        assert np.abs(read.images["wrist"].astype(int) - episode(wrote)["images"]["wrist"]).mean() < 1.5
    assert dataset.info["total_frames"] == sum(LENGTHS[index] for index in expected)


def test_an_episode_that_does_not_fit_changes_nothing(grown: Path, tmp_path: Path) -> None:
    root = tmp_path / "log"
    shutil.copytree(grown, root)
    appender = DatasetAppender(root)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    wrong = episode(0)
    for change in (
        {"state": wrong["state"][:, :3]},
        {"action": wrong["action"][:, :3]},
        {"columns": {}},
        {"images": {"agentview": wrong["images"]["agentview"]}},
        {"images": {camera: images[:, :-2] for camera, images in wrong["images"].items()}},
    ):
        with pytest.raises(DatasetError, match="holds"):
            appender.add_episode(**wrong | change)
    with pytest.raises(DatasetError, match="NaN"):
        appender.add_episode(**wrong | {"state": wrong["state"] * np.nan})
    assert before == {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_folders_that_cannot_be_continued(grown: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="has 20 frames per second, not 10"):
        DatasetAppender(grown, 10)
    (tmp_path / "something").write_text("else")
    with pytest.raises(DatasetError, match="no complete LeRobot dataset"):
        DatasetAppender(tmp_path)
    with pytest.raises(DatasetError):
        DatasetAppender(tmp_path / "something")
    root = tmp_path / "log"
    shutil.copytree(grown, root)
    info = json.loads((root / "meta/info.json").read_text())
    (root / "meta/info.json").write_text(json.dumps(info | {"video_path": "clips/{video_key}/{file_index}.mp4"}))
    with pytest.raises(DatasetError):
        DatasetAppender(root)
    with pytest.raises(DatasetError, match="fps is None"):
        DatasetAppender(tmp_path / "new").add_episode(**episode(0))


def test_a_robot_without_a_state(tmp_path: Path) -> None:
    appender = DatasetAppender(tmp_path / "log", FPS)
    appender.add_episode(**episode(1) | {"state": np.zeros((LENGTHS[1], 0), np.float32)})
    dataset = LeRobotDataset(tmp_path / "log")
    assert "observation.state" not in dataset.features
    assert dataset.episode(0).state.shape == (LENGTHS[1], 0)


@pytest.mark.parametrize("survived", range(6))
def test_what_is_derived_is_of_the_counted_episodes_after_any_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, survived: int
) -> None:
    """Whoever is killed within an episode and adds it again has the dataset of one who was not killed."""
    whole, root, left = tmp_path / "whole", tmp_path / "log", [survived]
    grow(whole, [0, 1, 2])
    grow(root, [0])

    def replace(source: Any, target: Any) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        os.rename(source, target)

    monkeypatch.setattr(append.os, "replace", replace)
    with contextlib.suppress(KeyboardInterrupt):
        grow(root, [1])
    monkeypatch.undo()
    counted = LeRobotDataset(root)
    assert counted.stats["action"]["count"] == counted.total_frames == sum(LENGTHS[: len(counted)])
    grow(root, [1, 2][len(counted) - 1 :])
    once, dataset = LeRobotDataset(whole), LeRobotDataset(root)
    assert (dataset.info, dataset.tasks) == (once.info, once.tasks)
    for key, stats in once.stats.items():
        for name, values in stats.items():
            np.testing.assert_allclose(dataset.stats[key][name], values, atol=1e-9, err_msg=f"{key} {name}")


def test_the_task_of_an_episode_that_was_not_finished_does_not_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "log"
    grow(root, [0])
    appender = DatasetAppender(root)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(append, "write_object", killed)  # behind the task table
    with pytest.raises(KeyboardInterrupt):
        appender.add_episode(**episode(1))
    monkeypatch.undo()
    assert set(LeRobotDataset(root).tasks.values()) == {"lift the cup", "open the drawer"}
    grow(root, [2])
    dataset = LeRobotDataset(root)
    assert (dataset.tasks, dataset.info["total_tasks"]) == ({0: "lift the cup"}, 1)
