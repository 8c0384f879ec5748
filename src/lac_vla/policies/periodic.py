"""Periodic: whole pictures are seen every so manieth call, whatever happens in between.

The rule of FlashRT's ``cache_frames`` (2 there), which keeps the keys and values of a whole prefix. Here text and state
are computed anew in every call all the same: what is reused is all that the cameras see.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lac_vla.errors import InputError
from lac_vla.policies.base import CachePolicy
from lac_vla.types import Decision, PolicyInput


@dataclass(frozen=True)
class Periodic(CachePolicy):
    """Compute all visual tokens in one call of ``every``, and reuse all of them in the others.

    Attributes:
        every: Calls from one that sees to the next, at least 1.
    """

    every: int = 2

    def __post_init__(self) -> None:
        if not isinstance(self.every, int) or self.every < 1:
            raise InputError(f"every is {self.every!r}; give the calls from one that sees to the next, at least 1")

    def decide(self, inputs: PolicyInput) -> Decision:
        """See :meth:`CachePolicy.decide`."""
        blind = bool((inputs.age < self.every - 1).all())
        cached = np.full(inputs.layout.n_visual, blind)
        return Decision.reuse(cached, inputs.n_layers, nominal_ratio=float(blind))
