"""Optical flow between adjacent frames: the motion channels of a policy's input (paper: RAFT-small).

DIS is the default: on a CPU it costs a small part of what RAFT-small does; `lac bench` shows it as a stage of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import cv2
import numpy as np

from lac_vla.errors import InputError
from lac_vla.types import FloatArray, UInt8Image


class Flow(Protocol):
    """Estimates the apparent motion from one image to the next."""

    def __call__(self, previous: UInt8Image, current: UInt8Image) -> FloatArray:
        """Flow in pixels from ``previous`` to ``current`` (both uint8, H×W×3), float32, H×W×2 (x, y)."""
        ...


@dataclass(frozen=True)
class DISFlow:
    """Dense Inverse Search flow (Kroeger et al., ECCV 2016, arXiv 1603.03590), by OpenCV.

    Attributes:
        preset: ``"ultrafast"``, ``"fast"`` or ``"medium"``, from the cheapest to the finest.
    """

    preset: str = "fast"

    def __post_init__(self) -> None:
        if self.preset not in _DIS_PRESETS:
            raise InputError(f"unknown DIS preset {self.preset!r}; choose one of {sorted(_DIS_PRESETS)}")

    @cached_property
    def _engines(self) -> dict[tuple[int, ...], cv2.DISOpticalFlow]:
        """One per image size: OpenCV's estimator fits its pyramid to a small image and keeps it for larger ones."""
        return {}

    def __call__(self, previous: UInt8Image, current: UInt8Image) -> FloatArray:
        """See :class:`Flow`."""
        first, second = (cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in (previous, current))
        engine = self._engines.get(first.shape)
        if engine is None:
            engine = self._engines[first.shape] = cv2.DISOpticalFlow.create(_DIS_PRESETS[self.preset])
        return np.asarray(engine.calc(first, second, None), dtype=np.float32)


_DIS_PRESETS = {
    "ultrafast": cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST,
    "fast": cv2.DISOPTICAL_FLOW_PRESET_FAST,
    "medium": cv2.DISOPTICAL_FLOW_PRESET_MEDIUM,
}

FLOWS: dict[str, Callable[[], Flow | None]] = {"dis": DISFlow, "none": lambda: None}
"""Name → factory. ``none`` leaves the view without flow: policies fall back on pixel change."""


def make_flow(name: str) -> Flow | None:
    """The flow estimator of that name.

    Raises:
        InputError: If there is none of that name.
    """
    if name not in FLOWS:
        raise InputError(f"unknown flow {name!r}; choose one of {sorted(FLOWS)}")
    return FLOWS[name]()


def estimate(
    flow: Flow, previous: Mapping[str, UInt8Image], current: Mapping[str, UInt8Image]
) -> dict[str, FloatArray]:
    """Flow of every camera."""
    return {camera: flow(previous[camera], image) for camera, image in current.items()}
