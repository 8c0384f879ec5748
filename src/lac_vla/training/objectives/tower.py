"""A new vision tower for a camera of a VLA that acts in tokens, learned by imitating the tower that it replaces."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import nn

from lac_vla.errors import CheckpointError
from lac_vla.models.prismatic.backbone import PrismaticBackbone
from lac_vla.models.prismatic.config import PrismaticConfig
from lac_vla.models.prismatic.model import PrismaticVLA
from lac_vla.models.prismatic.prompt import Encode
from lac_vla.models.prismatic.towers import Keep
from lac_vla.models.prismatic.vit import ViTTower
from lac_vla.training.config import PretrainConfig
from lac_vla.training.objectives.base import Batch
from lac_vla.training.objectives.tokens import TokenObjective


class TowerObjective(TokenObjective):
    """The losses of action tokens; and, while all but the first camera's tower is held fixed, ``imitation`` alone.

    That is the mean square error of the tower's features against those of the tower that it replaces, as a share of
    their variance. Every token of every frame teaches, and neither projector nor decoder need run.

    Args:
        config: The model's.
        run: The run.
    """

    terms = ("imitation", *TokenObjective.terms)

    def __init__(self, config: PrismaticConfig, run: PretrainConfig) -> None:
        super().__init__(config, run)
        self._camera = config.cameras[0].name
        self._prefix = f"towers.{self._camera}"
        self._teacher: tuple[nn.Module, ...] = ()  # in a tuple: it is no part of what is trained and saved
        initialise(self._tower)

    @property
    def _tower(self) -> ViTTower:
        return cast(ViTTower, self.model.vision_backbone.get_submodule(self._prefix))

    def backbone(self, encode: Encode) -> PrismaticBackbone:
        """See :meth:`Objective.backbone`."""
        return PrismaticBackbone(self.model, encode, name="mini-vit")

    def _known(self, start: PrismaticVLA) -> dict[str, torch.Tensor]:
        """All but the old tower's, which becomes the teacher."""
        try:
            self._teacher = (start.vision_backbone.get_submodule(self._prefix).requires_grad_(False),)
        except AttributeError as error:
            raise CheckpointError(
                f"it has no tower of its own for camera '{self._camera}' to imitate: {error}"
            ) from error
        old = f"vision_backbone.{self._prefix}."
        return {name: weight for name, weight in start.state_dict().items() if not name.startswith(old)}

    def imitate(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Loss ``imitation`` of a batch. The teacher is told how the frames were moved, the tower is not."""
        pixels, shift = batch.images[self._camera], batch.shifts[self._camera]
        with torch.no_grad():
            target = self._teacher[0](pixels, None, shift).float()
        error = (self._tower(pixels).float() - target).square().mean()
        return {"imitation": error / target.var(dim=(0, 1), correction=0).mean()}

    def forward(
        self, batch: Batch, keep: Keep | None, progress: float | None, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """See :meth:`Objective.forward`; when it validates, with ``imitation``."""
        losses = super().forward(batch, keep, progress, generator)
        return losses if progress is not None else losses | self.imitate(batch)


def initialise(vit: ViTTower) -> None:
    """Starting weights: Xavier's, and places as waves, so that a patch finds its neighbours from the first step on."""
    for module in vit.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.flatten(1))
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    side, width = math.isqrt(vit.pos_embed.shape[1]), vit.pos_embed.shape[2]
    frequencies = 100.0 ** -torch.linspace(0, 1, width // 4)
    at = torch.arange(side)[:, None] * frequencies
    waves = torch.cat([at.sin(), at.cos()], dim=-1)
    rows, cols = waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)
    with torch.no_grad():
        vit.pos_embed.copy_(0.5 * torch.cat([rows, cols], dim=-1).view(1, side * side, -1))
