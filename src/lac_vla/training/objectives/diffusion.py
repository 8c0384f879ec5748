"""CogACT's head, learned by predicting noise.

Source: CogACT (Li et al., 2024, arXiv 2411.19650) and its released training: several noisings of every chunk for one
pass of the VLM, and now and then no condition, for classifier-free guidance.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from lac_vla.models.cogact.backbone import GRIPPER_THRESHOLD, CogACTBackbone
from lac_vla.models.cogact.config import CogACTConfig
from lac_vla.models.cogact.dit import DiT
from lac_vla.models.cogact.model import SCHEDULE, CogACTVLA
from lac_vla.models.prismatic.prompt import Encode
from lac_vla.training.config import PretrainConfig
from lac_vla.training.frames import GRIPPER
from lac_vla.training.objectives.base import Batch, Objective, Targets


class DiffusionObjective(Objective):
    """Losses ``noise`` (mean square), ``chunk``, ``hindsight``.

    When it validates, also ``sampled``: the mean distance of the first action of a drawn chunk from the recorded one,
    normalised, the gripper in ±1.

    Args:
        config: The model's.
        run: The run.
    """

    terms = ("noise", "chunk", "hindsight")

    def __init__(self, config: CogACTConfig, run: PretrainConfig) -> None:
        vla = CogACTVLA(config)
        super().__init__(vla, run.chunk)
        self.vla, self.config = vla, config
        self.draws, self.dropout = run.draws, run.condition_dropout
        initialise(vla.action_model.net)

    def backbone(self, encode: Encode) -> CogACTBackbone:
        """See :meth:`Objective.backbone`."""
        return CogACTBackbone(self.config, self.vla, encode, name="mini-cogact")

    def append(self, batch: Batch, progress: float | None, generator: torch.Generator) -> torch.Tensor:
        """See :meth:`Objective.append`: none."""
        return batch.text[:, :0]

    def losses(
        self, read: torch.Tensor, targets: Targets, progress: float | None, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """See :meth:`Objective.losses`."""
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
        net, clean, z = self.vla.action_model.net, chunk.repeat(self.draws, 1, 1), feature.repeat(self.draws, 1)
        t = torch.randint(SCHEDULE.steps, (len(clean),), generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        if drop:
            dropped = torch.rand((len(clean), 1), generator=generator) < self.dropout
            z = torch.where(dropped, net.z_embedder.uncondition, z)
        return F.mse_loss(net(SCHEDULE.noised(clean, t, noise), t, z[:, None]), noise)

    def _sampled_error(self, feature: torch.Tensor, chunk: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        drawn = self.vla.action_model.sample(
            feature[:, None], self.config.sampling, lambda: torch.randn(chunk.shape, generator=generator)
        )[:, 0]
        distance = (drawn.clamp(-1, 1) - chunk[:, 0]).abs()
        opened = (drawn[:, GRIPPER] >= GRIPPER_THRESHOLD).float()
        distance[:, GRIPPER] = 2 * (opened - chunk[:, 0, GRIPPER]).abs()
        return distance.mean()


def initialise(net: DiT) -> None:
    """Starting weights as CogACT's: Xavier, small embeddings, and a last layer that predicts nothing."""
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for embedding in (net.z_embedder.linear, net.t_embedder.mlp[0], net.t_embedder.mlp[2]):
        nn.init.normal_(embedding.weight, std=0.02)  # type: ignore[arg-type]
    nn.init.normal_(net.z_embedder.uncondition, std=0.02)
    nn.init.normal_(net.positional_embedding, std=net.positional_embedding.shape[-1] ** -0.5)
    nn.init.zeros_(net.final_layer.linear.weight)
