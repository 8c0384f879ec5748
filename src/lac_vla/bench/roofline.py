"""The least time that a GPU needs: the roofline (Williams et al., CACM 2009) of a decoder at batch 1.

A prefill, or a decoding pass, takes at least the time of its arithmetic, and at least that of reading the layers'
weights once; its floor is the larger of the two. Keys, values and the output matrix are left out: a floor stays one.

Vendors' peaks, dense bfloat16 with 32-bit accumulation, and memory bandwidth:

========  ===============  ==========  ==================================================================
GPU       TFLOP/s          TB/s        source
========  ===============  ==========  ==================================================================
H200      989.4            4.8         NVIDIA H200 data sheet (SXM), without sparsity
H100      989.4            3.35        NVIDIA H100 data sheet (SXM5, HBM3), without sparsity
A100      312              2.039       NVIDIA A100 80 GB data sheet (SXM), without sparsity
RTX 4090  165.2            1.008       NVIDIA Ada architecture white paper, FP16 with FP32 accumulation
AGX Orin  42.6             0.2048      NVIDIA Jetson AGX Orin technical brief (64 GB): 170 sparse INT8 TOPS of its GPU
Thor      257              0.273       NVIDIA Jetson T5000 data sheet: 2070 sparse FP4 TFLOP/s, an eighth of it
========  ===============  ==========  ==================================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lac_vla.cost import decode_macs, layer_macs, prefill_macs
from lac_vla.errors import InputError
from lac_vla.models.protocols import DecoderShape
from lac_vla.types import Decision, TokenLayout

BYTES = 2
"""Size of a bfloat16 weight."""


@dataclass(frozen=True)
class GPU:
    """A GPU's peaks.

    Attributes:
        flops: Dense bfloat16 operations per second; two per multiply-accumulate.
        bandwidth: Bytes per second from its memory.
        device: Part of the name that torch calls it.
    """

    flops: float
    bandwidth: float
    device: str


GPUS: Mapping[str, GPU] = {
    "h200": GPU(989.4e12, 4.8e12, "H200"),
    "h100": GPU(989.4e12, 3.35e12, "H100"),
    "a100": GPU(312e12, 2.039e12, "A100"),
    "rtx4090": GPU(165.2e12, 1.008e12, "RTX 4090"),
    "agx-orin": GPU(42.6e12, 0.2048e12, "Orin"),
    "thor": GPU(257e12, 0.273e12, "Thor"),
}


@dataclass(frozen=True)
class Roofline:
    """The floors of a decoder on a GPU.

    Attributes:
        gpu: A key of :data:`GPUS`.
        shape: The decoder.

    Raises:
        InputError: If the GPU is unknown.
    """

    gpu: str
    shape: DecoderShape

    def __post_init__(self) -> None:
        if self.gpu not in GPUS:
            raise InputError(f"unknown GPU {self.gpu!r} for --roofline; choose one of {list(GPUS)}")

    @property
    def weights(self) -> int:
        """Parameters of all layers."""
        return self.shape.layers * layer_macs(self.shape, 1, 0)

    @property
    def weight_ms(self) -> float:
        """Time to read them once."""
        return 1e3 * BYTES * self.weights / GPUS[self.gpu].bandwidth

    @property
    def ridge(self) -> float:
        """Rows below which the weights' way from memory takes longer than the arithmetic."""
        return BYTES * GPUS[self.gpu].flops / (2 * GPUS[self.gpu].bandwidth)

    def compute_ms(self, macs: int) -> float:
        """Time of the arithmetic."""
        return 1e3 * 2 * macs / GPUS[self.gpu].flops

    def prefill_ms(
        self, layout: TokenLayout, decision: Decision, draft: int = 0, *, n_queries: int | None = None
    ) -> float:
        """Compute the floor of a prefill; see :func:`lac_vla.cost.prefill_macs` for the arguments."""
        macs = prefill_macs(self.shape, layout, decision, draft, n_queries=n_queries)
        return max(self.weight_ms, self.compute_ms(macs))

    def decode_ms(self, layout: TokenLayout, decision: Decision, passes: Sequence[tuple[int, int]]) -> float:
        """Compute the floor of decoding passes together; see :func:`lac_vla.cost.decode_macs` for the arguments."""
        return sum(
            max(self.weight_ms, self.compute_ms(decode_macs(self.shape, layout, decision, [part]))) for part in passes
        )

    def measures(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Tell whether times on this device, with weights of this type, can be held against the floors."""
        if device.type != "cuda" or dtype.itemsize != BYTES:
            return False
        return GPUS[self.gpu].device in torch.cuda.get_device_name(device)


@dataclass(frozen=True)
class RooflineRow:
    """A prompt of which a part is computed.

    Attributes:
        active: Share of the visual tokens that is computed.
        rows: Rows of the prompt that are computed.
        prefill_ms: Floor.
        bound: What makes it: ``compute`` or ``bandwidth``.
        action_ms: Floor of the prefill and of all further tokens, decoded one by one.
        faster: Floor of the dense prefill over this one: what caching can be worth at most on this GPU.
    """

    active: float
    rows: int
    prefill_ms: float
    bound: str
    action_ms: float
    faster: float


@dataclass(frozen=True)
class RooflineResult:
    """The section ``roofline``: floors, nothing measured.

    Attributes:
        gpu: A key of :data:`GPUS`.
        model: Name of the model.
        parameters: Of the decoder's layers.
        ridge: See :attr:`Roofline.ridge`.
        tokens: Of the prompt.
        visual_tokens: Of them.
        pass_ms: Floor of a decoding pass of one row.
        passes: Decoding passes behind the prefill of an action; none for a head without tokens.
        rows: Dense first.
    """

    gpu: str
    model: str
    parameters: int
    ridge: float
    tokens: int
    visual_tokens: int
    pass_ms: float
    passes: int
    rows: tuple[RooflineRow, ...]


def floors(
    roofline: Roofline,
    model: str,
    layout: TokenLayout,
    new_tokens: int,
    active: Sequence[float],
    n_queries: int | None = None,
) -> RooflineResult:
    """Compute the section's floors for some shares of active visual tokens beside 1, from shapes alone.

    ``new_tokens`` is the number that an action is decoded into, 0 for a head without tokens.
    """
    dense = Decision.dense(layout.n_visual, roofline.shape.layers)
    passes = [(i, i + 1) for i in range(new_tokens - 1)]
    rows = []
    for share in (1.0, *active):
        count = round(share * layout.n_visual)
        decision = Decision.reuse(np.arange(layout.n_visual) >= count, roofline.shape.layers)
        prefill = roofline.prefill_ms(layout, decision, n_queries=n_queries)
        rows.append(
            RooflineRow(
                active=count / layout.n_visual,
                rows=layout.length - layout.n_visual + count,
                prefill_ms=prefill,
                bound="compute" if prefill > roofline.weight_ms else "bandwidth",
                action_ms=prefill + roofline.decode_ms(layout, decision, passes),
                faster=roofline.prefill_ms(layout, dense, n_queries=n_queries) / prefill,
            )
        )
    return RooflineResult(
        gpu=roofline.gpu,
        model=model,
        parameters=roofline.weights,
        ridge=roofline.ridge,
        tokens=layout.length,
        visual_tokens=layout.n_visual,
        pass_ms=roofline.decode_ms(layout, dense, [(0, 1)]),
        passes=len(passes),
        rows=tuple(rows),
    )
