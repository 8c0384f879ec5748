"""The model families that ``lac pretrain`` trains: what is built, and what it starts from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from lac_vla.bundled import MINI as BUNDLED_MINI
from lac_vla.models.cogact.config import MINI_COGACT, CogACTConfig
from lac_vla.models.prismatic.config import PrismaticConfig
from lac_vla.models.prismatic.presets import MINI, MINI_VIT
from lac_vla.training.config import PretrainConfig
from lac_vla.training.objectives.base import Objective
from lac_vla.training.objectives.diffusion import DiffusionObjective
from lac_vla.training.objectives.tokens import TokenObjective
from lac_vla.training.objectives.tower import TowerObjective


class Family(Protocol):
    """A kind of model."""

    @property
    def vlm(self) -> PrismaticConfig:
        """Its trunk, without statistics."""
        ...

    @property
    def start(self) -> Path | None:
        """Checkpoint whose weights it starts from unless told otherwise; ``None`` for chance."""
        ...

    def horizon(self, run: PretrainConfig) -> int:
        """Actions that a target holds."""
        ...

    def objective(self, statistics: Mapping[str, Any], run: PretrainConfig) -> Objective:
        """What is trained, with the statistics of its data, and weights by chance."""
        ...


@dataclass(frozen=True)
class TokenFamily:
    """A Prismatic VLA that answers in action tokens."""

    vlm: PrismaticConfig
    start: Path | None = None

    def horizon(self, run: PretrainConfig) -> int:
        """The helper's."""
        return run.chunk

    def objective(self, statistics: Mapping[str, Any], run: PretrainConfig) -> Objective:
        """See :meth:`Family.objective`."""
        return TokenObjective(replace(self.vlm, norm_stats=statistics), run)


@dataclass(frozen=True)
class TowerFamily(TokenFamily):
    """Such a one that takes all but its first camera's vision tower from another."""

    def objective(self, statistics: Mapping[str, Any], run: PretrainConfig) -> Objective:
        """See :meth:`Family.objective`."""
        return TowerObjective(replace(self.vlm, norm_stats=statistics), run)


@dataclass(frozen=True)
class DiffusionFamily:
    """A VLA that draws chunks of actions as CogACT does."""

    config: CogACTConfig
    start: Path | None = None

    @property
    def vlm(self) -> PrismaticConfig:
        """See :attr:`Family.vlm`."""
        return self.config.vlm

    def horizon(self, run: PretrainConfig) -> int:
        """The head's, or the helper's if that is longer."""
        return max(run.chunk, self.config.head.horizon)

    def objective(self, statistics: Mapping[str, Any], run: PretrainConfig) -> Objective:
        """See :meth:`Family.objective`."""
        return DiffusionObjective(replace(self.config, vlm=replace(self.vlm, norm_stats=statistics)), run)


FAMILIES: dict[str, Family] = {
    "mini": TokenFamily(MINI),
    "mini-vit": TowerFamily(MINI_VIT, start=BUNDLED_MINI),
    "mini-cogact": DiffusionFamily(MINI_COGACT, start=BUNDLED_MINI),
}
"""By the name of the bundled model."""
