"""H.264 videos that any browser plays are written, and frames of them decoded."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from lac_vla.errors import InputError, MissingExtraError
from lac_vla.files import sync
from lac_vla.types import UInt8Image


class VideoFile:
    """Writes a video frame by frame. The file appears under its name only when it is whole.

    It is encoded in the calling thread, so that nothing runs behind what is timed between two frames.

    Args:
        path: Path of the ``.mp4`` file; its folder is created.
        fps: Frames per second.
    """

    def __init__(self, path: str | Path, fps: int) -> None:
        self._av, self._fps, self.path = _av(), fps, Path(path)
        self._partial = self.path.with_suffix(".partial")
        self._container: Any = None
        self._stream: Any = None
        self._size = (0, 0)

    def add(self, frame: UInt8Image) -> None:
        """Append a frame, uint8, H×W×3; odd sides get one more row or column, as H.264 knows even ones only.

        Raises:
            InputError: If its size is not that of the first, or the file cannot be written.
        """
        if self._container is None:
            self._open(*frame.shape[:2])
        if frame.shape[:2] != self._size:
            raise InputError(f"a frame of {frame.shape[:2]} in a video of {self._size}: give one size")
        height, width = self._size
        padded = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        planes = cv2.cvtColor(np.ascontiguousarray(padded), cv2.COLOR_RGB2YUV_I420)
        self._mux(self._av.VideoFrame.from_ndarray(planes, format="yuv420p"))

    def close(self) -> None:
        """Finish the file; without frames, there is none."""
        if self._container is None:
            return
        self._mux(None)
        self._container.close()
        self._container = None
        sync(self._partial)
        os.replace(self._partial, self.path)

    def _open(self, height: int, width: int) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            faststart = {"movflags": "+faststart"}
            self._container = self._av.open(str(self._partial), "w", format="mp4", options=faststart)
        except OSError as error:
            raise InputError(f"cannot write {self.path} ({error}): choose another folder") from error
        self._size = (height, width)
        options = {"crf": "24", "preset": "veryfast", "threads": "1"}
        self._stream = self._container.add_stream("libx264", rate=self._fps, options=options)
        self._stream.height, self._stream.width = height + height % 2, width + width % 2
        self._stream.pix_fmt = "yuv420p"

    def _mux(self, frame: Any) -> None:
        for packet in self._stream.encode(frame):
            self._container.mux(packet)


def sample_frames(path: str | Path, n: int) -> list[UInt8Image]:
    """Decode ``n`` frames of a video (or all, if fewer), uint8, H×W×3, evenly spread, with the first and the last.

    Raises:
        InputError: If the file is missing or damaged.
    """
    av = _av()
    try:
        with av.open(str(path), format="mp4") as container:  # nothing that would name further files
            stream = container.streams.video[0]
            total = stream.frames or sum(1 for _ in container.decode(stream))
            container.seek(0, stream=stream)
            wanted = set(np.linspace(0, total - 1, min(n, total)).round().astype(int).tolist())
            frames = (frame for index, frame in enumerate(container.decode(stream)) if index in wanted)
            return [np.asarray(frame.to_ndarray(format="rgb24"), dtype=np.uint8) for frame in frames]
    except (av.FFmpegError, IndexError, OSError) as error:
        raise InputError(f"{path} cannot be decoded ({error}): delete it, the report does without") from error


def frames_of(path: str | Path) -> Iterator[UInt8Image]:
    """Decode all frames of a video, one after the other, uint8, H×W×3.

    Raises:
        InputError: If the file is missing or damaged.
    """
    av = _av()
    try:
        with av.open(str(path), format="mp4") as container:
            for frame in container.decode(video=0):
                yield np.asarray(frame.to_ndarray(format="rgb24"), dtype=np.uint8)
    except (av.FFmpegError, IndexError, OSError) as error:
        raise InputError(f"{path} cannot be decoded ({error}): delete it and play the episode again") from error


def _av() -> Any:
    try:
        return importlib.import_module("av")
    except ModuleNotFoundError as error:
        raise MissingExtraError("report", "Making videos") from error
