"""Dense Inverse Search: the default, for what RAFT-small costs on a CPU is many times more."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np

from lac_vla.errors import InputError
from lac_vla.types import FloatArray, UInt8Image


@dataclass(frozen=True)
class DISFlow:
    """Dense Inverse Search flow (Kroeger et al., ECCV 2016, arXiv 1603.03590), by OpenCV.

    Attributes:
        preset: ``"ultrafast"``, ``"fast"`` or ``"medium"``, from the cheapest to the finest.
        finest: Pyramid level at which it stops, 0 being the image itself; ``None`` for the preset's. A policy needs
            motion by patch, for which half the resolution is enough; a quarter, the cheap presets' own, is too little
            for images of 112 pixels, and an image too small for the preset's level is done at its full resolution.
    """

    preset: str = "ultrafast"
    finest: int | None = 1

    def __post_init__(self) -> None:
        if self.preset not in _DIS_PRESETS:
            raise InputError(f"unknown DIS preset {self.preset!r}; choose one of {sorted(_DIS_PRESETS)}")
        if self.finest is not None and self.finest < 0:
            raise InputError(f"finest is {self.finest}; give a pyramid level, 0 for the image's own resolution")

    @cached_property
    def _engines(self) -> dict[tuple[int, ...], cv2.DISOpticalFlow]:
        """One per image size: OpenCV's estimator fits its pyramid to a small image and keeps it for larger ones."""
        return {}

    def __call__(self, previous: UInt8Image, current: UInt8Image) -> FloatArray:
        """See :class:`lac_vla.flow.Flow`."""
        first, second = (cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in (previous, current))
        engine = self._engines.get(first.shape)
        if engine is None:
            engine = self._engines[first.shape] = cv2.DISOpticalFlow.create(_DIS_PRESETS[self.preset])
            if self.finest is not None:
                engine.setFinestScale(self.finest)
        return np.asarray(engine.calc(first, second, None), dtype=np.float32)

    def macs(self, height: int, width: int) -> int:
        """Return 0: it has no matrix products, and what it takes shows in the time of the stage ``flow``."""
        return 0


_DIS_PRESETS = {
    "ultrafast": cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST,
    "fast": cv2.DISOPTICAL_FLOW_PRESET_FAST,
    "medium": cv2.DISOPTICAL_FLOW_PRESET_MEDIUM,
}
