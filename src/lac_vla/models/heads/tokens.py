"""Autoregressive action tokens: one token per action dimension, decoded greedily.

Source: OpenVLA (Kim et al., 2024), section 3.2 and its released rule of decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812

from lac_vla.errors import InputError
from lac_vla.models.heads.base import ActionHead, Decoding, HeadContext, LossContext
from lac_vla.models.heads.decoding import Picked, decode_tokens, pick
from lac_vla.models.heads.units import Range, check_units
from lac_vla.types import FloatArray, IntArray


@dataclass(frozen=True)
class ActionTokenizer:
    """Maps values in [-1, 1] to the last ``n_bins`` tokens of a vocabulary, and back to the bins' centres.

    Attributes:
        vocab_size: Size V of the vocabulary; token V − i means bin edge i.
        n_bins: Edges, evenly spaced over [-1, 1]; they enclose ``n_bins`` − 1 bins.
        edge_token: Whether +1, the upper edge itself, has a token of its own; else it is that of the highest bin.
    """

    vocab_size: int
    n_bins: int = 256
    edge_token: bool = True

    @cached_property
    def edges(self) -> npt.NDArray[np.float64]:
        """The edges of the bins, (n_bins,)."""
        return np.linspace(-1.0, 1.0, self.n_bins)

    @cached_property
    def centers(self) -> npt.NDArray[np.float64]:
        """The values that tokens decode to, (n_bins − 1,)."""
        edges = self.edges
        return (edges[:-1] + edges[1:]) / 2.0

    def encode(self, values: npt.ArrayLike) -> IntArray:
        """Encode values (clipped to [-1, 1]) as token ids, any shape, int64."""
        bins = np.digitize(np.clip(np.asarray(values, dtype=np.float64), -1.0, 1.0), self.edges)
        highest = self.n_bins if self.edge_token else self.n_bins - 1
        return (self.vocab_size - np.minimum(bins, highest)).astype(np.int64)

    def decode(self, ids: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Decode token ids to values, any shape. Ids that mean no action decode to the nearest bin."""
        index = np.clip(self.vocab_size - np.asarray(ids, dtype=np.int64) - 1, 0, self.n_bins - 2)
        return self.centers[index]


class TokenHead(ActionHead):
    """Answers with one token per action dimension, greedily: nothing is left to chance.

    Its loss is the cross-entropy of the recorded tokens, or the Kullback-Leibler divergence from the dense pass, in
    nats, mean over the tokens, which are forced to the recorded ones.

    Args:
        embed: Token ids (...) → embeddings (..., width).
        logits: Normalised hidden states (..., width) → scores of all tokens (..., vocabulary).
        tokenizer: Action values ↔ token ids.
        action_range: Units of the actions.
    """

    def __init__(
        self,
        embed: Callable[[torch.Tensor], torch.Tensor],
        logits: Callable[[torch.Tensor], torch.Tensor],
        tokenizer: ActionTokenizer,
        action_range: Range,
    ) -> None:
        self.embed, self.logits = embed, logits
        self.tokenizer, self.action_range = tokenizer, action_range
        self.max_new_tokens = self.n_rows = action_range.dim

    def decode(self, context: HeadContext) -> Decoding:
        """Decode one token per action dimension; see :meth:`ActionHead.decode`.

        Returns:
            The action in the units of the data set, float32, (action_dim,); and, as lists, the token ids
            (``tokens``) and the action in [-1, 1] (``normalized``).
        """
        draft = [] if context.drafted is None else context.drafted["tokens"][:-1]
        tokens = yield from decode_tokens(self._pick, context.hidden, self.max_new_tokens, draft)
        normalized = self.tokenizer.decode(tokens)
        action = self.action_range.unnormalize(normalized).astype(np.float32)
        return action, {"tokens": tokens, "normalized": normalized.tolist()}

    def _pick(self, rows: Sequence[torch.Tensor]) -> list[Picked]:
        """Pick the next token in every row, each (n, width)."""
        return pick(self.embed, self.logits, rows)

    def draft(self, metadata: Mapping[str, Any]) -> torch.Tensor:
        """Embed the preceding action's tokens but the last, (action_dim - 1, width)."""
        return self.embed(metadata["tokens"][:-1])

    def normalize_actions(self, actions: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Scale units of the data set to about [-1, 1], not clipped, (..., action_dim)."""
        return self.action_range.normalize(actions)

    def targets(self, actions: FloatArray) -> npt.NDArray[np.int64]:
        """Encode recorded actions as token ids; see :meth:`ActionHead.targets`."""
        if actions.ndim != 2 or actions.shape[1] != self.n_rows:
            raise InputError(f"the dataset's actions have shape {actions.shape}; the model's have {self.n_rows} values")
        normalized = self.normalize_actions(actions)
        check_units(normalized, self.action_range.mask)
        return self.tokenizer.encode(normalized)

    def forced(self, targets: torch.Tensor) -> torch.Tensor:
        """Embed all tokens but the last; see :meth:`ActionHead.forced`."""
        return self.embed(targets[:, :-1])

    def loss(
        self,
        context: LossContext,
        targets: torch.Tensor,
        generator: torch.Generator,
        teacher: LossContext | None = None,
    ) -> torch.Tensor:
        """Compute the cross-entropy, or KL(teacher ‖ model); see :meth:`ActionHead.loss`."""
        return token_loss(self.logits, context.hidden, targets, None if teacher is None else teacher.hidden)


def token_loss(
    logits: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    targets: torch.Tensor,
    teacher: torch.Tensor | None,
) -> torch.Tensor:
    """Compute the cross-entropy of tokens, or KL(teacher ‖ model), in nats, mean over the tokens.

    Args:
        logits: Hidden states → scores.
        hidden: Of the rows that answer with the tokens, (B, n, width).
        targets: The tokens, int64, (B, n).
        teacher: The dense pass's hidden states, (B, n, width); ``None`` for the cross-entropy.

    Returns:
        (B,).
    """
    scores = logits(hidden)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if teacher is None:
        return F.cross_entropy(scores.transpose(1, 2), targets, reduction="none").mean(dim=1)
    with torch.no_grad():
        truth = logits(teacher).to(scores.dtype).log_softmax(dim=-1)
    guess = scores.log_softmax(dim=-1)
    return F.kl_div(guess, truth, reduction="none", log_target=True).sum(dim=-1).mean(dim=1)
