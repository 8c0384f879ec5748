"""Datasets as other tools write them: pictures by time, tasks by index, what is missing or not finite named."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lac_vla import InputError
from lac_vla.dataset_keys import DatasetKeys
from lac_vla.datasets import DatasetAppender, DatasetError, DatasetWriter, LeRobotDataset, hub

FPS, FRAMES, EPISODES = 20, 10, 3
VIDEO = "videos/observation.images.{}/chunk-000/file-000.mp4"
TABLE, DATA, TASKS = "meta/episodes/chunk-000/file-000.parquet", "data/chunk-000/file-000.parquet", "meta/tasks.parquet"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 1\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three episodes; the grey of a frame tells its number within the file, 20 + 4 n."""
    rng = np.random.default_rng(0)
    with DatasetWriter(tmp_path / "data", FPS) as writer:
        for episode in range(EPISODES):
            grey = (20 + 4 * np.arange(episode * FRAMES, (episode + 1) * FRAMES)).astype(np.uint8)
            images = np.ascontiguousarray(np.broadcast_to(grey[:, None, None, None], (FRAMES, 32, 32, 3)))
            numbers = rng.normal(size=(FRAMES, 9)).astype(np.float32)
            task = ("lift it", "push it")[episode % 2]
            writer.add_episode({"front": images, "wrist": images}, numbers[:, :2], numbers[:, 2:], task)
    return tmp_path / "data"


def encode(path: Path, count: int, rate: int) -> None:
    """A video of ``count`` frames at another rate; the grey of frame n is 20 + 7 (n mod 30)."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "1", "g": "7"})
        stream.height = stream.width = 32
        stream.pix_fmt = "yuv420p"
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 20 + 7 * (number % 30), np.uint8), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def change(path: Path, how: Callable[[Any], Any]) -> None:
    pq.write_table(how(pq.read_table(path)), path)


def column(name: str, values: Any) -> Callable[[Any], Any]:
    return lambda table: table.set_column(table.column_names.index(name), name, pa.array(values))


def edit(root: Path, **changes: Any) -> None:
    path = root / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def numbers(images: np.ndarray, step: float = 4) -> list[int]:
    return [round(float(image.mean() - 20) / step) for image in images]


@pytest.mark.parametrize(("rate", "each"), [(60, 3), (40, 2)])
def test_a_row_has_the_picture_of_its_time(root: Path, rate: int, each: int) -> None:
    encode(root / VIDEO.format("front"), EPISODES * FRAMES * each, rate)
    images = LeRobotDataset(root).episode(1).images
    want = [at * each for at in range(FRAMES, 2 * FRAMES)]
    assert numbers(images["front"], 7) == [number % 30 for number in want]
    assert numbers(images.window("front", 4, 6), 7) == [number % 30 for number in want[4:6]]


def test_rows_need_not_be_evenly_spaced(root: Path) -> None:
    at = np.array([0, 1, 2, 3, 5, 6, 9, 10, 11, 14])
    times = np.array(pq.read_table(root / DATA)["timestamp"])
    times[FRAMES : 2 * FRAMES] = at / FPS
    change(root / DATA, column("timestamp", times.astype(np.float32)))
    images = LeRobotDataset(root).episode(1).images
    assert numbers(images["front"]) == [10, 11, 12, 13, 15, 16, 19, 20, 21, 24]
    assert numbers(images.window("front", 6, 8)) == [19, 20]


def test_a_time_without_a_picture_is_refused(root: Path) -> None:
    encode(root / VIDEO.format("front"), 14, FPS)
    episode = LeRobotDataset(root).episode(1)
    assert numbers(episode.images.window("front", 0, 4), 7) == [10, 11, 12, 13]
    with pytest.raises(DatasetError, match=r"file-000\.mp4: episode 1, frame 4 is at 0\.700 s.*nearest.*0\.650 s"):
        episode.images["front"]


@pytest.mark.parametrize("shift", [1.0, 0.5, -0.05])
def test_times_of_another_episode_are_refused(root: Path, shift: float) -> None:
    """Timestamps that go on from episode to episode would show the next one's pictures."""
    table = pq.read_table(root / DATA)
    times = np.array(table["timestamp"]) + shift * np.array(table["episode_index"])
    change(root / DATA, column("timestamp", times.astype(np.float32)))
    dataset = LeRobotDataset(root)
    assert numbers(dataset.episode(0).images["front"]) == [*range(FRAMES)]
    with pytest.raises(DatasetError, match=r"episode 1 begins at .* timestamps count from the episode's own beginning"):
        dataset.episode(1)


