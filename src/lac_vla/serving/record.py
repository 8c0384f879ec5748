"""``lac serve --record``: writes the sessions as a LeRobot dataset that ``lac train`` takes.

Frames go to a raw file per episode, in one thread; when an episode ends, another thread makes it part of the dataset.
Neither the event loop nor the model's thread waits for a disk. An episode is kept whole or dropped whole: the log and
the metrics say which.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from lac_vla.datasets import DatasetAppender, DatasetError, layout
from lac_vla.datasets.schema import describe
from lac_vla.errors import InputError, LacError
from lac_vla.files import locked, writing
from lac_vla.serving.metrics import Metrics, log
from lac_vla.serving.raw import COLUMNS, SUFFIX, TOO_MANY_FILES, RawEpisode, RawWriter
from lac_vla.serving.sessions import Answer
from lac_vla.types import FloatArray, Frame

LOCK = "lock"
MAX_WAITING = 2**28
"""Bytes of frames that may wait for the disk."""
MIN_FREE = 2**30
"""Bytes of the disk that stay free."""
MAX_FRAMES = 3000
"""Frames of an episode: one that goes on continues in another, for its raw file takes some hundred MB by then."""
MIN_FRAMES = 2
"""Frames of an episode: a single one, as clients send to warm a server up, has no next one to learn from."""
MIN_FIRST = 20
"""Frames of the episode from which a new dataset takes its rate and its images' size, if nobody has said the rate."""


