"""The section ``frame``: whole observations, from the image to the action, by every method in turn."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from lac_vla.bench.config import BenchConfig
from lac_vla.bench.engine import DENSE
from lac_vla.bench.measure import Ratio, Target, measured, take_turns
from lac_vla.bench.scene import Scene
from lac_vla.bench.stock import STOCK, StockSession
from lac_vla.cost import CostModel
from lac_vla.errors import InputError
from lac_vla.evaluation.methods import resolve
from lac_vla.evaluation.rollout import peak_memory_mb
from lac_vla.evaluation.stats import Percentiles
from lac_vla.levers import Levers
from lac_vla.models import PrismaticBackbone
from lac_vla.policies import paths_by_name
from lac_vla.timing import STAGES, WINDOWS
from lac_vla.types import FloatArray, Frame
from lac_vla.vla import CachedVLA, Session, Step

BOOKKEEPING = ("flow", "policy", "bookkeeping")
"""Stages that a model without cache does not have."""
SHARE = 0.15
"""Most that they may take together, of the dense model call."""


class Robot(Protocol):
    """A session, or the stock model behind the same face."""

    last: Step | None

    def reset(self) -> None:
        """Begin a new episode."""
        ...

    def act(self, frame: Frame) -> FloatArray:
        """Answer an observation with an action."""
        ...


@dataclass(frozen=True)
class FrameRow:
    """One method over the counted frames.

    Attributes:
        name: ``dense stock``, ``dense`` or the policy; with the levers behind it, if any are pulled.
        ratio_nominal: Mean of the ratio aimed at; ``None`` if the method aims at none.
        ratio_effective: Mean share of (token, layer) pairs that were not computed.
        windows_ms: Window → latency, see :data:`lac_vla.timing.WINDOWS`.
        stages_ms: Stage → latency, see :data:`lac_vla.timing.STAGES`.
        levers: What is pulled; empty for none and for the stock model.
        faster_than_dense: Window → latency of ``dense``, no lever pulled, over this one.
        faster_than_equal: Window → latency of dense with the same levers over this one: the worth of caching itself.
        faster_than_stock: Window → latency of ``stock`` over this one.
        bookkeeping: Flow, policy and bookkeeping over the model call of ``dense``.
        macs: Stage → mean multiply-accumulates per frame.
        flops: Two per multiply-accumulate, all stages.
        passes: Mean decoding passes behind the prefill.
        accepted: Mean share of the drafted tokens that stood; ``None`` without drafts.
        same_tokens: Share of the action tokens that are the stock model's.
        cache_mb: Keys and values that outlive a frame; ``None`` for the stock model.
        peak_memory_mb: Of the accelerator, within a call of this method; ``None`` on a CPU.
    """

    name: str
    levers: str
    ratio_nominal: float | None
    ratio_effective: float
    windows_ms: dict[str, Percentiles]
    stages_ms: dict[str, Percentiles]
    faster_than_dense: dict[str, Ratio]
    faster_than_equal: dict[str, Ratio]
    faster_than_stock: dict[str, Ratio]
    bookkeeping: Ratio
    macs: dict[str, float]
    flops: float
    passes: float
    accepted: float | None
    same_tokens: float
    cache_mb: float | None
    peak_memory_mb: float | None


@dataclass(frozen=True)
class FrameResult:
    """The section ``frame``.

    Attributes:
        model: Its name.
        dtype: Of its weights.
        visual_tokens: Of a prompt.
        source: Where the frames come from.
        frames: Counted frames.
        warmup: Frames before them that are not counted.
        peak_memory_mb: Of the accelerator, or of this process with all methods in it.
        rows: Stock, dense, then the policies.
        targets: Bookkeeping of every policy.
    """

    model: str
    dtype: str
    visual_tokens: int
    source: str
    frames: int
    warmup: int
    peak_memory_mb: float
    rows: tuple[FrameRow, ...]
    targets: tuple[Target, ...]


@dataclass
class Log:
    """What one method did, an entry per frame.

    Attributes:
        stages: Milliseconds by stage.
        windows: Milliseconds by window.
        nominal: Ratio aimed at.
        effective: Ratio reached.
        tokens: Action tokens.
        macs: Multiply-accumulates by stage.
        passes: Decoding passes.
        accepted: Share of the draft that stood, of the frames that had one.
        peaks_mb: Peak memory of the accelerator; empty on a CPU.
    """

    stages: list[dict[str, float]] = field(default_factory=list)
    windows: list[dict[str, float]] = field(default_factory=list)
    nominal: list[float | None] = field(default_factory=list)
    effective: list[float] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    macs: list[dict[str, int]] = field(default_factory=list)
    passes: list[int] = field(default_factory=list)
    accepted: list[float] = field(default_factory=list)
    peaks_mb: list[float] = field(default_factory=list)

    def add(self, step: Step, peak_mb: float | None, cost: CostModel) -> None:
        """Write down a frame."""
        if peak_mb is not None:
            self.peaks_mb.append(peak_mb)
        self.stages.append(dict(step.stages))
        self.windows.append(step.timings)
        self.nominal.append(step.decision.nominal_ratio)
        self.effective.append(step.ratio)
        self.tokens.append(list(step.info["tokens"]))
        self.macs.append(cost.step(step))
        self.passes.append(len(step.passes))
        if step.draft:
            self.accepted.append((step.passes[0][0] if step.passes else step.draft) / step.draft)

    def window(self, name: str) -> list[float]:
        """A window's latency, ms, frame by frame."""
        return [windows[name] for windows in self.windows]

    @property
    def bookkeeping(self) -> list[float]:
        """What the cache costs beside the model, ms, frame by frame."""
        return [sum(stages[name] for name in BOOKKEEPING) for stages in self.stages]


