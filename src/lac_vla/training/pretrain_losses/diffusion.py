"""A diffusion head learns by predicting noise.

Source: CogACT (Li et al., 2024, arXiv 2411.19650) and its released training: several noisings of every chunk for one
pass of the VLM, and now and then no condition, for classifier-free guidance.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from lac_vla.errors import CheckpointError, InputError
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
        self.head = vla.head
        self.draws, self.dropout = run.draws, run.condition_dropout
        initialise(self.head.model.net)

    def take_weights(self, folder: Path) -> list[nn.Parameter]:
        """See :meth:`PretrainLoss.take_weights`; a loaded head goes on learning where the trunk is held fixed."""
        own = {id(weight) for weight in self.head.model.parameters()}
        return [weight for weight in super().take_weights(folder) if id(weight) not in own]

    def _known(self, start: nn.Module) -> dict[str, torch.Tensor]:
        """Take all; of a start with other inputs its first camera's tower for ours, and no camera or state beyond."""
        cameras = getattr(getattr(start, "config", None), "cameras", None)
        if not cameras:
            raise CheckpointError("it has no camera's tower that could be ours: give another --start")
        first, (own, *others) = cameras[0].name, [camera.name for camera in self.model.config.cameras]
        weights, towers = {}, "vision_backbone.towers."
        for name, value in start.state_dict().items():
            camera, _, rest = name.removeprefix(towers).partition(".")
            if not name.startswith(towers):
                if self.model.proprio_projector is not None or not name.startswith("proprio_projector."):
                    weights[name] = value
            elif camera == first or camera in others:
                weights[f"{towers}{own if camera == first else camera}.{rest}"] = value
        return weights

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
