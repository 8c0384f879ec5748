"""The benchmark in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from lac_vla.bench.batch import BatchResult
from lac_vla.bench.engine import EngineResult
from lac_vla.bench.frame import FrameResult, FrameRow
from lac_vla.bench.measure import Ratio, Target
from lac_vla.bench.memory import MemoryResult
from lac_vla.bench.roofline import RooflineResult
from lac_vla.bench.run import BenchResult
from lac_vla.bench.stock import STOCK
from lac_vla.bench.trace import TraceResult
from lac_vla.provenance import busy
from lac_vla.realtime.device import DeviceTable
from lac_vla.results.format import NONE, count, latency, memory, milliseconds, percent
from lac_vla.timing import STAGES, WINDOWS

SWEPT = "\nrandom weights: what is reused and which drafts are accepted is swept, or says nothing about a trained model"


def bench_tables(result: BenchResult) -> list[Table]:
    """Make the tables of all sections that ran, then of the targets, with the conditions of measuring."""
    tables = []
    if result.roofline is not None:
        tables.append(roofline_table(result.roofline))
    if result.engine is not None:
        tables.append(engine_table(result.engine))
    if result.frame is not None:
        tables += [frame_table(result.frame), cost_table(result.frame), stage_table(result.frame)]
    if result.memory is not None:
        tables.append(memory_table(result.memory))
    if result.batch is not None:
        tables.append(batch_table(result.batch))
    if result.trace is not None:
        tables.append(trace_table(result.trace))
    if result.frame is not None and result.frame.roofline is not None:
        tables.append(floor_table(result.frame))
    return [*tables, target_table(result)] if result.targets else tables


def roofline_table(result: RooflineResult) -> Table:
    """Make the table of floors, from shapes alone."""
    decoding = f"a decoding pass {milliseconds(result.pass_ms)} ms, {result.passes} of them behind the prefill"
    table = _table(
        f"roofline: {result.model} on one {result.gpu}, bfloat16, batch 1, nothing measured",
        f"{count(result.parameters)} parameters in the layers; a prompt of {result.tokens} tokens, "
        f"{result.visual_tokens} of them visual\n"
        f"floor of {decoding if result.passes else 'the decoder alone; the head appends no tokens'}\n"
        f"below {result.ridge:.0f} rows the weights' way from memory takes longer: fewer active tokens buy nothing\n"
        "action: prefill and decoding one by one; tower, head and the cache's own work come on top",
        "rows", "floor of the prefill, ms", "bound by", "faster at most", "floor of the action, ms", first="active",
    )  # fmt: skip
    for row in result.rows:
        cells = [str(row.rows), milliseconds(row.prefill_ms), row.bound, f"{row.faster:.2f}×"]
        table.add_row(percent(row.active, 0), *cells, milliseconds(row.action_ms))
    return table


def floor_table(result: FrameResult) -> Table:
    """Make the table of every row's own floors, and of how far its times are above them."""
    measured_there = any(row.times_floor for row in result.rows)
    where = "× floor: median over floor" if measured_there else "measured elsewhere: floors only"
    caption = f"of prefill and of all decoding passes of a frame, means; {where}"
    title = f"roofline: floors of one {result.roofline}, bfloat16"
    table = _table(title, caption, "prefill ms", "× floor", "decode ms", "× floor")
    for row in result.rows:
        cells = []
        for stage in ("prefill", "decode"):
            floor, times = row.floor_ms.get(stage), row.times_floor.get(stage)
            cells += [NONE if floor is None else milliseconds(floor), NONE if times is None else f"{times:.1f}×"]
        table.add_row(row.name, *cells)
    return table


def engine_table(result: EngineResult) -> Table:
    """Make the table of prefill latencies."""
    table = _table(
        f"engine: prefill of {result.tokens} tokens, {result.visual_tokens} of them visual, {result.shape}",
        "stock: transformers' LlamaModel, "
        f"{result.attention} attention, use_cache=True (its keys and values are kept for decoding)\n"
        "faster: ratio of medians, and quartiles of the ratios within the rounds",
        "rows", "MACs", "FLOPs", "p50 / p95 ms", "faster than stock", "faster than dense", "floor ms", "× floor",
    )  # fmt: skip
    for row in result.rows:
        cells = [str(row.rows), count(row.macs), count(row.flops), latency(row.latency_ms)]
        floor = NONE if row.floor_ms is None else milliseconds(row.floor_ms)
        times = NONE if row.times_floor is None else f"{row.times_floor:.1f}×"
        table.add_row(row.name, *cells, ratio(row.faster_than_stock), ratio(row.faster_than_dense), floor, times)
    return table


