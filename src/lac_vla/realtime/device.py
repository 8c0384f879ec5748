"""A device is a latency table: milliseconds as a function of what a frame really computed.

A table is linear in the quantities of :func:`quantities`, stage by stage; the decoder's prefill has a floor beside, the
time in which its weights are read once. So a small model can play with the latencies of a large one of its family, at
its own ratios: of a frame that computed a third of its visual tokens the device's third is counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from lac_vla.checks import check_fields
from lac_vla.engine.step_info import StepInfo
from lac_vla.errors import InputError
from lac_vla.files import read_object
from lac_vla.models import FAMILIES, VLA
from lac_vla.policies import POLICIES
from lac_vla.types import SkippedTokens

FOLDER = Path(__file__).parent / "devices"
"""The tables that come with the package."""

Kind: TypeAlias = Literal["measured", "derived"]
Stages: TypeAlias = Mapping[str, Mapping[str, float]]
"""Stage → quantity → a number: of a table milliseconds per unit, of a frame units."""

QUANTITIES: Mapping[str, frozenset[str]] = {
    "host": frozenset({"fixed"}),
    "flow": frozenset({"fixed"}),
    "policy": frozenset(POLICIES),
    "vision": frozenset({"fixed", "per_share"}),
    "projector": frozenset({"fixed", "per_share"}),
    "prefill": frozenset({"fixed", "per_share", "floor"}),
    "probe": frozenset({"per_share"}),
    "decode": frozenset({"per_pass", "per_row"}),
    "head": frozenset({"fixed", "per_step"}),
}
"""Stage → what may stand in a table, see :func:`quantities`."""


@dataclass(frozen=True)
class Shape:
    """The model that a table is of.

    Attributes:
        model: Its name.
        families: Its family, a key of :data:`lac_vla.models.FAMILIES`, and others whose models take the same passes.
        layers: Of its decoder.
        width: Of its decoder.
        visual_tokens: Of its prompt.
        scaled: Whether smaller models of the family may play with it; else the model must have these sizes.
    """

    model: str
    families: tuple[str, ...]
    layers: int
    width: int
    visual_tokens: int
    scaled: bool = False

    @classmethod
    def of(cls, model: VLA, *, scaled: bool = False) -> Shape:
        """Read the sizes off a model."""
        visual = sum(rows * cols for rows, cols in model.grids.values())
        return cls(model.name, (model.family,), model.n_layers, model.decoder.shape.width, visual, scaled)

    def refuses(self, model: VLA) -> str | None:
        """Say why a model cannot play with the table; ``None`` if it can."""
        other = Shape.of(model)
        if model.family not in self.families:
            return f"it is for the family {' or '.join(self.families)}, and {model.name} is of {model.family}"
        sizes = [(shape.layers, shape.width, shape.visual_tokens) for shape in (self, other)]
        if self.scaled or sizes[0] == sizes[1]:
            return None
        mine, theirs = (f"{layers} layers of {width} and {n} visual tokens" for layers, width, n in sizes)
        return f"it was made for {mine}, and {model.name} has {theirs}"


@dataclass(frozen=True)
class DeviceTable:
    """The time that a frame of one model takes on one device.

    Attributes:
        name: Of the table, unique.
        device: What ``--clock`` calls the device; it may have tables of several models.
        hardware: The device in words.
        precision: Of the weights.
        kind: ``measured`` on the device, or ``derived`` from published figures.
        source: What it comes from: the command that measured it, or citations.
        baseline: What dense is there: which of its fast paths are counted, for all methods alike.
        shape: The model.
        stages: Milliseconds by stage, per unit of :func:`quantities`; what is left out is 0.
        jitter: Latency over the table's, at equally spaced probabilities from 0 to 1; ``(1.0,)`` for none.

    Raises:
        InputError: If a value cannot be.
    """

    name: str
    device: str
    hardware: str
    precision: str
    kind: Kind
    source: str
    baseline: str
    shape: Shape
    stages: Stages
    jitter: tuple[float, ...] = field(default=(1.0,))

    def __post_init__(self) -> None:
        where = f"the latency table {self.name!r}"
        for stage, costs in self.stages.items():
            if stage not in QUANTITIES or not set(costs) <= QUANTITIES[stage]:
                known = {stage: sorted(names) for stage, names in QUANTITIES.items()}
                raise InputError(f"{where} has {stage}: {sorted(costs)}; the stages and their numbers are {known}")
            if not all(math.isfinite(ms) and ms >= 0 for ms in costs.values()):
                raise InputError(f"{where} has {stage}: {dict(costs)}: a time is a finite number, at least 0")
        check_fields(self)
        check_fields(self.shape)
        if not self.shape.families or not set(self.shape.families) <= set(FAMILIES):
            raise InputError(f"{where} has families {self.shape.families}: give some of {', '.join(FAMILIES)}")
        if min(self.shape.layers, self.shape.width, self.shape.visual_tokens) < 1:
            raise InputError(f"{where} is of a model without layers, width or visual tokens")
        if not any(self.stages.get("prefill", {}).values()):
            raise InputError(f"{where} has no time for the prefill: give its fixed, per_share or floor")
        if not self.jitter or not all(math.isfinite(factor) and factor > 0 for factor in self.jitter):
            raise InputError(f"{where} has the jitter {self.jitter}: give quantiles of a factor, finite and above 0")
        if list(self.jitter) != sorted(self.jitter):
            raise InputError(f"{where} has the jitter {self.jitter}: quantiles never fall")

    @classmethod
    def read(cls, path: Path) -> DeviceTable:
        """Read a table's file.

        Raises:
            InputError: If it is missing or damaged, or a value cannot be.
        """
        advice = "measure one with `lac bench --latency-table OUT.json`"
        found = read_object(path, advice)
        try:
            sizes, stages = found.pop("shape"), found.pop("stages")
            shape = Shape(**sizes | {"families": tuple(sizes["families"])})
            numbers = {stage: {name: float(ms) for name, ms in costs.items()} for stage, costs in stages.items()}
            jitter = tuple(float(factor) for factor in found.pop("jitter", [1.0]))
            return cls(shape=shape, stages=numbers, jitter=jitter, **found)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise InputError(f"{path} is no latency table ({error!r:.200}): {advice}") from error

    def to_json(self) -> dict[str, Any]:
        """Give the content of its file."""
        return asdict(self)

    def stages_ms(self, units: Stages) -> dict[str, float]:
        """Compute the milliseconds of every stage of a frame that took so many units, without jitter."""
        spent = {
            stage: sum(ms * units.get(stage, {}).get(name, 0.0) for name, ms in costs.items())
            for stage, costs in self.stages.items()
        }
        floor = self.stages["prefill"].get("floor", 0.0) * units["prefill"]["fixed"]
        return spent | {"prefill": max(floor, spent["prefill"])}

    def milliseconds(self, units: Stages) -> float:
        """Compute the milliseconds from observation to action of a frame, without jitter."""
        return sum(self.stages_ms(units).values())

    def factor(self, chance: float) -> float:
        """Return the jitter at a probability in [0, 1]."""
        return float(np.interp(chance, np.linspace(0, 1, len(self.jitter)), self.jitter))


def quantities(step: StepInfo, policy: str, *, flow: bool) -> dict[str, dict[str, float]]:
    """Count what a frame took, in the units of a table.

    ``fixed`` is once a frame (of the prefill: once per pass over the prompt); ``per_share`` is the share of the visual
    tokens that were computed: by the vision tower, by the projector, by the decoder over all layers; of ``probe``, the
    share of all attention weights that were computed aside for the policy. ``per_pass`` and ``per_row`` are decoding
    passes behind the prefill and their rows, ``per_step`` runs of the head's own stack.

    Args:
        step: The session's report.
        policy: Key of :data:`lac_vla.policies.POLICIES`; its time counts if it was asked.
        flow: Whether it reads optical flow.
    """
    layout, decision = step.layout, step.decision
    n_visual, asked = max(1, layout.n_visual), float(step.dense_reason is None)
    encoded = 1.0 if step.encoded is None else float(np.mean(step.encoded)) if step.encoded.size else 0.0
    probed = 0.0
    if step.probe is not None:
        for layer in step.probe.layers:
            computed = layout.n_prefix + layout.n_suffix + int(np.count_nonzero(decision.exit_layer > layer))
            rows = {"last": 1, "suffix": layout.n_suffix, "all": computed}[step.probe.rows]
            slots = layout.length if decision.skipped is SkippedTokens.REUSE else computed
            probed += rows * slots / (layout.length**2 * decision.n_layers)
    return {
        "host": {"fixed": 1.0},
        "flow": {"fixed": asked * flow},
        "policy": {policy: asked},
        "vision": {"fixed": 1.0, "per_share": encoded},
        "projector": {"fixed": 1.0, "per_share": np.count_nonzero(decision.exit_layer) / n_visual},
        "prefill": {"fixed": float(step.prompt_passes), "per_share": step.prompt_passes * (1.0 - step.ratio)},
        "probe": {"per_share": probed},
        "decode": {
            "per_pass": float(len(step.decode_passes)),
            "per_row": float(sum(stop - start for start, stop in step.decode_passes)),
        },
        "head": {"fixed": 1.0, "per_step": float(len(step.stack_passes))},
    }


def find_tables(name: str) -> list[DeviceTable]:
    """Find the tables of a device of the package, by its name or a table's, or the one of a ``.json`` file.

    Raises:
        InputError: If there is none, or its file is damaged.
    """
    if name.endswith(".json"):
        return [DeviceTable.read(Path(name))]
    bundled = [DeviceTable.read(path) for path in sorted(FOLDER.glob("*.json"))]
    found = [table for table in bundled if name in (table.device, table.name)]
    if not found:
        devices = sorted({table.device for table in bundled})
        raise InputError(
            f"there is no device {name!r}: choose one of {', '.join(devices)}; give the file of a table, *.json, as "
            "`lac bench --latency-table` writes it; or a latency in milliseconds"
        )
    return found


def fitting(tables: Sequence[DeviceTable], model: VLA) -> DeviceTable:
    """Choose the table that a model can play with.

    Raises:
        InputError: If there is none.
    """
    reasons = {table.name: table.shape.refuses(model) for table in tables}
    for table in tables:
        if reasons[table.name] is None:
            return table
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise InputError(f"no latency table fits the model ({why}): measure one with `lac bench --latency-table OUT.json`")
