"""Time what the decoder could run through instead, on one GPU: ``gpu_kernels.py --device cuda``.

Attention with and without a mask, by the kernels that torch may choose and by FlexAttention; of several robots without
one, in turn and by one call of varlen attention; the row-wise part of a layer as it is and by ``torch.compile``; a
matrix in bfloat16, with weights in float8 (as ``--float8`` stores them) and wholly in float8, with their errors
against float32. Random numbers, the sizes of Llama 2 7B. Where the first call of a shape takes over a millisecond, as
with kernels that are made for it, that is told too. What is faster here is no option of the engine yet.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch.nn.attention import SDPBackend, sdpa_kernel

ROWS = (16, 64, 128, 282)
"""Active rows of a prompt of 282."""
SLOTS = 320
ROBOTS = 8
HEADS, HEAD_DIM, FFN = 32, 128, 11008
FP8_MAX = 448.0


def main(device: str) -> None:
    """Print one line per variant; what fails says so."""
    small = device == "cpu"
    heads, head_dim, ffn = (2, 16, 64) if small else (HEADS, HEAD_DIM, FFN)
    dtype = torch.float32 if small else torch.bfloat16
    print(f"| what | {' | '.join(f'{rows} rows, µs' for rows in ROWS)} |\n{'|---' * (len(ROWS) + 1)}|")
    for name, make in VARIANTS.items():
        if small and name in COMPILED + ON_A_GPU:  # it would compile for minutes what nobody asks about
            continue
        cells = []
        for rows in ROWS:
            try:
                work, note = make(rows, heads, head_dim, ffn, device, dtype)
                cells.append(_time(work, device, 5 if small else 50) + note)
            except Exception as error:
                cells.append(f"{type(error).__name__}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def _time(work: Callable[[], Any], device: str, rounds: int) -> str:
    """Take the median of some calls, microseconds; and tell the first call's time where it is long."""
    times = []
    for _ in range(rounds + 3):
        _wait(device)
        start = perf_counter()
        work()
        _wait(device)
        times.append(1e6 * (perf_counter() - start))
    first = f" (first {times[0] / 1e3:.0f} ms)" if times[0] > 1e3 + median(times[3:]) else ""
    return f"{median(times[3:]):.1f}{first}"


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _attention(kind: str) -> Callable[..., tuple[Callable[[], Any], str]]:
    def make(rows: int, heads: int, dim: int, ffn: int, device: str, dtype: torch.dtype) -> tuple[Any, str]:
        query = torch.randn(1, heads, rows, dim, device=device, dtype=dtype)
        keys, values = torch.randn(2, 1, heads, SLOTS, dim, device=device, dtype=dtype)
        last = torch.arange(SLOTS - rows, SLOTS, device=device)
        mask = torch.arange(SLOTS, device=device) <= last[:, None]
        if kind == "flex":
            from torch.nn.attention.flex_attention import create_block_mask, flex_attention

            blocks = create_block_mask(lambda b, h, q, k: k <= last[q], None, None, rows, SLOTS, device=device)
            flex = torch.compile(flex_attention)
            return lambda: flex(query, keys, values, block_mask=blocks), ""
        added = torch.zeros(rows, SLOTS, device=device, dtype=dtype).masked_fill_(~mask, -torch.inf)
        chosen = {"none": None, "bool": mask}.get(kind, added)

        def attention() -> torch.Tensor:
            with sdpa_kernel(BACKENDS[kind]) if kind in BACKENDS else nullcontext():
                return F.scaled_dot_product_attention(query, keys, values, attn_mask=chosen)

        if kind in BACKENDS or device == "cpu":
            return attention, ""
        return attention, f" {SDPBackend(torch._fused_sdp_choice(query, keys, values, attn_mask=chosen)).name}"

    return make


