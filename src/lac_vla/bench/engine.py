"""The section ``engine``: one decoder, one prompt, prefilled by the stock code and by ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lac_vla.bench.config import BenchConfig
from lac_vla.bench.measure import Ratio, Target, measured, milliseconds, take_turns
from lac_vla.bench.model import open_random
from lac_vla.bench.roofline import Roofline
from lac_vla.bench.stock import STOCK, language_model, stock_prefill
from lac_vla.cost import prefill_macs
from lac_vla.engine.engine import Engine
from lac_vla.engine.kv_cache import Region
from lac_vla.engine.prefill import PrefillCursor, SequenceState, run_packed
from lac_vla.models import VLA
from lac_vla.results.stats import Percentiles
from lac_vla.types import Decision, TokenLayout

DENSE = "dense"
OVERHEAD = 1.10
"""Most that a dense prefill may take, times the stock one."""
SPEEDUP = {0.5: 1.7, 0.25: 2.5}
"""Share of active visual tokens → least speed-up over our dense prefill."""
TARGET_SHAPE = "llama-8x512"
LAYOUT = TokenLayout.of({"camera": (16, 16)}, n_prefix=1, n_suffix=25)
"""OpenVLA's prompt with a LIBERO instruction: BOS, 256 visual tokens, 25 of text."""


@dataclass(frozen=True)
class EngineRow:
    """One way to prefill.

    Attributes:
        name: ``dense stock``, ``dense``, or how much is active.
        active: Share of the visual tokens that is recomputed.
        rows: Rows of the prompt that are computed.
        latency_ms: Of the prefill.
        macs: Multiply-accumulates.
        flops: Two per multiply-accumulate.
        faster_than_stock: Stock latency over this one.
        faster_than_dense: Our dense latency over this one.
        floor_ms: What a GPU needs at least, see :mod:`lac_vla.bench.roofline`; ``None`` if none was named.
        times_floor: The median over it; ``None`` where the device is not that GPU.
    """

    name: str
    active: float
    rows: int
    latency_ms: Percentiles
    macs: int
    flops: int
    faster_than_stock: Ratio
    faster_than_dense: Ratio
    floor_ms: float | None
    times_floor: float | None


@dataclass(frozen=True)
class EngineResult:
    """The section ``engine``.

    Attributes:
        shape: Name of the decoder.
        text_config: Its ``LlamaConfig`` arguments.
        tokens: Of the prompt.
        visual_tokens: Of them.
        attention: Implementation that the stock model runs, e.g. ``sdpa``.
        rows: Stock first, then ours.
        targets: Where there are any for this shape and device.
    """

    shape: str
    text_config: dict[str, Any]
    tokens: int
    visual_tokens: int
    attention: str
    rows: tuple[EngineRow, ...]
    targets: tuple[Target, ...]


class Prefills:
    """The ways to prefill one random prompt, over a cache that holds it already."""

    def __init__(self, model: VLA, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        embeddings = torch.randn(LAYOUT.length, model.decoder.shape.width, generator=generator)
        self._model = model
        self._embeddings = embeddings.to(model.device, model.dtype)
        self._rng = np.random.default_rng(seed)
        self._store, self._region = Engine(model).store, Region()
        self._store.reserve(self._region, LAYOUT.length)
        self._rotary = model.decoder.rotary(torch.arange(LAYOUT.length, device=model.device))
        self.ours(self.decision(1.0))()

    def decision(self, active: float) -> Decision:
        """Recompute a new random choice of ``active`` · N visual tokens."""
        cached = np.ones(LAYOUT.n_visual, dtype=np.bool_)
        cached[self._rng.permutation(cached.size)[: round(active * cached.size)]] = False
        return Decision.reuse(cached, len(self._model.decoder.layers))

    def ours(self, decision: Decision) -> Callable[[], torch.Tensor]:
        """Prepare the engine's prefill; the call returns the suffix's hidden states, (n_suffix, width)."""
        computed = np.ones(LAYOUT.length, dtype=np.bool_)
        computed[LAYOUT.visual] = decision.active
        rows = self._embeddings[torch.from_numpy(computed).to(self._embeddings.device)]
        decoder = self._model.decoder

        def prefill() -> torch.Tensor:
            cursor = PrefillCursor(decoder, SequenceState(LAYOUT, self._region, decision), self._rotary)
            [hidden] = run_packed(decoder, [cursor], [rows], self._store)
            return hidden

        return prefill

    def stock(self) -> torch.Tensor:
        """Run the stock prefill; return the suffix's hidden states, (n_suffix, width)."""
        out = stock_prefill(self._model, self._embeddings)
        hidden: torch.Tensor = out.last_hidden_state[0, LAYOUT.suffix]
        return hidden


@torch.inference_mode()
def measure_engine(config: BenchConfig) -> EngineResult:
    """Run the section."""
    model = open_random(config.shape, config)
    prefills = Prefills(model, config.seed)
    shares = {DENSE: 1.0, **{f"{100 * share:g} % active": share for share in config.active}}
    times: dict[str, list[float]] = {name: [] for name in (STOCK, *shares)}
    for index, order in take_turns(list(times), config.warmup + config.rounds, config.seed, "engine"):
        for name in order:
            work = prefills.stock if name == STOCK else prefills.ours(prefills.decision(shares[name]))
            elapsed = milliseconds(work, model.device)
            if index >= config.warmup:
                times[name].append(elapsed)
    roofline = None if config.roofline is None else Roofline(config.roofline, model.decoder.shape)
    rows = tuple(_row(model, name, prefills.decision(shares.get(name, 1.0)), times, roofline) for name in times)
    return EngineResult(
        shape=config.shape,
        text_config=dict(model.config.text_config),
        tokens=LAYOUT.length,
        visual_tokens=LAYOUT.n_visual,
        attention=str(language_model(model).config._attn_implementation),
        rows=rows,
        targets=_targets(rows) if (config.shape, model.device.type) == (TARGET_SHAPE, "cpu") else (),
    )


def _row(
    model: VLA, name: str, decision: Decision, times: dict[str, list[float]], roofline: Roofline | None
) -> EngineRow:
    n_queries = None if name == STOCK else LAYOUT.n_suffix
    macs = prefill_macs(model.decoder.shape, LAYOUT, decision, n_queries=n_queries)
    active = int(decision.active.sum())
    floor = None if roofline is None else roofline.prefill_ms(LAYOUT, decision, n_queries=n_queries)
    comparable = roofline is not None and roofline.measures(model.device, model.dtype)
    return EngineRow(
        name=name,
        active=active / LAYOUT.n_visual,
        rows=LAYOUT.length - LAYOUT.n_visual + active,
        latency_ms=measured(times[name]),
        macs=macs,
        flops=2 * macs,
        faster_than_stock=Ratio.of(times[STOCK], times[name]),
        faster_than_dense=Ratio.of(times[DENSE], times[name]),
        floor_ms=floor,
        times_floor=measured(times[name]).p50 / floor if comparable and floor else None,
    )


def _targets(rows: tuple[EngineRow, ...]) -> tuple[Target, ...]:
    """List the targets that these rows can be held to."""
    targets = []
    for row in rows:
        if row.name == DENSE:
            inverse = row.faster_than_stock
            overhead = Ratio(1 / inverse.value, 1 / inverse.high, 1 / inverse.low)
            targets.append(Target.at_most("dense prefill, times stock", overhead, OVERHEAD))
        elif row.active in SPEEDUP:
            what = f"prefill with {row.name}, faster than dense"
            targets.append(Target.at_least(what, row.faster_than_dense, SPEEDUP[row.active]))
    return tuple(targets)
