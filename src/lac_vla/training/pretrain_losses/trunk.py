"""The losses of heads that read hidden states of OpenVLA's trunk: BOS first, text last."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from lac_vla.engine.layers import NoCache, Segment, run_layers
from lac_vla.errors import CheckpointError
from lac_vla.models import VLA
from lac_vla.models.images import make_pipeline
from lac_vla.training.pretrain_losses.base import Batch, Keep, PretrainLoss, Targets
from lac_vla.types import FloatArray, UInt8Image

HEADS = ("action_model.", "action_head.", "noisy_action_projector.")
"""Of a checkpoint, the weights of heads: those that ours has not are left there."""


class TrunkLoss(PretrainLoss):
    """Reads the last prompt token's hidden states, and those of tokens appended. A subclass knows the head's loss.

    Attributes:
        head_modules: The head's own, if it has some: when loaded, they go on learning where the trunk is held fixed.
    """

    head_modules: tuple[nn.Module, ...] = ()

    @staticmethod
    def pictures(vla: VLA) -> tuple[Mapping[str, int], Callable[[UInt8Image, int], UInt8Image]]:
        """See :meth:`PretrainLoss.pictures`."""
        config: Any = vla.module.config
        return {camera.name: camera.image_size for camera in config.cameras}, make_pipeline(
            config.image_resize_strategy
        )

    def take_weights(self, folder: Path) -> list[nn.Parameter]:
        """See :meth:`PretrainLoss.take_weights`; those of the head are not returned."""
        own = {id(weight) for module in self.head_modules for weight in module.parameters()}
        return [weight for weight in super().take_weights(folder) if id(weight) not in own]

    def _known(self, start: nn.Module) -> dict[str, torch.Tensor]:
        """Leave out another head, and a state or cameras that ours has not.

        If the start has no tower for our first camera, its first one's is taken.
        """
        cameras = getattr(getattr(start, "config", None), "cameras", None)
        if not cameras:
            raise CheckpointError("it has no camera's tower that could be ours")
        theirs, ours = ([camera.name for camera in known] for known in (cameras, self.model.config.cameras))
        renamed = {name: name for name in ours} | ({} if ours[0] in theirs else {theirs[0]: ours[0]})
        weights, towers, own = {}, "vision_backbone.towers.", self.model.state_dict()
        absent = ("proprio_projector.",) if self.model.proprio_projector is None else ()
        for name, value in start.state_dict().items():
            camera, _, rest = name.removeprefix(towers).partition(".")
            if not name.startswith(towers):
                if name in own or not name.startswith((*HEADS, *absent)):
                    weights[name] = value
            elif camera in renamed:
                weights[f"{towers}{renamed[camera]}.{rest}"] = value
        return weights

    def text_ids(self, instruction: str) -> Sequence[int]:
        """See :meth:`PretrainLoss.text_ids`: all but BOS."""
        return cast(Sequence[int], cast(Any, self.vla.processor).prompt_ids(instruction)[1:])

    def normalize_actions(self, chunks: FloatArray) -> FloatArray:
        """See :meth:`PretrainLoss.normalize_actions`: to [-1, 1]."""
        normalized = cast(Any, self.vla.head).normalize_actions(chunks)
        return cast(FloatArray, normalized.clip(-1, 1).astype(np.float32))

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
        """See :meth:`PretrainLoss.forward`; ``keep`` is a regular subset of the first camera's tokens."""
        read = self.read(batch, keep, self.append(batch, progress, generator))
        return self.losses(read, batch.targets, progress, generator)

    def read(self, batch: Batch, keep: Keep | None, appended: torch.Tensor) -> torch.Tensor:
        """Run the trunk over prompts and the tokens behind them, whose ids are (B, n); ``keep`` as in :meth:`forward`.

        Returns:
            Normalised last hidden states of the last prompt token and of all appended ones, (B, 1 + n, width).
        """
        model, (size, more) = self.model, appended.shape
        kept = {} if keep is None else {self.layout.cameras[0].name: keep}
        visual = model.projector(model.vision_backbone(batch.images, kept, batch.shifts))
        # [BOS | visual | proprio | text | appended | padding]
        ids = F.pad(batch.text, (0, more))
        ids = ids.scatter(1, batch.text_length[:, None] + torch.arange(more), appended)
        parts = [self.embed(torch.full((size, 1), model.config.bos_id)), visual]
        if model.proprio_projector is not None:
            parts.append(model.proprio_projector(batch.proprio)[:, None])
        parts.append(self.embed(ids))
        inputs = torch.cat(parts, dim=1)
        behind = inputs.shape[1] - 1 - visual.shape[1]
        lengths = inputs.shape[1] - ids.shape[1] + batch.text_length + more
        hidden = self._decode(inputs, self._positions(keep, behind), lengths, ids.shape[1])
        rows = (batch.text_length - 1)[:, None] + torch.arange(1 + more)
        return hidden[torch.arange(size)[:, None], rows]

    def _positions(self, keep: Keep | None, behind: int) -> torch.Tensor:
        """List the sequence positions of the tokens shown, of which ``behind`` follow the visual ones."""
        shown = []
        for index, camera in enumerate(self.layout.cameras):
            grid = torch.arange(camera.size).view(camera.rows, camera.cols) + camera.start
            if keep is not None and index == 0:
                grid = grid[keep[0] :: keep[2], keep[1] :: keep[2]]
            shown.append(grid.flatten() + 1)
        return torch.cat([torch.zeros(1, dtype=torch.long), *shown, torch.arange(behind) + 1 + self.layout.n_visual])

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Embed tokens, (..., n) → (..., n, width)."""
        return cast(torch.Tensor, self.model.language_model.get_input_embeddings()(ids))

    def segment(self, length: int, lengths: torch.Tensor, wanted: int) -> Segment:
        """Say what the rows of whole sequences see of each other.

        Causal, padding behind everything that counts changes nothing.

        Args:
            length: Of the sequences, with padding.
            lengths: Of every sequence without it, (B,).
            wanted: How many of the last rows are read.
        """
        final = torch.ones(wanted, length, dtype=torch.bool).tril(length - wanted)
        return Segment(length, 0, length, n_queries=wanted, final_mask=final)

    def _decode(
        self, inputs: torch.Tensor, positions: torch.Tensor, lengths: torch.Tensor, wanted: int
    ) -> torch.Tensor:
        """Run the decoder over whole sequences, (B, length, width) → its last rows, (B, wanted, width).

        Of the other rows the last layer computes keys and values alone.
        """
        decoder = self.vla.decoder
        segment = self.segment(inputs.shape[1], lengths, wanted)
        return decoder.norm(run_layers(decoder.layers, inputs, decoder.rotary(positions), [segment], NoCache()).hidden)
