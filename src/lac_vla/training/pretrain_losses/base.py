"""The bundled VLAs learn from a frame by their head's own loss and by two helpers.

The head's own loss alone localises slowly on little data. Two read-outs of the last prompt token's hidden state make
the difference (they exist in training only, cost nothing at inference and are not part of the saved model): the next
actions as a chunk, by L1; and *hindsight*: where the hand is now, where it will close and where it will open again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from lac_vla.engine.layers import NoCache, Segment, run_layers
from lac_vla.errors import CheckpointError
from lac_vla.models import VLA, load_vla
from lac_vla.types import TokenLayout

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
        """Copy a checkpoint's weights into the model, which has all of them and perhaps more; return those replaced.

        Raises:
            CheckpointError: If the checkpoint has a weight that the model has not, or of another shape.
        """
        weights = self._known(load_vla(folder).module)
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

    @abstractmethod
    def append(self, batch: Batch, progress: float | None, generator: torch.Generator) -> torch.Tensor:
        """Make the ids of the tokens behind the prompts, (B, n)."""

    @abstractmethod
    def losses(
        self, read: torch.Tensor, targets: Targets, progress: float | None, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """Compute the losses of what :meth:`read` returned, as :meth:`forward` gives them."""

    def forward(
        self, batch: Batch, keep: Keep | None, progress: float | None, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """Compute the losses of a batch.

        Args:
            batch: The frames.
            keep: Row offset, column offset and stride of the visual tokens kept of the first camera (coarse phase), at
                their own positions; ``None`` for all.
            progress: Share of the run that is over; ``None`` to validate, without training's noise.
            generator: Draws the noise.

        Returns:
            Scalars: the ``terms``, and whatever else is worth watching.
        """
        read = self.read(batch, keep, self.append(batch, progress, generator))
        return self.losses(read, batch.targets, progress, generator)

    def read(self, batch: Batch, keep: Keep | None, appended: torch.Tensor) -> torch.Tensor:
        """Run the trunk over prompts and the tokens behind them, whose ids are (B, n); ``keep`` as in :meth:`forward`.

        Returns:
            Normalised last hidden states of the last prompt token and of all appended ones, (B, 1 + n, width).
        """
        model, (size, more) = self.model, appended.shape
        embed = self.model.language_model.get_input_embeddings()
        kept = {} if keep is None else {self.layout.cameras[0].name: keep}
        visual = model.projector(model.vision_backbone(batch.images, kept, batch.shifts))
        # [BOS | visual | proprio | text | appended | padding]: under a causal mask, padding behind everything that
        # counts changes nothing.
        ids = F.pad(batch.text, (0, more))
        ids = ids.scatter(1, batch.text_length[:, None] + torch.arange(more), appended)
        parts = [embed(torch.full((size, 1), model.config.bos_id)), visual]
        if model.proprio_projector is not None:
            parts.append(model.proprio_projector(batch.proprio)[:, None])
        parts.append(embed(ids))
        inputs = torch.cat(parts, dim=1)
        behind = inputs.shape[1] - 1 - visual.shape[1]
        hidden = self._decode(inputs, self._positions(keep, behind), ids.shape[1])
        rows = (batch.text_length - 1)[:, None] + torch.arange(1 + more)
        return hidden[torch.arange(size)[:, None], rows]

    def helpers(self, prompt_end: torch.Tensor, targets: Targets) -> dict[str, torch.Tensor]:
        """Compute ``chunk`` and ``hindsight`` (normalised L1) of the last prompt token's hidden states, (B, width)."""
        size = len(prompt_end)
        chunk = self.chunk_head(prompt_end).float().view(size, -1, ACTION_DIMS)
        hindsight = (self.hindsight_head(prompt_end).float().view(size, 3, 3) - targets.hindsight).abs().mean(dim=-1)
        return {
            "chunk": (chunk - targets.chunk[:, : chunk.shape[1]]).abs().mean(),
            "hindsight": (hindsight * targets.ahead).sum() / targets.ahead.sum().clamp(min=1),
        }

    def _positions(self, keep: Keep | None, behind: int) -> torch.Tensor:
        """List the sequence positions of the tokens shown, of which ``behind`` follow the visual ones."""
        shown = []
        for index, camera in enumerate(self.layout.cameras):
            grid = torch.arange(camera.size).view(camera.rows, camera.cols) + camera.start
            if keep is not None and index == 0:
                grid = grid[keep[0] :: keep[2], keep[1] :: keep[2]]
            shown.append(grid.flatten() + 1)
        return torch.cat([torch.zeros(1, dtype=torch.long), *shown, torch.arange(behind) + 1 + self.layout.n_visual])

    def _decode(self, inputs: torch.Tensor, positions: torch.Tensor, wanted: int) -> torch.Tensor:
        """Run the causal decoder over whole sequences, (B, length, width) → its last rows, (B, wanted, width).

        Of the other rows the last layer computes keys and values alone.
        """
        decoder, length = self.vla.decoder, inputs.shape[1]
        final = torch.ones(wanted, length, dtype=torch.bool).tril(length - wanted)
        segment = Segment(length, 0, length, n_queries=wanted, final_mask=final)
        return decoder.norm(run_layers(decoder.layers, inputs, decoder.rotary(positions), [segment], NoCache()).hidden)
