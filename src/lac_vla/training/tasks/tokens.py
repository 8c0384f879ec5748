"""Autoregressive action tokens as a task."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812

from lac_vla.errors import InputError
from lac_vla.models.prismatic.actions import ActionTokenizer, Range
from lac_vla.training.tasks.base import check_units
from lac_vla.types import FloatArray


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
    """Cross-entropy of the recorded tokens, or the Kullback-Leibler divergence from the dense pass, in nats.

    The tokens are forced to the recorded ones.

    Args:
        model: The backbone.
    """

    def __init__(self, model: SpeaksTokens) -> None:
        self.model = model
        self.n_rows = model.action_range.dim

    def targets(self, actions: FloatArray) -> npt.NDArray[np.int64]:
        """See :meth:`Task.targets`: token ids."""
        if actions.ndim != 2 or actions.shape[1] != self.n_rows:
            raise InputError(f"the dataset's actions have shape {actions.shape}; the model's have {self.n_rows} values")
        normalized = self.model.action_range.normalize(actions)
        check_units(normalized, self.model.action_range.mask)
        return self.model.actions.encode(normalized)

    def continuation(self, targets: torch.Tensor) -> torch.Tensor:
        """See :meth:`Task.continuation`: all tokens but the last."""
        return self.model.embed(targets[:, :-1])

    def demo(self, hidden: torch.Tensor, targets: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """See :meth:`Task.demo`: mean over the tokens."""
        logits = self.model.logits(hidden).float()
        return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(dim=1)

    def distill(
        self, hidden: torch.Tensor, dense: torch.Tensor, targets: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """See :meth:`Task.distill`: KL(dense ‖ cached), mean over the tokens."""
        with torch.no_grad():
            truth = self.model.logits(dense).float().log_softmax(dim=-1)
        guess = self.model.logits(hidden).float().log_softmax(dim=-1)
        return F.kl_div(guess, truth, reduction="none", log_target=True).sum(dim=-1).mean(dim=1)

    def fingerprint(self) -> bytes:
        """See :meth:`Task.fingerprint`: the vocabulary is that of the decoder."""
        return b""
