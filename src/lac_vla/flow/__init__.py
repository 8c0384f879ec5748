"""Optical flow between adjacent frames: the motion channels of a policy's input. ``lac bench`` shows what it costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from lac_vla.errors import InputError
from lac_vla.flow.dis import DISFlow
from lac_vla.flow.raft import RAFTFlow
from lac_vla.types import FloatArray, UInt8Image


class Flow(Protocol):
    """Estimates the apparent motion from one image to the next."""

    def __call__(self, previous: UInt8Image, current: UInt8Image) -> FloatArray:
        """Estimate flow in pixels from ``previous`` to ``current`` (uint8, H×W×3), float32, H×W×2 (x, y)."""
        ...

    def macs(self, height: int, width: int) -> int:
        """Count MACs for a pair of images of this size; 0 where there are no matrix products to count."""
        ...


FLOWS: dict[str, Callable[..., Flow | None]] = {"dis": DISFlow, "raft_small": RAFTFlow, "none": lambda: None}
"""Name → factory. ``none`` leaves the inputs without flow: policies fall back on pixel change."""


def make_flow(name: str) -> Flow | None:
    """Make the flow estimator of that name.

    Args:
        name: A key of :data:`FLOWS`; behind a colon may follow its first option: ``raft_small:FILE``, ``dis:medium``.

    Raises:
        InputError: If there is none of that name.
        CheckpointError: If it has weights, and they cannot be read.
    """
    kind, colon, option = name.partition(":")
    if kind not in FLOWS:
        raise InputError(f"unknown flow {name!r}; choose one of {sorted(FLOWS)}")
    try:
        return FLOWS[kind](option) if colon else FLOWS[kind]()
    except TypeError as error:
        raise InputError(f"flow {kind!r} does not take {option!r}: {error}") from error


def policy_flow(name: str) -> str:
    """Name a flow as a policy's file does: the estimator, and no file of weights.

    Raises:
        InputError: If there is none of that name.
    """
    kind = name.partition(":")[0]
    if kind != "raft_small":
        make_flow(name)
        return name
    return kind


def estimate(
    flow: Flow, previous: Mapping[str, UInt8Image], current: Mapping[str, UInt8Image]
) -> dict[str, FloatArray]:
    """Estimate the flow of every camera."""
    return {camera: flow(previous[camera], image) for camera, image in current.items()}


def flow_macs(flow: Flow, images: Mapping[str, UInt8Image]) -> int:
    """Count the multiply-accumulates of the flow of every camera."""
    return sum(flow.macs(*image.shape[:2]) for image in images.values())


__all__ = ["FLOWS", "DISFlow", "Flow", "RAFTFlow", "estimate", "flow_macs", "make_flow", "policy_flow"]
