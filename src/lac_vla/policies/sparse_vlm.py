"""SparseVLM: in three stages, the visual tokens that the instruction's raters attend to least are dropped.

*SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference*, arXiv 2410.04417. Pruning within
the frame: nothing is remembered from one frame to the next.

Differences from the release:

* It merges what it drops by clusters and puts the merged tokens back, up to a few dozen per stage. This engine adds no
  rows in mid-forward, so dropped tokens are lost: fewer tokens go on, at less cost, than in the release.
* It finds the raters once, by inner products of the text's and the image's embeddings. Here they are the tokens behind
  the visual ones (a proprioception token included) whose attention to the visual tokens, at the stage's own layer, is
  above those tokens' average; all of them if none is.
* Only those rows of the three layers are computed aside; the layers are of 32 and the numbers of 576 tokens, and scale
  with the model's; the tokens of all cameras are ranked together; of equally rated tokens the lower index is kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from lac_vla.errors import InputError
from lac_vla.policies.base import CachePolicy, scale_count, scale_layers
from lac_vla.types import AttentionProbe, Decision, FloatArray, PolicyInput, SkippedTokens, TokenLayout

LAYERS = (2, 6, 15)
"""The last layer (of 32) that every stage computes with all that the previous stage left."""


@dataclass(frozen=True)
class SparseVLM(CachePolicy):
    """Keep 300, 200 and 110 of 576 visual tokens behind layers 2, 6 and 15 of 32.

    Attributes:
        keep: How many of 576 visual tokens every stage keeps, joined by ``+``. The release also has ``303+110+36`` and
            ``66+30+17``.
    """

    keep: str = "300+200+110"

    def __post_init__(self) -> None:
        self._counts()

    def _counts(self) -> list[int]:
        parts = str(self.keep).split("+")
        counts = [int(part) for part in parts if part.isdecimal() and int(part) <= 576]
        if len(parts) != len(LAYERS) or len(counts) != len(LAYERS) or counts != sorted(counts, reverse=True):
            raise InputError(
                f"SparseVLM's keep is {self.keep!r}; give three falling numbers, of 576 tokens, joined by +, "
                "such as 300+200+110"
            )
        return counts

    def _stages(self, n_layers: int) -> dict[int, int]:
        """Map probed layers to tokens of 576 kept behind them; of two stages at one layer, the later."""
        return {scale_layers(layer + 1, n_layers) - 1: keep for layer, keep in zip(LAYERS, self._counts(), strict=True)}

    def probe(self, n_layers: int) -> AttentionProbe:
        """See :meth:`CachePolicy.probe`."""
        return AttentionProbe(tuple(self._stages(n_layers)), "suffix")

    def decide(self, inputs: PolicyInput) -> Decision:
        """See :meth:`CachePolicy.decide`."""
        return replace(
            Decision.dense(inputs.layout.n_visual, inputs.n_layers), skipped=SkippedTokens.PRUNE, nominal_ratio=None
        )

    def refine(self, layout: TokenLayout, layer: int, attention: torch.Tensor, decision: Decision) -> Decision:
        """See :meth:`CachePolicy.refine`."""
        left = np.flatnonzero(decision.exit_layer > layer)
        rating = rate(attention[:, layout.n_prefix : layout.n_prefix + left.size].cpu().numpy())
        keep = scale_count(self._stages(decision.n_layers)[layer], 576, layout.n_visual)
        exit_layer = decision.exit_layer.copy()
        exit_layer[left[np.argsort(-rating, kind="stable")[keep:]]] = layer + 1
        return replace(decision, exit_layer=exit_layer)


def rate(attention: FloatArray) -> FloatArray:
    """Average the attention of the raters: the rows that attend to the visual tokens more than the average row.

    ``attention`` is of text to visual tokens, mean over heads, (text, visual); the result (visual,).
    """
    relevance = attention.mean(axis=1)
    raters = relevance > relevance.mean()
    rating: FloatArray = attention[raters if raters.any() else slice(None)].mean(axis=0)
    return rating
