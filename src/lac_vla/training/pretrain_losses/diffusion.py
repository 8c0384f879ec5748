"""A diffusion head learns by predicting noise.

Source: CogACT (Li et al., 2024, arXiv 2411.19650) and its released training: several noisings of every chunk for one
pass of the VLM, and now and then no condition, for classifier-free guidance.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812

from lac_vla.errors import InputError
from lac_vla.models import VLA
from lac_vla.models.heads.diffusion import GRIPPER_THRESHOLD, SCHEDULE, DiffusionHead
from lac_vla.models.heads.dit import initialise
from lac_vla.training.config import PretrainConfig
from lac_vla.training.frames import GRIPPER
from lac_vla.training.pretrain_losses.base import Batch, Targets
from lac_vla.training.pretrain_losses.trunk import TrunkLoss


class DiffusionLoss(TrunkLoss):
    """Has the losses ``noise`` (mean square), ``chunk``, ``hindsight``.

    When it validates, also ``sampled``: the mean distance of the first action of a drawn chunk from the recorded one,
    normalised, the gripper in ±1.
    """

    terms = ("noise", "chunk", "hindsight")

    def __init__(self, vla: VLA, run: PretrainConfig) -> None:
        super().__init__(vla, run.chunk)
        if not isinstance(vla.head, DiffusionHead):
            raise InputError(f"{vla.name} does not draw its actions by diffusion")
        self.head, self.head_modules = vla.head, (vla.head.model,)
        self.draws, self.dropout = run.draws, run.condition_dropout
        initialise(self.head.model.net)

    def append(self, batch: Batch, progress: float | None, generator: torch.Generator) -> torch.Tensor:
        """Append none."""
        return batch.text[:, :0]

    def losses(
        self, read: torch.Tensor, targets: Targets, progress: float | None, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """See :meth:`TrunkLoss.losses`."""
        prompt_end = read[:, 0].float()
        # In float32, as it will be at inference, and on a CPU faster so.
        with torch.autocast(prompt_end.device.type, enabled=False):
            losses = {"noise": self._noise_loss(prompt_end, targets.chunk, progress is not None, generator)}
            losses |= self.helpers(prompt_end, targets)
            if progress is None:
                losses["sampled"] = self._sampled_error(prompt_end, targets.chunk, generator)
        return losses

    def _noise_loss(
        self, feature: torch.Tensor, chunk: torch.Tensor, drop: bool, generator: torch.Generator
    ) -> torch.Tensor:
        net, clean, z = self.head.model.net, chunk.repeat(self.draws, 1, 1), feature.repeat(self.draws, 1)
        t = torch.randint(SCHEDULE.steps, (len(clean),), generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        if drop:
            dropped = torch.rand((len(clean), 1), generator=generator) < self.dropout
            z = torch.where(dropped, net.z_embedder.uncondition, z)
        return F.mse_loss(net(SCHEDULE.noised(clean, t, noise), t, z[:, None]), noise)

    def _sampled_error(self, feature: torch.Tensor, chunk: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        drawn = self.head.model.sample(
            feature[:, None], self.head.sampling, lambda: torch.randn(chunk.shape, generator=generator)
        )[:, 0]
        distance = (drawn.clamp(-1, 1) - chunk[:, 0]).abs()
        opened = (drawn[:, GRIPPER] >= GRIPPER_THRESHOLD).float()
        distance[:, GRIPPER] = 2 * (opened - chunk[:, 0, GRIPPER]).abs()
        return distance.mean()
