"""The section ``trace``: one frame under torch's profiler, dense and reused, for whoever asks where the time goes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from lac_vla.bench.config import BenchConfig
from lac_vla.bench.engine import DENSE
from lac_vla.bench.methods import cached_vla, row_name
from lac_vla.bench.scene import Scene
from lac_vla.models import VLA
from lac_vla.policies import paths_by_name

HEAVIEST = 8
"""Operations that are listed."""
SETS = 2
"""Sets of options that are traced: the first ones."""
LEAST_FRAMES = 4
"""Frames before the one that is traced, at least: a shape's graph is captured the second time that it comes."""


@dataclass(frozen=True)
class TraceRow:
    """One traced frame.

    Attributes:
        name: The method, with its options.
        file: The trace beside ``bench.json``, for Perfetto or ``chrome://tracing``.
        span_ms: From the observation to the action; the profiler makes it longer than it is.
        busy_ms: Time that kernels took: of the GPU, on a CPU of its operations.
        launches: Number of kernels, or operations.
        heaviest: Name, milliseconds and calls of those that took longest together.
    """

    name: str
    file: str
    span_ms: float
    busy_ms: float
    launches: int
    heaviest: tuple[tuple[str, float, int], ...]


@dataclass(frozen=True)
class TraceResult:
    """The section ``trace``.

    Attributes:
        model: Its name.
        device: Whose operations are counted, ``cpu`` or ``cuda``.
        rows: Dense and the last policy, with the first sets of options.
    """

    model: str
    device: str
    rows: tuple[TraceRow, ...]


def measure_trace(model: VLA, scene: Scene, config: BenchConfig) -> TraceResult:
    """Run the section; the traces are written into ``config.out``."""
    rows: list[TraceRow] = []
    for options in list(dict.fromkeys(config.options))[:SETS]:
        for spec in (DENSE, config.methods[-1]):
            name = row_name(paths_by_name(spec), options)
            file = config.out / f"trace-{len(rows)}.json.gz"
            rows.append(_trace(model, scene, config, spec, options, name, file))
    return TraceResult(model.name, model.device.type, tuple(rows))


def _trace(model: VLA, scene: Scene, config: BenchConfig, spec: str, options: str, name: str, file: Path) -> TraceRow:
    session = cached_vla(model, spec, options, config).session(config.seed)
    *before, last = [scene.frames[i % len(scene.frames)] for i in range(max(config.warmup, LEAST_FRAMES) + 1)]
    for frame in before:
        session.act(frame)
    activities = [ProfilerActivity.CPU]
    if model.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        session.act(last)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
    profiler.export_chrome_trace(str(file))
    gpu = model.device.type == "cuda"
    events: list[Any] = [event for event in profiler.events() or () if (_device(event) == "CUDA") == gpu]
    totals: dict[str, tuple[float, int]] = {}
    for event in events:
        time_ms = (event.self_device_time_total if gpu else event.self_cpu_time_total) / 1e3
        before_ms, calls = totals.get(event.name, (0.0, 0))
        totals[event.name] = before_ms + time_ms, calls + 1
    heaviest = sorted(totals.items(), key=lambda item: -item[1][0])[:HEAVIEST]
    info = session.last_info
    if info is None:  # pragma: no cover - act always leaves a report
        raise RuntimeError("the session did not report its step")
    return TraceRow(
        name=name,
        file=file.name,
        span_ms=info.timings["observation_to_action"],
        busy_ms=sum(time_ms for time_ms, _ in totals.values()),
        launches=len(events),
        heaviest=tuple((key, time_ms, calls) for key, (time_ms, calls) in heaviest),
    )


def _device(event: Any) -> str:
    return str(event.device_type).rpartition(".")[2]
