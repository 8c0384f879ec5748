"""A new vision tower of a VLA that acts in tokens learns by imitating the tower that it replaces."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import nn

from lac_vla.errors import CheckpointError
from lac_vla.models import VLA
from lac_vla.training.config import PretrainConfig
from lac_vla.training.pretrain_losses.base import Batch, Keep
from lac_vla.training.pretrain_losses.tokens import TokenLoss


class TowerLoss(TokenLoss):
    """Has the losses of action tokens; and, while all but the first camera's tower is held fixed, ``imitation`` alone.

    That is the mean square error of the tower's features against those of the tower that it replaces, as a share of
    their variance. Every token of every frame teaches, and neither projector nor decoder need run.
    """

    terms = ("imitation", *TokenLoss.terms)

    def __init__(self, vla: VLA, run: PretrainConfig) -> None:
        super().__init__(vla, run)
        self._camera = next(iter(vla.grids))
        self._prefix = f"towers.{self._camera}"
        self._teacher: tuple[nn.Module, ...] = ()  # in a tuple: it is no part of what is trained and saved
        initialise(self._tower)

    @property
    def _tower(self) -> nn.Module:
        tower: nn.Module = self.model.vision_backbone.get_submodule(self._prefix)
        return tower

    def _known(self, start: Any) -> dict[str, torch.Tensor]:
        """Take all but the old tower's, which becomes the teacher."""
        try:
            self._teacher = (start.vision_backbone.get_submodule(self._prefix).requires_grad_(False),)
        except AttributeError as error:
            raise CheckpointError(
                f"it has no tower of its own for camera '{self._camera}' to imitate: {error}"
            ) from error
        old = f"vision_backbone.{self._prefix}."
        return {name: weight for name, weight in super()._known(start).items() if not name.startswith(old)}

    def imitate(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Compute the loss ``imitation``. The teacher is told how the frames were moved, the tower is not."""
        pixels, shift = batch.images[self._camera], batch.shifts[self._camera]
        with torch.no_grad():
            target = self._teacher[0](pixels, None, shift).float()
        error = (self._tower(pixels).float() - target).square().mean()
        return {"imitation": error / target.var(dim=(0, 1), correction=0).mean()}

    def forward(
        self, batch: Batch, keep: Keep | None, progress: float | None, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """See :meth:`TrunkLoss.forward`; when it validates, with ``imitation``."""
        losses = super().forward(batch, keep, progress, generator)
        return losses if progress is not None else losses | self.imitate(batch)


def initialise(vit: Any) -> None:
    """Set starting weights: Xavier's, and places as waves: a patch finds its neighbours from the first step on."""
    for module in vit.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.flatten(1))
            nn.init.zeros_(cast(nn.Parameter, module.bias))
    side, width = math.isqrt(vit.pos_embed.shape[1]), vit.pos_embed.shape[2]
    frequencies = 100.0 ** -torch.linspace(0, 1, width // 4)
    at = torch.arange(side)[:, None] * frequencies
    waves = torch.cat([at.sin(), at.cos()], dim=-1)
    rows, cols = waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)
    with torch.no_grad():
        vit.pos_embed.copy_(0.5 * torch.cat([rows, cols], dim=-1).view(1, side * side, -1))
