"""A session remembers of its frames, on the host: ages, reference pixels, the last frame, probed attention.

Every visual slot knows its age and the pixels it was computed from, so that staleness is bounded and visible.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from lac_vla.errors import InputError
from lac_vla.types import BoolArray, CameraGrid, Decision, Frame, IntArray, TokenLayout, UInt8Image


class OutdatedPlanError(InputError):
    """A plan whose session has gone on since; nothing was touched."""


class FrameMemory:
    """The host's side of one session's cache; its keys and values lie in the engine's store.

    It is warm after :meth:`commit`; from :meth:`begin` until then it is cold, so that a frame which fails half way can
    never be built upon.

    Attributes:
        layout: Of the frame that the cache holds; ``None`` while it has held none.
        age: Frames since each visual slot was last computed in every layer, int64, (N,).
        pixels: Camera → last frame's image.
        reference: Camera → image of the pixels that each slot was computed from.
        instruction: Of the last frame.
        attention: Layer → probed attention of the last frame.
        stems: Camera → the last picture, as the robot gave it (a copy), and the vision stem of it.
        warm: Whether the visual slots may be reused.
        version: Counts the changes of the cache: a plan is made for one of them.
    """

    def __init__(self) -> None:
        self.layout: TokenLayout | None = None
        self.age: IntArray = np.zeros(0, dtype=np.int64)
        self.pixels: Mapping[str, UInt8Image] = {}
        self.reference: dict[str, UInt8Image] = {}
        self.instruction = ""
        self.attention: dict[int, torch.Tensor] = {}
        self.stems: dict[str, tuple[UInt8Image, Any]] = {}
        self.warm = False
        self.version = 0

    def begin(self, version: int | None = None) -> None:
        """Open a frame, or forget the visual slots: cold until :meth:`commit`.

        Args:
            version: That for which the frame was planned; ``None`` for any.

        Raises:
            OutdatedPlanError: If the cache has changed since.
        """
        if version not in (None, self.version):
            raise OutdatedPlanError(
                "the session has gone on since this plan was made: make a new one by session.plan(frame)"
            )
        self.warm = False
        self.version += 1

    def copied(self, frame: Frame) -> Frame:
        """Copy a frame's pictures: the robot may write into its buffers while the frame is computed, and afterwards.

        A picture that is the last one to the bit becomes the remembered array itself.
        """
        return replace(frame, images={name: self._copied(name, image) for name, image in frame.images.items()})

    def _copied(self, camera: str, image: UInt8Image) -> UInt8Image:
        last = self.stems[camera][0] if camera in self.stems else None
        return last if last is not None and np.array_equal(last, image) else image.copy()

    def unchanged(self, frame: Frame) -> dict[str, Any]:
        """Find the vision stems of pictures that are the last ones, of a frame from :meth:`copied`: camera → stem."""
        if not self.warm or frame.instruction != self.instruction:
            return {}
        return {name: stem for name, (picture, stem) in self.stems.items() if frame.images.get(name) is picture}

    def keep_stems(self, frame: Frame, stems: Mapping[str, Any]) -> None:
        """Keep the vision stems of a frame that is closed, and its pictures: it is from :meth:`copied`."""
        kept = {name for name, (_, old) in self.stems.items() if stems.get(name) is old}
        self.stems = {
            name: self.stems[name] if name in kept else (frame.images[name], owned(stem))
            for name, stem in stems.items()
        }

    @property
    def nbytes(self) -> int:
        """Memory of the vision stems and of the pictures that they were made of, in bytes."""
        return sum(picture.nbytes + sum(part.nbytes for part in tensors(stem)) for picture, stem in self.stems.values())

    def commit(
        self,
        layout: TokenLayout,
        pixels: Mapping[str, UInt8Image],
        instruction: str,
        decision: Decision,
        attention: dict[int, torch.Tensor],
        elapsed: int = 1,
    ) -> None:
        """Close a frame: its slots may be reused by the next one.

        Args:
            layout: Where the frame's tokens are.
            pixels: Camera → what the model saw.
            instruction: The frame's.
            decision: What was computed.
            attention: Layer → probed attention.
            elapsed: Frames by which the slots that were not computed grew older; 0 for a frame seen before.
        """
        active = decision.active
        if self.layout is None or self.layout.grids != layout.grids:  # all is active then
            self.age = np.zeros(layout.n_visual, dtype=np.int64)
            self.reference = {}
        self.age = np.where(active, 0, self.age + elapsed).astype(np.int64)
        for camera in layout.cameras:
            image = pixels[camera.name]
            if active[camera.tokens].all():
                self.reference[camera.name] = image.copy()
            else:
                copy_patches(self.reference[camera.name], image, active[camera.tokens], camera)
        self.layout, self.pixels, self.instruction, self.warm = layout, dict(pixels), instruction, True
        self.attention = attention


def tensors(stem: Any) -> Iterator[torch.Tensor]:
    """List the tensors of a vision stem: it is one, or they are in lists and tuples."""
    if isinstance(stem, torch.Tensor):
        yield stem
    else:
        for part in stem:
            yield from tensors(part)


def owned(stem: Any) -> Any:
    """Copy a vision stem of one camera, so that it does not hold the memory of a whole batch."""
    return stem.clone() if isinstance(stem, torch.Tensor) else [owned(part) for part in stem]


def copy_patches(target: UInt8Image, source: UInt8Image, tokens: BoolArray, camera: CameraGrid) -> None:
    """Copy the patches of ``tokens`` (bool, (rows·cols,)) from one H×W×3 image into another, in place."""
    height, width, channels = source.shape
    shape = (camera.rows, height // camera.rows, camera.cols, width // camera.cols, channels)
    chosen = tokens.reshape(camera.rows, camera.cols)
    target.reshape(shape).swapaxes(1, 2)[chosen] = source.reshape(shape).swapaxes(1, 2)[chosen]
