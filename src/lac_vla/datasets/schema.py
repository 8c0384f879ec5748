"""Checks an episode's arrays, and makes the features, columns and rows with which a dataset describes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lac_vla.datasets import layout
from lac_vla.datasets.layout import DatasetError
from lac_vla.datasets.statistics import FeatureStats, to_lists
from lac_vla.errors import MissingExtraError
from lac_vla.types import FloatArray, UInt8Image

try:
    import pyarrow as pa
except ModuleNotFoundError as error:
    raise MissingExtraError("data", "Reading and writing datasets") from error

COLUMN_DTYPES = ("float32", "float64", "int8", "int32", "int64", "uint8", "bool")


def video_feature(camera: str, images: UInt8Image, length: int, fps: int) -> dict[str, Any]:
    """Check the images of one camera.

    Args:
        camera: Its name.
        images: Must be uint8, (T, H, W, 3), H and W even.
        length: T of the episode.
        fps: Frames per second.

    Returns:
        The camera's entry in ``info.json``.

    Raises:
        DatasetError: If they cannot become a video.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[::3] != (length, 3):
        raise DatasetError(f"images of '{camera}' are {images.dtype} {images.shape}; give uint8 ({length}, H, W, 3)")
    height, width = images.shape[1:3]
    if height % 2 or width % 2 or not height or not width:
        raise DatasetError(f"images of '{camera}' are {height}×{width}; H.264 needs even sides: pad or crop")
    if "/" in camera or not camera:
        raise DatasetError(f"camera name '{camera}' must not be empty or hold a '/'")
    return {
        "dtype": "video",
        "shape": [height, width, 3],
        "names": ["height", "width", "channels"],
        "info": {
            "video.height": height,
            "video.width": width,
            "video.codec": "h264",
            "video.pix_fmt": "yuv420p",
            "video.is_depth_map": False,
            "video.fps": fps,
            "video.channels": 3,
            "has_audio": False,
        },
    }


def vector_feature(dtype: str, width: int, names: Sequence[str] | None) -> dict[str, Any]:
    """Make the ``info.json`` entry of a column with ``width`` numbers a frame."""
    return {"dtype": dtype, "shape": [width], "names": None if names is None else list(names)}


def vector_column(
    name: str, values: npt.NDArray[Any], length: int, names: Sequence[str] | None = None
) -> tuple[npt.NDArray[Any], dict[str, Any]]:
    """Check one column of an episode.

    Args:
        name: The feature's name.
        values: Shape (T,) or (T, n).
        length: T of the episode.
        names: Names of the n numbers.

    Returns:
        The values, contiguous, (T,) where a frame has one number, else (T, n); and the feature's entry.

    Raises:
        DatasetError: If name, shape or dtype does not fit, or a number is not finite.
    """
    if "/" in name or not name:
        raise DatasetError(f"column name '{name}' must not be empty or hold a '/'")
    values = np.asarray(values)
    if values.dtype.name not in COLUMN_DTYPES:
        allowed = ", ".join(COLUMN_DTYPES)
        raise DatasetError(f"column '{name}' has dtype {values.dtype}; give one of {allowed}")
    if values.ndim not in (1, 2) or values.shape[0] != length or 0 in values.shape:
        raise DatasetError(f"column '{name}' has shape {values.shape}; give ({length},) or ({length}, n)")
    if not np.isfinite(values).all():
        raise DatasetError(f"column '{name}' holds NaN or infinity: leave this episode out or repair it")
    width = 1 if values.ndim == 1 else values.shape[1]
    if names is not None and len(names) != width:
        raise DatasetError(f"column '{name}' has {width} numbers a frame, but {len(names)} names are given")
    if width == 1:
        values = values.reshape(-1)
    return np.ascontiguousarray(values), vector_feature(values.dtype.name, width, names)


def check_episode(
    images: Mapping[str, UInt8Image],
    state: FloatArray,
    action: FloatArray,
    columns: Mapping[str, npt.NDArray[Any]],
    names: Mapping[str, Sequence[str] | None],
    fps: int,
) -> tuple[dict[str, npt.NDArray[Any]], dict[str, dict[str, Any]]]:
    """Check an episode's arrays.

    Args:
        images: Camera → uint8, (T, H, W, 3).
        state: float32, (T, S); with S = 0 there is no such column.
        action: float32, (T, A).
        columns: Further columns, (T,) or (T, n).
        names: Names of the numbers of ``observation.state`` and ``action``.
        fps: Frames per second.

    Returns:
        Column → values, without the bookkeeping ones; feature → its entry in ``info.json``.

    Raises:
        DatasetError: If something does not fit.
    """
    length = len(action)
    if length == 0:
        raise DatasetError("the episode has no frames")
    features = {
        layout.IMAGE_PREFIX + camera: video_feature(camera, pictures, length, fps)
        for camera, pictures in images.items()
    }
    named = {layout.STATE: np.asarray(state, np.float32), layout.ACTION: np.asarray(action, np.float32)}
    if named[layout.STATE].shape == (length, 0):
        del named[layout.STATE]
    taken = {*named, *layout.BOOKKEEPING, *features} & set(columns)
    if taken:
        raise DatasetError(f"column names {sorted(taken)} are taken: choose others")
    vectors: dict[str, npt.NDArray[Any]] = {}
    for key, values in {**named, **columns}.items():
        vectors[key], features[key] = vector_column(key, values, length, names.get(key))
    for key, dtype in layout.BOOKKEEPING.items():
        features[key] = vector_feature(dtype, 1, None)
    return vectors, features


