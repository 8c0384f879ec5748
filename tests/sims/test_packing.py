from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from lac_vla.datasets import DatasetError, LeRobotDataset
from lac_vla.sims.libero.packing import pack

META = {"format": 1, "suite": "libero_spatial", "rendering": "fast", "seed": 0, "resolution": 32}


def stage(folder: Path, task: int, init: int, codec: str = "raw") -> dict[str, np.ndarray]:
    """Write a staged episode the way ``lac collect`` does."""
    rng = np.random.default_rng([task, init])
    length = 5 + task + init
    meta = {**META, "task": task, "init_state": init, "instruction": f"task {task}", "steps": length}
    arrays: dict[str, np.ndarray] = {
        "state": rng.normal(size=(length, 8)).astype(np.float32),
        "action": rng.normal(size=(length, 7)).astype(np.float32),
        "executed": rng.normal(size=(length, 7)).astype(np.float32),
        "success": np.arange(length) > 2,
        "phase": np.arange(length).astype(np.int8),
        "object_position": rng.normal(size=(length, 3)).astype(np.float32),
        "target_position": rng.normal(size=(length, 3)).astype(np.float32),
    }
    for number, camera in enumerate(("agentview", "wrist")):
        images = np.full((length, 32, 32, 3), 40 * number + 20 * task + 60, dtype=np.uint8)
        if codec == "raw":
            arrays[f"images.{camera}"] = images
        else:
            encoded = [cv2.imencode(f".{codec}", image[..., ::-1])[1].reshape(-1) for image in images]
            arrays[f"encoded.{camera}"] = np.concatenate(encoded)
            arrays[f"lengths.{camera}"] = np.array([len(data) for data in encoded], dtype=np.int64)
    folder.mkdir(exist_ok=True)
    np.savez(folder / f"task{task:02d}_init{init:02d}_seed0.npz", meta=np.array(json.dumps(meta)), **arrays)
    return arrays


@pytest.mark.parametrize("codec", ["raw", "png"])
def test_staged_episodes_come_back(tmp_path: Path, codec: str) -> None:
    order = [(0, 0), (0, 1), (1, 0), (2, 3)]
    wrote = {key: stage(tmp_path / "staging", *key, codec) for key in reversed(order)}
    dataset = pack(tmp_path / "staging", tmp_path / "demos")
    assert isinstance(dataset, LeRobotDataset)
    assert dataset.cameras == ("agentview", "wrist")
    assert dataset.tasks == {0: "task 0", 1: "task 1", 2: "task 2"}
    assert dataset.fps == 20
    assert dataset.provenance == META
    assert dataset.features["action"]["names"][-1] == "gripper"
    for key, episode in zip(order, dataset, strict=True):
        arrays = wrote[key]
        assert (episode.metadata["task"], episode.metadata["init_state"]) == key
        assert episode.instruction == f"task {key[0]}"
        np.testing.assert_array_equal(episode.state, arrays["state"])
        np.testing.assert_array_equal(episode.action, arrays["action"])
        np.testing.assert_array_equal(episode.columns["executed_action"], arrays["executed"])
        np.testing.assert_array_equal(episode.columns["next.success"], arrays["success"])
        for name in ("phase", "object_position", "target_position"):
            np.testing.assert_array_equal(episode.columns[name], arrays[name])
        level = episode.images["wrist"].astype(int)
        assert abs(level - (100 + 20 * key[0])).max() <= 2


def test_packing_twice_gives_the_same_numbers(tmp_path: Path) -> None:
    for key in ((0, 0), (1, 0)):
        stage(tmp_path / "staging", *key)
    first = pack(tmp_path / "staging", tmp_path / "first")
    second = pack(tmp_path / "staging", tmp_path / "second")
    for name in ("meta/info.json", "meta/stats.json", "data/chunk-000/file-000.parquet"):
        assert (first.root / name).read_bytes() == (second.root / name).read_bytes()


def test_a_damaged_file_is_named_and_no_dataset_left(tmp_path: Path) -> None:
    stage(tmp_path / "staging", 0, 0)
    stage(tmp_path / "staging", 1, 0)
    path = tmp_path / "staging" / "task01_init00_seed0.npz"
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(DatasetError, match="task01_init00_seed0"):
        pack(tmp_path / "staging", tmp_path / "demos")
    assert not (tmp_path / "demos").exists()


def test_a_foreign_file_is_named(tmp_path: Path) -> None:
    stage(tmp_path / "staging", 0, 0)
    np.savez(tmp_path / "staging" / "other.npz", values=np.zeros(3))
    with pytest.raises(DatasetError, match=r"other\.npz is not a staged episode"):
        pack(tmp_path / "staging", tmp_path / "demos")


def test_nothing_staged(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="collect demonstrations first"):
        pack(tmp_path, tmp_path / "demos")