class Recorder:
    """Records all sessions of a server into one dataset.

    A frame is an answered request: the images as they were received, the state, the first action of the answer, and
    :data:`lac_vla.serving.raw.COLUMNS`. What a killed server left is recorded at the next start, once: an episode's
    metadata names its raw file.

    Args:
        folder: Folder of the dataset; one that is there is continued.
        metrics: Counts the episodes.
        cameras: The model's cameras.
        action: Length of an action.
        state: Length of the state that the model takes; ``None`` if it takes none.
        fps: Frames per second that the dataset is to have; 0 for those of the folder, or of a new one's first episode.
        metadata: Metadata of every episode.

    Raises:
        InputError: If what is in the folder does not fit, or another server records there.
    """

    def __init__(
        self,
        folder: Path,
        metrics: Metrics,
        *,
        cameras: tuple[str, ...],
        action: int,
        state: int | None = None,
        fps: int = 0,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        self.metadata, self.metrics = dict(metadata or {}), metrics
        folder = folder.resolve()  # the lock is for what is written, whatever it is called
        self._raw = folder.with_name(folder.name + ".recording")
        self._lock = contextlib.ExitStack()
        busy = f"another process writes to {folder}: give another --record"
        with writing(folder, "--record"):
            self._lock.enter_context(locked(self._raw / LOCK, busy))
        try:
            self._dataset = DatasetAppender(folder, fps or None)
            _check_fits(self._dataset, cameras, action, state)
        except LacError as error:
            self._release()
            raise InputError(f"{error}; give another --record") from error
        self._measured = not fps
        self._buffers: dict[str, RawWriter] = {}
        self._waiting, self._waiting_lock = 0, threading.Lock()
        self._writing = ThreadPoolExecutor(1, "record")
        self._packing = ThreadPoolExecutor(1, "pack", initializer=_lower_priority)
        recorded = {note.get("raw") for note in self._dataset.metadata}
        for path in sorted(self._raw.glob(f"*{SUFFIX}"), key=lambda path: (path.stat().st_mtime_ns, path.name)):
            if path.name in recorded or not path.stat().st_size:
                path.unlink()
            else:
                self._queue(path)

    def begin(self, session: str, peer: Any = None) -> None:
        """Open the file of a session's next episode: the descriptor is there when the first frame is."""
        path = self._raw / f"{time.time_ns()}-{session[:8]}{SUFFIX}"
        buffer = RawWriter(path, {**self.metadata, "session": session, "raw": path.name})
        self._buffers[session] = buffer
        self._writing.submit(self._open, buffer)

    def add(self, session: str, answer: Answer, arrived: float, took_ms: float) -> None:
        """Record a request that came at ``arrived``, by ``time.perf_counter()``; returns at once."""
        if answer.reset is not None:
            self.end(session, answer.reset)
        elif session in self._buffers and self._buffers[session].frames >= MAX_FRAMES:
            self.end(session, f"went on after {MAX_FRAMES} frames")
        if session not in self._buffers:
            self.begin(session)
        buffer = self._buffers[session]
        if not buffer.frames:
            buffer.started_at = arrived
        buffer.frames += 1
        size = sum(image.nbytes for image in answer.frame.images.values())
        with self._waiting_lock:
            full = self._waiting + size > MAX_WAITING
            self._waiting += 0 if full else size
        if full:
            self._writing.submit(self._drop, buffer, "the disk is slower than the robots")
            return
        self.metrics.unwritten.inc(size)
        columns = {"seconds": arrived - buffer.started_at, "cache_ratio": answer.step.ratio, "latency_ms": took_ms}
        self._writing.submit(self._write, buffer, answer.frame, answer.message["actions"][0], columns, size)

    def end(self, session: str, reason: str) -> None:
        """End the session's episode, if there is one."""
        if (buffer := self._buffers.pop(session, None)) is not None:
            self._writing.submit(self._finish, buffer, reason)

    def lost(self, session: str) -> str:
        """Say why the session's episode is not recorded; empty if it is, as far as is known."""
        return self._buffers[session].dropped if session in self._buffers else ""

    def close(self) -> None:
        """Finish all episodes, which may take seconds."""
        self._writing.shutdown()
        self._packing.shutdown()
        self._release()

    def _release(self) -> None:
        if not any(self._raw.glob(f"*{SUFFIX}")):
            shutil.rmtree(self._raw)
        self._lock.close()

    def _open(self, buffer: RawWriter) -> None:
        with contextlib.suppress(OSError):  # the first frame tries again
            buffer.open()

    def _write(
        self, buffer: RawWriter, frame: Frame, action: FloatArray, columns: Mapping[str, float], size: int
    ) -> None:
        try:
            if buffer.dropped:
                return
            if shutil.disk_usage(self._raw).free < MIN_FREE + size:
                raise OSError("the disk is full")
            if not buffer.written:
                sample = {name: np.asarray([columns[name]], dtype) for name, dtype in COLUMNS.items()}
                state = np.zeros((1, 0), np.float32) if frame.proprio is None else frame.proprio[None]
                self._dataset.check({c: image[None] for c, image in frame.images.items()}, state, action[None], sample)
            buffer.write(frame, action, columns)
        except (OSError, LacError) as error:
            self._drop(buffer, str(error))
        except Exception:
            self._drop(buffer, "internal error", exc_info=True)
        finally:
            with self._waiting_lock:
                self._waiting -= size
            self.metrics.unwritten.dec(size)

    def _drop(self, buffer: RawWriter, reason: str, *, exc_info: bool = False) -> None:
        if buffer.dropped:
            return
        buffer.dropped = reason
        buffer.discard()
        self._lost(reason, buffer.metadata["session"], buffer.written, exc_info=exc_info)

    def _lost(self, reason: str, session: Any, frames: int, *, exc_info: bool = False) -> None:
        self.metrics.recorded.labels("dropped").inc()
        lost = {"reason": reason, "session": session, "frames": frames}
        log("episode not recorded", level=logging.WARNING, exc_info=exc_info, **lost)

    def _finish(self, buffer: RawWriter, ended: str) -> None:
        if not buffer.frames:
            buffer.discard()
            return
        if buffer.written < MIN_FRAMES:
            self._drop(buffer, "it has a single frame")
        if not buffer.dropped:
            try:
                buffer.finish(ended)
            except OSError as error:
                self._drop(buffer, str(error))
            else:
                self._queue(buffer.path)

    def _queue(self, path: Path) -> None:
        self.metrics.unpacked.inc()
        self._packing.submit(self._pack, path).add_done_callback(lambda _: self.metrics.unpacked.dec())

    def _pack(self, path: Path) -> None:
        """Make a raw file an episode of the dataset; it is deleted once it is one, or if it can never be."""
        try:
            episode = RawEpisode.read(path)
            arrays = episode.arrays
            if len(episode.records) < MIN_FRAMES:
                raise DatasetError("it has a single frame")
            if self._measured and not self._dataset.features and len(episode.records) < MIN_FIRST:
                raise DatasetError(
                    f"it has {len(episode.records)} frames; a new dataset takes its frame rate and image size from an "
                    f"episode of at least {MIN_FIRST}: say the rate with --record-fps to keep shorter ones"
                )
            self._dataset.check(*(arrays[name] for name in ("images", "state", "action", "columns")))
            metadata = {**episode.header.metadata, "ended": episode.ended or "the server was killed"}
        except LacError as error:
            self._lost(str(error), path.stem, 0)
            path.unlink()
            return
        if self._measured and not self._dataset.features:
            self._dataset.fps = episode.rate
        try:
            index = self._add(arrays, metadata)
        except Exception as error:  # of the disk, as a rule; the frames are there and get another chance
            self._lost(f"{error}; {path} is tried again at the next start", path.stem, 0, exc_info=True)
            with contextlib.suppress(OSError, LacError):  # what is on the disk counts, however far it came
                self._dataset = DatasetAppender(self._dataset.root, self._dataset.fps)
        else:
            path.unlink()
            self.metrics.recorded.labels("kept").inc()
            log("episode recorded", episode=index, frames=len(episode.records), fps=self._dataset.fps, **metadata)

    def _add(self, arrays: Mapping[str, Any], metadata: Mapping[str, Any]) -> int:
        """Add an episode; while the process has too many files open, wait."""
        for _ in range(20):
            try:
                return self._dataset.add_episode(**arrays, metadata=metadata)
            except OSError as error:
                if error.errno not in TOO_MANY_FILES:
                    raise
                time.sleep(0.2)
        return self._dataset.add_episode(**arrays, metadata=metadata)


def _check_fits(dataset: DatasetAppender, cameras: tuple[str, ...], action: int, state: int | None) -> None:
    """Refuse a dataset of other cameras, columns or lengths; robots choose the images' sizes."""
    if not dataset.features:
        return
    numbers = {layout.ACTION: action, **dict.fromkeys((*COLUMNS, *layout.BOOKKEEPING), 1)}
    if state is not None:
        numbers[layout.STATE] = state
    found = {key: tuple(entry["shape"]) for key, entry in dataset.features.items()}
    images = {layout.IMAGE_PREFIX + camera for camera in cameras}
    left = found.keys() - numbers.keys() - images - {layout.STATE}
    if left or images - found.keys() or any(found.get(key) != (length,) for key, length in numbers.items()):
        raise DatasetError(
            f"{dataset.root} holds {describe(dataset.features)}; recorded here are the cameras {list(cameras)}, "
            f"actions of {action} numbers{'' if state is None else f', states of {state}'}, and {list(COLUMNS)}"
        )


def _lower_priority() -> None:
    """Let the model's thread go first: on Linux, every thread has a priority of its own."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