def measure_frames(backbone: PrismaticBackbone, scene: Scene, config: BenchConfig) -> FrameResult:
    """Run the section: every frame goes to every method before the next frame does, in a new order each time.

    Args:
        backbone: The model.
        scene: ``config.warmup`` + ``config.frames`` frames, or fewer.
        config: The benchmark.

    Raises:
        InputError: If no frame is left behind the warm-up.
    """
    if len(scene.frames) <= config.warmup:
        raise InputError(f"{scene.source}: {len(scene.frames)} frames, {config.warmup} of them warm-up: none is left")
    robots = _robots(backbone, config)
    cost = CostModel.of(backbone, scene.frames[0])
    logs = {name: Log() for name in robots}
    for index, order in take_turns(list(robots), len(scene.frames), config.seed, "frame"):
        for name in order:
            step, peak = _turn(robots[name], scene, index, backbone.device)
            if index >= config.warmup:
                logs[name].add(step, peak, cost)
    rows = tuple(_row(name, robots[name], logs) for name in robots)
    peaks = [row.peak_memory_mb for row in rows if row.peak_memory_mb is not None]
    return FrameResult(
        model=backbone.name,
        dtype=str(backbone.dtype).removeprefix("torch."),
        visual_tokens=backbone.layout(scene.frames[0]).n_visual,
        source=scene.source,
        frames=len(scene.frames) - config.warmup,
        warmup=config.warmup,
        peak_memory_mb=max(peaks, default=peak_memory_mb(backbone.device)),
        rows=rows,
        targets=tuple(
            Target.at_most(f"bookkeeping of {row.name}, of the dense model call", row.bookkeeping, SHARE)
            for row in rows
            if not row.name.startswith(DENSE)
        ),
    )


def _robots(backbone: PrismaticBackbone, config: BenchConfig) -> dict[str, Robot]:
    """Method and levers → session on the same model."""
    robots: dict[str, Robot] = {STOCK: StockSession(backbone)}
    for levers in dict.fromkeys(("none", *config.levers)):
        for spec in (DENSE, *config.policies):
            vla = CachedVLA(
                backbone,
                resolve(spec, config.model),
                flow=config.flow,
                max_age=config.max_age,
                levers=Levers.parse(levers),
            )
            robots[_name(paths_by_name(spec), levers)] = vla.session(config.seed)
    return robots


def _name(method: str, levers: str) -> str:
    return method if levers in ("", "none") else f"{method} +{levers}"


def _turn(robot: Robot, scene: Scene, index: int, device: torch.device) -> tuple[Step, float | None]:
    """One frame on one robot; and the accelerator's peak memory meanwhile, MB."""
    if index in scene.starts:
        robot.reset()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    robot.act(scene.frames[index])
    if robot.last is None:  # pragma: no cover - act always leaves a step
        raise RuntimeError("the session did not report its step")
    return robot.last, peak_memory_mb(device) if device.type == "cuda" else None


def _row(name: str, robot: Robot, logs: dict[str, Log]) -> FrameRow:
    levers = name.partition(" +")[2]
    log, dense, stock, equal = logs[name], logs[DENSE], logs[STOCK], logs[_name(DENSE, levers)]
    nominal = [ratio for ratio in log.nominal if ratio is not None]
    macs = {stage: float(np.mean([macs[stage] for macs in log.macs])) for stage in log.macs[0]}
    return FrameRow(
        name=name,
        levers=levers,
        ratio_nominal=float(np.mean(nominal)) if nominal else None,
        ratio_effective=float(np.mean(log.effective)),
        windows_ms={window: measured(log.window(window)) for window in WINDOWS},
        stages_ms={stage: measured([stages[stage] for stages in log.stages]) for stage in STAGES},
        faster_than_dense={w: Ratio.of(dense.window(w), log.window(w)) for w in WINDOWS},
        faster_than_equal={w: Ratio.of(equal.window(w), log.window(w)) for w in WINDOWS},
        faster_than_stock={w: Ratio.of(stock.window(w), log.window(w)) for w in WINDOWS},
        bookkeeping=Ratio.of(log.bookkeeping, dense.window("model_call")),
        macs=macs,
        flops=2 * sum(macs.values()),
        passes=float(np.mean(log.passes)),
        accepted=float(np.mean(log.accepted)) if log.accepted else None,
        same_tokens=float(np.mean(np.asarray(log.tokens) == np.asarray(stock.tokens))),
        cache_mb=robot.nbytes / 1e6 if isinstance(robot, Session) else None,
        peak_memory_mb=max(log.peaks_mb, default=None),
    )
