"""A film on one wall clock: methods side by side in the same world time, each as far as it has come by then."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from lac_vla.drawing.overlay import RECOMPUTED, overlay, reuse_text
from lac_vla.drawing.picture import INK, PAPER, caption, footnote, side_by_side
from lac_vla.drawing.video import VideoFile, frames_of
from lac_vla.engine.step_info import StepInfo
from lac_vla.errors import InputError
from lac_vla.files import write_whole
from lac_vla.types import Frame, UInt8Image

SIDE = 320
"""Height of a method's picture, pixels."""
BAR = 8
"""Height of the bar that tells the state, pixels."""
ROOM = 158
"""Height of the pictures of what an answer computed, pixels: two square ones fit below the world."""
ACTING, THINKING, SOLVED, FAILED = (86, 180, 233), (230, 159, 0), (0, 158, 115), (213, 60, 60)
"""Colours of the states."""
AFTER_S = 1
"""Seconds for which the end is shown."""
GIF_TRIES = ((10, 1.0, 128), (10, 0.8, 128), (10, 0.8, 64), (5, 0.8, 64), (5, 0.65, 32), (4, 0.5, 32), (2, 0.5, 16))
"""Frames per second, scale and colours of a moving picture, until one is small enough."""
STILL = 12
"""Levels by which a pixel may differ from what a moving picture shows there, and it is left: a video's noise."""


class WorldVideo:
    """The video of one episode in world time: a picture for every tick, whether the policy had answered or not.

    Above is the world at that tick; below, what the last answer computed anew and what it reused.

    Args:
        path: Path of the ``.mp4`` file.
        method: Name of the method, for the caption.
        hz: Ticks per second; the video runs in the world's time.
    """

    def __init__(self, path: str | Path, method: str, hz: float) -> None:
        self.path, self._method, self._hz = Path(path), method, hz
        self._file = VideoFile(path, round(hz))
        self._last: UInt8Image | None = None
        self._answer: tuple[UInt8Image | None, str] = None, "no answer yet"
        self._shown: tuple[UInt8Image | None, str] = self._answer  # by the last tick: a late one is never seen
        self._ticks = 0

    def add(self, frame: Frame, step: StepInfo) -> None:
        """Add an answer, when it is there; see :class:`lac_vla.engine.step_info.StepObserver`."""
        text = "all computed" if step.ratio == 0 else reuse_text(step).split(",")[0]
        looked = [
            overlay(step.pixels[camera.name], (camera.rows, camera.cols), step.active[camera.tokens], height=ROOM)
            for camera in step.layout.cameras
        ]
        sized = [_placed(each, ROOM, round(ROOM * each.shape[1] / each.shape[0])) for each in looked]
        self._answer = side_by_side(sized), text

    def tick(self, frame: Frame, *, thinking: bool) -> None:
        """Add a tick: what the first camera sees, and whether the robot waits for an answer."""
        image = next(iter(frame.images.values()))
        self._last = np.asarray(
            cv2.resize(image, (round(SIDE * image.shape[1] / image.shape[0]), SIDE), interpolation=cv2.INTER_CUBIC)
        )
        self._shown = self._answer
        self._add("thinking" if thinking else "acting", THINKING if thinking else ACTING)
        self._ticks += 1

    def close(self, *, success: bool) -> Path | None:
        """Hold the last picture for a second and finish the file; ``None`` without ticks."""
        if self._last is None:
            return None
        words = f"{'solved' if success else 'not solved'}: {self._ticks / self._hz:.2f} s"
        for _ in range(round(AFTER_S * self._hz)):
            self._add(words, SOLVED if success else FAILED)
        self._file.close()
        return self.path

    def _add(self, state: str, colour: tuple[int, int, int]) -> None:
        if self._last is None:  # pragma: no cover - a tick came before
            return
        width = self._last.shape[1]
        bar = np.full((BAR, width, 3), colour, dtype=np.uint8)
        picture, text = self._shown
        computed = caption(_placed(picture, ROOM, width), "its last answer", text)
        self._file.add(caption(np.concatenate([bar, self._last, computed]), self._method, state))


