"""Writes a LeRobotDataset v3.0."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from lac_vla.datasets import layout
from lac_vla.datasets.layout import DatasetError
from lac_vla.datasets.schema import (
    check_episode,
    data_table,
    dataset_info,
    describe,
    episode_row,
    tasks_table,
    with_bookkeeping,
)
from lac_vla.datasets.statistics import ImageHistogram, to_lists, vector_stats
from lac_vla.datasets.video import VideoWriter
from lac_vla.errors import MissingExtraError
from lac_vla.types import FloatArray, UInt8Image

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ModuleNotFoundError as error:
    raise MissingExtraError("data", "Reading and writing datasets") from error


class DatasetWriter:
    """Writes episodes into a new dataset. A context manager; or call :meth:`finalize` at the end.

    Everything goes to ``<root>.incomplete``, which becomes ``root`` only when the dataset is whole; a killed
    run thus never leaves something that looks like a dataset. The first episode settles the features.

    Args:
        root: Folder of the dataset; must not exist yet.
        fps: Frames per second.
        state_names: Names of the numbers of the state.
        action_names: Names of the numbers of an action.
        robot_type: The robot's name in ``info.json``.
        provenance: Origin of the data (simulator, rendering, noise …), JSON; kept in
            ``meta/provenance.json``.
        crf: x264's quality; 16 is visually lossless.
        gop: Frames from key frame to key frame: few make random access cheap, many make small files.
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
        crf: int = 16,
        gop: int = 5,
        overwrite: bool = False,
    ) -> None:
        if fps != int(fps) or fps < 1:
            raise DatasetError(f"fps is {fps}; LeRobot takes whole frames per second, at least 1")
        self.root, self.fps = Path(root), int(fps)
        self.provenance: dict[str, Any] = dict(provenance or {})
        self.features: dict[str, dict[str, Any]] = {}
        self.total_frames = 0
        self._names = {layout.STATE: state_names, layout.ACTION: action_names}
        self._robot_type, self._crf, self._gop = robot_type, crf, gop
        self._folder = layout.incomplete_path(self.root)
        self._overwrite = overwrite
        self._prepare()
        self._tasks: dict[str, int] = {}
        self._episodes: list[dict[str, Any]] = []
        self._vectors: dict[str, list[npt.NDArray[Any]]] = {}
        self._histograms: dict[str, ImageHistogram] = {}
        self._videos: dict[str, VideoWriter] = {}
        self._data: Any = None
        self._data_index = (0, 0)
        self._data_bytes = 0

    def __enter__(self) -> DatasetWriter:
        """Return the writer itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish the dataset; after an exception, close the files and leave it incomplete."""
        if kind is None:
            self.finalize()
        else:
            self._close()

    def add_episode(
        self,
        images: Mapping[str, UInt8Image],
        state: FloatArray,
        action: FloatArray,
        task: str,
        *,
        columns: Mapping[str, npt.NDArray[Any]] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> int:
        """Append one episode.

        Args:
            images: Camera → uint8, (T, H, W, 3), H and W even.
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
        """
        if not task.strip():
            raise DatasetError("task is empty: say what the robot does in this episode")
        note = json.dumps(dict(metadata or {}), ensure_ascii=False)
        vectors, features = check_episode(images, state, action, columns or {}, self._names, self.fps)
        index, length = len(self._episodes), len(action)
        if index and features != self.features:
            before = describe(self.features)
            raise DatasetError(f"episode {index} has features {describe(features)}; those before: {before}")
        self.features = features
        task_index = self._tasks.setdefault(task, len(self._tasks))
        first = self.total_frames
        vectors = with_bookkeeping(vectors, length, self.fps, episode=index, task=task_index, first=first)
        data = self._write_data(data_table(vectors))
        stats = {key: vector_stats(values) for key, values in vectors.items()}
        videos = {}
        for camera, pictures in images.items():
            key = layout.IMAGE_PREFIX + camera
            videos[key] = self._video(key).add(pictures)
            histogram = ImageHistogram().add(pictures)
            self._histograms.setdefault(key, ImageHistogram()).merge(histogram)
            stats[key] = histogram.stats()
        row = episode_row(
            index, task, length, first=first, data=data, videos=videos, stats=stats, table=(0, 0), note=note
        )
        for key, values in vectors.items():
            self._vectors.setdefault(key, []).append(values)
        self._episodes.append(row)
        self.total_frames += length
        return index

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
        pq.write_table(tasks_table(self._tasks), self._folder / layout.TASKS)
        stats = {key: vector_stats(np.concatenate(parts)) for key, parts in self._vectors.items()}
        stats |= {key: histogram.stats() for key, histogram in self._histograms.items()}
        layout.write_json(self._folder / layout.STATS, to_lists(stats))
        if self.provenance:
            layout.write_json(self._folder / layout.PROVENANCE, self.provenance)
        layout.write_json(self._folder / layout.INFO, self._info())
        if self._overwrite and self.root.exists():
            shutil.rmtree(self.root)
        os.replace(self._folder, self.root)
        return self.root

    def _prepare(self) -> None:
        for path in (self.root, self._folder):
            if path.exists() and not self._overwrite:
                raise DatasetError(f"{path} exists already: delete it, or overwrite it, or write elsewhere")
        try:
            if self._folder.exists():
                shutil.rmtree(self._folder)
            self._folder.mkdir(parents=True)
        except OSError as error:
            raise DatasetError(f"cannot write to {self._folder} ({error}): choose another folder") from error

    def _video(self, key: str) -> VideoWriter:
        if key not in self._videos:
            height, width, _ = self.features[key]["shape"]
            self._videos[key] = VideoWriter(self._folder, key, self.fps, height, width, crf=self._crf, gop=self._gop)
        return self._videos[key]

    def _write_data(self, table: Any) -> tuple[int, int]:
        if self._data is not None and self._data_bytes + table.nbytes > layout.DATA_FILE_MB * 1024**2:
            self._data.close()
            self._data = None
            self._data_index = layout.next_file(*self._data_index)
        chunk, file = self._data_index
        if self._data is None:
            path = self._folder / layout.DATA_PATH.format(chunk_index=chunk, file_index=file)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._data = pq.ParquetWriter(path, table.schema, compression="snappy")
            self._data_bytes = 0
        self._data.write_table(table)
        self._data_bytes += table.nbytes
        return chunk, file

    def _info(self) -> dict[str, Any]:
        return dataset_info(
            self.features,
            self.fps,
            self._robot_type,
            episodes=len(self._episodes),
            frames=self.total_frames,
            tasks=len(self._tasks),
        )

    def _close(self) -> None:
        for video in self._videos.values():
            video.close()
        if self._data is not None:
            self._data.close()
            self._data = None
