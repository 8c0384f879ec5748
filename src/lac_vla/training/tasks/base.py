"""What ``lac train`` needs of an action head."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from lac_vla.errors import InputError
from lac_vla.types import BoolArray, FloatArray

OUT_OF_RANGE = 0.5
"""Share of action values outside the model's quantiles from which on the statistics are taken to be the wrong ones."""
SLACK = 0.05


class Task(Protocol):
    """The loss of an action head. Its answers are appended to the prompt as far as it decodes them one by one.

    Attributes:
        n_rows: Rows that are read: the last prompt token and every appended one.
    """

    n_rows: int

    def targets(self, actions: FloatArray) -> npt.NDArray[Any]:
        """What the head is to answer.

        Args:
            actions: An episode's recorded actions in the data set's units, (T, A); or what the model itself answered in
                every frame, (T, …).

        Returns:
            A row for every frame, (T, n).

        Raises:
            InputError: If the actions do not fit the model.
        """
        ...

    def continuation(self, targets: torch.Tensor) -> torch.Tensor:
        """Embeddings appended to the prompt: (B, n) → (B, n_rows − 1, width)."""
        ...

    def demo(self, hidden: torch.Tensor, targets: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """The model's native loss on demonstrated actions.

        Args:
            hidden: Normalised hidden states, (B, n_rows, width).
            targets: (B, n).
            generator: Of all chance.

        Returns:
            (B,).
        """
        ...

    def distill(
        self, hidden: torch.Tensor, dense: torch.Tensor, targets: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """Divergence from the dense pass of the same model; arguments as in :meth:`demo`, ``dense`` as ``hidden``."""
        ...

    def fingerprint(self) -> bytes:
        """What stored targets depend on, besides what the decoder's last layer tells."""
        ...


def check_units(normalized: npt.NDArray[np.float64], mask: BoolArray) -> None:
    """Refuse actions that mostly lie outside the model's quantiles.

    Args:
        normalized: In the model's units, (..., A).
        mask: Which dimensions are scaled, (A,).

    Raises:
        InputError: If they do.
    """
    outside = float(np.mean(np.abs(normalized[..., mask]) > 1 + SLACK))
    if outside > OUT_OF_RANGE:
        raise InputError(
            f"{outside:.0%} of the action values lie outside the model's range: the dataset is in other units, or "
            "--unnorm-key names the statistics of another one"
        )
