"""The whole benchmark, and its ``bench.json``."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lac_vla.bench.batch import BatchResult, measure_batch
from lac_vla.bench.chart import stage_chart
from lac_vla.bench.config import BenchConfig
from lac_vla.bench.engine import EngineResult, measure_engine
from lac_vla.bench.frame import FrameResult, measure_frames
from lac_vla.bench.measure import Target, cpu_threads
from lac_vla.bench.memory import MemoryResult, measure_memory
from lac_vla.bench.model import open_model, open_shapes
from lac_vla.bench.roofline import Roofline, RooflineResult, floors
from lac_vla.bench.scene import make_scene, synthetic
from lac_vla.bench.trace import TraceResult, measure_trace
from lac_vla.errors import InputError
from lac_vla.files import made
from lac_vla.models import VLA
from lac_vla.policies import paths_by_name
from lac_vla.provenance import load, provenance
from lac_vla.results.stats import Percentiles

RESULT = "bench.json"
CHART = "bench.svg"
UNITS = {
    "*_ms": "milliseconds: median p50, 95th percentile p95, of n measurements",
    "*_mb": "10^6 bytes",
    "macs": "multiply-accumulates; DIS flow, which has no matrix products, is not counted",
    "flops": "floating-point operations: 2 per multiply-accumulate",
    "faster_than_*": "ratio of medians value, quartiles low and high of the ratios within the rounds",
    "frames_per_second": "of all sessions together, over the median time of a pass",
    "bookkeeping": "as faster_than_*: flow + policy + bookkeeping over the model call of 'dense'",
    "deciding": "as faster_than_*: flow + policy over the model call of dense with the same options",
    "floor_ms": "least time of that GPU's vendor peaks: of the arithmetic, or of reading the layers' weights once",
    "times_floor": "median over floor_ms; only where the device is that GPU",
    "swept": "prescribed, no property of the method or of the weights",
    "load": "processes that wanted a core, mean of a minute, before and after",
}
"""The meaning of the numbers in the file."""


@dataclass(frozen=True)
class BenchResult:
    """The measurements, and the conditions that they were made under.

    Attributes:
        config: What was asked for.
        provenance: Versions, hardware, command, commit.
        load: Load average of the last minute, before and after; one of our threads counts 1.
        engine: The section, if it ran.
        frame: The section, if it ran.
        memory: The section, if it ran.
        batch: The section, if it ran.
        trace: The section, if it ran.
        roofline: The section, if it was asked for.
    """

    config: BenchConfig
    provenance: Mapping[str, Any]
    load: tuple[float, float]
    engine: EngineResult | None = None
    frame: FrameResult | None = None
    memory: MemoryResult | None = None
    batch: BatchResult | None = None
    trace: TraceResult | None = None
    roofline: RooflineResult | None = None

    @property
    def targets(self) -> tuple[Target, ...]:
        """The targets of all sections."""
        ran = [part for part in (self.engine, self.frame, self.memory) if part is not None]
        return tuple(target for part in ran for target in part.targets)

    def to_json(self) -> dict[str, Any]:
        """Make plain data of everything."""
        content: dict[str, Any] = {**self.provenance, "units": UNITS, **plain(self)}
        del content["provenance"]
        config = self.config
        content["config"] |= {
            "policies": [paths_by_name(spec) for spec in config.policies],
            "memory_policy": paths_by_name(config.memory_policy),
            "flow": config.flow and paths_by_name(config.flow),
        }
        return content


def run_bench(config: BenchConfig) -> BenchResult:
    """Measure section after section; after each, ``bench.json`` in ``config.out`` holds all there is so far.

    Beside it, ``bench.svg`` shows the section ``frame``.

    Raises:
        InputError: If the model, the device or the dataset does not fit, or the folder cannot be written.
        CheckpointError: If the checkpoint cannot be used.
        DatasetError: If the dataset cannot be read.
    """
    with cpu_threads(config.threads):
        sections = _sections(config)
        result = BenchResult(config, provenance(), (load(),) * 2)
        with _folder(config.out):
            for section, measure in sections.items():
                part: Any = {section: measure()}
                result = replace(result, load=(result.load[0], load()), **part)
                text = json.dumps(result.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
                _write(config.out / RESULT, text + "\n")
                if result.frame is not None:
                    _write(config.out / CHART, stage_chart(result.frame))
    return result


def _sections(config: BenchConfig) -> dict[str, Callable[[], Any]]:
    """List the wanted sections. What they need is opened here, so that faults show before all measuring."""
    sections: dict[str, Callable[[], Any]] = {}
    if "roofline" in config.sections:
        sections["roofline"] = partial(_floors, config, open_shapes(config))
    if "engine" in config.sections:
        sections["engine"] = partial(measure_engine, config)
    if {"frame", "memory", "batch", "trace"} & set(config.sections):
        model = open_model(config)
        scene = make_scene(model, config.replay, config.warmup + config.frames, config.seed, config.keys)
        if "frame" in config.sections:
            sections["frame"] = partial(measure_frames, model, scene, config)
        if "memory" in config.sections:
            sections["memory"] = partial(measure_memory, model, scene, config)
        if "batch" in config.sections:
            sections["batch"] = partial(measure_batch, model, scene, config)
        if "trace" in config.sections:
            sections["trace"] = partial(measure_trace, model, scene, config)
    return sections


def _floors(config: BenchConfig, model: VLA) -> RooflineResult:
    """Run the section ``roofline``, for the prompt of a synthetic frame."""
    [frame] = synthetic(tuple(model.grids), model.processor.state_dim, 1, config.seed).frames
    layout = model.processor.prompt(frame).layout
    roofline = Roofline(str(config.roofline), model.decoder.shape)
    n_queries = layout.n_suffix if model.head.reads == "hidden" else 0
    return floors(roofline, model.name, layout, model.head.max_new_tokens, config.active, n_queries)


def _write(path: Path, text: str) -> None:
    """Write a file, never half of it."""
    unfinished = path.with_suffix(".partial")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        raise _unwritable(path.parent, error) from error


@contextmanager
def _folder(folder: Path) -> Iterator[None]:
    """Make a folder, and see that files can be written there, before minutes are spent; without any it goes again."""
    with ExitStack() as stack:
        try:
            stack.enter_context(made(folder))
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise _unwritable(folder, error) from error
        yield


def _unwritable(folder: Path, error: OSError) -> InputError:
    return InputError(f"cannot write to {folder} ({error}); give another --out")


def plain(value: Any) -> Any:
    """Turn dataclasses, tuples and paths into what JSON knows."""
    if isinstance(value, Percentiles):
        return value._asdict()
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
