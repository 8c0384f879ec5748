"""Action tokens are learned by cross-entropy with soft targets and noisy teacher forcing."""

from __future__ import annotations

import torch

from lac_vla.errors import InputError
from lac_vla.models import VLA
from lac_vla.models.heads.tokens import TokenHead
from lac_vla.training.config import PretrainConfig
from lac_vla.training.pretrain_losses.base import ACTION_DIMS, Batch, Targets
from lac_vla.training.pretrain_losses.trunk import TrunkLoss


class TokenLoss(TrunkLoss):
    """Has the losses ``tokens`` (nats), ``chunk``, ``hindsight``; and ``action_error``, without a gradient.

    The action error is the mean distance of the most likely bin from the true one, in bins.
    """

    terms: tuple[str, ...] = ("tokens", "chunk", "hindsight")

    def __init__(self, vla: VLA, run: PretrainConfig) -> None:
        super().__init__(vla, run.chunk)
        if not isinstance(vla.head, TokenHead):
            raise InputError(f"{vla.name} does not answer in action tokens")
        self.sigma, self.noise = run.sigma, run.noise
        self.tokenizer = vla.head.tokenizer
        self.n_bins = self.tokenizer.n_bins - 1
        self.last_id = self.tokenizer.vocab_size - 1  # means bin 0; smaller ids mean higher bins

    def append(self, batch: Batch, progress: float | None, generator: torch.Generator) -> torch.Tensor:
        """Take the recorded action's tokens but the last, some of them replaced by random ones."""
        shown = self._ids(batch.targets)
        if self.noise and progress is not None:
            drawn = self.last_id - torch.randint(self.n_bins, shown.shape, generator=generator)
            shown = torch.where(torch.rand(shown.shape, generator=generator) < self.noise, drawn, shown)
        return shown[:, :-1]

    def losses(
        self, read: torch.Tensor, targets: Targets, progress: float | None, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """See :meth:`TrunkLoss.losses`; the width of the soft targets falls with ``progress``.

        ``read`` holds the row before every action token, (B, A, width).
        """
        first, last = self.sigma
        sigma = last if progress is None else first * (last / first) ** min(1.0, progress / 0.9)
        bins = torch.arange(self.n_bins)
        truth = self.last_id - self._ids(targets)
        widths = torch.full((ACTION_DIMS, 1), sigma)
        widths[-1] = 0.5  # the gripper knows open and closed only
        target = torch.softmax(-0.5 * ((bins - truth[..., None]) / widths) ** 2, dim=-1)
        logits = self.model.language_model.lm_head(read).float().log_softmax(dim=-1)[..., self.last_id - bins]
        with torch.no_grad():
            error = (logits.argmax(dim=-1) - truth).abs().float().mean()
        return {
            "tokens": -(target * logits).sum(dim=-1).mean(),
            **self.helpers(read[:, 0].float(), targets),
            "action_error": error,
        }

    def _ids(self, targets: Targets) -> torch.Tensor:
        """Encode the recorded actions, (B, A)."""
        return torch.from_numpy(self.tokenizer.encode(targets.chunk[:, 0].numpy()))
