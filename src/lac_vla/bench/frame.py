"""The section ``frame``: whole observations, from the image to the action, by every method in turn."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from lac_vla.bench.config import BenchConfig
from lac_vla.bench.engine import DENSE
from lac_vla.bench.lerobot_session import LeRobotSession
from lac_vla.bench.measure import Ratio, Target, measured, take_turns
from lac_vla.bench.methods import Method, make_methods, row_name
from lac_vla.bench.roofline import Roofline
from lac_vla.bench.scene import Scene
from lac_vla.bench.stock import STOCK, StockSession
from lac_vla.cost import CostModel, peak_memory_mb
from lac_vla.engine.options import EngineOptions
from lac_vla.engine.step_info import StepInfo
from lac_vla.errors import InputError
from lac_vla.models import VLA
from lac_vla.results.stats import Percentiles
from lac_vla.session import Session
from lac_vla.timing import STAGES, WINDOWS

BOOKKEEPING = ("flow", "policy", "bookkeeping")
"""Stages that a model without cache does not have."""
SHARE = 0.15
"""Most that they may take together, of the dense model call."""
LEARNED = {"share": 0.10, "prefill": 2.0, "action": 1.3, "options": 1.76}
"""Targets of a learned policy on replayed frames: flow and policy over the model call of dense with the same options,
at most; the prefill, and observation to action, faster than dense with the same options; observation to action with
options faster than dense without, at least."""
SAME = 1 / 256
"""Two action values that differ by less, of a range from -1 to 1, are the same: half a bin of OpenVLA's tokens."""


@dataclass(frozen=True)
class FrameRow:
    """One method over the counted frames.

    Attributes:
        name: ``dense stock`` (not of every model), ``dense`` or the policy; with the options behind it, if any are on.
        ratio_nominal: Mean of the ratio aimed at; ``None`` if the method aims at none.
        ratio_effective: Mean share of (token, layer) pairs that were not computed.
        windows_ms: Window → latency, see :data:`lac_vla.timing.WINDOWS`.
        stages_ms: Stage → latency, see :data:`lac_vla.timing.STAGES`.
        options: The options that are on; empty for none and for the stock model.
        faster_than_dense: Window → latency of ``dense``, no option on, over this one.
        faster_than_equal: Window → latency of dense with the same options over this one: the worth of caching itself.
        faster_than_stock: Window → latency of ``stock`` over this one; empty without it.
        bookkeeping: Flow, policy and bookkeeping over the model call of ``dense``.
        deciding: Flow and policy over the model call of dense with the same options.
        macs: Stage → mean multiply-accumulates per frame.
        flops: Two per multiply-accumulate, all stages.
        passes: Mean decoding passes behind the prefill.
        accepted: Mean share of the drafted tokens that were accepted; ``None`` without drafts.
        swept: What was prescribed, and is no property of the method: ``ratio``, ``acceptance``.
        same_actions: Share of the action's tokens, or of its values within :data:`SAME`, that are the stock model's;
            ``None`` where they are prescribed, or there is no such model.
        floor_ms: Stage (``prefill``, ``decode``) → mean of what a GPU needs at least for this row's own active rows
            and passes, see :mod:`lac_vla.bench.roofline`; empty if none was named.
        times_floor: Stage → its median over the floor; empty where the device is not that GPU.
        cache_mb: What outlives a frame, keys and values mostly; ``None`` for the stock model.
        peak_memory_mb: Of the accelerator, within a call of this method; ``None`` on a CPU.
    """

    name: str
    options: str
    ratio_nominal: float | None
    ratio_effective: float
    windows_ms: dict[str, Percentiles]
    stages_ms: dict[str, Percentiles]
    faster_than_dense: dict[str, Ratio]
    faster_than_equal: dict[str, Ratio]
    faster_than_stock: dict[str, Ratio]
    bookkeeping: Ratio
    deciding: Ratio
    macs: dict[str, float]
    flops: float
    passes: float
    accepted: float | None
    swept: tuple[str, ...]
    same_actions: float | None
    floor_ms: dict[str, float]
    times_floor: dict[str, float]
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
        random_weights: Whether no number here tells what a trained model would reuse or guess.
        stock: What the stock model is; empty if there is none.
        roofline: GPU of the floors; ``None`` if none was named.
        frames: Counted frames.
        warmup: Frames before them that are not counted.
        peak_memory_mb: Of the accelerator, or of this process with all methods in it.
        rows: Stock, where there is one, dense, then the policies.
        targets: Bookkeeping of every policy.
    """

    model: str
    dtype: str
    visual_tokens: int
    source: str
    random_weights: bool
    stock: str
    roofline: str | None
    frames: int
    warmup: int
    peak_memory_mb: float
    rows: tuple[FrameRow, ...]
    targets: tuple[Target, ...]


@dataclass
class Log:
    """A log of one method, an entry per frame.

    Attributes:
        stages: Milliseconds by stage.
        windows: Milliseconds by window.
        nominal: Ratio aimed at.
        effective: Ratio reached.
        answers: Action tokens, or values in [-1, 1].
        macs: Multiply-accumulates by stage.
        decode_passes: Decoding passes.
        accepted: Share of the draft that was accepted, of the frames that had one.
        peaks_mb: Peak memory of the accelerator; empty on a CPU.
        floors: Milliseconds by stage, if a GPU was named.
    """

    stages: list[dict[str, float]] = field(default_factory=list)
    windows: list[dict[str, float]] = field(default_factory=list)
    nominal: list[float | None] = field(default_factory=list)
    effective: list[float] = field(default_factory=list)
    answers: list[npt.NDArray[np.float64]] = field(default_factory=list)
    macs: list[dict[str, int]] = field(default_factory=list)
    decode_passes: list[int] = field(default_factory=list)
    accepted: list[float] = field(default_factory=list)
    peaks_mb: list[float] = field(default_factory=list)
    floors: list[dict[str, float]] = field(default_factory=list)

    def add(
        self, step: StepInfo, peak_mb: float | None, cost: CostModel | LeRobotSession, roofline: Roofline | None
    ) -> None:
        """Write down a frame."""
        if peak_mb is not None:
            self.peaks_mb.append(peak_mb)
        self.stages.append(dict(step.stages))
        self.windows.append(step.timings)
        self.nominal.append(step.decision.nominal_ratio)
        self.effective.append(step.ratio)
        self.answers.append(np.asarray(step.metadata.get("tokens", step.metadata.get("normalized")), dtype=np.float64))
        self.macs.append(cost.step(step))
        self.decode_passes.append(len(step.decode_passes))
        if step.accepted is not None:
            self.accepted.append(step.accepted / step.draft)
        if roofline is not None:
            floors = {"prefill": roofline.prefill_ms(step.layout, step.decision, step.draft, n_queries=step.n_queries)}
            if step.decode_passes:
                floors["decode"] = roofline.decode_ms(step.layout, step.decision, step.decode_passes)
            if again := step.prompt_passes - 1:
                whole = roofline.prefill_ms(step.layout, step.decision, 0, n_queries=step.layout.n_suffix)
                floors["decode"] = floors.get("decode", 0.0) + again * whole
            self.floors.append(floors)

    def stage(self, name: str) -> list[float]:
        """List a stage's latency, ms, frame by frame."""
        return [stages[name] for stages in self.stages]

    def window(self, name: str) -> list[float]:
        """List a window's latency, ms, frame by frame."""
        return [windows[name] for windows in self.windows]

    @property
    def bookkeeping(self) -> list[float]:
        """Time that the cache costs beside the model, ms, frame by frame."""
        return [sum(stages[name] for name in BOOKKEEPING) for stages in self.stages]


