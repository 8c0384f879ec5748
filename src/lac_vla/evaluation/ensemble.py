"""CogACT's adaptive action ensemble: one action out of the overlapping chunks of the last frames.

Source: CogACT (Li et al., 2024, arXiv 2411.19650) and its released evaluation.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from lac_vla.errors import InputError
from lac_vla.types import FloatArray


@dataclass
class AdaptiveEnsemble:
    """Averages what the last chunks say about the present step: the more like the newest, the more weight.

    It belongs to one robot in one episode and stands outside the model: what it returns is executed, and nothing of
    the model depends on it.

    Attributes:
        horizon: Chunks that are averaged, at most; CogACT takes 2 for SIMPLER's Google robot, 7 for its WidowX.
        alpha: Weight is exp(alpha · cosine similarity).

    Raises:
        InputError: If ``horizon`` is not positive.
    """

    horizon: int = 7
    alpha: float = 0.1
    _chunks: deque[npt.NDArray[np.float64]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.horizon < 1:
            raise InputError(f"horizon is {self.horizon}; at least the newest chunk must count")
        self._chunks = deque(maxlen=self.horizon)

    def reset(self) -> None:
        """Begin a new episode."""
        self._chunks.clear()

    def __call__(self, chunk: FloatArray) -> FloatArray:
        """Add a frame's chunk, and give the action for this frame.

        Args:
            chunk: The present action and those after it, in the robot's units, (length, action_dim); at least as
                long as ``horizon``.

        Returns:
            float32, (action_dim,).

        Raises:
            InputError: If the chunk is too short, or not of the shape of the last one; it is not added then.
        """
        if chunk.ndim != 2 or len(chunk) < self.horizon:
            raise InputError(
                f"an ensemble of {self.horizon} chunks needs that many actions in each, got {chunk.shape}: "
                "give --ensemble 1"
            )
        if self._chunks and chunk.shape != self._chunks[-1].shape:
            raise InputError(f"a chunk of shape {chunk.shape} after {self._chunks[-1].shape}: call reset() before")
        self._chunks.append(np.asarray(chunk, dtype=np.float64))
        # The chunk of ``age`` frames ago says in its row ``age`` what to do now.
        votes = np.stack([past[age] for age, past in enumerate(reversed(self._chunks))])
        lengths = np.linalg.norm(votes, axis=1)
        similarity = votes @ votes[0] / (lengths * lengths[0] + 1e-7)
        weights = np.exp(self.alpha * similarity)
        return np.asarray(weights @ votes / weights.sum(), dtype=np.float32)
