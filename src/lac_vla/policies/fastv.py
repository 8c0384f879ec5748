"""FastV: after a few layers, the visual tokens that the last token attends to least are dropped.

*An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large Vision-Language Models*,
arXiv 2403.06764. Pruning within the frame: nothing is remembered from one frame to the next.

Differences from the release: only the last prompt token's row of one layer is computed aside, where the release takes
the whole map from eager attention; K = 3 is of 32 layers and scales with the model's depth; the tokens of all cameras
are ranked together; of equally attended tokens the lower index goes first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from lac_vla.errors import InputError
from lac_vla.policies.base import CachePolicy, cache_lowest, check_ratio, scale_layers
from lac_vla.types import AttentionProbe, Decision, PolicyInput, SkippedTokens, TokenLayout


@dataclass(frozen=True)
class FastV(CachePolicy):
    """Drop a share of the visual tokens for all layers from the K-th on, ranked by the attention of layer K − 1.

    The others keep their original positions. The query is the last prompt token, the attention the mean over heads.

    Attributes:
        ratio: Share of the visual tokens dropped, in [0, 1].
        layer: K, the number of layers (of 32) that compute every token.
    """

    ratio: float = 0.5
    layer: float = 3

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        if self.layer not in range(1, 32):
            raise InputError(f"FastV's layer is the number of layers, of 32, before the cut: 1..31; got {self.layer}")

    def probe(self, n_layers: int) -> AttentionProbe:
        """See :meth:`CachePolicy.probe`."""
        return AttentionProbe((scale_layers(int(self.layer), n_layers) - 1,), "last")

    def decide(self, inputs: PolicyInput) -> Decision:
        """See :meth:`CachePolicy.decide`."""
        return replace(
            Decision.dense(inputs.layout.n_visual, inputs.n_layers), skipped=SkippedTokens.PRUNE, nominal_ratio=None
        )

    def refine(self, layout: TokenLayout, layer: int, attention: torch.Tensor, decision: Decision) -> Decision:
        """See :meth:`CachePolicy.refine`."""
        dropped = cache_lowest(attention[-1, layout.visual].cpu().numpy(), self.ratio)
        return replace(decision, exit_layer=np.where(dropped, layer + 1, decision.exit_layer))