def measure_frames(model: VLA, scene: Scene, config: BenchConfig) -> FrameResult:
    """Run the section: every frame goes to every method before the next frame does, in a new order each time.

    Raises:
        InputError: If the scene has no frame left behind the warm-up.
    """
    if len(scene.frames) <= config.warmup:
        raise InputError(f"{scene.source}: {len(scene.frames)} frames, {config.warmup} of them warm-up: none is left")
    methods = list(make_methods(model, config))
    reuses = {method.name: EngineOptions.parse(method.options or "none").vision_kv_reuse for method in methods}
    costs = {reuse: CostModel.of(model, scene.frames[0], vision_kv_reuse=reuse) for reuse in set(reuses.values())}
    roofline = None if config.roofline is None else Roofline(config.roofline, model.decoder.shape)
    sessions = {method.name: method.session for method in methods}
    logs = {name: Log() for name in sessions}
    least, seconds = config.warmup + 1, 60 * config.minutes if config.minutes else math.inf
    turns = take_turns(list(sessions), len(scene.frames), config.seed, "frame", least=least, seconds=seconds)
    for index, order in turns:
        for name in order:
            step, peak = _turn(sessions[name], scene, index, model.device)
            if index >= config.warmup:
                session = sessions[name]
                cost = session if isinstance(session, LeRobotSession) else costs[reuses[name]]
                logs[name].add(step, peak, cost, roofline)
    comparable = roofline is not None and roofline.measures(model.device, model.dtype)
    rows = tuple(_row(method, logs, comparable=comparable) for method in methods)
    peaks = [row.peak_memory_mb for row in rows if row.peak_memory_mb is not None]
    return FrameResult(
        model=model.name,
        dtype=str(model.dtype).removeprefix("torch."),
        visual_tokens=model.processor.prompt(scene.frames[0]).layout.n_visual,
        source=scene.source,
        random_weights=config.model is None,
        stock=next((s.described for s in sessions.values() if not isinstance(s, Session)), ""),
        roofline=config.roofline,
        frames=len(logs[DENSE].stages),
        warmup=config.warmup,
        peak_memory_mb=max(peaks, default=peak_memory_mb(model.device)),
        rows=rows,
        targets=tuple(
            target
            for row in rows
            if not row.name.startswith(DENSE)
            for target in _targets(row, earned=config.replay is not None and config.model is not None)
        ),
    )


