"""The statistics that map a model's normalised values to the robot's own units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lac_vla.checks import shortened
from lac_vla.errors import CheckpointError, InputError
from lac_vla.types import BoolArray

OUT_OF_RANGE = 0.5
"""Share of action values outside the model's quantiles from which on the statistics are taken to be the wrong ones."""
SLACK = 0.05


QUANTILES = ("q01", "q99")
"""Names of the statistics that [-1, 1] stands for unless a family says otherwise."""


@dataclass(frozen=True, eq=False)
class Range:
    """A vector's range in a data set, which [-1, 1] stands for: its 1 % and 99 % quantiles, or its extremes.

    Attributes:
        low: Lower ends, (dim,).
        high: Upper ends, (dim,).
        mask: Dimensions that are scaled at all, (dim,); the others pass through.
        epsilon: What the span is enlarged by, ≥ 0.
    """

    low: npt.NDArray[np.float64]
    high: npt.NDArray[np.float64]
    mask: BoolArray
    epsilon: float = 0.0

    @classmethod
    def of(cls, stats: Mapping[str, Any], kind: str, names: tuple[str, str] = QUANTILES, epsilon: float = 0.0) -> Range:
        """Read one data set's ``kind`` (``"action"``, ``"proprio"``) statistics.

        Args:
            stats: Of the data set.
            kind: Of the vector.
            names: Of the lower and the upper end.
            epsilon: See the class.

        Raises:
            CheckpointError: If they are missing, no finite numbers, or their lengths differ.
        """
        lower, upper = names
        own = stats.get(kind) if isinstance(stats, Mapping) else None
        if not isinstance(own, Mapping) or not {*names} <= set(own):
            raise CheckpointError(f'the data set\'s statistics hold no "{lower}" and "{upper}" of "{kind}"')
        low, high = (_numbers(own[name], f'{name} of "{kind}"') for name in names)
        mask = np.ones(low.shape, dtype=bool)
        if own.get("mask") is not None:
            mask = _numbers(own["mask"], f'mask of "{kind}"').astype(bool)
        shapes = (low.shape, high.shape, mask.shape)
        if low.ndim != 1 or len(set(shapes)) != 1:
            raise CheckpointError(f'{lower}, {upper} and mask of "{kind}" must be vectors of one length, not {shapes}')
        return cls(low, high, mask, epsilon)

    @property
    def dim(self) -> int:
        """Length of the vector."""
        return int(self.low.size)

    @property
    def _span(self) -> npt.NDArray[np.float64]:
        return self.high - self.low + self.epsilon

    def normalize(self, values: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Scale units of the data set to [-1, 1] within the range, (..., dim); to 0 where its span is none."""
        raw, span = np.asarray(values, dtype=np.float64), self._span
        scaled = np.where(span > 0, 2.0 * (raw - self.low) / np.where(span > 0, span, 1.0) - 1.0, 0.0)
        return np.where(self.mask, scaled, raw)

    def unnormalize(self, values: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Scale [-1, 1] to units of the data set, (..., dim)."""
        scaled = np.asarray(values, dtype=np.float64)
        return np.where(self.mask, 0.5 * (scaled + 1.0) * self._span + self.low, scaled)


def _numbers(values: Any, what: str) -> npt.NDArray[np.float64]:
    """Read numbers that are finite as float32, in which actions are given."""
    try:
        array = np.asarray(values)
        if array.dtype.kind in "biuf":
            with np.errstate(over="ignore"):
                finite = np.isfinite(array.astype(np.float32)).all()
            if finite:
                return array.astype(np.float64)
    except (TypeError, ValueError):
        pass
    raise CheckpointError(f"the statistics' {what} must be finite numbers, not {shortened(values)}")


def choose_stats(norm_stats: Mapping[str, Any], key: str | None) -> Mapping[str, Any]:
    """Pick the statistics of one data set; no ``key`` is needed if there is only one.

    The suffix ``_no_noops`` of LIBERO's keys may be left out.

    Raises:
        InputError: If the key is unknown, or is missing though there are several; the message lists the keys.
        CheckpointError: If there are none.
    """
    if not isinstance(norm_stats, Mapping) or not norm_stats:
        raise CheckpointError(
            "there are no statistics that give actions their units: copy dataset_statistics.json of the training run "
            "into the checkpoint's folder (config.json holds no norm_stats)"
        )
    if key is None and len(norm_stats) == 1:
        key = next(iter(norm_stats))
    for name in () if key is None else (key, f"{key}_no_noops"):
        if name in norm_stats:
            stats: Mapping[str, Any] = norm_stats[name]
            return stats
    what = "unnorm_key is missing" if key is None else f"unknown unnorm_key '{key}'"
    raise InputError(f"{what}: choose one of {sorted(norm_stats)}")


def chunks_of(actions: npt.NDArray[Any], horizon: int, dim: int) -> npt.NDArray[Any]:
    """Cut an episode's actions, (T, A), into the chunk that begins at every frame; behind the end the last goes on.

    Args:
        actions: Of the episode; or chunks already, (T, horizon, A), which are returned.
        horizon: Actions of a chunk.
        dim: Values A of an action.

    Returns:
        (T, horizon, A).

    Raises:
        InputError: If the shape is neither.
    """
    chunks = actions
    if actions.ndim == 2:
        steps = np.minimum(np.arange(len(actions))[:, None] + np.arange(horizon), len(actions) - 1)
        chunks = actions[steps]
    if chunks.ndim != 3 or chunks.shape[1:] != (horizon, dim):
        raise InputError(
            f"the dataset's actions have shape {actions.shape}; the model's are chunks of {horizon} × {dim} values"
        )
    return chunks


def check_units(normalized: npt.NDArray[np.float64], mask: BoolArray) -> None:
    """Refuse normalised actions, (..., A), that mostly lie outside the model's range, where ``mask`` scales them.

    Raises:
        InputError: If they do.
    """
    outside = float(np.mean(np.abs(normalized[..., mask]) > 1 + SLACK))
    if outside > OUT_OF_RANGE:
        raise InputError(
            f"{outside:.0%} of the action values lie outside the model's range: the dataset is in other units, or "
            "--unnorm-key names the statistics of another one"
        )
