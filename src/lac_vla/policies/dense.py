"""No caching at all: the model as it is."""

from __future__ import annotations

from dataclasses import dataclass

from lac_vla.policies.base import CachePolicy
from lac_vla.types import Decision, PolicyInput


@dataclass(frozen=True)
class Dense(CachePolicy):
    """Recompute every token of every frame: the exact baseline, on the fastest path of the engine."""

    def decide(self, inputs: PolicyInput) -> Decision:
        """See :meth:`CachePolicy.decide`."""
        return Decision.dense(inputs.layout.n_visual, inputs.n_layers)
