"""Reads a LeRobotDataset v3.0: many episodes in few files, and tables that say what is where."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from lac_vla.datasets import layout
from lac_vla.datasets.layout import DatasetError
from lac_vla.datasets.statistics import FeatureStats, from_lists
from lac_vla.datasets.video import read_frames
from lac_vla.types import FloatArray, UInt8Image


class EpisodeImages(Mapping[str, UInt8Image]):
    """The images of an episode by camera, uint8, (T, H, W, 3), RGB; decoded when asked for, then kept."""

    def __init__(self, clips: Mapping[str, tuple[Path, float]], length: int, fps: float) -> None:
        self._clips, self._length, self._fps = dict(clips), length, fps
        self._decoded: dict[str, UInt8Image] = {}

    def __getitem__(self, camera: str) -> UInt8Image:
        """Return all images of a camera, uint8, (T, H, W, 3)."""
        if camera not in self._decoded:
            self._decoded[camera] = self.window(camera, 0, self._length)
        return self._decoded[camera]

    def __iter__(self) -> Iterator[str]:
        return iter(self._clips)

    def __len__(self) -> int:
        return len(self._clips)

    def window(self, camera: str, start: int, stop: int) -> UInt8Image:
        """Decode frames ``start`` to ``stop`` (exclusive), little more than them, and keep nothing.

        Raises:
            KeyError: If there is no such camera.
            DatasetError: If the episode has no such frames, or the file is missing or damaged.
        """
        if not 0 <= start < stop <= self._length:
            raise DatasetError(f"frames {start}..{stop} do not lie within the episode's {self._length}")
        path, offset = self._clips[camera]
        return read_frames(path, offset + start / self._fps, stop - start, self._fps)


@dataclass(frozen=True, eq=False)
class Episode:
    """An episode of a dataset.

    Attributes:
        index: Its place in the dataset.
        instruction: The task, in words.
        images: Camera → uint8, (T, H, W, 3), decoded on access.
        state: float32, (T, S); S is 0 if the dataset has none.
        action: float32, (T, A); A is 0 if the dataset has none (plain observation logs).
        columns: All other columns, (T,) or (T, n).
        metadata: The writer's metadata of the episode.
    """

    index: int
    instruction: str
    images: EpisodeImages
    state: FloatArray
    action: FloatArray
    columns: Mapping[str, npt.NDArray[Any]]
    metadata: Mapping[str, Any]

    def __len__(self) -> int:
        """Return the number of frames T."""
        return len(self.action)


class LeRobotDataset:
    """A dataset on disk.

    Args:
        root: Its folder, the one that holds ``meta``, ``data`` and ``videos``.

    Attributes:
        info: ``meta/info.json``.
        fps: Frames per second.
        features: Feature → dtype, shape, names.
        cameras: Names of the cameras (without ``observation.images.``).
        tasks: Task index → instruction.
        episodes: The episode table, one mapping per episode, without statistics.
        stats: Feature → ``min``, ``max``, ``mean``, ``std``, ``count``, ``q01``, ``q10``, ``q50``, ``q90``, ``q99``,
            as far as the dataset has them. Images' are scaled to [0, 1], (3, 1, 1).
        provenance: Origin of the data, if the dataset names it.

    Raises:
        DatasetError: If the folder is no complete dataset of version 3.x.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.info = _read_info(self.root)
        self.fps: float = self.info["fps"]
        self.features: dict[str, dict[str, Any]] = self.info["features"]
        for key, feature in self.features.items():
            if feature["dtype"] == "image":
                raise DatasetError(f"'{key}' is stored as single images; convert the dataset to videos first")
        videos = [key for key, feature in self.features.items() if feature["dtype"] == "video"]
        self._videos = {key.removeprefix(layout.IMAGE_PREFIX): key for key in videos}
        self.cameras = tuple(self._videos)
        self.tasks = _read_tasks(self.root)
        # An episode counts once info.json does: what an interrupted append left behind is none.
        self.episodes = _read_episodes(self.root)[: self.info["total_episodes"]]
        stats = self.root / layout.STATS
        self.stats: dict[str, FeatureStats] = from_lists(layout.read_json(stats)) if stats.exists() else {}
        provenance = self.root / layout.PROVENANCE
        self.provenance: dict[str, Any] = layout.read_json(provenance) if provenance.exists() else {}
        self._tables: dict[Path, Any] = {}
        self._check_files()

    def __len__(self) -> int:
        """Return the number of episodes."""
        return len(self.episodes)

    def __iter__(self) -> Iterator[Episode]:
        """Iterate over the episodes in order."""
        return (self.episode(index) for index in range(len(self)))

    @property
    def total_frames(self) -> int:
        """Frames of all episodes together."""
        return int(self.info["total_frames"])

    def episode(self, index: int) -> Episode:
        """Read an episode's numbers; its images are decoded when they are asked for.

        Raises:
            IndexError: If there is no such episode.
            DatasetError: If a file is missing or damaged.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"episode {index} of a dataset of {len(self)}")
        row = self.episodes[index]
        path = self._path(row)
        rows = self._rows(path, row)
        columns = {name: _numpy(rows.column(name)) for name in rows.column_names}
        nothing = np.zeros((rows.num_rows, 0))
        state, action = (
            columns.pop(key, nothing).astype(np.float32).reshape(rows.num_rows, -1)
            for key in (layout.STATE, layout.ACTION)
        )
        task_index = int(columns["task_index"][0])
        if not 0 <= task_index < len(self.tasks):
            raise DatasetError(f"{path}: episode {index} has an unknown task, {task_index}; copy it again")
        clips = {
            camera: (self._path(row, key), float(row[f"videos/{key}/from_timestamp"]))
            for camera, key in self._videos.items()
        }
        return Episode(
            index=index,
            instruction=self.tasks[task_index],
            images=EpisodeImages(clips, len(action), self.fps),
            state=state,
            action=action,
            columns=columns,
            metadata=json.loads(row.get(layout.METADATA) or "{}"),
        )

    def _rows(self, path: Path, row: Mapping[str, Any]) -> Any:
        if path not in self._tables:
            self._tables[path] = _read_table(path)
        table = self._tables[path]
        first = int(table.column("index")[0].as_py()) if table.num_rows else 0
        rows = table.slice(int(row["dataset_from_index"]) - first, int(row["length"]))
        if rows.num_rows != row["length"] or rows.column("episode_index")[0].as_py() != row["episode_index"]:
            place = f"{path} does not hold episode {row['episode_index']} where the episode table says"
            raise DatasetError(f"{place}; copy the dataset again")
        return rows

    def _path(self, row: Mapping[str, Any], key: str | None = None) -> Path:
        """Return the file of an episode's numbers, or of its images of the feature ``key``."""
        name, place = ("data_path", "data") if key is None else ("video_path", f"videos/{key}")
        chunk, file = row[f"{place}/chunk_index"], row[f"{place}/file_index"]
        return self.root / str(self.info[name]).format(video_key=key, chunk_index=chunk, file_index=file)

    def _check_files(self) -> None:
        if len(self) != self.info["total_episodes"]:
            raise DatasetError(
                f"{self.root}: info.json speaks of {self.info['total_episodes']} episodes, the episode table "
                f"of {len(self)}; copy the dataset again, all of it"
            )
        wanted = {self._path(row) for row in self.episodes}
        wanted |= {self._path(row, key) for row in self.episodes for key in self._videos.values()}
        if missing := sorted(str(path) for path in wanted if not path.exists()):
            count = f"{len(missing)} files in all"
            raise DatasetError(f"{missing[0]} is missing, {count}: copy the dataset again, all of it")


