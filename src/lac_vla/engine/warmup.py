"""Warm-up: every shape that a robot's frames may need is run, and captured, before the first episode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from lac_vla.engine.cuda_graphs import ROW_MULTIPLE
from lac_vla.engine.engine import Engine
from lac_vla.engine.kv_cache import Region
from lac_vla.engine.plan import FramePlan, FrameResult
from lac_vla.models.heads.base import AppendRows
from lac_vla.types import Decision, Frame

RUNS = 2
"""A shape's first run makes the libraries' handles; the second is captured."""


def warm_up(engine: Engine, frames: Sequence[Frame], sessions: int = 1) -> None:
    """Run frames with every number of active tokens, and decoding passes of every length; then add no more graphs.

    Args:
        engine: What is to be warm. Call it before there are sessions: the store is made as large as they will need.
        frames: One for every instruction that is to be expected: longer and shorter ones may be other shapes.
        sessions: How many robots there will be at a time.
    """
    regions = [Region() for _ in range(sessions)]
    for region in regions:
        for frame in frames:
            _run(engine, frame, region, 0)
    for frame in frames:
        for count in _counts(engine, frame):
            for _ in range(RUNS):
                drafted = _run(engine, frame, regions[0], count).metadata
            if engine.options.draft and engine.model.decoder.causal and engine.model.head.draft(drafted) is not None:
                for _ in range(RUNS):
                    _run(engine, frame, regions[0], count, drafted)
        result = _run(engine, frame, regions[0], 0)
        for count in range(1, engine.model.head.max_new_tokens):
            if result.sequence is not None and result.sequence.reads_hidden:
                rows = torch.zeros(count, engine.model.decoder.shape.width, device=engine.model.device)
                for _ in range(RUNS):
                    engine.append(result.sequence, AppendRows(rows.to(engine.model.dtype), at=0))
    for region in regions:
        engine.store.release(region)
    if engine.graphs is not None:
        engine.graphs.freeze()


def _counts(engine: Engine, frame: Frame) -> Iterator[int]:
    """List numbers of active tokens that between them make every padded number of rows."""
    n_visual = engine.model.processor.prompt(frame).layout.n_visual
    yield from range(n_visual, 0, -ROW_MULTIPLE)
    yield 0


def _run(engine: Engine, frame: Frame, region: Region, count: int, drafted: object = None) -> FrameResult:
    model = engine.model
    prompt = model.processor.prompt(frame)
    n_visual = prompt.layout.n_visual
    cached = np.arange(n_visual) >= (count if region.size else n_visual)  # nothing is reused that was never computed
    plan = FramePlan(
        engine=engine,
        frame=frame,
        images=model.processor.images(frame),
        prompt=prompt,
        region=region,
        vision_kv=None,
        begin=lambda: None,
        clock=engine.stopwatch(),
        decided=(Decision.reuse(cached, model.n_layers), np.zeros(n_visual, dtype=np.bool_)),
        drafted=drafted if isinstance(drafted, dict) else None,
        rng=np.random.default_rng(0),
    )
    [result] = engine.run([plan])
    if result.error is not None:
        raise result.error
    return result
