from __future__ import annotations

import contextlib
import json
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pytest

from lac_vla.datasets import DatasetError, DatasetWriter, LeRobotDataset
from lac_vla.datasets.video import VideoWriter, read_frames

FPS = 20
LENGTHS = (12, 7, 23)


def pictures(length: int, seed: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A smooth background whose brightness tells the frame, and a moving square."""
    rows, cols = np.mgrid[:height, :width]
    images = np.zeros((length, height, width, 3), dtype=np.uint8)
    for t in range(length):
        images[t, :, :, 0] = 30 + 8 * t
        images[t, :, :, 1] = 60 + rows
        images[t, :, :, 2] = 90 + cols // 2 + 10 * seed
        images[t, 8:24, 4 + t : 20 + t] = 200
    return images


def episode(index: int) -> dict:
    rng = np.random.default_rng(index)
    length = LENGTHS[index]
    return {
        "images": {"agentview": pictures(length, index), "wrist": pictures(length, index + 3)[::-1]},
        "state": rng.normal(size=(length, 8)).astype(np.float32),
        "action": rng.normal(size=(length, 7)).astype(np.float32),
        "task": ("lift the cup", "open the drawer", "lift the cup")[index],
        "columns": {
            "executed_action": rng.normal(size=(length, 7)).astype(np.float32),
            "next.success": np.arange(length) > length - 3,
        },
        "metadata": {"init_state": index, "note": "grün"},
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("datasets") / "demos"
    with DatasetWriter(path, FPS, state_names=list("abcdefgh"), provenance={"rendering": "fast"}) as writer:
        for index in range(3):
            assert writer.add_episode(**episode(index)) == index
    return path


def copy(root: Path, tmp_path: Path) -> Path:
    target = tmp_path / "copy"
    for path in root.rglob("*"):
        if path.is_file():
            (target / path.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
            (target / path.relative_to(root)).write_bytes(path.read_bytes())
    return target


def edit_info(root: Path, **changes: object) -> None:
    path = root / "meta" / "info.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_numbers_survive_exactly_and_images_nearly(root: Path) -> None:
    dataset = LeRobotDataset(root)
    assert (len(dataset), dataset.total_frames, dataset.fps) == (3, sum(LENGTHS), FPS)
    assert dataset.cameras == ("agentview", "wrist")
    assert dataset.tasks == {0: "lift the cup", 1: "open the drawer"}
    assert dataset.provenance == {"rendering": "fast"}
    for index, read in enumerate(dataset):
        wrote = episode(index)
        assert read.instruction == wrote["task"]
        assert read.metadata == wrote["metadata"]
        assert len(read) == LENGTHS[index]
        np.testing.assert_array_equal(read.state, wrote["state"])
        np.testing.assert_array_equal(read.action, wrote["action"])
        for name, values in wrote["columns"].items():
            np.testing.assert_array_equal(read.columns[name], values)
            assert read.columns[name].dtype == values.dtype
        np.testing.assert_allclose(read.columns["timestamp"], np.arange(len(read)) / FPS, rtol=1e-6)
        assert set(read.images) == {"agentview", "wrist"}
        for camera, images in wrote["images"].items():
            decoded = read.images[camera]
            assert decoded.dtype == np.uint8
            assert decoded.shape == images.shape
            difference = np.abs(decoded.astype(int) - images)
            assert difference.mean() < 1.5, f"{camera} of episode {index}"


def test_every_frame_is_the_right_one(root: Path) -> None:
    red = LeRobotDataset(root).episode(2).images["agentview"][:, 40, :, 0].mean(axis=1)
    np.testing.assert_allclose(red, 30 + 8 * np.arange(LENGTHS[2]), atol=3)


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (3, 9), (5, 6), (0, 23), (22, 23)])
def test_a_window_equals_the_same_frames_of_the_whole(root: Path, start: int, stop: int) -> None:
    images = LeRobotDataset(root).episode(2).images
    np.testing.assert_array_equal(images.window("wrist", start, stop), images["wrist"][start:stop])


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 3), (0, 24)])
def test_a_window_outside_the_episode_is_refused(root: Path, start: int, stop: int) -> None:
    with pytest.raises(DatasetError, match="do not lie within"):
        LeRobotDataset(root).episode(2).images.window("wrist", start, stop)


def test_layout_is_lerobots(root: Path) -> None:
    files = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    assert files == [
        "data/chunk-000/file-000.parquet",
        "meta/episodes/chunk-000/file-000.parquet",
        "meta/info.json",
        "meta/provenance.json",
        "meta/stats.json",
        "meta/tasks.parquet",
        "videos/observation.images.agentview/chunk-000/file-000.mp4",
        "videos/observation.images.wrist/chunk-000/file-000.mp4",
    ]
    info = json.loads((root / "meta/info.json").read_text())
    assert info["codebase_version"] == "v3.0"
    assert info["total_frames"] == sum(LENGTHS)
    assert info["splits"] == {"train": "0:3"}
    assert info["data_path"] == "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
    assert info["video_path"] == "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    assert info["features"]["observation.images.agentview"]["shape"] == [48, 64, 3]
    assert info["features"]["observation.state"] == {
        "dtype": "float32",
        "shape": [8],
        "names": list("abcdefgh"),
    }
    rows = pq.read_table(root / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert [(row["dataset_from_index"], row["dataset_to_index"]) for row in rows] == [
        (0, 12),
        (12, 19),
        (19, 42),
    ]
    key = "videos/observation.images.wrist"
    assert rows[2][f"{key}/from_timestamp"] == pytest.approx(19 / FPS)
    assert rows[2][f"{key}/to_timestamp"] == pytest.approx(42 / FPS)
    assert rows[1]["tasks"] == ["open the drawer"]
    np.testing.assert_allclose(rows[1]["stats/action/max"], episode(1)["action"].max(axis=0), rtol=1e-6)
    assert np.shape(rows[1]["stats/observation.images.wrist/mean"]) == (3, 1, 1)
    data = pq.read_table(root / "data/chunk-000/file-000.parquet")
    assert data.column("index").to_pylist() == list(range(42))
    assert str(data.schema.field("action").type) == "fixed_size_list<element: float>[7]"
    assert str(data.schema.field("timestamp").type) == "float"
    tasks = pq.read_table(root / "meta/tasks.parquet")
    assert tasks.to_pydict() == {"task_index": [0, 1], "task": ["lift the cup", "open the drawer"]}
    assert json.loads(tasks.schema.metadata[b"pandas"])["index_columns"] == ["task"]


def test_video_is_h264_with_key_frames_at_episode_starts(root: Path) -> None:
    with av.open(str(root / "videos/observation.images.agentview/chunk-000/file-000.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        frames = list(container.decode(stream))
    assert len(frames) == sum(LENGTHS)
    keys = [index for index, frame in enumerate(frames) if frame.key_frame]
    assert {0, 12, 19} <= set(keys)
    assert max(np.diff([*keys, len(frames)])) <= 5
    times = [float(frame.pts * frame.time_base) for frame in frames]
    np.testing.assert_allclose(times, np.arange(len(frames)) / FPS, atol=1e-4)


def test_statistics_are_those_of_all_frames(root: Path) -> None:
    stats = LeRobotDataset(root).stats
    actions = np.concatenate([episode(index)["action"] for index in range(3)]).astype(np.float64)
    assert stats["action"]["count"] == [42]
    np.testing.assert_allclose(stats["action"]["mean"], actions.mean(axis=0))
    np.testing.assert_allclose(stats["action"]["std"], actions.std(axis=0))
    np.testing.assert_allclose(stats["action"]["q01"], np.quantile(actions, 0.01, axis=0))
    np.testing.assert_allclose(stats["action"]["q99"], np.quantile(actions, 0.99, axis=0))
    images = np.concatenate([episode(index)["images"]["agentview"] for index in range(3)]) / 255
    image = stats["observation.images.agentview"]
    assert image["mean"].shape == (3, 1, 1)
    np.testing.assert_allclose(image["mean"].ravel(), images.mean(axis=(0, 1, 2)))
    np.testing.assert_allclose(image["std"].ravel(), images.std(axis=(0, 1, 2)))
    np.testing.assert_allclose(image["min"].ravel(), images.min(axis=(0, 1, 2)))
    np.testing.assert_allclose(image["max"].ravel(), images.max(axis=(0, 1, 2)))
    np.testing.assert_allclose(image["q50"].ravel(), np.median(images, axis=(0, 1, 2)), atol=1 / 255)


def test_long_videos_go_into_several_files(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (4, 48, 64, 3), dtype=np.uint8)
    writer = VideoWriter(tmp_path, "camera", FPS, 48, 64, limit_mb=0.03)
    places = [writer.add(noise) for _ in range(6)]
    writer.close()
    assert len({place["file_index"] for place in places}) > 1
    for place in places:
        path = tmp_path / f"videos/camera/chunk-000/file-{place['file_index']:03d}.mp4"
        assert len(read_frames(path, place["from_timestamp"] + np.arange(4) / FPS, FPS)) == 4


def test_a_killed_writer_leaves_no_dataset(tmp_path: Path) -> None:
    path = tmp_path / "demos"
    with contextlib.suppress(KeyboardInterrupt), DatasetWriter(path, FPS) as writer:
        writer.add_episode(**episode(0))
        raise KeyboardInterrupt
    assert not path.exists()
    with pytest.raises(DatasetError, match="never finished"):
        LeRobotDataset(path)
    with pytest.raises(DatasetError, match="exists already"):
        DatasetWriter(path, FPS)
    with DatasetWriter(path, FPS, overwrite=True) as writer:
        writer.add_episode(**episode(1))
    assert len(LeRobotDataset(path)) == 1
    assert not path.with_name("demos.incomplete").exists()


def test_existing_data_is_not_overwritten(root: Path) -> None:
    with pytest.raises(DatasetError, match="exists already"):
        DatasetWriter(root, FPS)


def test_an_empty_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no episode"):
        DatasetWriter(tmp_path / "demos", FPS).finalize()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": {"agentview": np.zeros((12, 48, 64, 3), np.float32)}}, "give uint8"),
        ({"images": {"agentview": np.zeros((11, 48, 64, 3), np.uint8)}}, "give uint8"),
        ({"images": {"agentview": np.zeros((12, 47, 64, 3), np.uint8)}}, "even sides"),
        ({"state": np.full((12, 8), np.nan, np.float32)}, "NaN"),
        ({"state": np.zeros((11, 8), np.float32)}, "shape"),
        ({"action": np.zeros((0, 7), np.float32)}, "no frames"),
        ({"columns": {"action": np.zeros(12)}}, "taken"),
        ({"columns": {"a/b": np.zeros(12)}}, "hold a '/'"),
        ({"columns": {"words": np.array(["x"] * 12)}}, "dtype"),
        ({"task": " "}, "task is empty"),
    ],
)
def test_bad_episodes_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    writer = DatasetWriter(tmp_path / "demos", FPS)
    with pytest.raises(DatasetError, match=message):
        writer.add_episode(**{**episode(0), **change})


def test_episodes_with_other_features_are_refused(tmp_path: Path) -> None:
    writer = DatasetWriter(tmp_path / "demos", FPS)
    writer.add_episode(**episode(0))
    with pytest.raises(DatasetError, match="those before"):
        writer.add_episode(**{**episode(1), "columns": {}})


def test_other_versions_are_named(root: Path, tmp_path: Path) -> None:
    old = copy(root, tmp_path)
    edit_info(old, codebase_version="v2.1")
    with pytest.raises(DatasetError, match="convert_dataset_v21_to_v30"):
        LeRobotDataset(old)
    edit_info(old, codebase_version="v4.0")
    with pytest.raises(DatasetError, match=r"layout v4\.0"):
        LeRobotDataset(old)


@pytest.mark.parametrize(
    "name",
    [
        "data/chunk-000/file-000.parquet",
        "meta/episodes/chunk-000/file-000.parquet",
        "meta/info.json",
        "meta/tasks.parquet",
        "videos/observation.images.wrist/chunk-000/file-000.mp4",
    ],
)
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_missing_and_damaged_files_are_named(root: Path, tmp_path: Path, name: str, damage: str) -> None:
    broken = copy(root, tmp_path)
    if damage == "missing":
        (broken / name).unlink()
    else:
        content = (broken / name).read_bytes()
        (broken / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(DatasetError, match="meta/episodes" if "episodes" in name else name):
        LeRobotDataset(broken).episode(2).images["wrist"]


def test_a_table_that_disagrees_is_found(root: Path, tmp_path: Path) -> None:
    broken = copy(root, tmp_path)
    edit_info(broken, total_episodes=4)
    with pytest.raises(DatasetError, match="speaks of 4 episodes"):
        LeRobotDataset(broken)


def test_no_dataset_at_all(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="there is no dataset"):
        LeRobotDataset(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match="no complete LeRobot dataset"):
        LeRobotDataset(tmp_path)


def test_there_is_no_such_episode(root: Path) -> None:
    with pytest.raises(IndexError, match="dataset of 3"):
        LeRobotDataset(root).episode(3)
