"""Reads a dataset's Parquet files: tasks, episodes, the rows of an episode, pictures within them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from lac_vla.datasets import layout
from lac_vla.datasets.layout import AGAIN, DatasetError
from lac_vla.files import parse_json, reading
from lac_vla.types import FloatArray, UInt8Image


def read_tasks(root: Path) -> dict[int, str]:
    """Read task index → instruction.

    Raises:
        DatasetError: If the table is missing or damaged, or has no or several texts for an index.
    """
    path = root / layout.TASKS
    if not path.exists() and (root / "meta" / "tasks.jsonl").exists():
        raise DatasetError(f"{root} is laid out as LeRobot v2, whatever its version says. {layout.CONVERT}")
    with reading(path, f"{AGAIN}, all of it", DatasetError), pq.ParquetFile(path) as file:
        table = file.read()
        text = _text_column(table)
        if text is None or "task_index" not in table.column_names:
            raise DatasetError(f"{path} has columns {table.column_names}, not task and task_index")
        tasks: dict[int, str] = {}
        for index, name in zip(table.column("task_index").to_pylist(), table.column(text).to_pylist(), strict=True):
            if not isinstance(index, int) or not isinstance(name, str) or tasks.get(index, name) != name:
                raise DatasetError(f"{path}: task {index!r} is {name!r}, which is no text, or a second one; {AGAIN}")
            tasks[index] = name
    return tasks


def _text_column(table: Any) -> str | None:
    """Find the column of the instructions: ``task``, else the index of the pandas frame, else the only text."""
    kinds = {
        field.name: field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        for field in table.schema
    }
    texts = [name for name, kind in kinds.items() if str(kind) in ("string", "large_string", "string_view")]
    note = (table.schema.metadata or {}).get(b"pandas", b"{}")
    index = [name for name in parse_json(note).get("index_columns", []) if isinstance(name, str)]
    for name in ("task", *index, "__index_level_0__", *(texts if len(texts) == 1 else [])):
        if name in texts:
            return str(name)
    return None


def read_episodes(root: Path, videos: Sequence[str], *, stats: bool = False) -> list[dict[str, Any]]:
    """Read the episode table, ordered by episode, and check what is used of it.

    Args:
        root: The dataset's folder.
        videos: Features whose videos are needed.
        stats: Whether to read the episodes' statistics, too.

    Raises:
        DatasetError: If a table is missing or damaged, or lacks something.
    """
    paths = sorted((root / "meta" / "episodes").glob("chunk-*/file-*.parquet"))
    if not paths:
        old = f". It is laid out as LeRobot v2: {layout.CONVERT}" if (root / "meta/episodes.jsonl").exists() else ""
        raise DatasetError(f"{root} has no episode table in meta/episodes: {AGAIN}, all of it{old}")
    needed = ["length", "data/chunk_index", "data/file_index"]
    needed += [f"videos/{key}/{name}" for key in videos for name in ("chunk_index", "file_index", "from_timestamp")]
    found: dict[int, dict[str, Any]] = {}
    for path in paths:
        with reading(path, AGAIN, DatasetError), pq.ParquetFile(path) as file:
            names = [name for name in file.schema_arrow.names if stats or not name.startswith("stats/")]
            for row in file.read(columns=names).to_pylist():
                number = row.get("episode_index")
                if not _counts(number):
                    raise DatasetError(f"{path}: an episode has the episode_index {number!r}; {AGAIN}")
                if number in found:
                    raise DatasetError(f"{path}: episode {number} stands there twice; {AGAIN}")
                for name in needed:
                    value = row.get(name)
                    timed = name.endswith("timestamp")
                    if not (isinstance(value, float | int) and 0 <= value < 2**53 if timed else _counts(value)):
                        what = f"has the {name} {value!r}" if name in row else f"lacks the column '{name}'"
                        raise DatasetError(f"{path}: episode {number} {what}; {AGAIN}, or repair the table")
                found[number] = row
    return [found[number] for number in sorted(found)]


def _counts(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


@dataclass(frozen=True)
class Table:
    """A file of numbers.

    Attributes:
        path: The file.
        table: Its columns, without pictures.
        places: Episode → its rows, from first to before last; ``None`` where they do not stand together.
    """

    path: Path
    table: Any
    places: Mapping[int, tuple[int, int] | None]

    @classmethod
    def read(cls, path: Path, left_out: Sequence[str]) -> Table:
        """Read a file, but for some columns.

        Raises:
            DatasetError: If it is damaged, or lacks what every dataset has.
        """
        with reading(path, AGAIN, DatasetError), pq.ParquetFile(path) as file:
            table = file.read(columns=[name for name in file.schema_arrow.names if name not in left_out])
            for name in ("episode_index", "task_index", "timestamp"):
                if name not in table.column_names:
                    raise DatasetError(f"{path} lacks the column '{name}': {AGAIN}, or repair the table")
            numbers = _array(table.column("episode_index"), str(path)).reshape(-1)
            starts = np.flatnonzero(np.diff(numbers, prepend=np.nan))
            places: dict[int, tuple[int, int] | None] = {}
            for start, stop in zip(starts, [*starts[1:], len(numbers)], strict=True):
                number = int(numbers[start])
                places[number] = None if number in places else (int(start), int(stop))
        return cls(path, table, places)

    def episode(self, number: int, length: int) -> Rows:
        """Return an episode's rows.

        Raises:
            DatasetError: If they are not there, not together, or not so many.
        """
        place = self.places.get(number, (0, 0))
        if place is None:
            raise DatasetError(
                f"{self.path}: the rows of episode {number} do not stand together: order the table by episode and time"
            )
        first, stop = place
        if stop - first != length:
            raise DatasetError(
                f"{self.path} holds {stop - first} rows of episode {number}, the episode table says {length}: {AGAIN}"
            )
        return Rows(self.path, number, first, self.table.slice(first, length))


@dataclass(frozen=True)
class Rows:
    """The rows of an episode, T of them.

    Attributes:
        path: The file.
        episode: The episode's number.
        first: Its first row within the file.
        table: The rows.
    """

    path: Path
    episode: int
    first: int
    table: Any

    @property
    def names(self) -> list[str]:
        """List the columns."""
        return list(self.table.column_names)

    def column(self, name: str) -> npt.NDArray[Any]:
        """Convert a column of scalars to (T,), one of equally long lists to (T, n).

        Raises:
            DatasetError: If it is something else, or a row has nothing.
        """
        where = f"{self.path}: column '{name}' of episode {self.episode}"
        with reading(self.path, AGAIN, DatasetError):
            return _array(self.table.column(name), where)

    def numbers(self, name: str) -> FloatArray:
        """Convert a column to float32, (T, n), finite; n is 0 if there is no such column."""
        if name not in self.names:
            return np.zeros((self.table.num_rows, 0), np.float32)
        values = self.column(name)
        if values.dtype.kind not in "biuf":
            raise DatasetError(f"{self.path}: column '{name}' holds no numbers; give another column")
        with np.errstate(over="ignore"):
            found = np.asarray(values, np.float32).reshape(len(values), -1)
        self._refuse(name, ~np.isfinite(found).all(axis=1), "is not finite (NaN or infinity)")
        return found

    def times(self) -> npt.NDArray[np.float64]:
        """Convert the timestamps to seconds, (T,), which grow."""
        values = self.column("timestamp").reshape(-1)
        if values.dtype.kind not in "iuf" or len(values) != self.table.num_rows:
            raise DatasetError(f"{self.path}: column 'timestamp' holds no seconds: repair the table")
        times = values.astype(np.float64)
        self._refuse("timestamp", ~np.isfinite(times), "is not finite")
        self._refuse("timestamp", np.diff(times, prepend=-np.inf) <= 0, "is not later than the one before")
        return times

    def task(self) -> int:
        """Return the index of the episode's task."""
        values = self.column("task_index").reshape(-1)
        if values.dtype.kind not in "iu":
            raise DatasetError(f"{self.path}: column 'task_index' holds no whole numbers: repair the table")
        self._refuse("task_index", values != values[0], "is another one: an episode has one task, split it there; it")
        return int(values[0])

    def _refuse(self, name: str, wrong: npt.NDArray[Any], what: str) -> None:
        if wrong.any():
            raise DatasetError(
                f"{self.path}: episode {self.episode}, frame {int(wrong.argmax())}: '{name}' {what}; repair the row, "
                "or leave the episode out"
            )


