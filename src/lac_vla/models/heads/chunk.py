"""Heads that read a chunk of actions off rows within the prompt: parallel decoding, without a pass behind the prefill.

The prompt ends in a placeholder for every value of the chunk and one stop token; everything sees everything. As a
causal model's would, the rows that answer stand one before the values that they answer for: the last prompt token's and
all placeholders' but the last.

Source: OpenVLA-OFT (Kim et al., 2025, arXiv 2502.19645) and its released code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lac_vla.errors import CheckpointError
from lac_vla.models.heads.base import ActionHead, Decoding, HeadContext, LossContext
from lac_vla.models.heads.decoding import best, read
from lac_vla.models.heads.tokens import ActionTokenizer, token_loss
from lac_vla.models.heads.units import Range, check_units, chunks_of
from lac_vla.types import FloatArray

BLOCKS = 2
STOP_TOKENS = 1
N_UNREAD = STOP_TOKENS + 1
"""Tokens at the end of a prompt that no head reads: the last placeholder and the stop token."""


class ResidualBlock(nn.Module):
    """A normalised linear layer with a ReLU, added to its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run (..., width) → the same."""
        return x + cast(torch.Tensor, self.ffn(x))


class ChunkMLP(nn.Module):
    """Turns the rows of an action into its values, each action by itself.

    Args:
        width: Of the rows.
        action_dim: Values of an action, and rows.
    """

    def __init__(self, width: int, action_dim: int) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(action_dim * width)
        self.fc1 = nn.Linear(action_dim * width, width)
        self.mlp_resnet_blocks = nn.ModuleList(ResidualBlock(width) for _ in range(BLOCKS))
        self.layer_norm2 = nn.LayerNorm(width)
        self.fc2 = nn.Linear(width, action_dim)
        self.action_dim = action_dim

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Run (..., chunk · action_dim, width) → (..., chunk, action_dim)."""
        x = rows.reshape(*rows.shape[:-2], -1, self.action_dim * rows.shape[-1])
        x = nn.functional.relu(self.fc1(self.layer_norm1(x)))
        for block in self.mlp_resnet_blocks:
            x = block(x)
        out: torch.Tensor = self.fc2(self.layer_norm2(x))
        return out

    def fingerprint(self, n_rows: int) -> bytes:
        """Compute what is made of fixed rows."""
        weight = self.fc2.weight
        rows = torch.linspace(-1, 1, n_rows * weight.shape[1], device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            return bytes(self(rows.view(n_rows, -1)).float().cpu().numpy().tobytes())


class ChunkHead(ActionHead):
    """The base of heads that answer with a chunk, read off rows within the prompt.

    Args:
        horizon: Actions of a chunk.
        action_dim: Values of an action.
        action_range: Units of the actions.

    Attributes:
        action_range: As given.

    Raises:
        CheckpointError: If the statistics are of another number of values than the head's actions.
    """

    def __init__(self, horizon: int, action_dim: int, action_range: Range) -> None:
        if action_range.dim != action_dim:
            raise CheckpointError(f"statistics of {action_range.dim} action values, an action head of {action_dim}")
        self.horizon, self.action_dim, self.action_range = horizon, action_dim, action_range
        self.shape = (horizon, action_dim)
        self.n_rows = horizon * action_dim
        self.n_before = self.n_rows + STOP_TOKENS

    def rows(self, hidden: torch.Tensor) -> torch.Tensor:
        """Pick the rows that answer of a prompt's last ones, (rows, width) → (n_rows, width)."""
        first = len(hidden) - 1 - self.n_before
        return hidden[first : first + self.n_rows]

    def unnormalize_actions(self, normalized: npt.ArrayLike) -> FloatArray:
        """Scale a chunk from [-1, 1] to units of the data set, float32, (horizon, A); nothing is clipped."""
        return self.action_range.unnormalize(normalized).astype(np.float32)

    def normalize_actions(self, actions: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Scale units of the data set to about [-1, 1], not clipped, (..., A)."""
        return self.action_range.normalize(actions)

    def targets(self, actions: FloatArray) -> npt.NDArray[Any]:
        """Flatten normalised chunks, float32, (T, horizon · A); scaled values are clipped to [-1, 1]."""
        normalized, mask = self.normalize_actions(chunks_of(actions, *self.shape)), self.action_range.mask
        check_units(normalized, mask)
        clipped = np.where(mask, normalized.clip(-1, 1), normalized)
        return clipped.reshape(len(normalized), -1).astype(np.float32)


class L1Head(ChunkHead):
    """Answers with the values that an MLP makes of the rows; trained by, and its loss is, the mean absolute error.

    Given a teacher, the error is that from the dense pass's chunk.

    Args:
        model: The MLP.
        horizon: Actions of a chunk.
        action_range: Units of the actions.
    """

    def __init__(self, model: ChunkMLP, horizon: int, action_range: Range) -> None:
        super().__init__(horizon, model.action_dim, action_range)
        self.model = model

    def decode(self, context: HeadContext) -> Decoding:
        """Read the chunk off the rows; see :meth:`ActionHead.decode`.

        Returns:
            The actions in the units of the data set, float32, (horizon, action_dim); and, as lists, the chunk in
            [-1, 1] (``normalized``).
        """
        normalized = self.model(self.rows(context.hidden)).float().cpu().numpy()
        return self.unnormalize_actions(normalized), {"normalized": normalized.tolist()}
        yield  # a generator, although it appends nothing

    def loss(
        self,
        context: LossContext,
        targets: torch.Tensor,
        generator: torch.Generator,
        teacher: LossContext | None = None,
    ) -> torch.Tensor:
        """Compute the mean absolute error from targets or teacher; see :meth:`ActionHead.loss`."""
        if teacher is not None:
            with torch.no_grad():
                targets = self.model(teacher.hidden).flatten(1).to(targets.dtype)
        guess: torch.Tensor = self.model(context.hidden).flatten(1)
        return (guess.to(targets.dtype) - targets).abs().mean(dim=1)

    def fingerprint(self) -> bytes:
        """Compute what the MLP makes of fixed rows; see :meth:`ActionHead.fingerprint`."""
        return self.model.fingerprint(self.n_rows)


class ChunkTokenHead(ChunkHead):
    """Answers with one token per value, all at once, the best of the whole vocabulary.

    Args:
        logits: Normalised hidden states (..., width) → scores of all tokens (..., vocabulary).
        tokenizer: Action values ↔ token ids.
        horizon: Actions of a chunk.
        action_dim: Values of an action.
        action_range: Units of the actions.
    """

    def __init__(
        self,
        logits: Callable[[torch.Tensor], torch.Tensor],
        tokenizer: ActionTokenizer,
        horizon: int,
        action_dim: int,
        action_range: Range,
    ) -> None:
        super().__init__(horizon, action_dim, action_range)
        self.logits, self.tokenizer = logits, tokenizer

    def decode(self, context: HeadContext) -> Decoding:
        """Read the tokens off the rows; see :meth:`ActionHead.decode`.

        Returns:
            The actions in the units of the data set, float32, (horizon, action_dim); and, as lists, the token ids
            (``tokens``) and the chunk in [-1, 1] (``normalized``).
        """
        tokens = np.array(read(*best(self.logits(self.rows(context.hidden)))))
        normalized = self.tokenizer.decode(tokens).reshape(self.shape)
        metadata = {"tokens": tokens.tolist(), "normalized": normalized.tolist()}
        return self.unnormalize_actions(normalized), metadata
        yield  # a generator, although it appends nothing

    def targets(self, actions: FloatArray) -> npt.NDArray[np.int64]:
        """Encode chunks as token ids, int64, (T, horizon · A); see :meth:`ActionHead.targets`."""
        return self.tokenizer.encode(super().targets(actions))

    def loss(
        self,
        context: LossContext,
        targets: torch.Tensor,
        generator: torch.Generator,
        teacher: LossContext | None = None,
    ) -> torch.Tensor:
        """Compute the cross-entropy, or KL(teacher ‖ model); see :meth:`ActionHead.loss`."""
        return token_loss(self.logits, context.hidden, targets, None if teacher is None else teacher.hidden)
