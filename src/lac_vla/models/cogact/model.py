"""CogACT's modules: those of its Prismatic VLM, and the action head."""

from __future__ import annotations

import torch
from torch import nn

from lac_vla.models.cogact.config import CogACTConfig, DiTConfig, Sampling
from lac_vla.models.cogact.dit import DiT
from lac_vla.models.cogact.sampler import Draw, Schedule, ddim, ddpm
from lac_vla.models.prismatic.model import PrismaticVLA

SCHEDULE = Schedule()


class ActionHead(nn.Module):
    """Draws a chunk of normalised actions, given a cognition feature.

    Attributes:
        net: Predicts noise.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.net = DiT(config)

    def sample(self, z: torch.Tensor, sampling: Sampling, draw: Draw) -> torch.Tensor:
        """Draw a chunk for every cognition feature, with classifier-free guidance.

        Guidance: Ho & Salimans, 2022, arXiv 2207.12598. What does not change from step to step is embedded once.

        Args:
            z: Cognition features, (B, 1, condition).
            sampling: How.
            draw: Makes noise, (B, horizon, action_dim).

        Returns:
            Normalised actions, not clipped, (B, horizon, action_dim).
        """
        size, guided = len(z), sampling.guidance > 1
        if guided:  # both predictions in one batch
            z = torch.cat([z, self.net.z_embedder.uncondition.expand(size, 1, -1)])
        feature = self.net.z_embedder(z)
        visited = sampling.visited
        steps = dict(zip(visited, self.net.t_embedder(torch.tensor(visited, device=z.device)), strict=True))

        def denoise(x: torch.Tensor, t: int) -> torch.Tensor:
            predicted = self.net.denoise(torch.cat([x, x]) if guided else x, feature + steps[t])
            given, absent = predicted[:size], predicted[-size:]
            return absent + sampling.guidance * (given - absent)

        if sampling.method == "ddpm":
            return ddpm(denoise, draw, SCHEDULE)
        return ddim(denoise, draw, SCHEDULE, sampling.steps)


class CogACTVLA(PrismaticVLA):
    """A Prismatic VLM with an action head beside it.

    The head stays in float32 whatever the VLM's dtype, as in CogACT's evaluation: it is small, and its many steps
    would add up their roundings.

    Attributes:
        action_model: The head.
    """

    def __init__(self, config: CogACTConfig) -> None:
        super().__init__(config.vlm)
        self.action_model = ActionHead(config.head)
