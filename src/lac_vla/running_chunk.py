"""The running chunk, as a session must know it to answer in real time: the contract of real-time chunking.

A session takes it with the observation, ``session.act(frame, RealTimeChunk(left_over, inference_delay=2))``, and so do
the server, under the fields' names, and :class:`lac_vla.client.remote.RemoteSession`.

Source: Real-Time Execution of Action Chunking Flow Policies (Black et al., 2025, arXiv 2506.07339). The names are
LeRobot's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from lac_vla.errors import InputError
from lac_vla.types import FloatArray

PrefixAttentionSchedule: TypeAlias = Literal["zeros", "ones", "linear", "exp"]
MAX_GUIDANCE_WEIGHT = 5.0
"""β of the paper; its guidance is unstable with few steps if it is much larger."""


@dataclass(frozen=True, eq=False)
class RealTimeChunk:
    """The running chunk, as far as it is not executed, and how long the next one will take.

    Row 0 of the left-over is the action that runs at the moment of the observation; so is row 0 of the next chunk. The
    answer's first ``inference_delay`` actions are the left-over's: they run before the answer is there. Those behind
    them are drawn towards the left-over, ever less.

    Attributes:
        prev_chunk_left_over: Actions of the running chunk that are not executed yet, in the robot's own units, float32,
            (n, A); of no rows before the first chunk.
        inference_delay: Control steps from the observation until its answer acts, d.
        execution_horizon: Actions that the left-over guides at all, counted from the first; by default all that are
            left, the paper's H − s.
        max_guidance_weight: Most weight of the guidance against the model's own velocity, β.
        prefix_attention_schedule: Weights of the guided actions behind the frozen ones: ``"exp"`` (the paper's, eq. 5),
            ``"linear"``, ``"ones"``, or ``"zeros"``, which guides the frozen ones alone.

    Raises:
        InputError: If a value makes no sense, or the delay is longer than what is left.
    """

    prev_chunk_left_over: FloatArray
    inference_delay: int = 0
    execution_horizon: int | None = None
    max_guidance_weight: float = MAX_GUIDANCE_WEIGHT
    prefix_attention_schedule: PrefixAttentionSchedule = "exp"

    def __post_init__(self) -> None:
        """Check the values."""
        left, delay, end = self.prev_chunk_left_over, self.inference_delay, self.execution_horizon
        if not isinstance(left, np.ndarray) or left.ndim != 2 or left.dtype.kind not in "biuf":
            raise InputError("prev_chunk_left_over must be an array of numbers, (n, A), one action a row")
        if not np.isfinite(left).all():
            raise InputError("prev_chunk_left_over holds NaN or infinity: stop the robot")
        if not _whole(delay) or delay < 0:
            raise InputError(f"inference_delay is {delay!r}; give a whole number of control steps, from 0 on")
        if delay > len(left):
            raise InputError(
                f"the answer takes {delay} control steps (inference_delay), but only {len(left)} actions of the "
                "running chunk are left: ask earlier, or execute fewer actions of a chunk"
            )
        if end is not None and (not _whole(end) or end < max(delay, 1)):
            raise InputError(f"execution_horizon is {end!r}; give a whole number from 1 and from inference_delay on")
        most: object = self.max_guidance_weight
        if not isinstance(most, int | float | np.number) or not 0 < most < np.inf:
            raise InputError(f"max_guidance_weight is {most!r}; give a number above 0, e.g. 5")
        if str(self.prefix_attention_schedule) not in get_args(PrefixAttentionSchedule):
            known = ", ".join(get_args(PrefixAttentionSchedule))
            raise InputError(f"prefix_attention_schedule is {self.prefix_attention_schedule!r}; choose one of {known}")

    @classmethod
    def of_request(cls, request: Mapping[str, Any]) -> RealTimeChunk | None:
        """Read what a client sends along with an observation, under the fields' names; all but the first are optional.

        Returns:
            ``None`` where there is no left-over, or it is nil.

        Raises:
            InputError: As the class does.
        """
        given = {field.name: request[field.name] for field in fields(cls) if request.get(field.name) is not None}
        return cls(**given) if "prev_chunk_left_over" in given else None

    def to_request(self) -> dict[str, Any]:
        """Write what :meth:`of_request` reads."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def check(self, horizon: int, action_dim: int) -> None:
        """Check that the left-over may be one of a model's chunks, (horizon, action_dim).

        Raises:
            InputError: If not.
        """
        rows, values = self.prev_chunk_left_over.shape
        if horizon < 2:
            raise InputError("this model answers with single actions: there is no chunk to go on with in real time")
        if self.inference_delay >= horizon:
            raise InputError(
                f"the answer takes {self.inference_delay} control steps (inference_delay), and a chunk is {horizon} "
                "actions long: nothing of it would be left to execute"
            )
        if rows > horizon or (rows and values != action_dim):
            raise InputError(
                f"prev_chunk_left_over has shape {(rows, values)}; the model's chunks are {(horizon, action_dim)}"
            )

    def weights(self, horizon: int) -> npt.NDArray[np.float32]:
        """Compute the weight of every action of the next chunk, eq. 5, (horizon,): 1 where frozen, then falling."""
        end = len(self.prev_chunk_left_over)
        end = end if self.execution_horizon is None else min(end, self.execution_horizon)
        delay, index = self.inference_delay, np.arange(horizon)
        falling = np.clip((end - index) / (end - delay + 1), 0.0, 1.0)
        behind = {
            "zeros": np.zeros(horizon),
            "ones": np.ones(horizon),
            "linear": falling,
            "exp": falling * np.expm1(falling) / np.expm1(1.0),
        }[self.prefix_attention_schedule]
        weights = np.where(index < delay, 1.0, np.where(index < end, behind, 0.0))
        return weights.astype(np.float32)

    def padded(self, horizon: int) -> FloatArray:
        """Fill the left-over up with zeros, which weigh nothing, float32, (horizon, A)."""
        left = self.prev_chunk_left_over.astype(np.float32)
        return np.pad(left, ((0, horizon - len(left)), (0, 0)))

    def join(self, chunk: FloatArray, *, guided: bool) -> FloatArray:
        """Put the frozen actions in place; and blend the others with the left-over where nothing has guided them.

        Args:
            chunk: As the model answers, (horizon, A).
            guided: Whether the left-over has guided it.

        Returns:
            As ``chunk``.
        """
        if not len(self.prev_chunk_left_over):
            return chunk
        weights, left = self.weights(len(chunk))[:, None], self.padded(len(chunk))
        joined = chunk if guided else (weights * left + (1 - weights) * chunk).astype(chunk.dtype)
        frozen = np.arange(len(chunk))[:, None] < self.inference_delay
        return np.where(frozen, left, joined).astype(chunk.dtype)


def _whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
