"""The small models that ``lac pretrain`` trains: loss and start."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lac_vla.bundled import MINI, MINI_VIT
from lac_vla.training.pretrain_losses.chunk import ChunkLoss
from lac_vla.training.pretrain_losses.diffusion import DiffusionLoss
from lac_vla.training.pretrain_losses.flow import FlowLoss
from lac_vla.training.pretrain_losses.tokens import TokenLoss
from lac_vla.training.pretrain_losses.tower import TowerLoss


@dataclass(frozen=True)
class Recipe:
    """Says how a small model is trained.

    Attributes:
        loss: Makes its loss of the model and the run.
        start: Checkpoint whose weights it starts from unless told otherwise; ``None`` for random weights.
        statistics: Key of the model's normalisation statistics.
    """

    loss: type[ChunkLoss] | type[DiffusionLoss] | type[FlowLoss] | type[TokenLoss]
    start: Path | None = None
    statistics: str = "libero"


RECIPES: dict[str, Recipe] = {
    "mini": Recipe(TokenLoss),
    "mini-vit": Recipe(TowerLoss, start=MINI),
    "mini-cogact": Recipe(DiffusionLoss, start=MINI),
    "mini-oft": Recipe(ChunkLoss, start=MINI),
    "mini-widowx": Recipe(ChunkLoss, start=MINI, statistics="bridge_orig"),
    "mini-flow": Recipe(FlowLoss, start=MINI_VIT),
}
"""Name of a small model, which is also that of its preset → recipe."""