def _array(column: Any, where: str) -> npt.NDArray[Any]:
    array = column.combine_chunks()
    width, flat = None, array
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or pa.types.is_fixed_size_list(array.type):
        if array.null_count:
            raise _gap(where, array, 1)
        sizes = np.unique(array.value_lengths().to_numpy(zero_copy_only=False))
        if len(sizes) != 1 or not sizes[0]:
            raise DatasetError(f"{where} has rows of {sizes.tolist()} numbers: every frame needs equally many")
        width, flat = int(sizes[0]), array.flatten()
    if flat.null_count:
        raise _gap(where, flat, width or 1)
    kinds = ("integer", "floating", "boolean", "string", "large_string")
    if not any(getattr(pa.types, f"is_{kind}")(flat.type) for kind in kinds):
        raise DatasetError(f"{where} holds {array.type}; a number, or a list of numbers, a frame is read")
    values = np.array(flat.to_numpy(zero_copy_only=False))
    return values if width is None else values.reshape(-1, width)


def _gap(where: str, array: Any, width: int) -> DatasetError:
    frame = int(array.is_null().to_numpy(zero_copy_only=False).argmax()) // width
    return DatasetError(f"{where} has nothing at frame {frame}: repair the row, or leave the episode out")


def read_pictures(path: Path, key: str, first: int, episode: int, start: int, stop: int) -> UInt8Image:
    """Decode pictures, PNG or JPEG, that stand in the table itself.

    Args:
        path: The file.
        key: Their column.
        first: The episode's first row within the file.
        episode: Its number.
        start: The first frame of the episode that is wanted.
        stop: One past the last.

    Returns:
        uint8, (stop − start, H, W, 3), RGB.

    Raises:
        DatasetError: If a picture is missing or damaged, or they differ in size.
    """
    images: list[UInt8Image] = []
    with reading(path, AGAIN, DatasetError), pq.ParquetFile(path) as file:
        if key not in file.schema_arrow.names:
            raise DatasetError(f"{path} lacks the column '{key}': {AGAIN}")
        ends = np.cumsum([file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)])
        begin, last = (int(np.searchsorted(ends, first + at, side="right")) for at in (start, stop - 1))
        before = int(ends[begin - 1]) if begin else 0
        rows = file.read_row_groups(range(begin, last + 1), columns=[key]).slice(first + start - before, stop - start)
        for frame, cell in enumerate(rows.column(0).to_pylist(), start):
            data = cell.get("bytes") if isinstance(cell, dict) else cell
            if not isinstance(data, bytes):
                raise DatasetError(
                    f"{path}: episode {episode}, frame {frame}: '{key}' holds no picture but {str(cell)[:80]}; "
                    "embed the pictures in the table, or convert them to videos"
                )
            image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if data else None
            if image is None or (images and image.shape != images[0].shape):
                what = "cannot be decoded" if image is None else f"has the size {image.shape[:2]}, unlike those before"
                raise DatasetError(f"{path}: episode {episode}, frame {frame}: the picture in '{key}' {what}; {AGAIN}")
            images.append(np.asarray(image[..., ::-1]))
    return np.stack(images)
