"""What a frame costs in multiply-accumulates (MACs); FLOPs = 2 × MACs.

The decoder is counted analytically, as in the paper's equations 13-14, from the decision that was really taken: every
row of a layer pays 2D² + 2D·D_kv for its projections, 3DM for the gated feed-forward network (three matrices, where
the paper's formula has two) and 2·D·slots for attention, which counts the masked half of a causal square too. In the
last layer only the suffix pays all that; the other rows leave their keys and values, 2D·D_kv, and are done. Attention
that a policy watches is computed aside, beside the kernel that computes the model: D·slots per watched row. Towers and
projectors are counted by torch's own counter, once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from lac_vla.models.base import Backbone, DecoderShape
from lac_vla.types import Beyond, Decision, Frame, TokenLayout, Watch


def layer_macs(shape: DecoderShape, rows: int, slots: int, asking: int | None = None) -> int:
    """MACs of one block for ``rows`` rows, of which ``asking`` (all by default) attend to ``slots`` slots."""
    weights = 2 * shape.width**2 + 3 * shape.width * shape.ffn
    asking = rows if asking is None else asking
    return rows * 2 * shape.width * shape.kv_width + asking * (weights + 2 * shape.width * slots)


def prefill_macs(shape: DecoderShape, layout: TokenLayout, decision: Decision, watch: Watch | None = None) -> int:
    """MACs of a prompt under a decision; ``watch`` says whether somebody wants all rows of the last layer."""
    total = 0
    for index in range(shape.layers):
        computed, slots = _rows_and_slots(layout, decision, index)
        suffix_asks = index == shape.layers - 1 and not (watch and watch.rows == "all" and index in watch.layers)
        total += layer_macs(shape, computed, slots, layout.n_suffix if suffix_asks else None)
    return total


def watch_macs(shape: DecoderShape, layout: TokenLayout, decision: Decision, watch: Watch | None) -> int:
    """MACs of the attention that is computed aside for a policy: watched rows × slots × width, per watched layer."""
    if watch is None:
        return 0
    total = 0
    for index in watch.layers:
        computed, slots = _rows_and_slots(layout, decision, index)
        rows = {"last": 1, "suffix": layout.n_suffix, "all": computed}[watch.rows]
        total += rows * slots * shape.width
    return total


def decode_macs(shape: DecoderShape, layout: TokenLayout, decision: Decision, n_tokens: int) -> int:
    """MACs of ``n_tokens`` greedy tokens behind a prompt; the first comes from the prompt's own last row."""
    total = n_tokens * shape.width * shape.vocabulary
    for index in range(shape.layers):
        _, slots = _rows_and_slots(layout, decision, index)
        total += sum(layer_macs(shape, 1, slots + step) for step in range(1, n_tokens))
    return total


def _rows_and_slots(layout: TokenLayout, decision: Decision, layer: int) -> tuple[int, int]:
    """Rows computed in a layer, and slots that exist there."""
    rows = layout.n_prefix + layout.n_suffix + int(np.count_nonzero(decision.depth > layer))
    return rows, layout.length if decision.beyond is Beyond.REUSE else rows


def count_macs(work: Callable[[], Any]) -> int:
    """MACs of anything, by torch's operator counter."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        work()
    return int(counter.get_total_flops()) // 2


@dataclass(frozen=True)
class CostModel:
    """MACs per frame of a backbone.

    Attributes:
        decoder: Sizes of its decoder.
        tower: MACs of the vision tower per frame.
        projector: MACs of the projector per visual token.
        action_tokens: Tokens decoded per action.
    """

    decoder: DecoderShape
    tower: int
    projector: int
    action_tokens: int

    @classmethod
    def of(cls, backbone: Backbone, frame: Frame) -> CostModel:
        """Measure the parts that do not depend on a decision, on one frame."""
        pixels = backbone.pixels(frame)
        tower = count_macs(lambda: backbone.see(pixels))
        with torch.inference_mode():
            features = backbone.see(pixels)
        projector = count_macs(lambda: backbone.project(features)) // features.shape[0]
        return cls(backbone.shape, tower, projector, backbone.max_new_tokens)

    def frame(
        self, layout: TokenLayout, decision: Decision, policy: int = 0, watch: Watch | None = None
    ) -> dict[str, int]:
        """MACs by stage.

        Args:
            layout: Where the tokens are.
            decision: How deep every visual token was computed.
            policy: Of the policy's own networks.
            watch: Attention that was computed aside for the policy.

        Returns:
            ``policy`` (its networks and what it watched), ``tower``, ``projector``, ``prefill``, ``decode``.
        """
        return {
            "policy": policy + watch_macs(self.decoder, layout, decision, watch),
            "tower": self.tower,
            "projector": self.projector * int(np.count_nonzero(decision.depth)),
            "prefill": prefill_macs(self.decoder, layout, decision, watch),
            "decode": decode_macs(self.decoder, layout, decision, self.action_tokens),
        }
