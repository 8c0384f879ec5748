"""The latency table of a device that is not here, derived from its peaks and the model's shapes.

Every stage takes the time of its roofline, see :mod:`lac_vla.bench.roofline`, over :data:`EFFICIENCY`: what the fastest
path of the dense model could reach there, with CUDA graphs (launching costs nothing). That favours dense: whatever is
slower in practice, the kernels' launches above all, is not shortened by reuse.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lac_vla.bench.roofline import BYTES, GPUS, Roofline
from lac_vla.bench.scene import synthetic
from lac_vla.cost import prefill_macs
from lac_vla.models import VLA
from lac_vla.realtime.device import DeviceTable, Shape
from lac_vla.types import Decision, TokenLayout

EFFICIENCY = 0.88
"""Share of its peaks that a GPU reaches. Source: π0.5 on an RTX 4090 in the best published bfloat16 kernels, where one
more view of 256 tokens costs 8.4 ms, and its arithmetic at the GPU's peak takes 7.4 ms (realtime-vla, 2510.26742)."""
HOST_MS = 1.2
"""Image geometry, tokenisation and bookkeeping: `docs/results/bench-mini.json`, dense."""
FLOW_MS = 0.6
"""DIS on a CPU, two cameras: `docs/results/bench-mini.json`."""
POLICY_MS = {"lac": 1.7, "motion": 0.8, "vla-cache": 1.2}
"""The policies' own work on a CPU: `docs/results/bench-mini.json`, `docs/results/bench-mini-cogact.json`; others: 0."""
DRAWS = {"cogact": 10}
"""Family → runs of the action head's own network per answer: CogACT's ten DDIM steps."""

ALSO = {"oft": ("cogact",)}
"""Family → others whose models take the same passes: a chunk of one prefill, without decoding."""


def derive(model: VLA, device: str) -> DeviceTable:
    """Derive the table of a model, which may be on the device ``meta``, on a GPU.

    Args:
        model: Its shapes count.
        device: Key of :data:`lac_vla.bench.roofline.GPUS`.

    Raises:
        InputError: If the GPU is unknown.
    """
    roofline = Roofline(device, model.decoder.shape)
    [frame] = synthetic(tuple(model.grids), model.processor.state_dim, 1, 0).frames
    layout = model.processor.prompt(frame).layout
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.module.named_children()}
    vision, projector, head = (parts.get(name, 0) for name in ("vision_backbone", "projector", "action_model"))
    head += parts.get("action_head", 0)
    dense, nothing = _prefill(roofline, layout, 1.0), _prefill(roofline, layout, 0.0)
    gpu, shape = GPUS[device], Shape.of(model, scaled=True)

    def read(weights: int) -> float:
        return 1e3 * BYTES * weights / gpu.bandwidth

    stages = {
        "host": {"fixed": HOST_MS},
        "flow": {"fixed": FLOW_MS},
        "policy": POLICY_MS,
        "vision": {"fixed": max(read(vision), roofline.compute_ms(vision * layout.n_visual)) / EFFICIENCY},
        "projector": {
            "fixed": read(projector) / EFFICIENCY,
            "per_share": max(0.0, roofline.compute_ms(projector * layout.n_visual) - read(projector)) / EFFICIENCY,
        },
        "prefill": {
            "fixed": nothing / EFFICIENCY,
            "per_share": (dense - nothing) / EFFICIENCY,
            "floor": roofline.weight_ms / EFFICIENCY,
        },
        "probe": {"per_share": _probe_bytes(model, layout) / gpu.bandwidth * 1e3 / EFFICIENCY},
        "decode": {"per_pass": roofline.weight_ms / EFFICIENCY},
        "head": {"fixed": DRAWS.get(model.family, 1) * read(head) / EFFICIENCY},
    }
    return DeviceTable(
        name=f"{device}-{model.name}",
        device=device,
        hardware=f"NVIDIA {gpu.device}",
        precision="bfloat16",
        kind="derived",
        source=(
            f"Roofline of the vendor's peaks ({gpu.flops / 1e12:g} TFLOP/s, {gpu.bandwidth / 1e12:g} TB/s) at "
            f"{EFFICIENCY:g} of them, what the best published kernels reach (pi0.5 on an RTX 4090, 8.4 ms for one more "
            "view, 7.4 at the peak); host, flow and policy as in docs/results/bench-mini.json; no jitter. Written by "
            f"`lac bench --sections roofline --roofline {device} --random-weights {model.name} "
            "--latency-table OUT.json`."
        ),
        baseline=(
            "its fastest path: kernels at that share of the roofline, CUDA graphs, drafted action tokens where the "
            "model drafts; the same for all methods."
        ),
        shape=replace(shape, families=(*shape.families, *ALSO.get(model.family, ()))),
        stages={stage: {name: round(ms, 4) for name, ms in costs.items()} for stage, costs in stages.items()},
    )


def _prefill(roofline: Roofline, layout: TokenLayout, share: float) -> float:
    """Compute the time of a prefill's arithmetic, of all visual tokens or of none."""
    skipped = np.full(layout.n_visual, share == 0.0)
    decision = Decision.reuse(skipped, roofline.shape.layers)
    return roofline.compute_ms(prefill_macs(roofline.shape, layout, decision))


def _probe_bytes(model: VLA, layout: TokenLayout) -> float:
    """Count the bytes of all attention weights, float32, written once and read once."""
    heads = model.decoder.shape.queries // model.decoder.head_dim
    return 2 * 4 * heads * layout.length**2 * model.n_layers
