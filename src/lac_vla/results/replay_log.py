"""The lines of ``frames.jsonl``, which ``lac replay`` writes: what every policy did in a recorded episode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Calls:
    """A policy's deeds in an episode, call by call of the model from the second on: the first computes everything.

    Attributes:
        divergence: Of the answer from dense's, by the head's loss, (T,).
        active: Share of the visual tokens that was computed, recovery and maximum age included, (T,).
        nominal: Cache ratio that the policy aimed at, (T,); ``None`` where it aims at none.
        reuse: Camera → share of its tokens that was reused, (T,).
    """

    divergence: list[float]
    active: list[float]
    nominal: list[float | None]
    reuse: Mapping[str, list[float]]


@dataclass(frozen=True)
class EpisodeReplay:
    """One recorded episode under all policies.

    Attributes:
        episode: Its number in the data set.
        frames: Number in the episode of the frame of every call, (T,).
        gripper: Frames from which on the recorded gripper is told otherwise; ``None`` if that is not known.
        methods: Policy → what it did.
    """

    episode: int
    frames: Sequence[int]
    gripper: Sequence[int] | None
    methods: Mapping[str, Calls]

    def contact(self, within: int) -> npt.NDArray[np.bool_]:
        """Tell which calls lie within so many frames of a gripper event, (T,)."""
        frames = np.array(self.frames)
        away = np.abs(frames[:, None] - np.array(self.gripper or (), dtype=np.int64))
        return np.asarray((away <= within).any(axis=1))

    def to_json(self) -> dict[str, Any]:
        """Give the line of the log."""
        return asdict(self)

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> EpisodeReplay:
        """Read a line; whatever is wrong with it is a ``ValueError``, ``KeyError`` or ``TypeError``."""
        methods, count = {name: Calls(**calls) for name, calls in line["methods"].items()}, len(line["frames"])
        for calls in methods.values():
            rows: list[Sequence[Any]] = [calls.divergence, calls.active, calls.nominal, *calls.reuse.values()]
            for row in rows:
                if len(row) != count:
                    raise ValueError("its rows are not equally long")
            if not np.isfinite(np.array([calls.divergence, calls.active], dtype=np.float64)).all():
                raise ValueError("a number is not finite")
        return cls(int(line["episode"]), line["frames"], line["gripper"], methods)