def with_bookkeeping(
    vectors: Mapping[str, npt.NDArray[Any]], length: int, fps: int, *, episode: int, task: int, first: int
) -> dict[str, npt.NDArray[Any]]:
    """Add the columns that every dataset has to an episode's own.

    Args:
        vectors: Column → values.
        length: T of the episode.
        fps: Frames per second.
        episode: The episode's index.
        task: Its task's index.
        first: Its first frame's index within the dataset.
    """
    frames = np.arange(length, dtype=np.int64)
    return {
        **vectors,
        "timestamp": (frames / fps).astype(np.float32),
        "frame_index": frames,
        "episode_index": np.full(length, episode, dtype=np.int64),
        "index": frames + first,
        "task_index": np.full(length, task, dtype=np.int64),
    }


def episode_row(
    index: int,
    task: str,
    length: int,
    *,
    first: int,
    data: tuple[int, int],
    videos: Mapping[str, Mapping[str, int | float]],
    stats: Mapping[str, FeatureStats],
    table: tuple[int, int],
    note: str,
) -> dict[str, Any]:
    """Make a row of the episode table.

    Args:
        index: The episode's index.
        task: The instruction.
        length: Its frames.
        first: Its first frame's index within the dataset.
        data: Chunk and file of its numbers.
        videos: Video feature → where it is, as :meth:`lac_vla.datasets.video.VideoWriter.add` says.
        stats: Feature → statistics.
        table: Chunk and file of this row.
        note: Metadata, JSON.
    """
    row: dict[str, Any] = {
        "episode_index": index,
        "tasks": [task],
        "length": length,
        "data/chunk_index": data[0],
        "data/file_index": data[1],
        "dataset_from_index": first,
        "dataset_to_index": first + length,
    }
    for key, place in videos.items():
        row |= {f"videos/{key}/{name}": value for name, value in place.items()}
    for key, entry in to_lists(stats).items():
        row |= {f"stats/{key}/{name}": value for name, value in entry.items()}
    return row | {"meta/episodes/chunk_index": table[0], "meta/episodes/file_index": table[1], layout.METADATA: note}


def dataset_info(
    features: Mapping[str, Any], fps: int, robot_type: str | None, *, episodes: int, frames: int, tasks: int
) -> dict[str, Any]:
    """Make the content of ``meta/info.json``."""
    return {
        "codebase_version": layout.VERSION,
        "robot_type": robot_type,
        "total_episodes": episodes,
        "total_frames": frames,
        "total_tasks": tasks,
        "chunks_size": layout.CHUNKS_SIZE,
        "data_files_size_in_mb": layout.DATA_FILE_MB,
        "video_files_size_in_mb": layout.VIDEO_FILE_MB,
        "fps": fps,
        "splits": {"train": f"0:{episodes}"},
        "data_path": layout.DATA_PATH,
        "video_path": layout.VIDEO_PATH,
        "features": dict(features),
    }


def describe(features: Mapping[str, Mapping[str, Any]]) -> str:
    """Describe the features in one line, for messages."""
    own = {key: entry for key, entry in features.items() if key not in layout.BOOKKEEPING}
    return ", ".join(f"{key} {entry['dtype']}{tuple(entry['shape'])}" for key, entry in own.items())


def data_table(vectors: Mapping[str, npt.NDArray[Any]]) -> Any:
    """Make an Arrow table: numbers of (T,), lists of fixed length of (T, n)."""
    columns = {}
    for key, values in vectors.items():
        flat = pa.array(values.reshape(-1))
        columns[key] = flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    return pa.table(columns)


def tasks_table(tasks: Mapping[str, int]) -> Any:
    """Make the task table, which LeRobot reads as a pandas frame whose index is the task's text."""
    table = pa.table({"task_index": pa.array(tasks.values(), pa.int64()), "task": pa.array(tasks, pa.string())})
    types = {"task_index": ("int64", "int64"), "task": ("unicode", "object")}
    pandas = {
        "index_columns": ["task"],
        "column_indexes": [],
        "columns": [
            {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": dtype, "metadata": None}
            for name, (kind, dtype) in types.items()
        ],
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": None,
    }
    return table.replace_schema_metadata({"pandas": json.dumps(pandas)})