def _placed(picture: UInt8Image | None, height: int, width: int) -> UInt8Image:
    """Make a picture fit into a room, whose ground is dark; ``None`` leaves it empty."""
    room = np.full((height, width, 3), PAPER, dtype=np.uint8)
    if picture is None:
        return room
    scale = min(height / picture.shape[0], width / picture.shape[1])
    size = round(picture.shape[1] * scale), round(picture.shape[0] * scale)
    left = (width - size[0]) // 2
    room[: size[1], left : left + size[0]] = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    return room


def join(
    videos: Sequence[Path], out: Path, hz: float, words: str, gif: Path | None = None, limit: int = 3_000_000
) -> None:
    """Join world videos into one, under one clock; who is done shows the end until all are.

    Args:
        videos: Of :class:`WorldVideo`.
        out: Path of the ``.mp4`` file.
        hz: Their ticks per second.
        words: What a viewer must know, e.g. whose latencies are played; below the pictures.
        gif: Path of a moving picture of the same; ``None`` for none.
        limit: Bytes that it may have.

    Raises:
        InputError: If a video is missing or damaged, a file cannot be written, or the moving picture is too large even
            when it is coarse.
    """
    if not videos:
        raise InputError("a film needs at least one video")
    film, kept = VideoFile(out, round(hz)), list[UInt8Image]()
    for picture in _pictures(videos, hz, words):
        film.add(picture)
        if gif is not None:
            kept.append(picture)
    film.close()
    if gif is not None:
        write_whole(gif, _moving(kept, hz, limit))


def _pictures(videos: Sequence[Path], hz: float, words: str) -> Iterator[UInt8Image]:
    """Put the videos side by side, tick by tick."""
    sources = [frames_of(video) for video in videos]
    shown: dict[int, UInt8Image] = {}
    tick = 0
    while True:
        new = {number: found for number, source in enumerate(sources) if (found := next(source, None)) is not None}
        if not new:
            return
        shown |= new
        both = side_by_side([shown[number] for number in sorted(shown)])
        yield footnote(caption(both, "one world, one clock", f"{tick / hz:5.2f} s"), words)
        tick += 1


def _moving(pictures: Sequence[UInt8Image], hz: float, limit: int) -> bytes:
    """Encode a GIF, the finest that is small enough; it repeats, and holds its end."""
    for fps, scale, colours in GIF_TRIES:
        step = max(1, round(hz / fps))
        chosen = [*pictures[::step], pictures[-1]]
        size = round(pictures[0].shape[1] * scale), round(pictures[0].shape[0] * scale)
        small = list(_calm(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS) for picture in chosen))
        palette = _palette(small, colours)
        drawn = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in small]
        lasts = [round(1000 * step / hz)] * (len(drawn) - 1) + [2000]
        data = io.BytesIO()
        drawn[0].save(data, "GIF", save_all=True, append_images=drawn[1:], duration=lasts, loop=0, optimize=True)
        if data.tell() <= limit:
            return data.getvalue()
    raise InputError(
        f"a moving picture of {len(pictures)} pictures takes more than {limit} bytes: film a shorter episode, or allow "
        "more"
    )


def _calm(pictures: Iterable[Image.Image]) -> Iterator[Image.Image]:
    """Leave a pixel as it was shown until it changes by more than a video's noise: it then costs nothing."""
    shown: UInt8Image | None = None
    for picture in pictures:
        new = np.asarray(picture)
        if shown is not None:
            still = np.abs(new.astype(np.int16) - shown).max(axis=2, keepdims=True) <= STILL
            new = np.where(still, shown, new)
        shown = new
        yield Image.fromarray(new)


def _palette(pictures: Sequence[Image.Image], colours: int) -> Image.Image:
    """Choose colours from a few pictures; those that mean something are among them, however rare."""
    some = np.concatenate([np.asarray(picture) for picture in pictures[:: max(1, len(pictures) // 6)]])
    kept = [ACTING, THINKING, SOLVED, FAILED, RECOMPUTED, INK, PAPER]
    free = colours - len(kept)
    found = Image.fromarray(some).quantize(free, kmeans=3, dither=Image.Dither.NONE)
    palette = Image.new("P", (1, 1))
    palette.putpalette([*(found.getpalette() or [])[: 3 * free], *(level for colour in kept for level in colour)])
    return palette
