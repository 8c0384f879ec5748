"""``lac serve --record``: what the sessions saw and did, as a LeRobot dataset that ``lac train`` takes.

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
from lac_vla.errors import InputError, LacError, MissingExtraError
from lac_vla.serving.controller import sample_frames, state_length
from lac_vla.serving.metrics import Metrics, log
from lac_vla.serving.raw import COLUMNS, SUFFIX, Header, RawEpisode, RawWriter
from lac_vla.serving.sessions import Answer
from lac_vla.session import CachedVLA
from lac_vla.types import FloatArray, Frame

try:
    from filelock import FileLock, Timeout
except ModuleNotFoundError as error:
    raise MissingExtraError("serve", "Serving") from error

WAITING = 2**28
"""Bytes of frames that may wait for the disk."""
RESERVE = 2**30
"""Bytes of the disk that stay free."""
LONGEST = 3000
"""Frames of an episode: one that goes on continues in another, for its raw file takes some hundred MB by then."""
SHORTEST = 2
"""Frames of an episode: a single one, as clients send to warm a server up, has no next one to learn from."""


class Recorder:
    """Records all sessions of a server into one dataset.

    A frame is an answered request: the images as they were received, the state, the first action of the answer, and
    :data:`lac_vla.serving.raw.COLUMNS`. What a killed server left is recorded at the next start.

    Args:
        folder: Of the dataset; one that is there is continued.
        cameras: Those of the model.
        action: Length of an action.
        metrics: Where episodes are counted.
        state: Length of the state that the model takes; ``None`` if it takes none.
        fps: Frames per second that the dataset is to have; 0 for those of the folder, or of a new one's first episode.
        about: Facts for every episode's metadata.

    Raises:
        InputError: If what is in the folder does not fit, or another server records there.
    """

    def __init__(
        self,
        folder: Path,
        *,
        cameras: tuple[str, ...],
        action: int,
        metrics: Metrics,
        state: int | None = None,
        fps: int = 0,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.about, self.metrics = dict(about or {}), metrics
        self._raw = folder.with_name(folder.name + ".recording")
        try:
            self._raw.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot write to {self._raw} ({error}); give another --record") from error
        self._lock = FileLock(self._raw / "lock", thread_local=False)  # another thread closes
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise InputError(f"another server records into {folder}; give another --record") from None
        try:
            self._dataset = DatasetAppender(folder, fps or None, threads=1)
            _check_fits(self._dataset, cameras, action, state)
        except LacError as error:
            self._leave()
            raise InputError(f"{error}; give another --record") from error
        self._measured = not fps
        self._waiting, self._guard = 0, threading.Lock()
        self._writing = ThreadPoolExecutor(1, "record")
        self._packing = ThreadPoolExecutor(1, "pack", initializer=_step_back)
        for path in sorted(self._raw.glob(f"*{SUFFIX}")):
            self._hand_over(path, "the server was killed")

    def session(self, name: str, peer: Any = None) -> Recording:
        """Record a session; where the robot sits is not kept."""
        return Recording(self, name)

    def take(self, session: str, begun: float) -> Take:
        """Begin an episode."""
        return Take(self._raw / f"{time.time_ns()}-{session[:8]}{SUFFIX}", session, begun)

    def write(self, take: Take, frame: Frame, action: FloatArray, columns: Mapping[str, float]) -> None:
        """Have a frame written; drops the whole episode if too much waits for the disk already."""
        size = sum(image.nbytes for image in frame.images.values())
        with self._guard:
            full = self._waiting + size > WAITING
            self._waiting += 0 if full else size
        if full:
            self._writing.submit(self._drop, take, "the disk is slower than the robots")
            return
        self.metrics.unwritten.inc(size)
        self._writing.submit(self._write, take, frame, action, columns, size)

    def finish(self, take: Take, ended: str) -> None:
        """End an episode."""
        self._writing.submit(self._finish, take, ended)

    def close(self) -> None:
        """Finish what was begun, which may take seconds."""
        self._writing.shutdown()
        self._packing.shutdown()
        self._leave()

    def _leave(self) -> None:
        if not any(self._raw.glob(f"*{SUFFIX}")):
            shutil.rmtree(self._raw)
        self._lock.release()

    def _write(self, take: Take, frame: Frame, action: FloatArray, columns: Mapping[str, float], size: int) -> None:
        try:
            if take.dropped:
                return
            if shutil.disk_usage(self._raw).free < RESERVE + size:
                raise OSError("the disk is full")
            if take.file is None:
                sample = {name: np.asarray([columns[name]], dtype) for name, dtype in COLUMNS.items()}
                state = np.zeros((1, 0), np.float32) if frame.proprio is None else frame.proprio[None]
                self._dataset.check({c: image[None] for c, image in frame.images.items()}, state, action[None], sample)
                take.file = RawWriter(take.path, Header.of(frame, action, {**self.about, "session": take.session}))
            take.file.write(frame, action, columns)
            take.written += 1
        except (OSError, LacError) as error:
            self._drop(take, str(error))
        except Exception:
            self._drop(take, "internal error", exc_info=True)
        finally:
            with self._guard:
                self._waiting -= size
            self.metrics.unwritten.dec(size)

    def _drop(self, take: Take, reason: str, *, exc_info: bool = False) -> None:
        if take.dropped:
            return
        take.dropped = True
        if take.file is not None:
            with contextlib.suppress(OSError):  # what a full disk did not take is thrown away anyhow
                take.file.close()
            take.path.unlink(missing_ok=True)
        self._lost(reason, take.session, take.written, exc_info=exc_info)

    def _lost(self, reason: str, session: Any, frames: int, *, exc_info: bool = False) -> None:
        self.metrics.recorded.labels("dropped").inc()
        log(
            "episode not recorded", level=logging.WARNING, exc_info=exc_info,
            reason=reason, session=session, frames=frames,
        )  # fmt: skip

    def _finish(self, take: Take, ended: str) -> None:
        if take.written < SHORTEST:
            self._drop(take, "it has a single frame")
        if not take.dropped and take.file is not None:
            take.file.close()
            self._hand_over(take.path, ended)

    def _hand_over(self, path: Path, ended: str) -> None:
        self.metrics.unpacked.inc()
        self._packing.submit(self._pack, path, ended)

    def _pack(self, path: Path, ended: str) -> None:
        """Make a raw file an episode of the dataset."""
        try:
            episode = RawEpisode.read(path)
            if len(episode) < SHORTEST:
                raise DatasetError("it has a single frame")
            if self._measured and not self._dataset.features:
                self._dataset.fps = episode.rate
            about = {**episode.header.about, "ended": ended}
            index = self._dataset.add_episode(
                episode.images, episode.state, episode.action, episode.header.task,
                columns=episode.columns, metadata=about,
            )  # fmt: skip
        except LacError as error:
            self._lost(str(error), path.stem, 0)
            path.unlink()
        except Exception as error:  # of the disk, as a rule; the frames are there and get another chance
            self._lost(f"{error}; {path} is tried again at the next start", path.stem, 0, exc_info=True)
        else:
            path.unlink()
            self.metrics.recorded.labels("kept").inc()
            log("episode recorded", episode=index, frames=len(episode), fps=self._dataset.fps, **about)
        finally:
            self.metrics.unpacked.dec()


class Take:
    """An episode that is being recorded.

    Attributes:
        path: Of its raw file.
        session: Name of its session.
        begun: When its first request came, by ``time.perf_counter()``.
        frames: Handed in.
        written: Frames on disk. This and what follows belongs to the writing thread.
        dropped: Nothing of it is kept.
        file: Of its frames.
    """

    def __init__(self, path: Path, session: str, begun: float) -> None:
        self.path, self.session, self.begun = path, session, begun
        self.frames, self.written, self.dropped = 0, 0, False
        self.file: RawWriter | None = None


class Recording:
    """Of one session."""

    def __init__(self, recorder: Recorder, session: str) -> None:
        self._recorder, self._session = recorder, session
        self._take: Take | None = None

    def add(self, answer: Answer, arrived: float, took_ms: float) -> None:
        """Record an answered request; returns at once.

        Args:
            answer: What was answered, and to what.
            arrived: When the request came, by ``time.perf_counter()``.
            took_ms: From then until the answer was sent.
        """
        if answer.reset is not None:
            self.end(answer.reset)
        elif self._take is not None and self._take.frames >= LONGEST:
            self.end(f"went on after {LONGEST} frames")
        if self._take is None:
            self._take = self._recorder.take(self._session, arrived)
        take = self._take
        take.frames += 1
        columns = {"seconds": arrived - take.begun, "cache_ratio": answer.step.ratio, "latency_ms": took_ms}
        self._recorder.write(take, answer.frame, answer.message["actions"][0], columns)

    def end(self, why: str) -> None:
        """End the episode, if there is one."""
        if self._take is not None:
            self._recorder.finish(self._take, why)
            self._take = None


def make_recorder(vla: CachedVLA, folder: Path, fps: int, about: Mapping[str, Any], metrics: Metrics) -> Recorder:
    """The recorder of a server of this model: see :class:`Recorder`."""
    action = np.atleast_2d(vla.session().act(sample_frames(vla.model)[0]))
    return Recorder(
        folder,
        cameras=tuple(vla.model.grids),
        action=action.shape[1],
        state=state_length(vla.model),
        fps=fps,
        about={**about, "horizon": len(action)},
        metrics=metrics,
    )


def _check_fits(dataset: DatasetAppender, cameras: tuple[str, ...], action: int, state: int | None) -> None:
    """Refuse a dataset of other cameras, columns or lengths; the images' sizes are the robots' affair."""
    if not dataset.features:
        return
    numbers = {layout.ACTION: action, **dict.fromkeys((*COLUMNS, *layout.BOOKKEEPING), 1)}
    if state is not None:
        numbers[layout.STATE] = state
    found = {key: tuple(entry["shape"]) for key, entry in dataset.features.items()}
    left = found.keys() - numbers.keys() - {layout.IMAGE_PREFIX + camera for camera in cameras} - {layout.STATE}
    lacking = {layout.IMAGE_PREFIX + camera for camera in cameras} - found.keys()
    if left or lacking or any(found.get(key) != (length,) for key, length in numbers.items()):
        raise DatasetError(
            f"{dataset.root} holds {describe(dataset.features)}; recorded here are the cameras {list(cameras)}, "
            f"actions of {action} numbers{'' if state is None else f', states of {state}'}, and {list(COLUMNS)}"
        )


def _step_back() -> None:
    """Let the model's thread go first: a thread of its own has its own priority on Linux."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