def test_tasks_are_found_by_their_index(root: Path) -> None:
    pq.write_table(pa.table({"task_index": [5, 0, 2], "task": ["five", "zero", "two"]}), root / TASKS)
    change(root / DATA, lambda t: column("task_index", np.where(np.array(t["task_index"]) == 0, 2, 0))(t))
    assert [episode.instruction for episode in LeRobotDataset(root)] == ["two", "zero", "two"]


@pytest.mark.parametrize("name", ["task", "instruction", "__index_level_0__"])
def test_the_column_of_the_instructions_is_found_by_its_name(root: Path, name: str) -> None:
    table = pa.table({"category": ["easy", "hard"], "task_index": [0, 1], name: ["lift it", "push it"]})
    pandas = json.dumps({"index_columns": [name] if name == "instruction" else []})
    pq.write_table(table.replace_schema_metadata({"pandas": pandas}), root / TASKS)
    assert [episode.instruction for episode in LeRobotDataset(root)] == ["lift it", "push it", "lift it"]


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int8(), pa.string())])
def test_instructions_may_be_stored_in_other_ways(root: Path, kind: Any) -> None:
    pq.write_table(pa.table({"task_index": [0, 1], "task": pa.array(["lift it", "push it"]).cast(kind)}), root / TASKS)
    assert [episode.instruction for episode in LeRobotDataset(root)] == ["lift it", "push it", "lift it"]


def test_an_episode_that_changes_its_task_is_refused(root: Path) -> None:
    change(root / DATA, column("task_index", [int(at == 13) for at in range(EPISODES * FRAMES)]))
    with pytest.raises(DatasetError, match="episode 1, frame 3: 'task_index'"):
        LeRobotDataset(root).episode(1)


@pytest.mark.parametrize("name", ["action", "observation.state"])
@pytest.mark.parametrize("value", [np.nan, -np.inf, 1e300])
def test_numbers_that_are_not_finite_are_named(root: Path, name: str, value: float) -> None:
    values = [[0.0, value if at == 17 else 1.0] for at in range(EPISODES * FRAMES)]
    change(root / DATA, column(name, values))
    dataset = LeRobotDataset(root)
    dataset.episode(0)
    with pytest.raises(DatasetError, match=f"episode 1, frame 7: '{name}' is not finite"):
        dataset.episode(1)


def drop(path: str, name: str) -> Callable[[Path], None]:
    return lambda root: change(root / path, lambda t: t.drop([c for c in t.column_names if c.startswith(name)]))


def rewrite(path: str, name: str, values: Any) -> Callable[[Path], None]:
    return lambda root: change(root / path, column(name, values))


def write(path: str, text: str) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        (root / path).write_text(text)

    return apply


def folder(root: Path) -> None:
    (root / DATA).unlink()
    (root / DATA).mkdir()


def info(**changes: Any) -> Callable[[Path], None]:
    return lambda root: edit(root, **changes)