def _targets(row: FrameRow, *, earned: bool) -> Iterator[Target]:
    """List a policy's targets; a learned one has more where ratios are ``earned``: real frames, trained weights."""
    yield Target.at_most(f"bookkeeping of {row.name}, of the dense model call", row.bookkeeping, SHARE)
    if not earned or not row.name.startswith("lac"):
        return
    action = "observation_to_action"
    yield Target.at_most(f"flow and policy of {row.name}, of dense so equipped", row.deciding, LEARNED["share"])
    prefill = row.faster_than_equal["decoder_prefill"]
    yield Target.at_least(f"prefill of {row.name}, faster than dense so equipped", prefill, LEARNED["prefill"])
    equal = row.faster_than_equal[action]
    yield Target.at_least(f"{row.name}, observation to action, than dense so equipped", equal, LEARNED["action"])
    if row.options:
        plain = row.faster_than_dense[action]
        what = f"{row.name}, observation to action, than dense without options"
        yield Target.at_least(what, plain, LEARNED["options"])


def _turn(
    session: Session | StockSession | LeRobotSession, scene: Scene, index: int, device: torch.device
) -> tuple[StepInfo, float | None]:
    """Run one frame on one session; and read the accelerator's peak memory meanwhile, MB."""
    if index in scene.starts:
        session.reset()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    session.act(scene.frames[index])
    if session.last_info is None:  # pragma: no cover - act always leaves a step
        raise RuntimeError("the session did not report its step")
    return session.last_info, peak_memory_mb(device) if device.type == "cuda" else None


def _row(method: Method, logs: dict[str, Log], *, comparable: bool) -> FrameRow:
    log, dense, stock, equal = logs[method.name], logs[DENSE], logs.get(STOCK), logs[row_name(DENSE, method.options)]
    nominal = [ratio for ratio in log.nominal if ratio is not None]
    macs = {stage: float(np.mean([macs[stage] for macs in log.macs])) for stage in log.macs[0]}
    floors = {
        stage: float(np.mean([floor.get(stage, 0.0) for floor in log.floors]))
        for stage in ("prefill", "decode")
        if any(stage in floor for floor in log.floors)
    }
    return FrameRow(
        name=method.name,
        options=method.options,
        ratio_nominal=float(np.mean(nominal)) if nominal else None,
        ratio_effective=float(np.mean(log.effective)),
        windows_ms={window: measured(log.window(window)) for window in WINDOWS},
        stages_ms={stage: measured(log.stage(stage)) for stage in STAGES},
        faster_than_dense={w: Ratio.of(dense.window(w), log.window(w)) for w in WINDOWS},
        faster_than_equal={w: Ratio.of(equal.window(w), log.window(w)) for w in WINDOWS},
        faster_than_stock={w: Ratio.of(stock.window(w), log.window(w)) for w in WINDOWS if stock is not None},
        bookkeeping=Ratio.of(log.bookkeeping, dense.window("model_call")),
        deciding=Ratio.of(
            [flow + policy for flow, policy in zip(log.stage("flow"), log.stage("policy"), strict=True)],
            equal.window("model_call"),
        ),
        macs=macs,
        flops=2 * sum(macs.values()),
        passes=float(np.mean(log.decode_passes)),
        accepted=float(np.mean(log.accepted)) if log.accepted else None,
        swept=method.swept,
        same_actions=None if stock is None or "acceptance" in method.swept else _same(log, stock),
        floor_ms=floors,
        times_floor={s: float(np.median(log.stage(s))) / f for s, f in floors.items()} if comparable else {},
        cache_mb=method.session.nbytes / 1e6 if isinstance(method.session, Session) else None,
        peak_memory_mb=max(log.peaks_mb, default=None),
    )


def _same(log: Log, stock: Log) -> float:
    """Compute the share of the answers that are the stock model's."""
    return float(np.mean(np.abs(np.asarray(log.answers) - np.asarray(stock.answers)) < SAME))
