"""Checks an episode's arrays, and makes the features and tables with which a dataset describes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from lac_vla.datasets import layout
from lac_vla.datasets.layout import DatasetError
from lac_vla.types import UInt8Image

Arrays: TypeAlias = Mapping[str, npt.NDArray[Any]]
Images: TypeAlias = Mapping[str, UInt8Image]
Features: TypeAlias = dict[str, dict[str, Any]]
"""Feature → its entry in ``info.json``."""
COLUMN_DTYPES = ("float32", "float64", "int8", "int32", "int64", "uint8", "bool")


def video_feature(camera: str, images: UInt8Image, length: int, fps: int) -> dict[str, Any]:
    """Check the images of one camera, and make its entry in ``info.json``."""
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


def vector_feature(dtype: str, width: int, names: Sequence[str] | None = None) -> dict[str, Any]:
    """Make the entry of a column of ``width`` numbers."""
    return {"dtype": dtype, "shape": [width], "names": None if names is None else list(names)}


def vector_column(
    name: str, values: npt.NDArray[Any], length: int, names: Sequence[str] | None
) -> tuple[npt.NDArray[Any], dict[str, Any]]:
    """Check one column, (T,) or (T, n); return it contiguous, (T, 1) as (T,), and the feature's entry."""
    if "/" in name or not name:
        raise DatasetError(f"column name '{name}' must not be empty or hold a '/'")
    values = np.asarray(values)
    if values.dtype.name not in COLUMN_DTYPES:
        raise DatasetError(f"column '{name}' has dtype {values.dtype}; give one of {', '.join(COLUMN_DTYPES)}")
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


def describe(features: Features) -> str:
    """Describe the features in one line, for messages."""
    own = {key: entry for key, entry in features.items() if key not in layout.BOOKKEEPING}
    return ", ".join(f"{key} {entry['dtype']}{tuple(entry['shape'])}" for key, entry in own.items())


def data_table(vectors: Arrays) -> Any:
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
