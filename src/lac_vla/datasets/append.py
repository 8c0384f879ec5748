"""Adds episodes to a LeRobotDataset v3.0 that stays whole: it can be read, and trained on, between any two of them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt

from lac_vla.datasets import layout
from lac_vla.datasets.layout import DatasetError
from lac_vla.datasets.lerobot import LeRobotDataset
from lac_vla.datasets.schema import (
    check_episode,
    data_table,
    dataset_info,
    describe,
    episode_row,
    tasks_table,
    with_bookkeeping,
)
from lac_vla.datasets.statistics import FeatureStats, ImageHistogram, merge, to_lists, vector_stats
from lac_vla.datasets.video import VideoWriter
from lac_vla.errors import MissingExtraError
from lac_vla.types import FloatArray, UInt8Image

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ModuleNotFoundError as error:
    raise MissingExtraError("data", "Reading and writing datasets") from error


class DatasetAppender:
    """Appends episodes to a dataset, or begins one.

    Every episode has files of its own, and belongs to the dataset once ``info.json``, replaced last, counts it. What
    a killed process leaves behind is referred to by nothing, and the next episode takes its place. A new dataset gets
    its name with its first episode.

    Args:
        root: Folder of the dataset.
        fps: Frames per second; ``None`` for those of the folder.
        threads: Threads of the video encoder; 0 leaves their number to x264.

    Attributes:
        fps: Frames per second; must be set before a new dataset's first episode.
        features: Feature → dtype, shape, names; empty until there is an episode.

    Raises:
        DatasetError: If the folder holds something else than a dataset, or one with other frames per second.
    """

    def __init__(self, root: str | Path, fps: int | None = None, *, threads: int = 0) -> None:
        self.root, self.fps = Path(root), fps
        self.features: dict[str, dict[str, Any]] = {}
        self._threads = threads
        self._folder = layout.incomplete_path(self.root)
        self._tasks: dict[str, int] = {}
        self._stats: dict[str, FeatureStats] = {}
        self._info: dict[str, Any] = {}
        self._next = (0, 0)
        if self.root.exists() and (not self.root.is_dir() or any(self.root.iterdir())):
            self._continue(LeRobotDataset(self.root))
        else:
            shutil.rmtree(self._folder, ignore_errors=True)

    def __len__(self) -> int:
        """Return the number of episodes."""
        return int(self._info.get("total_episodes", 0))

    def check(
        self,
        images: Mapping[str, UInt8Image],
        state: FloatArray,
        action: FloatArray,
        columns: Mapping[str, npt.NDArray[Any]],
    ) -> tuple[dict[str, npt.NDArray[Any]], dict[str, dict[str, Any]]]:
        """Check whether arrays, as :meth:`add_episode` takes them, fit; one frame suffices.

        Returns:
            See :func:`lac_vla.datasets.schema.check_episode`.

        Raises:
            DatasetError: If they do not.
        """
        vectors, features = check_episode(images, state, action, columns, {}, self.fps or 1)
        if self.features and _sizes(features) != _sizes(self.features):
            raise DatasetError(f"this is {describe(features)}; {self.root.name} holds {describe(self.features)}")
        return vectors, features

    def add_episode(
        self,
        images: Mapping[str, UInt8Image],
        state: FloatArray,
        action: FloatArray,
        task: str,
        *,
        columns: Mapping[str, npt.NDArray[Any]],
        metadata: Mapping[str, Any],
    ) -> int:
        """Append one episode.

        Args:
            images: Camera → uint8, (T, H, W, 3), H and W even; may be memory-mapped.
            state: float32, (T, S); S = 0 for none.
            action: float32, (T, A).
            task: The instruction.
            columns: Further columns, (T,) or (T, n).
            metadata: Metadata of the episode, JSON.

        Returns:
            The episode's index.

        Raises:
            DatasetError: If something does not fit; nothing has been written then.
            OSError: If the disk fails; the dataset is as it was.
        """
        if self.fps is None or self.fps < 1:
            raise DatasetError(f"fps is {self.fps}; LeRobot takes whole frames per second, at least 1")
        vectors, features = self.check(images, state, action, columns)
        index, length, first = len(self), len(action), int(self._info.get("total_frames", 0))
        folder = self.root if self._info else self._folder
        tasks = dict(self._tasks)
        number = tasks.setdefault(task, len(tasks))
        vectors = with_bookkeeping(vectors, length, self.fps, episode=index, task=number, first=first)
        stats = {key: vector_stats(values) for key, values in vectors.items()}
        videos = {}
        for camera, pictures in images.items():
            key = layout.IMAGE_PREFIX + camera
            video = VideoWriter(folder, key, self.fps, *pictures.shape[1:3], first=self._next, threads=self._threads)
            videos[key] = video.add(pictures)
            video.close()
            stats[key] = ImageHistogram().add(pictures).stats()
        row = episode_row(
            index, task, length, first=first, data=self._next, videos=videos, stats=stats, table=self._next,
            note=json.dumps(dict(metadata), ensure_ascii=False),
        )  # fmt: skip
        stats = {k: merge(self._stats[k], v) for k, v in stats.items() if k in self._stats} if index else stats
        counts = {"episodes": index + 1, "frames": first + length, "tasks": len(tasks)}
        info = self._info | dataset_info(self.features or features, self.fps, self._info.get("robot_type"), **counts)
        self._write(folder, data_table(vectors), tasks, stats, row, info)
        if not self._info:
            os.replace(folder, self.root)
        self.features, self._tasks, self._stats, self._info = info["features"], tasks, stats, info
        self._next = layout.next_file(*self._next)
        return index

    def _continue(self, dataset: LeRobotDataset) -> None:
        if dataset.fps != int(dataset.fps) or (self.fps is not None and dataset.fps != self.fps):
            raise DatasetError(f"{self.root} has {dataset.fps:g} frames per second, not {self.fps}")
        if dataset.info["data_path"] != layout.DATA_PATH or dataset.info.get("video_path") != layout.VIDEO_PATH:
            raise DatasetError(f"{self.root} names its files in a way of its own: nothing can be added to it")
        self.fps, self.features, self._info = int(dataset.fps), dataset.features, dataset.info
        self._tasks = {task: index for index, task in enumerate(dataset.tasks)}
        self._stats = dataset.stats
        taken = [
            (int(value), int(row[key.replace("chunk_index", "file_index")]))
            for row in dataset.episodes
            for key, value in row.items()
            if key.endswith("chunk_index")
        ]
        self._next = layout.next_file(*max(taken)) if taken else (0, 0)

    def _write(
        self,
        folder: Path,
        data: Any,
        tasks: Mapping[str, int],
        stats: Mapping[str, FeatureStats],
        row: Mapping[str, Any],
        info: Mapping[str, Any],
    ) -> None:
        """Write the tables, each under another name first, in the order in which they refer to one another."""
        chunk, file = self._next
        written = {
            layout.DATA_PATH.format(chunk_index=chunk, file_index=file): data,
            layout.TASKS: tasks_table(tasks),
            layout.STATS: to_lists(stats),
            layout.EPISODES_PATH.format(chunk_index=chunk, file_index=file): pa.Table.from_pylist([row]),
            layout.INFO: info,
        }
        for name, content in written.items():
            path = folder / name
            partial = path.with_name(path.name + ".partial")
            partial.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Mapping):
                layout.write_json(partial, content)
            else:
                pq.write_table(content, partial, compression="snappy")
            os.replace(partial, path)


def _sizes(features: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {key: (entry["dtype"], tuple(entry["shape"])) for key, entry in features.items()}
