"""Writes a LeRobotDataset v3.0."""

from __future__ import annotations

import json
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from lac_vla.datasets import layout, schema
from lac_vla.datasets.layout import DatasetError
from lac_vla.datasets.schema import Arrays, Features, Images
from lac_vla.datasets.statistics import FeatureStats, ImageHistogram, to_lists, vector_stats
from lac_vla.datasets.video import VideoWriter
from lac_vla.files import write_object
from lac_vla.types import FloatArray

Place = tuple[int, int]
"""Chunk and file."""
VideoPlaces = dict[str, dict[str, int | float]]
"""Feature → its place, as :meth:`lac_vla.datasets.video.VideoWriter.add` returns it."""


class EpisodeWriter(ABC):
    """Checks episodes, and describes them in the tables' words; where they are written is its subclasses' business.

    Attributes:
        root: Folder of the dataset.
        fps: Frames per second; must be set before the first episode.
    """

    def __init__(self, root: str | Path, fps: int | None) -> None:
        if fps is not None and (fps != int(fps) or fps < 1):
            raise DatasetError(f"fps is {fps}; LeRobot takes whole frames per second, at least 1")
        self.root, self.fps = Path(root), None if fps is None else int(fps)
        self._folder = layout.incomplete_path(self.root)
        self._names: dict[str, Sequence[str] | None] = {}
        self._robot_type: str | None = None
        self._info: dict[str, Any] = {}
        self._tasks: dict[str, int] = {}

    def __len__(self) -> int:
        """Return the number of episodes."""
        return int(self._info.get("total_episodes", 0))

    @property
    def features(self) -> Features:
        """Feature → dtype, shape, names, as the first episode settles them; empty until then."""
        return dict(self._info.get("features", {}))

    def check(self, images: Images, state: FloatArray, action: FloatArray, columns: Arrays) -> tuple[Arrays, Features]:
        """Check whether arrays, as :meth:`add_episode` takes them, fit; one frame suffices.

        Returns:
            Column → values, without the bookkeeping ones; feature → its entry in ``info.json``.

        Raises:
            DatasetError: If they do not.
        """
        length = len(action)
        if length == 0:
            raise DatasetError("the episode has no frames")
        features = {
            layout.IMAGE_PREFIX + camera: schema.video_feature(camera, pictures, length, self.fps or 1)
            for camera, pictures in images.items()
        }
        named = {layout.STATE: np.asarray(state, np.float32), layout.ACTION: np.asarray(action, np.float32)}
        if named[layout.STATE].shape == (length, 0):
            del named[layout.STATE]
        if taken := {*named, *layout.BOOKKEEPING, *features} & set(columns):
            raise DatasetError(f"column names {sorted(taken)} are taken: choose others")
        vectors: dict[str, npt.NDArray[Any]] = {}
        for key, values in {**named, **columns}.items():
            vectors[key], features[key] = schema.vector_column(key, values, length, self._names.get(key))
        for key, dtype in layout.BOOKKEEPING.items():
            features[key] = schema.vector_feature(dtype, 1)
        if self.features and _sizes(features) != _sizes(self.features):
            raise DatasetError(
                f"this episode has features {schema.describe(features)}; those before, which {self.root.name} holds: "
                f"{schema.describe(self.features)}"
            )
        return vectors, features

    def add_episode(
        self,
        images: Images,
        state: FloatArray,
        action: FloatArray,
        task: str,
        *,
        columns: Arrays | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> int:
        """Append one episode.

        Args:
            images: Camera → uint8, (T, H, W, 3), H and W even; may be memory-mapped.
            state: float32, (T, S); S = 0 for none.
            action: float32, (T, A).
            task: The instruction.
            columns: Further columns, (T,) or (T, n). To LeRobot, names that begin with ``observation`` or
                ``action`` are inputs and outputs of a policy: avoid them for anything else.
            metadata: Metadata of the episode (initial state, seed …), JSON; kept in the episode table.

        Returns:
            The episode's index.

        Raises:
            DatasetError: If something does not fit; nothing has been written then.
            OSError: If the disk fails.
        """
        if not task.strip():
            raise DatasetError("task is empty: say what the robot does in this episode")
        if self.fps is None:
            raise DatasetError("fps is None; say how many frames per second a new dataset has")
        note = json.dumps(dict(metadata or {}), ensure_ascii=False)
        vectors, features = self.check(images, state, action, columns or {})
        index, length, first = len(self), len(action), int(self._info.get("total_frames", 0))
        tasks = self._tasks | {task: self._tasks.get(task, max(self._tasks.values(), default=-1) + 1)}
        frames = np.arange(length, dtype=np.int64)
        vectors = {
            **vectors,
            "timestamp": (frames / self.fps).astype(np.float32),
            "frame_index": frames,
            "episode_index": np.full(length, index, dtype=np.int64),
            "index": frames + first,
            "task_index": np.full(length, tasks[task], dtype=np.int64),
        }
        pictures = {layout.IMAGE_PREFIX + camera: values for camera, values in images.items()}
        stats = {key: vector_stats(values) for key, values in vectors.items()}
        stats |= {key: ImageHistogram().add(values).stats() for key, values in pictures.items()}
        (chunk, file), table, videos = self._write_frames(vectors, pictures, self.fps)
        row: dict[str, Any] = {
            "episode_index": index,
            "tasks": [task],
            "length": length,
            "data/chunk_index": chunk,
            "data/file_index": file,
            "dataset_from_index": first,
            "dataset_to_index": first + length,
        }
        for key, place in videos.items():
            row |= {f"videos/{key}/{name}": value for name, value in place.items()}
        for key, entry in to_lists(stats).items():
            row |= {f"stats/{key}/{name}": value for name, value in entry.items()}
        row["meta/episodes/chunk_index"], row["meta/episodes/file_index"] = table
        row[layout.METADATA] = note
        info = self._info | {
            "codebase_version": layout.VERSION,
            "robot_type": self._info.get("robot_type", self._robot_type),
            "total_episodes": index + 1,
            "total_frames": first + length,
            "total_tasks": len(tasks),
            "chunks_size": layout.CHUNKS_SIZE,
            "data_files_size_in_mb": layout.DATA_FILE_MB,
            "video_files_size_in_mb": layout.VIDEO_FILE_MB,
            "fps": self.fps,
            "splits": {"train": f"0:{index + 1}"},
            "data_path": layout.DATA_PATH,
            "video_path": layout.VIDEO_PATH,
            "features": self.features or features,
        }
        self._write_tables(row, stats, tasks, info)
        self._info, self._tasks = info, tasks
        return index

    @abstractmethod
    def _write_frames(self, vectors: Arrays, pictures: Images, fps: int) -> tuple[Place, Place, VideoPlaces]:
        """Write an episode's numbers and videos, and return the places of its numbers, its row and its videos."""

    @abstractmethod
    def _write_tables(
        self, row: dict[str, Any], stats: dict[str, FeatureStats], tasks: dict[str, int], info: dict[str, Any]
    ) -> None:
        """Write what describes the episode, and now the dataset, or keep it for later."""


class DatasetWriter(EpisodeWriter):
    """Writes episodes into a new dataset. A context manager; or call :meth:`finalize` at the end.

    Everything goes to ``<root>.incomplete``, which becomes ``root`` only when the dataset is whole; a killed
    run thus never leaves something that looks like a dataset. The first episode settles the features.

    Args:
        root: Folder of the dataset; must not exist yet.
        fps: Frames per second.
        state_names: Names of the numbers of the state.
        action_names: Names of the numbers of an action.
        robot_type: The robot's name in ``info.json``.
        provenance: Origin of the data (simulator, rendering, noise …), JSON; kept in ``meta/provenance.json``.
        overwrite: Replace what is at ``root``, or what a killed run left.

    Raises:
        DatasetError: If there is something at ``root`` already, or the folder cannot be written.
    """

    def __init__(
        self,
        root: str | Path,
        fps: int,
        *,
        state_names: Sequence[str] | None = None,
        action_names: Sequence[str] | None = None,
        robot_type: str | None = None,
        provenance: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> None:
        super().__init__(root, fps)
        self._names = {layout.STATE: state_names, layout.ACTION: action_names}
        self._robot_type, self._provenance, self._overwrite = robot_type, dict(provenance or {}), overwrite
        for path in (self.root, self._folder):
            if path.exists() and not overwrite:
                raise DatasetError(f"{path} exists already: delete it, or overwrite it, or write elsewhere")
        if (
            self.root.exists()
            and not (self.root / layout.INFO).exists()
            and (self.root.is_file() or [*self.root.iterdir()])
        ):
            raise DatasetError(f"{self.root} is no dataset that could be overwritten: write elsewhere")
        try:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(parents=True)
        except OSError as error:
            raise DatasetError(f"cannot write to {self._folder} ({error}): choose another folder") from error
        self._episodes: list[dict[str, Any]] = []
        self._vectors: dict[str, list[npt.NDArray[Any]]] = {}
        self._histograms: dict[str, ImageHistogram] = {}
        self._videos: dict[str, VideoWriter] = {}
        self._data: Any = None
        self._data_place, self._data_bytes = (0, 0), 0

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Finish the dataset; after an exception, close the files and leave it incomplete."""
        if kind is None:
            self.finalize()
        else:
            self._close()

    def finalize(self) -> Path:
        """Close all files, write tables and statistics, and give the folder its name.

        Returns:
            The dataset's folder.

        Raises:
            DatasetError: If there is no episode.
        """
        self._close()
        if not self._episodes:
            raise DatasetError(f"no episode was added: there is nothing to make {self.root} of")
        table = self._folder / layout.EPISODES_PATH.format(chunk_index=0, file_index=0)
        table.parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(self._episodes), table, compression="snappy")
        pq.write_table(schema.tasks_table(self._tasks), self._folder / layout.TASKS)
        stats = {key: vector_stats(np.concatenate(parts)) for key, parts in self._vectors.items()}
        stats |= {key: histogram.stats() for key, histogram in self._histograms.items()}
        write_object(self._folder / layout.STATS, to_lists(stats))
        if self._provenance:
            write_object(self._folder / layout.PROVENANCE, self._provenance)
        write_object(self._folder / layout.INFO, self._info)
        if self._overwrite and self.root.exists():
            shutil.rmtree(self.root)
        os.replace(self._folder, self.root)
        return self.root

    def _write_frames(self, vectors: Arrays, pictures: Images, fps: int) -> tuple[Place, Place, VideoPlaces]:
        table = schema.data_table(vectors)
        if self._data is not None and self._data_bytes + table.nbytes > layout.DATA_FILE_MB * 1024**2:
            self._close_data()
            self._data_place, self._data_bytes = layout.next_file(*self._data_place), 0
        if self._data is None:
            chunk, file = self._data_place
            path = self._folder / layout.DATA_PATH.format(chunk_index=chunk, file_index=file)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._data = pq.ParquetWriter(path, table.schema, compression="snappy")
        self._data.write_table(table)
        self._data_bytes += table.nbytes
        for key, values in vectors.items():
            self._vectors.setdefault(key, []).append(values)
        videos = {}
        for key, values in pictures.items():
            if key not in self._videos:
                self._videos[key] = VideoWriter(self._folder, key, fps, *values.shape[1:3])
            videos[key] = self._videos[key].add(values)
            self._histograms.setdefault(key, ImageHistogram()).add(values)
        return self._data_place, (0, 0), videos

    def _write_tables(
        self, row: dict[str, Any], stats: dict[str, FeatureStats], tasks: dict[str, int], info: dict[str, Any]
    ) -> None:
        self._episodes.append(row)

    def _close(self) -> None:
        for video in self._videos.values():
            video.close()
        self._close_data()

    def _close_data(self) -> None:
        if self._data is not None:
            self._data.close()
            self._data = None


def _sizes(features: Features) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {key: (entry["dtype"], tuple(entry["shape"])) for key, entry in features.items()}
