"""The task loss L_VLA of stage II: what a model's own head says about an action, from the decoder's hidden states."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from lac_vla.errors import InputError
from lac_vla.models.base import Backbone
from lac_vla.models.prismatic.actions import ActionTokenizer, Range
from lac_vla.types import FloatArray, IntArray

OUT_OF_RANGE = 0.5
"""Share of action values outside the model's quantiles from which on the statistics are taken to be the wrong ones."""
SLACK = 0.05


class Task(Protocol):
    """What stage II needs of an action head. Action tokens are appended to the prompt and forced to the recorded ones.

    Attributes:
        n_rows: Rows that are read: the last prompt token and every appended token.
    """

    n_rows: int

    def targets(self, actions: FloatArray) -> IntArray:
        """Recorded actions, (T, A), in the robot's units → what the head is to answer, int64, (T, n)."""
        ...

    def continuation(self, targets: torch.Tensor) -> torch.Tensor:
        """Embeddings appended to the prompt: (B, n) → (B, n_rows − 1, width)."""
        ...

    def demo(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The model's native loss on demonstrated actions: (B, n_rows, width), (B, n) → (B,)."""
        ...

    def distill(self, hidden: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
        """Divergence from the dense pass of the same model: hidden states, both (B, n_rows, width) → (B,)."""
        ...


@runtime_checkable
class SpeaksTokens(Protocol):
    """A backbone that answers in action tokens.

    Attributes:
        actions: Action values in [-1, 1] ↔ token ids.
        action_range: Units of the actions.
    """

    actions: ActionTokenizer
    action_range: Range

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids, (...) → embeddings, (..., width)."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalised hidden states, (..., width) → scores of all tokens, (..., vocabulary)."""
        ...


class TokenTask:
    """Autoregressive action tokens: cross-entropy, or the Kullback-Leibler divergence from the dense pass, in nats.

    Args:
        model: The backbone.
    """

    def __init__(self, model: SpeaksTokens) -> None:
        self.model = model
        self.n_rows = model.action_range.dim

    def targets(self, actions: FloatArray) -> IntArray:
        """See :meth:`Task.targets`.

        Raises:
            InputError: If the actions have another length than the model's, or mostly lie outside its range.
        """
        if actions.ndim != 2 or actions.shape[1] != self.n_rows:
            raise InputError(f"the dataset's actions have shape {actions.shape}; the model's have {self.n_rows} values")
        normalized = self.model.action_range.normalize(actions)
        outside = float(np.mean(np.abs(normalized[:, self.model.action_range.mask]) > 1 + SLACK))
        if outside > OUT_OF_RANGE:
            raise InputError(
                f"{outside:.0%} of the action values lie outside the model's range: the dataset is in other units, or "
                "--unnorm-key names the statistics of another one"
            )
        return self.model.actions.encode(normalized)

    def continuation(self, targets: torch.Tensor) -> torch.Tensor:
        """See :meth:`Task.continuation`: all tokens but the last."""
        return self.model.embed(targets[:, :-1])

    def demo(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """See :meth:`Task.demo`: mean over the tokens."""
        logits = self.model.logits(hidden).float()
        return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(dim=1)

    def distill(self, hidden: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
        """See :meth:`Task.distill`: KL(dense ‖ cached), mean over the tokens."""
        with torch.no_grad():
            truth = self.model.logits(dense).float().log_softmax(dim=-1)
        guess = self.model.logits(hidden).float().log_softmax(dim=-1)
        return F.kl_div(guess, truth, reduction="none", log_target=True).sum(dim=-1).mean(dim=1)


def task_of(backbone: Backbone) -> Task:
    """The task of a model family.

    Raises:
        InputError: If none is known for it.
    """
    if isinstance(backbone, SpeaksTokens):
        return TokenTask(backbone)
    raise InputError(f"{backbone.name} has no task loss that `lac train` knows")
