"""What a frame costs in multiply-accumulates (MACs); FLOPs = 2 × MACs.

The decoder is counted analytically, as in the paper's equations 13-14, from the decision that was really taken: every
row of a layer pays 2D² + 2D·D_kv for its projections, 3DM for the gated feed-forward network (three matrices, where
the paper's formula has two) and 2·D·slots for attention, which counts the masked half of a causal square too. In the
last layer only the suffix pays all that; the other rows leave their keys and values, 2D·D_kv, and are done. Towers,
projectors and heads (what turns hidden states into the action: the output matrix for tokens; all steps of a diffusion
head, guidance included) are counted by torch's own counter, once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lac_vla.models.base import Backbone, DecoderShape
from lac_vla.types import Beyond, Decision, Frame, TokenLayout


def layer_macs(shape: DecoderShape, rows: int, slots: int, asking: int | None = None) -> int:
    """MACs of one block for ``rows`` rows, of which ``asking`` (all by default) attend to ``slots`` slots."""
    weights = 2 * shape.width**2 + 3 * shape.width * shape.ffn
    asking = rows if asking is None else asking
    return rows * 2 * shape.width * shape.kv_width + asking * (weights + 2 * shape.width * slots)


def prefill_macs(shape: DecoderShape, layout: TokenLayout, decision: Decision) -> int:
    """MACs of a prompt under a decision."""
    total = 0
    for index in range(shape.layers):
        computed, slots = _rows_and_slots(layout, decision, index)
        total += layer_macs(shape, computed, slots, layout.n_suffix if index == shape.layers - 1 else None)
    return total


def decode_macs(shape: DecoderShape, layout: TokenLayout, decision: Decision, n_tokens: int) -> int:
    """MACs of the layers for ``n_tokens`` tokens behind a prompt; the first comes from the prompt's own last row."""
    total = 0
    for index in range(shape.layers):
        _, slots = _rows_and_slots(layout, decision, index)
        total += sum(layer_macs(shape, 1, slots + step) for step in range(1, n_tokens))
    return total


def _rows_and_slots(layout: TokenLayout, decision: Decision, layer: int) -> tuple[int, int]:
    """Rows computed in a layer, and slots that exist there."""
    rows = layout.n_prefix + layout.n_suffix + int(np.count_nonzero(decision.depth > layer))
    return rows, layout.length if decision.beyond is Beyond.REUSE else rows


def count_macs(work: Callable[[], Any]) -> int:
    """MACs of anything, by torch's operator counter.

    Attention runs in matrix products meanwhile: there are kernels that the counter does not know, the CPU's for one.
    """
    with FlopCounterMode(display=False) as counter, torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):
        work()
    return int(counter.get_total_flops()) // 2


@dataclass(frozen=True)
class CostModel:
    """MACs per frame of a backbone.

    Attributes:
        decoder: Sizes of its decoder.
        tower: MACs of the vision tower per frame.
        projector: MACs of the projector per visual token.
        head: MACs from the hidden states to the action, the decoder's layers left out.
        action_tokens: Tokens decoded per action.
    """

    decoder: DecoderShape
    tower: int
    projector: int
    head: int
    action_tokens: int

    @classmethod
    def of(cls, backbone: Backbone, frame: Frame) -> CostModel:
        """Measure the parts that do not depend on a decision, on one frame."""
        pixels = backbone.pixels(frame)
        tower = count_macs(lambda: backbone.see(pixels))
        with torch.inference_mode():
            features, hidden = backbone.see(pixels), backbone.suffix(frame)
        projector = count_macs(lambda: backbone.project(features)) // features.shape[0]
        chance = np.random.default_rng(0)
        head = count_macs(lambda: backbone.act(frame, hidden, lambda new: new, chance))  # any rows of the right width
        return cls(backbone.shape, tower, projector, head, backbone.max_new_tokens)

    def frame(self, layout: TokenLayout, decision: Decision, policy: int = 0) -> dict[str, int]:
        """MACs by stage: ``policy`` (as given), ``tower``, ``projector``, ``prefill``, ``decode``, ``head``."""
        return {
            "policy": policy,
            "tower": self.tower,
            "projector": self.projector * int(np.count_nonzero(decision.depth)),
            "prefill": prefill_macs(self.decoder, layout, decision),
            "decode": decode_macs(self.decoder, layout, decision, self.action_tokens),
            "head": self.head,
        }
