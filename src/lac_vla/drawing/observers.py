"""Observers of an episode that draw it: its overlay video, and a picture of a failure."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lac_vla.drawing.overlay import camera_overlays, heat, reuse_text, step_picture
from lac_vla.drawing.picture import caption, jpeg, side_by_side, stacked
from lac_vla.drawing.video import VideoFile
from lac_vla.engine.budget import frames_of_age
from lac_vla.engine.step_info import StepInfo
from lac_vla.errors import InputError
from lac_vla.files import write_whole
from lac_vla.types import Frame, UInt8Image

MOMENTS = 4
"""A failure's picture shows so many calls, evenly spread, the last one among them."""
HEIGHT = 128
"""Least height of a camera's picture of a failure, pixels."""


class EpisodeVideo:
    """The overlay video of one episode, in real time: a picture stands as long as the actions of its call take.

    Args:
        path: Path of the ``.mp4`` file.
        method: Name of the method, for the caption.
        fps: World steps per second; 20 is real time in LIBERO.
        actions_per_call: World steps per call of the model.
    """

    def __init__(self, path: str | Path, method: str, fps: int = 20, actions_per_call: int = 1) -> None:
        self.path = Path(path)
        self._file = VideoFile(path, fps)
        self._method, self._fps, self._actions_per_call = method, fps, actions_per_call
        self._steps = 0
        self._last: UInt8Image | None = None

    def add(self, frame: Frame, step: StepInfo) -> None:
        """Add a call of the model; see :class:`lac_vla.engine.step_info.StepObserver`."""
        self._last = step_picture(step, self._method, self._steps)
        self._repeat(self._last, self._actions_per_call)
        self._steps += self._actions_per_call

    def close(self, *, success: bool) -> Path | None:
        """Hold the last picture for a second, framed green if the task was solved, else red; ``None`` without calls."""
        if self._last is None:
            return None
        framed = self._last.copy()
        colour = (0, 158, 115) if success else (213, 60, 60)
        for edge in (framed[:6], framed[-6:], framed[:, :6], framed[:, -6:]):
            edge[...] = colour
        self._repeat(framed, self._fps)
        self._file.close()
        return self.path

    def _repeat(self, picture: UInt8Image, frames: int) -> None:
        for _ in range(frames):
            self._file.add(picture)


class FailurePicture:
    """Leaves a picture of some moments of an episode that fails; a solved one leaves nothing.

    Each column is a call of the model: above, what was recomputed; below, the age of every token, dark for fresh.

    Args:
        path: Path of the ``.jpg`` file; its folder is created.
        horizon: World steps of an episode that fails.
        max_age: The age that is brightest, control steps.
        actions_per_call: World steps per call of the model.
    """

    def __init__(self, path: str | Path, horizon: int, max_age: int, actions_per_call: int = 1) -> None:
        self.path = Path(path)
        self._max_age, self._actions_per_call = frames_of_age(max_age, actions_per_call), actions_per_call
        calls = -(-horizon // actions_per_call)
        self._wanted = set(np.linspace(0, calls - 1, MOMENTS + 1).round().astype(int).tolist()[1:])
        self._count = 0
        self._steps: list[tuple[int, StepInfo]] = []

    def add(self, frame: Frame, step: StepInfo) -> None:
        """Add a call of the model; see :class:`lac_vla.engine.step_info.StepObserver`."""
        if self._count in self._wanted:
            self._steps.append((self._count * self._actions_per_call, step))
        self._count += 1

    def close(self, *, success: bool) -> Path | None:
        """Write the picture of a failure, or raise :class:`InputError`; give its path, ``None`` after a success."""
        if success or not self._steps:
            return None
        picture = side_by_side([self._moment(number, step) for number, step in self._steps])
        try:
            write_whole(self.path, jpeg(picture, quality=80))
        except OSError as error:
            raise InputError(f"cannot write {self.path} ({error}): choose another folder") from error
        return self.path

    def _moment(self, number: int, step: StepInfo) -> UInt8Image:
        drawn = []
        for camera in step.layout.cameras:
            ages = step.age[camera.tokens].reshape(camera.rows, camera.cols).astype(np.float32)
            drawn.append(heat(step.pixels[camera.name], ages, (0, self._max_age), height=HEIGHT))
        both = stacked([side_by_side(camera_overlays(step, HEIGHT)), side_by_side(drawn)])
        return caption(both, f"step {number}", reuse_text(step))
