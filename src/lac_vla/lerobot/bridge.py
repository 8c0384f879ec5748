"""A session over LeRobot's batches: turns them into frames, and chunks into actions. It does not need LeRobot."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from lac_vla.bundled import find_model
from lac_vla.checkpoint_files import read_json
from lac_vla.engine.step_info import StepInfo
from lac_vla.errors import InputError
from lac_vla.factory import CachedVLA
from lac_vla.hub import find_folder
from lac_vla.lerobot.self_check import fault, without_cache
from lac_vla.models import is_plugin
from lac_vla.running_chunk import RealTimeChunk
from lac_vla.session import Session
from lac_vla.types import FloatArray, Frame, UInt8Image

LOG = logging.getLogger("lac_vla.lerobot")

IMAGES = "observation.images."
STATE = "observation.state"
TASK = "task"
ROUNDING = 1e-3
"""Distance by which a value may lie outside 0..1."""


class Bridge:
    """A session of one robot, which answers LeRobot's batches.

    Args:
        vla: Model and policy.
        cameras: The model's camera → key of its image in a batch; ``observation.images.<camera>`` for those left out.
        seed: Seed of the session.
        n_action_steps: Actions of a chunk that are executed before the model is asked again.
        self_check: See :func:`lac_vla.lerobot.self_check.fault`: on the first observation, before it is answered.

    Attributes:
        cameras: Camera → key of its image.
        horizon: Actions of a chunk.
        fault: What the check found, so that all is computed without a cache now; ``None`` for nothing.

    Raises:
        InputError: If a camera is none of the model's, or its chunks have fewer actions.
    """

    def __init__(
        self,
        vla: CachedVLA,
        cameras: Mapping[str, str] | None = None,
        seed: int = 0,
        n_action_steps: int = 1,
        *,
        self_check: bool = False,
    ) -> None:
        names = list(vla.model.grids)
        if unknown := sorted(set(cameras or {}) - set(names)):
            raise InputError(f"the model has no camera {unknown}; it has {names}")
        self.cameras = {name: (cameras or {}).get(name, IMAGES + name) for name in names}
        self.horizon = vla.model.horizon
        if not 1 <= n_action_steps <= self.horizon:
            raise InputError(f"n_action_steps is {n_action_steps}; give 1 to {self.horizon}, the length of a chunk")
        self._vla, self._seed, self._n_action_steps = vla, seed, n_action_steps
        self._session = self._begin(vla)
        self._unchecked = self_check
        self.fault: str | None = None
        self._queue: deque[FloatArray] = deque()

    def _begin(self, vla: CachedVLA) -> Session:
        session = vla.session(self._seed)
        session.steps_per_frame = self._n_action_steps
        return session

    @property
    def supports_rtc(self) -> bool:
        """Tell whether the model can go on with a running chunk."""
        head = self._vla.model.head
        try:
            head.check_rtc(RealTimeChunk(np.zeros((0, head.action_dim), dtype=np.float32)))
        except InputError:
            return False
        return True

    @property
    def last_info(self) -> StepInfo | None:
        """The report of the last frame that the model answered."""
        return self._session.last_info

    def reset(self) -> None:
        """Begin a new episode; what is left of the last chunk is dropped."""
        self._session.reset()
        self._queue.clear()

    def next_action(self, batch: Mapping[str, Any]) -> FloatArray:
        """Return the next action of the chunk, float32, (A,); ask the model, see :meth:`act`, when none is left."""
        if not self._queue:
            self._queue.extend(self.act(batch)[: self._n_action_steps])
        return self._queue.popleft()

    def act(self, batch: Mapping[str, Any], rtc: RealTimeChunk | None = None) -> FloatArray:
        """Answer a batch of one with a whole chunk.

        Args:
            batch: The observation, see :func:`frame_of`.
            rtc: See :meth:`lac_vla.session.Session.act`.

        Returns:
            The actions, float32, (horizon, A), in the robot's units.

        Raises:
            InputError: If the batch cannot be used; the session is as it was.
        """
        frame = frame_of(batch, self.cameras)
        if self._unchecked:
            self.fault = fault(self._vla, frame, self._seed)
            self._unchecked = False
            if self.fault is not None:
                LOG.warning("%s; from now on every frame is computed in full, without options", self.fault)
                self._session = self._begin(without_cache(self._vla))
        return np.atleast_2d(self._session.act(frame, rtc))


def own_action_steps(model: str) -> int:
    """Read how many actions of a chunk LeRobot executes by a checkpoint of its own; 1 of any other model's.

    Args:
        model: Name of a bundled model, checkpoint folder, hub id, or plug-in.
    """
    if is_plugin(model):
        return 1
    steps = read_json(find_folder(find_model(model), ("config.json",)) / "config.json").get("n_action_steps", 1)
    return steps if isinstance(steps, int) else 1


def running_chunk(left_over: Any, inference_delay: int | None, horizon: int, settings: Any) -> RealTimeChunk | None:
    """Make of LeRobot's arguments what a session takes.

    Args:
        left_over: What is left of the running chunk, (n, A) or (1, n, A). LeRobot fills it up to its execution
            horizon with rows of zeros, which are no actions: frozen, they would be executed where the delay is
            overestimated. So zeros at the end of as many rows are taken for filling; of other numbers they are actions.
        inference_delay: Control steps until the answer acts. LeRobot's is an estimate: it may exceed what is left.
        horizon: Actions of a chunk.
        settings: LeRobot's ``RTCConfig``; ``None`` for the library's own.

    Returns:
        ``None`` if nothing is left.

    Raises:
        InputError: If they cannot be read.
    """
    rows = torch.as_tensor(left_over).detach().float().cpu().numpy()
    rows = rows[0] if rows.ndim == 3 and len(rows) == 1 else rows
    if rows.ndim != 2:
        raise InputError(f"prev_chunk_left_over has shape {rows.shape}; give the actions of one robot, (n, A)")
    if settings is None or len(rows) == int(settings.execution_horizon):
        rows = rows[: 1 + int(np.flatnonzero(rows.any(axis=1)).max(initial=-1))]
    if not len(rows):
        return None
    delay = min(int(inference_delay or 0), len(rows), horizon - 1)
    if settings is None:
        return RealTimeChunk(rows, delay)
    schedule = str(getattr(settings.prefix_attention_schedule, "value", settings.prefix_attention_schedule)).lower()
    end = max(int(settings.execution_horizon), delay, 1)
    return RealTimeChunk(rows, delay, end, float(settings.max_guidance_weight), schedule)  # type: ignore[arg-type]


def frame_of(batch: Mapping[str, Any], cameras: Mapping[str, str]) -> Frame:
    """Make the frame of a batch of one.

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
    """Return uint8, (H, W, 3), exactly the image that became a float image by division by 255."""
    image = _one(value, key, 4)
    if image.is_floating_point():
        if not (image.amin() >= -ROUNDING and image.amax() <= 1 + ROUNDING):  # NaN is outside, too
            raise InputError(f"{key} has values outside 0..1: give images that are not normalised")
        image = (image.float() * 255).round().clamp(0, 255).to(torch.uint8)
    if image.dtype != torch.uint8 or image.shape[0] != 3:
        raise InputError(f"{key} is {image.dtype} {tuple(image.shape)}; give float in 0..1 or uint8, 3×H×W")
    return np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy())


def _one(value: Any, key: str, dims: int) -> torch.Tensor:
    """Return the only item of a batch."""
    if not isinstance(value, torch.Tensor) or value.ndim != dims:
        shape = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise InputError(f"{key} is {shape}; give a tensor of {dims} dimensions, the batch first")
    if len(value) != 1:
        raise InputError(f"{key} is of {len(value)} robots; a cache belongs to one: use a batch size of 1")
    return value[0]
