"""The shape of a learned policy: what it reads, how large it is, which ratios it may choose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from lac_vla.checks import LONGEST_AGE, check_fields, check_whole
from lac_vla.errors import CheckpointError, InputError
from lac_vla.flow import policy_flow

INPUTS = ("paper", "extended")
RATIOS = (0.0, 0.25, 0.5, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class LACConfig:
    """Everything that :class:`lac_vla.policies.lac.LACPolicy` is, but its weights.

    Attributes:
        grids: Camera → (rows, cols) of visual tokens, in token order: the layout that it was made for.
        ratios: R, the cache ratios it chooses from, ascending; 0 (recompute everything) is one of them.
        inputs: ``"paper"``: [I; O], five channels. ``"extended"``: also |I − reference| (three channels, against the
            pixels that every slot was computed from) and the age of every slot, so that slow change cannot hide.
        flow: The optical flow it was trained with, see :data:`lac_vla.flow.FLOWS`; ``"none"`` drops the channels.
        language: Whether both networks read the instruction (the paper's ablation; its default is not to).
        ratio: A fixed cache ratio, the predictor unused (the paper's ablation "selector only"); ``None`` for none.
        recovery: p_recover: chance of a cached token to be recomputed anyway.
        patch_pixels: Pixels per token side that the networks see; images are resized to it.
        width: Channels of both networks.
        depth: Residual convolutions of both networks.
        max_age: Age, in frames, that the age channel is scaled by.
        proprio: Values of the proprioception that the ratio predictor reads besides; 0 for none. Ours.
        slots: (Layers, heads of keys, width of a head) of the model whose reused slots' changes a third network
            predicts, see :class:`lac_vla.policies.lac.deltas.Deltas`; ``None`` for none.

    Raises:
        InputError: If a value is out of range.
    """

    grids: Mapping[str, tuple[int, int]]
    ratios: tuple[float, ...] = RATIOS
    inputs: str = "extended"
    flow: str = "dis"
    language: bool = False
    ratio: float | None = None
    recovery: float = 0.05
    patch_pixels: int = 4
    width: int = 32
    depth: int = 2
    max_age: int = 16
    slots: tuple[int, int, int] | None = None
    proprio: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.flow != policy_flow(self.flow):
            raise InputError(f"flow {self.flow!r}: a policy names an estimator; its weights are named when it is run")
        if not self.grids or any(min(grid) < 1 for grid in self.grids.values()):
            raise InputError(f"grids {dict(self.grids)}: give (rows, cols) for at least one camera")
        if list(self.ratios) != sorted(set(self.ratios)) or not self.ratios or self.ratios[0] != 0:
            raise InputError(f"ratios {self.ratios}: give ascending cache ratios that begin with 0, the full refresh")
        if self.ratios[-1] > 1:
            raise InputError(f"ratios {self.ratios}: a cache ratio is a share of the tokens, at most 1")
        if self.inputs not in INPUTS:
            raise InputError(f"inputs {self.inputs!r}: choose one of {list(INPUTS)}")
        if self.ratio is not None and not 0 <= self.ratio <= 1:
            raise InputError(f"ratio {self.ratio}: a cache ratio is a share of the tokens, in 0..1")
        if not 0 <= self.recovery <= 1:
            raise InputError(f"recovery {self.recovery}: give a probability in 0..1")
        check_whole("max_age", self.max_age, 1, LONGEST_AGE)
        if self.slots is not None and min(self.slots) < 1:
            raise InputError(f"slots {self.slots}: give layers, heads and a head's width, each at least 1")
        for name, low, high in (("proprio", 0, 4096), ("patch_pixels", 1, 64), ("width", 1, 4096), ("depth", 0, 100)):
            check_whole(name, getattr(self, name), low, high)

    @property
    def channels(self) -> int:
        """Input channels of the networks: 3 of the image, 2 of the flow, 4 of the extended inputs."""
        return 3 + 2 * (self.flow != "none") + 4 * (self.inputs == "extended")

    @property
    def n_visual(self) -> int:
        """Visual tokens N over all cameras."""
        return sum(rows * cols for rows, cols in self.grids.values())

    def to_json(self) -> dict[str, Any]:
        """Make plain data, which :meth:`from_json` reads."""
        return {**asdict(self), "grids": {name: list(grid) for name, grid in self.grids.items()}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LACConfig:
        """Read what :meth:`to_json` made.

        Raises:
            CheckpointError: If it is something else.
        """
        unknown = sorted(set(data) - {field.name for field in fields(cls)})
        if unknown:
            raise CheckpointError(f"unknown settings {unknown}: the policy is of another version of lac-vla")
        try:
            grids = {name: (rows, cols) for name, (rows, cols) in data["grids"].items()}
            rest = {key: value for key, value in data.items() if key not in ("grids", "ratios", "slots")}
            slots = data.get("slots")
            return cls(grids, tuple(data["ratios"]), slots=None if slots is None else tuple(slots), **rest)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"these are no settings of a learned policy: {error}") from error
