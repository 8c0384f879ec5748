"""Warm-up: every shape that a robot's frames may need is run, and captured, before the first episode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from lac_vla.engine.engine import Engine
from lac_vla.engine.graphs import ROW_MULTIPLE
from lac_vla.engine.kv_cache import Region
from lac_vla.engine.plan import FramePlan, FrameResult
from lac_vla.models.heads.base import AppendRows
from lac_vla.types import Decision, Frame

RUNS = 2
"""A shape's first run makes the libraries' handles; the second is captured."""


def warm_up(engine: Engine, frames: Sequence[Frame], sessions: int = 1, together: int = 1) -> None:
    """Run frames with every number of active tokens, and decoding passes of every length; then add no more graphs.

    Args:
        engine: What is to be warm. Call it before there are sessions: the store is made as large as they will need.
        frames: One for every instruction that is to be expected: longer and shorter ones may be other shapes.
        sessions: How many robots there will be at a time.
        together: How many of them will be answered in one pass, at most.
    """
    regions = [Region() for _ in range(sessions)]
    vision_kv = engine.model.vision.kv_cache() if engine.options.vision_kv_reuse else None

    def run(frame: Frame, count: int, regions: Sequence[Region], drafted: object = None) -> list[FrameResult]:
        results = engine.run([_plan(engine, frame, region, count, vision_kv, drafted) for region in regions])
        for result in results:
            if result.error is not None:
                raise result.error
        return results

    for region in regions:
        for frame in frames:
            run(frame, 0, [region])
    for frame in frames:
        for count in _counts(engine, frame):
            for _ in range(RUNS):
                drafted = run(frame, count, regions[:1])[0].metadata
            if engine.options.draft and engine.model.decoder.causal and engine.model.head.draft(drafted) is not None:
                for _ in range(RUNS):
                    run(frame, count, regions[:1], drafted)
    for number in range(1, min(together, sessions) + 1):  # behind the prompts no instruction makes another shape
        for _ in range(RUNS):
            results = run(frames[0], 0, regions[:number])
        _append(engine, results)
    for region in regions:
        engine.store.release(region)
    if engine.graphs is not None:
        engine.graphs.freeze()


def _append(engine: Engine, results: Sequence[FrameResult]) -> None:
    """Run decoding passes of every length behind prompts, the same for all."""
    sequences = [result.sequence for result in results if result.sequence is not None]
    if not all(sequence.reads_hidden for sequence in sequences):
        return
    for count in range(1, engine.model.head.max_new_tokens):
        rows = torch.zeros(count, engine.model.decoder.shape.width, device=engine.model.device)
        for _ in range(RUNS):
            engine.append(sequences, [AppendRows(rows.to(engine.model.dtype), at=0) for _ in sequences])


def _counts(engine: Engine, frame: Frame) -> Iterator[int]:
    """List numbers of active tokens that between them make every padded number of rows."""
    n_visual = engine.model.processor.prompt(frame).layout.n_visual
    yield from range(n_visual, 0, -ROW_MULTIPLE)
    yield 0


def _plan(engine: Engine, frame: Frame, region: Region, count: int, vision_kv: Any, drafted: object) -> FramePlan:
    model = engine.model
    prompt = model.processor.prompt(frame)
    n_visual = prompt.layout.n_visual
    cached = np.arange(n_visual) >= (count if region.size else n_visual)  # nothing is reused that was never computed
    return FramePlan(
        engine=engine,
        frame=frame,
        images=model.processor.images(frame),
        prompt=prompt,
        region=region,
        vision_kv=vision_kv,
        begin=lambda: None,
        clock=engine.stopwatch(),
        decided=(Decision.reuse(cached, model.n_layers), np.zeros(n_visual, dtype=np.bool_)),
        drafted=drafted if isinstance(drafted, dict) else None,
        rng=np.random.default_rng(0),
    )
