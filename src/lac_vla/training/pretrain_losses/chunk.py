"""A chunk read off rows within the prompt is learned by its mean absolute error.

Source: OpenVLA-OFT (Kim et al., 2025, arXiv 2502.19645).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812

from lac_vla.engine.layers import Segment
from lac_vla.errors import InputError
from lac_vla.models import VLA
from lac_vla.models.heads.chunk import STOP_TOKENS, L1Head
from lac_vla.training.config import PretrainConfig
from lac_vla.training.pretrain_losses.base import Batch, Targets
from lac_vla.training.pretrain_losses.trunk import TrunkLoss


class ChunkLoss(TrunkLoss):
    """Has the losses ``l1`` (of the head's chunk, normalised), ``chunk``, ``hindsight``.

    When it validates, also ``first``: that of the chunk's first action.
    """

    terms = ("l1", "chunk", "hindsight")

    def __init__(self, vla: VLA, run: PretrainConfig) -> None:
        super().__init__(vla, run.chunk)
        if not isinstance(vla.head, L1Head):
            raise InputError(f"{vla.name} does not answer with a chunk that is learned by L1")
        self.head, self.stop_id = vla.head, vla.config.stop_id
        self.head_modules = (vla.head.model,)

    def append(self, batch: Batch, progress: float | None, generator: torch.Generator) -> torch.Tensor:
        """Append a placeholder for every value, whose id is −1, and the stop token."""
        ids = torch.full((len(batch.text), self.head.n_rows + STOP_TOKENS), -1)
        ids[:, -STOP_TOKENS:] = self.stop_id
        return ids

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Embed tokens, (..., n) → (..., n, width); placeholders are zeros."""
        return super().embed(ids.clamp(min=0)) * (ids >= 0)[..., None]

    def segment(self, length: int, lengths: torch.Tensor, wanted: int) -> Segment:
        """Let every token see all of its sequence, and no padding."""
        real = (torch.arange(length) < lengths[:, None])[:, None, None]
        rows = real.expand(-1, -1, length, -1)
        return Segment(length, 0, length, mask=rows, n_queries=wanted, final_mask=rows[:, :, -wanted:])

    def losses(
        self, read: torch.Tensor, targets: Targets, progress: float | None, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """See :meth:`TrunkLoss.losses`; the rows that answer are the last prompt token's and those behind it."""
        guess = self.head.model(read[:, : self.head.n_rows]).float()
        error = F.l1_loss(guess, targets.chunk[:, : self.head.horizon], reduction="none")
        losses = {"l1": error.mean(), **self.helpers(read[:, 0].float(), targets)}
        return losses if progress is not None else {**losses, "first": error[:, 0].mean()}
