"""Sweeps: what random weights cannot tell, a ratio that pays or a draft that stands, is prescribed instead.

A model with random weights costs what the trained one does, frame by frame. What it reuses and which of its drafts
stand means nothing. So its ratios are run through, and so is the number of drafted tokens that stand.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any

import numpy as np
import torch

from lac_vla.models import PrismaticBackbone
from lac_vla.models.base import Extend
from lac_vla.types import FloatArray, Frame


def expand(spec: str) -> list[str]:
    """Policies of a text with several values of an option: ``random:ratio=.25,.5`` → one of .25 and one of .5.

    What has no ``=`` is a further value of the option before it. Anything else stays for the policy's own reader.
    """
    head, colon, rest = spec.partition(":")
    options: list[list[str]] = []
    for item in filter(None, rest.split(",")):
        if "=" in item or not options:
            options.append([item])
        else:
            options[-1].append(f"{options[-1][0].partition('=')[0]}={item.strip()}")
    return [head + colon + ",".join(choice) for choice in product(*options)]


class Scripted(PrismaticBackbone):
    """A model that always says the same token, and whose drafts have the first ``kept`` tokens right.

    It computes its own answer in full, then is made to say another. Behind a wrong token it is wrong again: after
    ``kept`` tokens stood, every further pass settles one token. That is the least that a draft of ``kept`` right
    tokens can be worth.

    Args:
        backbone: The model, of which this is another face.
        kept: Drafted tokens that stand, in 0..``max_new_tokens`` - 1.

    Attributes:
        kept: As given.
    """

    def __init__(self, backbone: PrismaticBackbone, kept: int) -> None:
        super().__init__(backbone.model, backbone.encode, name=backbone.name)
        self.kept = kept
        self._standing = 0
        self._right, self._wrong = (int(token) for token in self.actions.encode(np.array([0.0, 0.5])))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Scores of all tokens, those of the script's answer the highest; see :meth:`PrismaticBackbone.logits`."""
        scores = super().logits(hidden)
        right = min(len(scores), 1 + self._standing)
        self._standing = 0
        scores[:right, self._right] = torch.inf
        scores[right:, self._wrong] = torch.inf
        return scores

    def act(
        self,
        frame: Frame,
        hidden: torch.Tensor,
        extend: Extend,
        rng: np.random.Generator | None = None,
        last: Mapping[str, Any] | None = None,
    ) -> tuple[FloatArray, dict[str, Any]]:
        """See :meth:`PrismaticBackbone.act`; what it says of its tokens makes the next draft."""
        self._standing = 0 if last is None else self.kept
        action, info = super().act(frame, hidden, extend, rng, last)
        wrong = self.max_new_tokens - self.kept
        return action, {**info, "tokens": [self._right] * self.kept + [self._wrong] * wrong}
