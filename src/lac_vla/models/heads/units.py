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


@dataclass(frozen=True, eq=False)
class Range:
    """A vector's 1 % and 99 % quantiles in a data set, which [-1, 1] stands for.

    Attributes:
        q01: 1 % quantiles, (dim,).
        q99: 99 % quantiles, (dim,).
        mask: Dimensions that are scaled at all, (dim,); the others pass through.
    """

    q01: npt.NDArray[np.float64]
    q99: npt.NDArray[np.float64]
    mask: BoolArray

    @classmethod
    def of(cls, stats: Mapping[str, Any], kind: str) -> Range:
        """Read one data set's ``kind`` (``"action"``, ``"proprio"``) statistics.

        Raises:
            CheckpointError: If they are missing, no finite numbers, or their lengths differ.
        """
        own = stats.get(kind) if isinstance(stats, Mapping) else None
        if not isinstance(own, Mapping) or not {"q01", "q99"} <= set(own):
            raise CheckpointError(f'the data set\'s statistics hold no "q01" and "q99" of "{kind}"')
        q01, q99 = _numbers(own["q01"], f'q01 of "{kind}"'), _numbers(own["q99"], f'q99 of "{kind}"')
        mask = np.ones(q01.shape, dtype=bool)
        if own.get("mask") is not None:
            mask = _numbers(own["mask"], f'mask of "{kind}"').astype(bool)
        shapes = (q01.shape, q99.shape, mask.shape)
        if q01.ndim != 1 or len(set(shapes)) != 1:
            raise CheckpointError(f'q01, q99 and mask of "{kind}" must be vectors of one length, not {shapes}')
        return cls(q01, q99, mask)

    @property
    def dim(self) -> int:
        """Length of the vector."""
        return int(self.q01.size)

    def normalize(self, values: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Scale units of the data set to [-1, 1] between the quantiles, (..., dim); to 0 where these are equal."""
        raw = np.asarray(values, dtype=np.float64)
        span = self.q99 - self.q01
        scaled = np.where(span > 0, 2.0 * (raw - self.q01) / np.where(span > 0, span, 1.0) - 1.0, 0.0)
        return np.where(self.mask, scaled, raw)

    def unnormalize(self, values: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Scale [-1, 1] to units of the data set, (..., dim)."""
        scaled = np.asarray(values, dtype=np.float64)
        return np.where(self.mask, 0.5 * (scaled + 1.0) * (self.q99 - self.q01) + self.q01, scaled)


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


def check_units(normalized: npt.NDArray[np.float64], mask: BoolArray) -> None:
    """Refuse normalised actions, (..., A), that mostly lie outside the model's quantiles, where ``mask`` scales them.

    Raises:
        InputError: If they do.
    """
    outside = float(np.mean(np.abs(normalized[..., mask]) > 1 + SLACK))
    if outside > OUT_OF_RANGE:
        raise InputError(
            f"{outside:.0%} of the action values lie outside the model's range: the dataset is in other units, or "
            "--unnorm-key names the statistics of another one"
        )
