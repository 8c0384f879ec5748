"""Adds episodes to a LeRobotDataset v3.0 that stays whole: it can be read, and trained on, between any two of them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lac_vla.datasets import layout
from lac_vla.datasets.layout import DatasetError
from lac_vla.datasets.lerobot import LeRobotDataset
from lac_vla.datasets.schema import Arrays, Images, data_table, tasks_table
from lac_vla.datasets.statistics import FeatureStats, merge, to_lists
from lac_vla.datasets.video import VideoWriter
from lac_vla.datasets.writer import EpisodeWriter, Place, VideoPlaces
from lac_vla.files import sync, write_object, write_whole


class DatasetAppender(EpisodeWriter):
    """Appends episodes to a dataset, or begins one. When the disk fails, the dataset is as it was.

    Every episode has files of its own, and belongs to the dataset once ``info.json``, replaced last, counts it. What
    a killed process leaves behind is referred to by nothing, and the next episode takes its place; tasks and statistics
    that count it already are put right with that one. A new dataset gets its name with its first episode. Videos are
    encoded in one thread, which leaves the others to a model.

    Args:
        root: Folder of the dataset.
        fps: Frames per second; ``None`` for those of the folder.

    Attributes:
        metadata: That of every episode which was there at the start.

    Raises:
        DatasetError: If the folder holds something else than a dataset, or one with other frames per second.
    """

    def __init__(self, root: str | Path, fps: int | None = None) -> None:
        super().__init__(root, fps)
        self.metadata: list[dict[str, Any]] = []
        self._stats: dict[str, FeatureStats] = {}
        self._next = (0, 0)
        if self.root.exists() and (not self.root.is_dir() or any(self.root.iterdir())):
            self._folder = self.root
            self._continue(LeRobotDataset(self.root))
        else:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _continue(self, dataset: LeRobotDataset) -> None:
        if dataset.fps != int(dataset.fps) or (self.fps is not None and dataset.fps != self.fps):
            raise DatasetError(f"{self.root} has {dataset.fps:g} frames per second, not {self.fps}")
        if dataset.info["data_path"] != layout.DATA_PATH or dataset.info.get("video_path") != layout.VIDEO_PATH:
            raise DatasetError(f"{self.root} names its files in a way of its own: nothing can be added to it")
        numbers = [row["episode_index"] for row in dataset.episodes]
        if numbers != list(range(dataset.info["total_episodes"])) or not all(
            "shape" in f for f in dataset.features.values()
        ):
            raise DatasetError(f"{self.root} numbers its episodes in a way of its own: nothing can be added to it")
        self.fps, self._info = int(dataset.fps), dataset.info
        # Tasks that info.json does not count are those of an episode that was not finished.
        count = dataset.info.get("total_tasks", len(dataset.tasks))
        self._tasks = {task: index for index, task in sorted(dataset.tasks.items())[:count]}
        self._stats = dataset.stats
        notes = [json.loads(row.get(layout.METADATA) or "{}") for row in dataset.episodes]
        self.metadata = [note for note in notes if isinstance(note, dict)]
        taken = [
            (int(value), int(row[key.replace("chunk_index", "file_index")]))
            for row in dataset.episodes
            for key, value in row.items()
            if key.endswith("chunk_index")
        ]
        self._next = layout.next_file(*max(taken)) if taken else (0, 0)

    def _write_frames(self, vectors: Arrays, pictures: Images, fps: int) -> tuple[Place, Place, VideoPlaces]:
        videos = {}
        for key, values in pictures.items():
            video = VideoWriter(self._folder, key, fps, *values.shape[1:3], place=self._next, threads=1)
            videos[key] = video.add(values)
            video.close()
            sync(
                self._folder
                / layout.VIDEO_PATH.format(video_key=key, chunk_index=self._next[0], file_index=self._next[1])
            )
        self._replace(layout.DATA_PATH, data_table(vectors))
        return self._next, self._next, videos

    def _write_tables(
        self, row: dict[str, Any], stats: dict[str, FeatureStats], tasks: dict[str, int], info: dict[str, Any]
    ) -> None:
        """Write the tables in the order in which they refer to one another."""
        if len(self):
            stats = _merged(self._stats, stats)
        self._replace(layout.TASKS, tasks_table(tasks))
        self._replace(layout.STATS, to_lists(stats))
        self._replace(layout.EPISODES_PATH, pa.Table.from_pylist([row]))
        self._replace(layout.INFO, info)
        if self._folder != self.root:
            os.replace(self._folder, self.root)
        self._folder, self._stats, self._next = self.root, stats, layout.next_file(*self._next)

    def _replace(self, name: str, content: Any) -> None:
        path = self._folder / name.format(chunk_index=self._next[0], file_index=self._next[1])
        if isinstance(content, Mapping):
            write_object(path, content)
        else:
            write_whole(path, lambda partial: pq.write_table(content, partial, compression="snappy"))


def _merged(one: Mapping[str, FeatureStats], other: Mapping[str, FeatureStats]) -> dict[str, FeatureStats]:
    return {key: merge(one[key], entry) for key, entry in other.items() if key in one}