def frame_table(result: FrameResult) -> Table:
    """Make the table of latencies of whole observations in the three windows."""
    table = _table(
        f"frame: {result.model}, {result.dtype}, {result.visual_tokens} visual tokens",
        f"{result.frames} frames, {result.source}\n"
        f"{_stock(result)}\n"
        "p50 / p95 in ms; faster: observation to action, ratio of medians, and quartiles of the ratios frame by frame"
        + (SWEPT if result.random_weights else ""),
        "ratio nom. / eff.",
        *(window.replace("_", " ") for window in WINDOWS),
        "faster than stock",
        "faster than dense",
        "than dense so equipped",
    )
    for row in result.rows:
        window = "observation_to_action"
        table.add_row(
            row.name,
            f"{percent(row.ratio_nominal, 0)} / {percent(row.ratio_effective)}" + _swept(row, "ratio"),
            *(latency(row.windows_ms[name]) for name in WINDOWS),
            ratio(row.faster_than_stock[window]) if row.faster_than_stock else NONE,
            ratio(row.faster_than_dense[window]),
            ratio(row.faster_than_equal[window]),
        )
    return table


def _stock(result: FrameResult) -> str:
    """Say what the stock model is, or why there is none."""
    if result.stock:
        return f"{STOCK}: {result.stock}"
    return "no dense stock: transformers alone does not run this model, e.g. an expert that reads keys and values"


def cost_table(result: FrameResult) -> Table:
    """Make the table of operations and memory per frame."""
    table = _table(
        "cost of a frame",
        "MACs: of matrix products, RAFT's flow included; DIS flow has none and is not counted\n"
        "cache: what outlives a frame, keys and values mostly\n"
        "stock's actions: tokens, or values within 1/256, that are equal\n"
        f"peak memory of all methods together: {memory(result.peak_memory_mb)}"
        + (SWEPT if result.random_weights else ""),
        "MACs",
        "FLOPs",
        "cache MB",
        "peak memory",
        "decoding passes",
        "draft accepted",
        "stock's actions",
    )
    for row in result.rows:
        cache = NONE if row.cache_mb is None else f"{row.cache_mb:.2f}"
        cells = [count(sum(row.macs.values())), count(row.flops), cache, memory(row.peak_memory_mb)]
        decoding = [f"{row.passes:.1f}", percent(row.accepted) + _swept(row, "acceptance")]
        table.add_row(row.name, *cells, *decoding, percent(row.same_actions))
    return table


def stage_table(result: FrameResult) -> Table:
    """Make the table of stages: where the milliseconds go."""
    caption = "p50 / p95 in ms; bookkeeping share: flow + policy + bookkeeping, of the model call of dense"
    table = _table("stages of a frame", caption, *STAGES, "bookkeeping share")
    for row in result.rows:
        share = percent(row.bookkeeping.value)
        table.add_row(row.name, *(latency(row.stages_ms[stage]) for stage in STAGES), share)
    return table


def memory_table(result: MemoryResult) -> Table:
    """Make the table of memory over a long session."""
    caption = f"{result.policy}, {result.model}; grown by {result.growth_mb:+.2f} MB in all"
    headings = ("process MB", "cache MB", "accelerator MB")
    table = _table("memory of one session", caption, *headings, first="frame")
    for point in result.points:
        accelerator = NONE if point.accelerator_mb is None else f"{point.accelerator_mb:.2f}"
        table.add_row(str(point.frame), f"{point.process_mb:.2f}", f"{point.cache_mb:.3f}", accelerator)
    return table


