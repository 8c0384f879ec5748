"""The bundled VLAs learn from a frame by their head's own loss and by two helpers.

The head's own loss alone localises slowly on little data. Two read-outs of the last prompt token's hidden state make
the difference (they exist in training only, cost nothing at inference and are not part of the saved model): the next
actions as a chunk, by L1; and *hindsight*: where the hand is now, where it will close and where it will open again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from lac_vla.errors import CheckpointError
from lac_vla.models import VLA, load_vla
from lac_vla.types import FloatArray, TokenLayout, UInt8Image

Keep: TypeAlias = tuple[int, int, int]
"""Row offset, column offset and stride of a regular subset of a token grid."""

ACTION_DIMS = 7
HINDSIGHT_VALUES = 9  # three positions


@dataclass(frozen=True, eq=False)
class Targets:
    """Holds the targets of frames.

    Attributes:
        chunk: Next actions, normalised as the model's head answers, (B, H, A).
        hindsight: Normalised positions, (B, 3, 3).
        ahead: Which of them count, (B, 3).
    """

    chunk: torch.Tensor
    hindsight: torch.Tensor
    ahead: torch.Tensor

    @classmethod
    def join(cls, parts: Sequence[Targets]) -> Targets:
        """Put targets one after the other."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def __getitem__(self, rows: torch.Tensor) -> Targets:
        """Take those of some frames."""
        return Targets(self.chunk[rows], self.hindsight[rows], self.ahead[rows])


@dataclass(frozen=True, eq=False)
class Batch:
    """Holds demonstration frames, ready for the model.

    Attributes:
        images: Camera → normalised pixels, float32, (B, 3, H, W).
        shifts: Camera → whole pixels by which its content was moved down and right, (B, 2).
        proprio: Normalised, (B, S).
        text: Prompt token ids behind the visual tokens, right-padded, (B, T).
        text_length: Their true lengths, (B,).
        targets: See :class:`Targets`.
    """

    images: dict[str, torch.Tensor]
    shifts: dict[str, torch.Tensor]
    proprio: torch.Tensor
    text: torch.Tensor
    text_length: torch.Tensor
    targets: Targets


class PretrainLoss(nn.Module, ABC):
    """Wraps a model with its training-only helpers. A subclass knows the head's loss.

    Args:
        vla: The model, with the statistics of its data.
        chunk: Actions that the chunk helper predicts.

    Attributes:
        vla: As given.
        model: Its modules.
        terms: The losses that are summed up.
    """

    terms: tuple[str, ...]

    def __init__(self, vla: VLA, chunk: int) -> None:
        super().__init__()
        self.vla = vla
        self.model: Any = vla.module
        width = vla.decoder.shape.width
        self.chunk_head = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, chunk * ACTION_DIMS)
        )
        self.hindsight_head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, HINDSIGHT_VALUES))
        self.layout = TokenLayout.of(vla.grids, n_prefix=1, n_suffix=0)

    def take_weights(self, folder: Path) -> list[nn.Parameter]:
        """Copy a checkpoint's weights into the model, which may have more; return those replaced.

        Raises:
            CheckpointError: If one of those to be copied is none of the model's, or of another shape.
        """
        try:
            weights = self._known(load_vla(folder).module)
        except CheckpointError as error:
            raise CheckpointError(f"{folder} cannot be started from: {error}: give another --start") from error
        try:
            unknown = self.model.load_state_dict(weights, strict=False).unexpected_keys
        except RuntimeError as error:
            raise CheckpointError(f"{folder} does not fit the model: give another --start: {error}") from error
        if unknown:
            raise CheckpointError(f"{folder} is of another model, it has {unknown[0]}: give another --start")
        return [parameter for name, parameter in self.model.named_parameters() if name in weights]

    def _known(self, start: nn.Module) -> dict[str, torch.Tensor]:
        """Choose the weights of the start that are copied."""
        return dict(start.state_dict())

    def helpers(self, prompt_end: torch.Tensor, targets: Targets) -> dict[str, torch.Tensor]:
        """Compute ``chunk`` and ``hindsight`` (normalised L1) of the last prompt token's hidden states, (B, width)."""
        size = len(prompt_end)
        chunk = self.chunk_head(prompt_end).float().view(size, -1, ACTION_DIMS)
        hindsight = (self.hindsight_head(prompt_end).float().view(size, 3, 3) - targets.hindsight).abs().mean(dim=-1)
        return {
            "chunk": (chunk - targets.chunk[:, : chunk.shape[1]]).abs().mean(),
            "hindsight": (hindsight * targets.ahead).sum() / targets.ahead.sum().clamp(min=1),
        }

    @abstractmethod
    def forward(
        self, batch: Batch, keep: Keep | None, progress: float | None, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """Compute the losses of a batch.

        Args:
            batch: The frames.
            keep: Which visual tokens are shown in the coarse phase; ``None`` for all.
            progress: Share of the run that is over; ``None`` to validate, without training's noise.
            generator: Draws the noise.

        Returns:
            Scalars: the ``terms``, and whatever else is worth watching.
        """

    @staticmethod
    @abstractmethod
    def pictures(vla: VLA) -> tuple[Mapping[str, int], Callable[[UInt8Image, int], UInt8Image]]:
        """Say how images are kept: camera → side in pixels, and what brings an image to it."""

    @abstractmethod
    def text_ids(self, instruction: str) -> Sequence[int]:
        """Make the ids of the text behind the visual tokens."""

    @abstractmethod
    def normalize_actions(self, chunks: FloatArray) -> FloatArray:
        """Scale chunks of recorded actions to what the head answers, (F, H, A), float32."""

    def settle(self, batch: Batch) -> None:
        """Adjust weights that no checkpoint gave to some frames, before training; by default none.

        Args:
            batch: Frames, not augmented.
        """
