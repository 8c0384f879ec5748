"""Paths and versions of the LeRobotDataset v3.0 layout, and the error that everything here raises."""

from __future__ import annotations

import os
import re
from pathlib import Path
from string import Formatter
from typing import Any

from lac_vla.dataset_keys import IMAGE_PREFIX as IMAGE_PREFIX
from lac_vla.errors import DatasetError as DatasetError
from lac_vla.files import read_object

VERSION = "v3.0"
CHUNKS_SIZE = 1000
"""Files per chunk folder."""
DATA_FILE_MB = 100
VIDEO_FILE_MB = 200

INFO = "meta/info.json"
STATS = "meta/stats.json"
TASKS = "meta/tasks.parquet"
PROVENANCE = "meta/provenance.json"
"""Our own addition, which LeRobot ignores: how the data came about."""

METADATA = "lac_vla/metadata"
"""Column of the episode table with an episode's metadata as JSON; our own addition as well."""

_FILE = "chunk-{chunk_index:03d}/file-{file_index:03d}"
EPISODES_PATH = f"meta/episodes/{_FILE}.parquet"
DATA_PATH = f"data/{_FILE}.parquet"
VIDEO_PATH = f"videos/{{video_key}}/{_FILE}.mp4"

STATE = "observation.state"
ACTION = "action"

BOOKKEEPING: dict[str, str] = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}
"""Columns that every dataset has beside its own features, with their dtypes; all scalars."""


AGAIN = "copy the dataset again"
CONVERT = (
    "Convert it with LeRobot's own tool, --repo-id=<name>: python -m lerobot.datasets.v30.convert_dataset_v21_to_v30 "
    "(LeRobot 0.4), python -m lerobot.scripts.convert_dataset_v21_to_v30 (later ones)"
)


def incomplete_path(root: Path) -> Path:
    """Return the folder in which a dataset is written until it is whole and renamed to ``root``."""
    return root.with_name(root.name + ".incomplete")


def next_file(chunk: int, file: int) -> tuple[int, int]:
    """Return the (chunk, file) indices behind the given ones."""
    return (chunk, file + 1) if file + 1 < CHUNKS_SIZE else (chunk + 1, 0)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        DatasetError: If the file is missing or holds something else.
    """
    return read_object(path, AGAIN, DatasetError)


def read_info(root: Path) -> dict[str, Any]:
    """Read ``info.json`` and check what is used of it.

    Raises:
        DatasetError: If there is no such dataset, or one of another version, or something is missing or wrong.
    """
    if not os.path.isdir(root):
        unfinished = incomplete_path(root)
        if unfinished.exists():
            raise DatasetError(f"{root} was never finished ({unfinished} exists): run what writes it again")
        raise DatasetError(f"there is no dataset at {root}: give the folder that holds 'meta' and 'data'")
    path = root / INFO
    if not path.exists():
        raise DatasetError(f"{root} is no complete LeRobot dataset: {INFO} is missing")
    info = read_json(path)
    version = str(info.get("codebase_version"))
    if version.startswith(("v1.", "v2.")):
        raise DatasetError(f"{root} has the layout {version}; 3.x is read. {CONVERT}")
    if not version.startswith("v3."):
        raise DatasetError(f"{root} has the layout {version[:20]}; 3.x is read")
    needed = ("fps", "features", "total_episodes", "total_frames", "data_path")
    if lacking := [key for key in needed if key not in info]:
        raise DatasetError(f"{path} lacks {', '.join(lacking)}: {AGAIN}")
    fps, features = info["fps"], info["features"]
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < 1e6:
        raise DatasetError(f"{path}: fps is {fps!r}; frames per second are needed, a number above 0")
    for name in ("total_episodes", "total_frames", *(["total_tasks"] if "total_tasks" in info else [])):
        if isinstance(info[name], bool) or not isinstance(info[name], int) or info[name] < 0:
            raise DatasetError(f"{path}: {name} is {info[name]!r}; a whole number is needed")
    if not isinstance(features, dict) or not all(
        isinstance(entry, dict) and isinstance(entry.get("dtype"), str) for entry in features.values()
    ):
        raise DatasetError(f"{path}: features must name every feature's dtype; {AGAIN}")
    _check_pattern(path, info["data_path"], "data_path", {"chunk_index", "file_index"})
    if any(entry["dtype"] == "video" for entry in features.values()):
        _check_pattern(path, info.get("video_path"), "video_path", {"video_key", "chunk_index", "file_index"})
    return info


def _check_pattern(path: Path, pattern: Any, name: str, known: set[str]) -> None:
    """Refuse a pattern of file names that holds anything but numbers of few digits, and the feature."""
    try:
        parts = [part[1:] for part in Formatter().parse(pattern) if part[1] is not None]
    except (TypeError, ValueError) as error:
        raise DatasetError(f"{path}: {name} is {str(pattern)[:80]!r}, no pattern of file names; {AGAIN}") from error
    if {field for field, _, _ in parts} & {"episode_chunk", "episode_index"}:
        raise DatasetError(f"{path}: {name} is that of LeRobot v2, whatever the version says. {CONVERT}")
    if any(field not in known or not re.fullmatch(r"(0?\dd)?", spec or "") or turned for field, spec, turned in parts):
        raise DatasetError(f"{path}: {name} is {pattern[:80]!r}; it may hold {sorted(known)} alone")