def batch_table(result: BatchResult) -> Table:
    """Make the table of frames per second of several sessions on one engine."""
    table = _table(
        f"batch: sessions on one engine, {result.model}, {result.dtype}",
        f"frames of all sessions together, {result.source}\n"
        "a pass: all sessions' observations to all their actions, p50 / p95 in ms; faster: frames per second, ratio of "
        "medians, and quartiles of the ratios within the rounds" + (SWEPT if result.random_weights else ""),
        "sessions", "frames per second", "pass ms", "ratio eff.", "faster than one session", "faster than dense",
    )  # fmt: skip
    for row in result.rows:
        cells = [str(row.sessions), f"{row.frames_per_second:.1f}", latency(row.latency_ms)]
        ratios = [percent(row.ratio_effective), ratio(row.faster_than_one), ratio(row.faster_than_dense)]
        table.add_row(row.name, *cells, *ratios)
    return table


def trace_table(result: TraceResult) -> Table:
    """Make the table of traced frames: how busy the device was, and with what."""
    what = "kernels" if result.device == "cuda" else "operations"
    table = _table(
        f"trace: {result.model}, one frame under the profiler, which makes it longer",
        f"busy: time of all {what}; for the rest of the span the device waited\n"
        "heaviest: ms × calls; traces open in Perfetto",
        "span ms", "busy ms", what, "heaviest", "trace",
    )  # fmt: skip
    for row in result.rows:
        heaviest = "\n".join(f"{name[:48]} {milliseconds(ms)} × {calls}" for name, ms, calls in row.heaviest[:3])
        table.add_row(
            row.name, milliseconds(row.span_ms), milliseconds(row.busy_ms), str(row.launches), heaviest, row.file
        )
    return table


def target_table(result: BenchResult) -> Table:
    """Make the table of targets, and whether they were reached."""
    table = _table("targets", conditions(result), "measured", "target", "reached", first="what")
    for target in result.targets:
        sign = "≤" if target.bound == "at most" else "≥"
        reached = Text("yes", "green") if target.reached else Text("no", "red")
        table.add_row(target.what, measured(target), f"{sign} {target.limit:g} {target.unit}", reached)
    return table


def conditions(result: BenchResult) -> str:
    """Write hardware, versions, and whether the machine was busy with something else."""
    hardware: Mapping[str, Any] = result.provenance["hardware"]
    versions: Mapping[str, Any] = result.provenance["versions"]
    where = hardware.get("accelerator") if result.config.device != "cpu" else None
    text = (
        f"{where or hardware['processor']}, {hardware['cores']} cores, {hardware['threads']} threads; "
        f"torch {versions.get('torch')}, transformers {versions.get('transformers')}"
    )
    warning = busy(result.load[0], hardware["cores"])
    return text if warning is None else f"{text}\n{warning}"


def ratio(value: Ratio) -> str:
    """Write a ratio and its quartiles, e.g. ``2.93× [2.73, 3.09]``."""
    return f"{value.value:.2f}× [{value.low:.2f}, {value.high:.2f}]"


def measured(target: Target) -> str:
    """Write what was measured for a target, e.g. ``2.93 × [2.73, 3.09]``."""
    spread = "" if target.low is None or target.high is None else f" [{target.low:.2f}, {target.high:.2f}]"
    return f"{target.value:.2f} {target.unit}{spread}"


def _swept(row: FrameRow, what: str) -> str:
    return " swept" if what in row.swept else ""


def device_table(found: DeviceTable) -> Table:
    """Make the table of a device's latencies, per unit of what a frame computes."""
    jitter = f"{min(found.jitter):.2f} to {max(found.jitter):.2f} times" if len(found.jitter) > 1 else "none"
    table = _table(
        f"latency table {found.name}: {found.shape.model} on {found.hardware}, {found.precision}, {found.kind}",
        f"{found.source}\njitter: {jitter}",
        "ms per unit",
        first="stage",
    )
    for stage, costs in found.stages.items():
        table.add_row(stage, ", ".join(f"{name} {milliseconds(ms)}" for name, ms in costs.items()))
    return table


def _table(title: str, caption: str, *headings: str, first: str = "method") -> Table:
    table = Table(title=title, caption=caption)
    table.add_column(first, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table
