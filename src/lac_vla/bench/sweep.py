"""Sweeps: what random weights cannot tell, a ratio that pays or a draft that is accepted, is prescribed instead.

A model with random weights costs what the trained one does, frame by frame. What it reuses and which of its drafts
are accepted means nothing. So its ratios are run through, and so is the number of drafted tokens that are accepted.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import torch

from lac_vla.models import VLA
from lac_vla.models.heads.base import Decoding, HeadContext
from lac_vla.models.heads.tokens import TokenHead


def expand(spec: str) -> list[str]:
    """Expand a text with several values of an option: ``random:ratio=.25,.5`` → one of .25 and one of .5.

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


CERTAIN = 6e4
"""A score beyond every other's, and finite in half precision as well."""


class ScriptedHead(TokenHead):
    """Always says the same token, and its drafts have the first ``accepted`` tokens right.

    It computes its own answer in full, then is made to say another. Behind a wrong token it is wrong again: after
    ``accepted`` tokens, every further pass settles one token. That is the least that a draft of ``accepted`` right
    tokens can be worth.

    Args:
        head: The model's own.
        accepted: Drafted tokens that are accepted, in 0..``max_new_tokens`` - 1.
    """

    def __init__(self, head: TokenHead, accepted: int) -> None:
        super().__init__(head.embed, self._scores, head.tokenizer, head.action_range)
        self._head, self._accepted, self._drafted_right = head, accepted, 0
        self._right, self._wrong = (int(token) for token in head.tokenizer.encode(np.array([0.0, 0.5])))

    def decode(self, context: HeadContext) -> Decoding:
        """Decode by the script; what it says of its tokens makes the next draft."""
        self._drafted_right = 0 if context.drafted is None else self._accepted
        action, metadata = yield from super().decode(context)
        wrong = self.max_new_tokens - self._accepted
        return action, {**metadata, "tokens": [self._right] * self._accepted + [self._wrong] * wrong}

    def _scores(self, hidden: torch.Tensor) -> torch.Tensor:
        scores = self._head.logits(hidden)
        right = min(len(scores), 1 + self._drafted_right)
        self._drafted_right = 0
        scores[:right, self._right] = CERTAIN
        scores[right:, self._wrong] = CERTAIN
        return scores


def scripted(model: VLA, head: TokenHead, accepted: int) -> VLA:
    """Make the same model with a :class:`ScriptedHead`."""
    return replace(model, head=ScriptedHead(head, accepted))
