"""An episode on disk while it happens: one file of equally long records, readable at any time."""

from __future__ import annotations

import contextlib
import errno
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from lac_vla.datasets import DatasetError
from lac_vla.types import FloatArray, Frame

SUFFIX = ".frames"
MAX_HEADER = 2**20
"""Bytes of a file's first line, at most."""
ENDED = b"LACENDED"
"""The last bytes of a finished file; before them the reason why the episode ended, and its length, four bytes."""
TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)
COLUMNS = {"seconds": np.float64, "cache_ratio": np.float32, "latency_ms": np.float32}
"""Columns beside observation and action: the request's arrival since the episode began; the share of the tokens that
was reused; the time from the request's arrival to the answer."""


@dataclass(frozen=True)
class Header:
    """Describes what all frames of an episode have in common.

    Attributes:
        task: The instruction.
        images: Camera → (H, W).
        state: Length of the state, 0 for none.
        action: Length of an action.
        metadata: The episode's metadata, JSON.
    """

    task: str
    images: Mapping[str, tuple[int, int]]
    state: int
    action: int
    metadata: Mapping[str, Any]

    @classmethod
    def of(cls, frame: Frame, action: FloatArray, metadata: Mapping[str, Any]) -> Header:
        """Make the header of an episode that begins with this frame."""
        state = 0 if frame.proprio is None else frame.proprio.size
        return cls(frame.instruction, frame.shapes, state, action.size, metadata)

    @property
    def record(self) -> np.dtype[np.void]:
        """The dtype of a frame in the file."""
        fields: list[tuple[str, Any, tuple[int, ...]]] = [
            (f"images.{camera}", np.uint8, (*size, 3)) for camera, size in self.images.items()
        ]
        fields += [("state", np.float32, (self.state,)), ("action", np.float32, (self.action,))]
        return np.dtype(fields + [(name, dtype, ()) for name, dtype in COLUMNS.items()])


@dataclass(frozen=True, eq=False)
class RawEpisode:
    """An episode read from its file.

    Attributes:
        header: The file's header.
        records: Its frames, (T,), of the dtype that the header gives; they stay on the disk.
        ended: The reason why it ended; ``None`` if it never did.
    """

    header: Header
    records: npt.NDArray[np.void]
    ended: str | None

    @property
    def arrays(self) -> dict[str, Any]:
        """The episode as :meth:`lac_vla.datasets.DatasetAppender.add_episode` takes it."""
        images = {camera: self.records[f"images.{camera}"] for camera in self.header.images}
        columns = {name: self.records[name] for name in COLUMNS}
        numbers = {"state": self.records["state"], "action": self.records["action"]}
        return {"images": images, **numbers, "task": self.header.task, "columns": columns}

    @property
    def rate(self) -> int:
        """Frames per second: the median, rounded, at least 1. Needs two frames."""
        return max(1, round(1 / max(1e-3, float(np.median(np.diff(self.records["seconds"]))))))

    @classmethod
    def read(cls, path: Path) -> RawEpisode:
        """Map a file; a record that was not finished is left out.

        Raises:
            DatasetError: If it is no such file, or holds no frame.
        """
        with path.open("rb") as file:
            try:
                found = json.loads(file.readline(MAX_HEADER))
                header = Header(**found | {"images": {c: (int(h), int(w)) for c, (h, w) in found["images"].items()}})
                record = header.record
            except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
                raise DatasetError(f"{path} is no recorded episode ({error!r:.200})") from error
            offset, size, ended = file.tell(), path.stat().st_size, None
            file.seek(max(offset, size - 4 - len(ENDED)))
            tail = file.read()
            if tail[4:] == ENDED:
                end = size - len(tail) - int.from_bytes(tail[:4], "big")
                file.seek(max(offset, end))
                ended, size = file.read(max(0, size - len(tail) - end)).decode("utf-8", "replace"), end
        count = (size - offset) // record.itemsize
        if count < 1:
            raise DatasetError(f"{path} holds no frame")
        return cls(header, np.memmap(path, record, "r", offset, (count,)), ended)


@dataclass
class RawWriter:
    """Writes the file of one episode.

    Attributes:
        path: Path of the new file.
        metadata: The episode's metadata, JSON.
        started_at: Arrival of its first request, by ``time.perf_counter()``.
        frames: Frames handed in.
        written: Frames on disk. This and what follows belongs to the writing thread.
        dropped: Why it is thrown away; empty if it is not.
    """

    path: Path
    metadata: Mapping[str, Any]
    started_at: float = 0.0
    frames: int = 0
    written: int = 0
    dropped: str = ""
    _header: Header | None = None
    _file: BinaryIO | None = None

    def open(self, patience: float = 0.0) -> None:
        """Make the file, if it is not there; while the process has too many, try again for ``patience`` seconds.

        Raises:
            OSError: If the disk fails, or there are too many files all the time.
        """
        end = time.monotonic() + patience
        while self._file is None:
            try:
                self._file = self.path.open("xb")
            except OSError as error:
                if error.errno not in TOO_MANY_FILES or time.monotonic() >= end:
                    raise
                time.sleep(0.05)

    def write(self, frame: Frame, action: FloatArray, columns: Mapping[str, float]) -> None:
        """Append one frame.

        Raises:
            DatasetError: If its sizes are not those of the first frame.
            OSError: If the disk fails.
        """
        header = Header.of(frame, action, self.metadata)
        self.open(patience=1.0)
        assert self._file is not None
        if self._header is None:
            self._header = header
            self._file.write(json.dumps(asdict(header)).encode() + b"\n")
        if header != self._header:
            raise DatasetError("images, state, action or instruction changed in mid-episode")
        parts: list[npt.NDArray[Any]] = [frame.images[camera] for camera in header.images]
        parts += [np.zeros(0) if frame.proprio is None else frame.proprio, np.asarray(action, np.float32)]
        parts += [np.asarray(columns[name], dtype) for name, dtype in COLUMNS.items()]
        for part in parts:
            self._file.write(part.tobytes())
        self._file.flush()
        self.written += 1

    def finish(self, ended: str) -> None:
        """Note why the episode ended, and close the file, or raise :class:`OSError`."""
        if self._file is not None:
            reason = ended.encode("utf-8", "replace")
            self._file.write(reason + len(reason).to_bytes(4, "big") + ENDED)
            self._file.close()

    def discard(self) -> None:
        """Close the file, and delete it."""
        with contextlib.suppress(OSError):  # what a full disk did not take is thrown away anyhow
            if self._file is not None:
                self._file.close()
        self.path.unlink(missing_ok=True)