def _several(packed: bool) -> Callable[..., tuple[Callable[[], Any], str]]:
    def make(rows: int, heads: int, dim: int, ffn: int, device: str, dtype: torch.dtype) -> tuple[Any, str]:
        query = torch.randn(ROBOTS * rows, heads, dim, device=device, dtype=dtype)
        keys, values = torch.randn(2, ROBOTS * SLOTS, heads, dim, device=device, dtype=dtype)
        if packed:
            from torch.nn.attention.varlen import varlen_attn

            asked, seen = (
                torch.arange(0, (ROBOTS + 1) * size, size, device=device, dtype=torch.int32) for size in (rows, SLOTS)
            )
            return lambda: varlen_attn(query, keys, values, asked, seen, rows, SLOTS), ""
        own = [
            [part.view(ROBOTS, -1, heads, dim)[robot : robot + 1].transpose(1, 2) for part in (query, keys, values)]
            for robot in range(ROBOTS)
        ]
        return lambda: [F.scaled_dot_product_attention(*parts) for parts in own], ""

    return make


def _rowwise(compiled: bool) -> Callable[..., tuple[Callable[[], Any], str]]:
    def make(rows: int, heads: int, dim: int, ffn: int, device: str, dtype: torch.dtype) -> tuple[Any, str]:
        width = heads * dim
        hidden = torch.randn(rows, width, device=device, dtype=dtype)
        gain = torch.ones(width, device=device, dtype=dtype)
        gate, up, down = (
            torch.randn(size, device=device, dtype=dtype) for size in ((ffn, width),) * 2 + ((width, ffn),)
        )

        def mlp() -> torch.Tensor:
            normed = F.rms_norm(hidden, (width,), gain)
            return hidden + F.linear(F.silu(F.linear(normed, gate)) * F.linear(normed, up), down)

        return (torch.compile(mlp) if compiled else mlp), ""

    return make


def _matrix(kind: str) -> Callable[..., tuple[Callable[[], Any], str]]:
    def make(rows: int, heads: int, dim: int, ffn: int, device: str, dtype: torch.dtype) -> tuple[Any, str]:
        x = torch.randn(-(-rows // 16) * 16, heads * dim, device=device)
        weight = torch.randn(ffn, heads * dim, device=device) / (heads * dim) ** 0.5
        exact = x @ weight.T
        x, weight = x.bfloat16(), weight.bfloat16()

        def error(product: torch.Tensor) -> str:
            return f" (error {float((product.float() - exact).norm() / exact.norm()):.2%})"

        if kind == "bfloat16":
            return lambda: x @ weight.T, error(x @ weight.T)
        if kind == "weights":  # one scale per row, multiplied in bfloat16
            scales = weight.float().abs().amax(dim=1, keepdim=True) / FP8_MAX
            stored, scales = (weight / scales).to(torch.float8_e4m3fn), scales.bfloat16()

            def unpacked() -> torch.Tensor:
                return x @ (stored.bfloat16() * scales).T

            return unpacked, error(unpacked())
        scale_x, scale_w = (part.float().abs().amax() / FP8_MAX for part in (x, weight))
        small_w = (weight / scale_w).to(torch.float8_e4m3fn)

        def product() -> torch.Tensor:
            return torch._scaled_mm(
                (x / scale_x).to(small_w.dtype), small_w.T, scale_a=scale_x, scale_b=scale_w, out_dtype=torch.bfloat16
            )

        return product, error(product())

    return make


BACKENDS = {"efficient": SDPBackend.EFFICIENT_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
VARIANTS = {
    "attention, no mask": _attention("none"),
    "attention, additive mask": _attention("additive"),
    "attention, boolean mask": _attention("bool"),
    "attention, additive mask, memory-efficient": _attention("efficient"),
    "attention, additive mask, cuDNN": _attention("cudnn"),
    "attention, no mask, 8 robots in turn": _several(packed=False),
    "attention, no mask, 8 robots, varlen": _several(packed=True),
    "matrix, bfloat16": _matrix("bfloat16"),
    "matrix, float8 weights": _matrix("weights"),
    "matrix, float8 weights and rows": _matrix("both"),
    "feed-forward": _rowwise(compiled=False),
    "FlexAttention, block mask": _attention("flex"),
    "feed-forward, torch.compile": _rowwise(compiled=True),
}
"""What compiles comes last: it may take until the end."""
COMPILED = ("FlexAttention, block mask", "feed-forward, torch.compile")
ON_A_GPU = ("attention, additive mask, memory-efficient", "attention, additive mask, cuDNN")


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] != "--device":
        raise SystemExit(__doc__)
    with torch.inference_mode():
        main(sys.argv[2])