ROWS = range(EPISODES * FRAMES)
BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "task_index": (drop(DATA, "task_index"), "lacks the column 'task_index'"),
    "timestamp": (drop(DATA, "timestamp"), "lacks the column 'timestamp'"),
    "action": (drop(DATA, "action"), "lacks the column 'action'"),
    "length": (drop(TABLE, "length"), "episode 0 lacks the column 'length'"),
    "no episode_index": (drop(TABLE, "episode_index"), "episode_index None"),
    "text as length": (rewrite(TABLE, "length", ["10"] * 3), "has the length '10'"),
    "a video's place": (drop(TABLE, "videos/observation.images.wrist"), "videos/observation.images.wrist/chunk_index"),
    "no position in the video": (
        rewrite(TABLE, "videos/observation.images.wrist/from_timestamp", [0.0, None, 1.0]),
        "episode 1 has the videos/observation.images.wrist/from_timestamp None",
    ),
    "an episode twice": (rewrite(TABLE, "episode_index", [0, 1, 1]), "episode 1 stands there twice"),
    "video_path": (info(video_path=None), "video_path is 'None'"),
    "fps 0": (info(fps=0), "fps is 0"),
    "fps as text": (info(fps="20"), "fps is '20'"),
    "fps true": (info(fps=True), "fps is True"),
    "features as list": (info(features=[]), "features must name"),
    "dtype": (info(features={"action": {"dtype": 3}}), "features must name"),
    "episodes": (info(total_episodes="3"), "total_episodes is '3'"),
    "files of v2": (
        info(data_path="data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"),
        r"LeRobot v2.*lerobot\.datasets\.v30\.convert_dataset_v21_to_v30.*lerobot\.scripts\.convert_dataset",
    ),
    "wide": (info(data_path="{chunk_index:999999999d}"), "it may hold"),
    "attributes": (info(data_path="{chunk_index.__class__}"), "it may hold"),
    "too long for the system": (info(data_path=300 * "x"), "is missing"),
    "out of the folder": (info(data_path="../{chunk_index}/{file_index}"), "leads out of the dataset"),
    "nested": (write("meta/info.json", "[" * 100_000), "nested too deeply"),
    "statistics": (write("meta/stats.json", '{"action": {"mean": [NaN]}}'), "'action' hold NaN or infinity"),
    "digits": (write("meta/info.json", '{"fps": ' + "9" * 5000 + "}"), "cannot be read"),
    "shuffled": (
        lambda root: change(root / DATA, lambda t: t.take(np.random.default_rng(0).permutation(t.num_rows))),
        "do not stand together",
    ),
    "backwards": (
        rewrite(DATA, "timestamp", [-at / FPS for at in ROWS]),
        "episode 1, frame 1: 'timestamp' is not later",
    ),
    "a row without": (
        rewrite(DATA, "action", [None if at == 12 else [1.0] * 7 for at in ROWS]),
        "column 'action' of episode 1 has nothing at frame 2",
    ),
    "a hole": (
        rewrite(DATA, "action", [[1.0, None if at == 12 else 0.0] for at in ROWS]),
        "column 'action' of episode 1 has nothing at frame 2",
    ),
    "chunks": (rewrite(DATA, "action", [[[1.0] * 7] * 4] * len(ROWS)), "holds list"),
    "ragged": (rewrite(DATA, "action", [[1.0] * (2 + at % 2) for at in ROWS]), r"rows of \[2, 3\] numbers"),
    "words": (rewrite(DATA, "action", ["up"] * len(ROWS)), "holds no numbers"),
    "an unknown task": (rewrite(DATA, "task_index", [7] * len(ROWS)), "unknown task, 7"),
    "two texts": (
        lambda root: pq.write_table(pa.table({"task_index": [0, 0], "task": ["a", "b"]}), root / TASKS),
        "task 0 is 'b'",
    ),
    "another length": (rewrite(TABLE, "length", [10, 9, 10]), "holds 10 rows of episode 1, the episode table says 9"),
    **{
        f"pointer {path}": (write(path, POINTER), "Git LFS pointer.*git lfs pull")
        for path in (TABLE, DATA, TASKS, "meta/info.json", VIDEO.format("wrist"))
    },
    "page": (write(DATA, "<!DOCTYPE html><html>404"), "HTML page"),
    "folder": (folder, "it is a folder"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_is_named(root: Path, name: str) -> None:
    how, message = BROKEN[name]
    how(root)
    with pytest.raises(DatasetError, match=message) as error:
        _ = LeRobotDataset(root).episode(1).images["wrist"], LeRobotDataset(root).stats
    assert str(root) in str(error.value)


def test_flipped_bytes_are_the_datasets_error(root: Path) -> None:
    rng = np.random.default_rng(1)
    for path in (TABLE, DATA, TASKS, "meta/info.json", VIDEO.format("front")):
        whole = (root / path).read_bytes()
        for _ in range(25):
            broken = bytearray(whole)
            for at in rng.integers(0, len(whole), 4):
                broken[at] ^= int(rng.integers(1, 256))
            (root / path).write_bytes(bytes(broken))
            with contextlib.suppress(DatasetError):
                LeRobotDataset(root).episode(1).images["front"]
        (root / path).write_bytes(whole)


def test_an_episode_taken_out_leaves_the_others(root: Path) -> None:
    change(root / DATA, lambda t: t.filter(pa.array(np.array(t["episode_index"]) != 1)))
    change(root / TABLE, lambda t: t.filter(pa.array(np.array(t["episode_index"]) != 1)))
    edit(root, total_episodes=2)
    dataset = LeRobotDataset(root)
    assert [numbers(episode.images["wrist"])[0] for episode in dataset] == [0, 20]
    with pytest.raises(DatasetError, match="in a way of its own"):
        DatasetAppender(root)


def test_episodes_without_frames_are_none(root: Path) -> None:
    change(root / DATA, lambda t: t.filter(pa.array(np.array(t["episode_index"]) != 1)))
    change(root / TABLE, column("length", [10, 0, 10]))
    dataset = LeRobotDataset(root)
    assert (len(dataset), dataset.total_frames) == (2, 20)
    assert dataset.episode(1).instruction == "lift it"


def test_columns_nobody_asked_for_may_be_anything(root: Path) -> None:
    for name, values in {"force": [None] * 30, "plan": [[[1.0], [2.0]]] * 30, "note": ["x"] * 30}.items():
        change(root / DATA, lambda t, n=name, v=values: t.append_column(n, pa.array(v)))  # type: ignore[misc]
    columns = LeRobotDataset(root).episode(0).columns
    assert set(columns) == {"timestamp", "frame_index", "episode_index", "index", "task_index", "note"}


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("wrapped", [True, False])
def test_pictures_within_the_table_are_read(root: Path, suffix: str, wrapped: bool) -> None:
    features = json.loads((root / "meta/info.json").read_text())["features"]
    del features["observation.images.wrist"], features["observation.images.front"]
    edit(root, features=features | {"image": {"dtype": "image", "shape": [24, 32, 3]}}, video_path=None)
    colours = [np.full((24, 32, 3), (8 * at, 200, 40), np.uint8) for at in ROWS]
    encoded = [cv2.imencode(f".{suffix}", colour[..., ::-1])[1].tobytes() for colour in colours]
    cells = [{"bytes": data, "path": f"{at}.{suffix}"} for at, data in enumerate(encoded)] if wrapped else encoded
    table = pq.read_table(root / DATA).append_column("image", pa.array(cells))
    pq.write_table(table, root / DATA, row_group_size=7)
    dataset = LeRobotDataset(root, {"front": "image"})
    images = dataset.episode(1).images
    assert set(images) == {"front"}
    np.testing.assert_allclose(images["front"], np.stack(colours[10:20]), atol=0 if suffix == "png" else 4)
    np.testing.assert_array_equal(images.window("front", 3, 9), images["front"][3:9])
    bad = dict(enumerate(cells)) | {14: {"bytes": None, "path": "14.png"} if wrapped else b"broken"}
    change(root / DATA, column("image", list(bad.values())))
    with pytest.raises(DatasetError, match=r"episode 1, frame 4: .*'image'"):
        LeRobotDataset(root).episode(1).images["image"]


def test_only_the_cameras_that_are_needed_must_be_there(root: Path) -> None:
    (root / VIDEO.format("wrist")).unlink()
    drop(TABLE, "videos/observation.images.wrist")(root)
    dataset = LeRobotDataset(root, DatasetKeys(("top=observation.images.front",)).cameras(["top"]))
    assert dataset.cameras == ("top",)
    assert numbers(dataset.episode(2).images["top"])[0] == 20


def test_what_is_read_can_be_named(root: Path) -> None:
    change(root / DATA, lambda t: t.rename_columns([n.replace("observation.state", "state") for n in t.column_names]))
    features = json.loads((root / "meta/info.json").read_text())["features"]
    edit(root, features={name.replace("observation.state", "state"): entry for name, entry in features.items()})
    assert LeRobotDataset(root).episode(0).state.shape == (FRAMES, 0)
    assert LeRobotDataset(root, keys=DatasetKeys(state_key="state")).episode(0).state.shape == (FRAMES, 2)
    with pytest.raises(InputError, match=r"no column 'joints'; --state-key takes one of \['state', 'action'\]"):
        LeRobotDataset(root, keys=DatasetKeys(state_key="joints"))
    with pytest.raises(InputError, match=r"\['side'\] are missing.*\['front', 'wrist'\].*--camera top=KEY"):
        LeRobotDataset(root, DatasetKeys(("top=side",)).cameras(["top"]))
    with pytest.raises(InputError, match="cameras are"):
        DatasetKeys(("side=front",)).cameras(["top"])
    with pytest.raises(InputError, match="cannot use the camera 'top'"):
        DatasetKeys(("top",))


def test_a_hub_id_is_downloaded_as_far_as_needed(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str | None, list[str]]] = []

    def download(name: str, repo_type: str, revision: str | None, allow_patterns: list[str]) -> str:
        assert (name, repo_type) == ("someone/demos", "dataset")
        asked.append((revision, allow_patterns))
        return str(root)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", download)
    dataset = LeRobotDataset("someone/demos", {"front": "front"})
    assert dataset.episode(0).images["front"].shape == (FRAMES, 32, 32, 3)
    assert asked == [(None, ["meta/*"]), (root.name, [DATA, VIDEO.format("front")])]
    (tmp_path / "someone").mkdir()  # a path into a folder that is there is no id
    with pytest.raises(DatasetError, match="there is no dataset at"):
        LeRobotDataset("someone/demos")


def test_the_hubs_refusal_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise OSError("401 Unauthorized\nmore")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", refuse)
    with pytest.raises(DatasetError, match=r"no dataset at someone/demos, and the hub says: 401 Unauthorized$"):
        LeRobotDataset("someone/demos")


def test_only_datasets_are_overwritten(tmp_path: Path) -> None:
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday/picture.png").write_bytes(b"beach")
    with pytest.raises(DatasetError, match="no dataset that could be overwritten"):
        DatasetWriter(tmp_path / "holiday", FPS, overwrite=True)
    assert (tmp_path / "holiday/picture.png").read_bytes() == b"beach"
