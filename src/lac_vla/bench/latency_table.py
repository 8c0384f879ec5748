"""The latency table of this machine: lines through what frames of several methods took, and the spread around them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lac_vla.bench.config import BenchConfig
from lac_vla.bench.derived import derive
from lac_vla.bench.measure import cpu_threads
from lac_vla.bench.methods import cached_vla
from lac_vla.bench.model import open_model, open_shapes
from lac_vla.bench.scene import Scene, make_scene
from lac_vla.engine.step_info import StepInfo
from lac_vla.errors import InputError
from lac_vla.files import write_object, writing
from lac_vla.models import VLA
from lac_vla.policies import PolicySpec
from lac_vla.provenance import provenance
from lac_vla.realtime.device import DeviceTable, Shape, Stages, quantities

OPTIONS = "default"
"""Engine options of all methods: drafts and the like count for dense as well."""
SHARES = ("dense", "random:ratio=0.3", "random:ratio=0.6", "random:ratio=0.9")
"""Methods that compute different shares of the visual tokens."""
RULES = ("motion:ratio=0.8", "vla-cache:variant=released", "fastv:ratio=0.5", "sparsevlm")
"""Methods whose own work is measured beside them, and that of ``lac``, if it comes with the model."""
FITTED: Mapping[str, tuple[tuple[str, str], ...]] = {
    "tower": (("vision", "fixed"), ("vision", "per_share")),
    "projector": (("projector", "fixed"), ("projector", "per_share")),
    "prefill": (("prefill", "fixed"), ("prefill", "per_share"), ("probe", "per_share")),
    "decode": (("head", "fixed"), ("head", "per_step"), ("decode", "per_pass"), ("decode", "per_row")),
}
"""Stage of a frame → quantities of a table that explain it."""
QUANTILES = 21
"""Numbers that describe the jitter."""


@dataclass(frozen=True)
class Measured:
    """One frame: its policy, what it took in a table's units, and its stages in milliseconds."""

    policy: str
    units: Stages
    stages: Mapping[str, float]


def make_table(config: BenchConfig) -> DeviceTable:
    """Measure the table of this machine, or derive that of ``config.roofline``, and write it.

    Raises:
        InputError: If the model or the device does not fit, or the file cannot be written.
    """
    out = config.latency_table
    if out is None or out.suffix != ".json":
        raise InputError(f"latency_table is {out}: give the file to write, *.json")
    if config.sections == ("roofline",):
        table = derive(open_shapes(config), str(config.roofline))
    else:
        with cpu_threads(config.threads):
            model = open_model(config)
            scene = make_scene(model, config.replay, config.warmup + config.frames, config.seed, config.keys)
            table = measure_table(model, scene, config, out.stem)
    with writing(out, "--latency-table"):
        write_object(out, table.to_json())
    return table


def measure_table(model: VLA, scene: Scene, config: BenchConfig, name: str) -> DeviceTable:
    """Time the frames of a scene by methods in turn, and fit the table."""
    frames = list(_frames(model, scene, config))
    costs = fit(frames)
    about = provenance()
    hardware = about["hardware"]
    machine = ", ".join(str(hardware[key]) for key in ("accelerator", "processor") if hardware.get(key))
    plain = DeviceTable(
        name=name,
        device=config.device,
        hardware=f"{machine}, {config.threads or 'all'} thread{'' if config.threads == 1 else 's'}",
        precision=str(model.dtype).removeprefix("torch."),
        kind="measured",
        source=f"`{about['command']}`, {about['created']}; {len(frames)} frames, {scene.source}.",
        baseline=f"engine options {OPTIONS!r}, drafted action tokens among them; the same for all methods.",
        shape=Shape.of(model),
        stages=costs,
    )
    ratios = [sum(frame.stages.values()) / plain.milliseconds(frame.units) for frame in frames]
    quantiles = np.quantile(ratios, np.linspace(0, 1, QUANTILES)) / np.median(ratios)
    return DeviceTable(**{**vars(plain), "jitter": tuple(np.round(quantiles, 4).tolist())})


def fit(frames: Sequence[Measured]) -> dict[str, dict[str, float]]:
    """Fit the milliseconds per unit to measured frames, none of them negative."""
    costs: dict[str, dict[str, float]] = {"policy": {}}
    costs["host"] = {"fixed": _median([f.stages["preprocess"] + f.stages["bookkeeping"] for f in frames])}
    costs["flow"] = {"fixed": _median([f.stages["flow"] for f in frames if f.units["flow"]["fixed"]])}
    for policy in dict.fromkeys(frame.policy for frame in frames):
        asked = [f.stages["policy"] for f in frames if f.policy == policy and f.units["policy"][policy]]
        costs["policy"][policy] = _median(asked)
    for stage, names in FITTED.items():
        units = np.array([[f.units[part].get(name, 0.0) for part, name in names] for f in frames])
        for (part, name), ms in zip(names, _line(units, np.array([f.stages[stage] for f in frames])), strict=True):
            costs.setdefault(part, {})[name] = round(float(ms), 4)
    return costs


def _line(units: npt.NDArray[np.float64], spent: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Fit a non-negative linear model by least absolute deviations, reweighted: a disturbed frame pulls little."""
    result, weights = np.zeros(units.shape[1]), np.ones(len(spent))
    used = units.any(axis=0)
    for _ in range(50):
        root = np.sqrt(weights)[:, None]
        found = np.linalg.lstsq(root * units[:, used], root[:, 0] * spent, rcond=None)[0]
        while used.any() and found.min() < 0:
            used[np.flatnonzero(used)[found.argmin()]] = False
            found = np.linalg.lstsq(root * units[:, used], root[:, 0] * spent, rcond=None)[0]
        result[:] = 0.0
        result[used] = found
        weights = 1 / np.maximum(1e-3, np.abs(units @ result - spent))
    return result


def _median(values: Sequence[float]) -> float:
    return round(float(np.median(values)), 4) if values else 0.0


def _frames(model: VLA, scene: Scene, config: BenchConfig) -> Iterator[Measured]:
    """Run every frame of the scene by every method in turn; the first ones warm up."""
    specs = [*SHARES, *RULES]
    try:
        cached_vla(model, "lac", OPTIONS, config)
        specs.append("lac")
    except InputError:  # the model comes without a policy
        pass
    vlas = [(PolicySpec.parse(spec).name, cached_vla(model, spec, OPTIONS, config)) for spec in specs]
    sessions = [(name, vla.flow_used != "none", vla.session(config.seed)) for name, vla in vlas]
    order = np.random.default_rng(config.seed)
    for index, frame in enumerate(scene.frames):
        for turn in order.permutation(len(sessions)):
            policy, flow, session = sessions[turn]
            if index in scene.starts:
                session.reset()
            session.act(frame)
            step = session.last_info
            if index >= config.warmup and isinstance(step, StepInfo):
                yield Measured(policy, quantities(step, policy, flow=flow), step.stages)
