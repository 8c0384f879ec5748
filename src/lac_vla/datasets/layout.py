"""Paths and versions of the LeRobotDataset v3.0 layout, and the error that everything here raises."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lac_vla.errors import LacError

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

IMAGE_PREFIX = "observation.images."
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


class DatasetError(LacError, ValueError):
    """A dataset that is missing, incomplete, damaged or of another version, or data that fits none."""


def incomplete_path(root: Path) -> Path:
    """Return the folder in which a dataset is written until it is whole and renamed to ``root``."""
    return root.with_name(root.name + ".incomplete")


def next_file(chunk: int, file: int) -> tuple[int, int]:
    """Return the (chunk, file) indices behind the given ones."""
    return (chunk, file + 1) if file + 1 < CHUNKS_SIZE else (chunk + 1, 0)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, its folder included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=4, ensure_ascii=False), encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        DatasetError: If the file is missing or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DatasetError(f"{path} is missing: copy the dataset again, all of it") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DatasetError(f"{path} cannot be read ({error}): copy the dataset again") from error
    if not isinstance(content, dict):
        raise DatasetError(f"{path} holds no JSON object: copy the dataset again")
    return content
