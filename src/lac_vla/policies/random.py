"""Chance: the floor that every rule has to beat."""

from __future__ import annotations

from dataclasses import dataclass

from lac_vla.policies.base import CachePolicy, cache_lowest, check_ratio
from lac_vla.types import Decision, PolicyInput


@dataclass(frozen=True)
class Random(CachePolicy):
    """Reuse a fresh random choice of tokens in every frame.

    Attributes:
        ratio: Share of the visual tokens reused, in [0, 1].
    """

    ratio: float = 0.5

    def __post_init__(self) -> None:
        check_ratio(self.ratio)

    def decide(self, inputs: PolicyInput) -> Decision:
        """See :meth:`CachePolicy.decide`."""
        cached = cache_lowest(inputs.rng.random(inputs.layout.n_visual), self.ratio)
        return Decision.reuse(cached, inputs.n_layers, nominal_ratio=self.ratio)