def _read_info(root: Path) -> dict[str, Any]:
    if not root.is_dir():
        unfinished = layout.incomplete_path(root)
        if unfinished.exists():
            raise DatasetError(f"{root} was never finished ({unfinished} exists): run what writes it again")
        raise DatasetError(f"there is no dataset at {root}: give the folder that holds 'meta' and 'data'")
    if not (root / layout.INFO).exists():
        raise DatasetError(f"{root} is no complete LeRobot dataset: {layout.INFO} is missing")
    info = layout.read_json(root / layout.INFO)
    version = str(info.get("codebase_version"))
    if version.startswith(("v1.", "v2.")):
        raise DatasetError(
            f"{root} has the layout {version}; 3.x is read. Convert it with LeRobot's own tool: "
            "python -m lerobot.scripts.convert_dataset_v21_to_v30 --repo-id=<name>"
        )
    if not version.startswith("v3."):
        raise DatasetError(f"{root} has the layout {version}; 3.x is read")
    needed = ("fps", "features", "total_episodes", "total_frames", "data_path")
    if lacking := [key for key in needed if key not in info]:
        raise DatasetError(f"{root / layout.INFO} lacks {', '.join(lacking)}: copy the dataset again")
    return info


def _read_tasks(root: Path) -> list[str]:
    table = _read_table(root / layout.TASKS)
    text = next((name for name in table.column_names if name != "task_index"), None)
    if text is None or "task_index" not in table.column_names:
        raise DatasetError(f"{root / layout.TASKS} has columns {table.column_names}, not task and task_index")
    order = np.argsort(_numpy(table.column("task_index")))
    names = table.column(text).to_pylist()
    return [str(names[index]) for index in order]


def _read_episodes(root: Path) -> list[dict[str, Any]]:
    paths = sorted((root / "meta" / "episodes").glob("chunk-*/file-*.parquet"))
    if not paths:
        raise DatasetError(f"{root} has no episode table in meta/episodes: copy the dataset again, all of it")
    rows: list[dict[str, Any]] = []
    for path in paths:
        table = _read_table(path)
        rows += table.select([name for name in table.column_names if not name.startswith("stats/")]).to_pylist()
    return sorted(rows, key=lambda row: int(row["episode_index"]))


def _read_table(path: Path) -> Any:
    try:
        return pq.read_table(path)
    except FileNotFoundError:
        raise DatasetError(f"{path} is missing: copy the dataset again, all of it") from None
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{path} cannot be read ({error}): copy the dataset again") from error


def _numpy(column: Any) -> npt.NDArray[Any]:
    """Convert a column of numbers to (T,), one of equally long lists to (T, n)."""
    array = column.combine_chunks()
    if not isinstance(array, pa.ListArray | pa.LargeListArray | pa.FixedSizeListArray):
        return np.array(array.to_numpy(zero_copy_only=False))
    return np.array(array.flatten().to_numpy(zero_copy_only=False).reshape(len(array), -1))
