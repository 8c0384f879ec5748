"""From LeRobot's batches to frames, and a session behind them. LeRobot itself is not needed here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from lac_vla.engine.step_info import StepInfo
from lac_vla.errors import InputError
from lac_vla.factory import CachedVLA
from lac_vla.types import FloatArray, Frame, UInt8Image

IMAGES = "observation.images."
STATE = "observation.state"
TASK = "task"
ROUNDING = 1e-3
"""By how much a value may lie outside 0..1."""


class Bridge:
    """One robot, as LeRobot sees it.

    Args:
        vla: Backbone and policy.
        cameras: The model's camera → key of its image in a batch; ``observation.images.<camera>`` for those left out.
        seed: Of chance.

    Raises:
        InputError: If a camera is none of the model's.
    """

    def __init__(self, vla: CachedVLA, cameras: Mapping[str, str] | None = None, seed: int = 0) -> None:
        names = list(vla.model.grids)
        if unknown := sorted(set(cameras or {}) - set(names)):
            raise InputError(f"the model has no camera {unknown}; it has {names}")
        self.cameras = {name: (cameras or {}).get(name, IMAGES + name) for name in names}
        self._session = vla.session(seed)

    @property
    def last_info(self) -> StepInfo | None:
        """What the last :meth:`act` did."""
        return self._session.last_info

    def reset(self) -> None:
        """Begin a new episode."""
        self._session.reset()

    def act(self, batch: Mapping[str, Any]) -> FloatArray:
        """Answer a batch of one.

        Args:
            batch: See :func:`frame_of`.

        Returns:
            The actions, float32, (horizon, A), in the robot's units.

        Raises:
            InputError: If the batch cannot be used; the session is as it was.
        """
        return np.atleast_2d(self._session.act(frame_of(batch, self.cameras)))


def frame_of(batch: Mapping[str, Any], cameras: Mapping[str, str]) -> Frame:
    """The frame of a batch of one.

    Args:
        batch: Images, (1, 3, H, W), float in 0..1 or uint8; ``observation.state``, (1, S), if there is one; ``task``,
            a text or a list of one.
        cameras: Camera → key of its image.

    Raises:
        InputError: If something is missing, or is not what it should be.
    """
    if missing := [key for key in cameras.values() if key not in batch]:
        found = sorted(key for key in batch if "image" in key)
        raise InputError(f"the observation has no {missing}, its images are {found}; say which is which with cameras")
    task = batch.get(TASK)
    if isinstance(task, list | tuple) and len(task) == 1:
        task = task[0]
    if not isinstance(task, str):
        raise InputError(f"task is {task!r:.60}; the policy needs the instruction of one robot, a text")
    images = {camera: _image(batch[key], key) for camera, key in cameras.items()}
    state = batch.get(STATE)
    return Frame(images, task, None if state is None else _one(state, STATE, 2).float().cpu().numpy())


def _image(value: Any, key: str) -> UInt8Image:
    """H×W×3; exactly the image that became a float image by division by 255."""
    image = _one(value, key, 4)
    if image.is_floating_point():
        if not (image.amin() >= -ROUNDING and image.amax() <= 1 + ROUNDING):  # NaN is outside, too
            raise InputError(f"{key} has values outside 0..1: give images that are not normalised")
        image = (image.float() * 255).round().clamp(0, 255).to(torch.uint8)
    if image.dtype != torch.uint8 or image.shape[0] != 3:
        raise InputError(f"{key} is {image.dtype} {tuple(image.shape)}; give float in 0..1 or uint8, 3×H×W")
    return np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy())


def _one(value: Any, key: str, dims: int) -> torch.Tensor:
    """The only item of a batch."""
    if not isinstance(value, torch.Tensor) or value.ndim != dims:
        shape = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise InputError(f"{key} is {shape}; give a tensor of {dims} dimensions, the batch first")
    if len(value) != 1:
        raise InputError(f"{key} is of {len(value)} robots; a cache belongs to one: use a batch size of 1")
    return value[0]
