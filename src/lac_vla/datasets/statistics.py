"""Statistics as LeRobot's ``stats.json`` holds them: min, max, mean, std, count and five quantiles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from lac_vla.types import UInt8Image

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
SAMPLED_FRAMES = 32
"""Frames of an episode that image statistics look at, evenly spread."""

FeatureStats: TypeAlias = dict[str, npt.NDArray[Any]]


def vector_stats(values: npt.NDArray[Any]) -> FeatureStats:
    """Compute exact statistics over frames.

    Args:
        values: Shape (T,) or (T, n), any numeric or bool dtype.

    Returns:
        ``min``, ``max``, ``mean``, ``std`` (population) and quantiles, float64 (n,); ``count``, int64 (1,).
    """
    rows = values.reshape(len(values), -1).astype(np.float64)
    return {
        "min": rows.min(axis=0),
        "max": rows.max(axis=0),
        "mean": rows.mean(axis=0),
        "std": rows.std(axis=0),
        "count": np.array([len(rows)], dtype=np.int64),
        **dict(zip(QUANTILES, np.quantile(rows, list(QUANTILES.values()), axis=0), strict=True)),
    }


class ImageHistogram:
    """Counts the 256 values of each colour channel, for exact statistics of any number of images."""

    def __init__(self) -> None:
        self.counts = np.zeros((3, 256), dtype=np.int64)
        self.frames = 0

    def add(self, images: UInt8Image) -> ImageHistogram:
        """Count an episode's images, uint8 (T, H, W, 3), or ``SAMPLED_FRAMES`` of them, evenly spread."""
        picked = np.linspace(0, len(images) - 1, min(len(images), SAMPLED_FRAMES)).round().astype(int)
        for index in picked:
            for channel in range(3):
                self.counts[channel] += np.bincount(images[index, :, :, channel].reshape(-1), minlength=256)
        self.frames += len(picked)
        return self

    def stats(self) -> FeatureStats:
        """Compute statistics of the values scaled to [0, 1], float64 (3, 1, 1); ``count``, the frames, int64 (1,)."""
        levels = np.arange(256) / 255.0
        total = self.counts.sum(axis=1, keepdims=True)
        mean = (self.counts * levels).sum(axis=1, keepdims=True) / total
        variance = (self.counts * (levels - mean) ** 2).sum(axis=1, keepdims=True) / total
        seen = self.counts > 0
        cumulative = self.counts.cumsum(axis=1) / total
        stats: FeatureStats = {
            "min": levels[seen.argmax(axis=1)],
            "max": levels[255 - seen[:, ::-1].argmax(axis=1)],
            "mean": mean[:, 0],
            "std": np.sqrt(variance[:, 0]),
        }
        stats |= {name: levels[(cumulative >= share).argmax(axis=1)] for name, share in QUANTILES.items()}
        count = np.array([self.frames], dtype=np.int64)
        return {name: value.reshape(3, 1, 1) for name, value in stats.items()} | {"count": count}


def merge(one: FeatureStats, other: FeatureStats) -> FeatureStats:
    """Merge the statistics of two sets of frames; what only one of them has is left out.

    All are exact but the quantiles, which are means weighted by the frames, as LeRobot's own are.
    """
    frames = one["count"] + other["count"]
    weights = one["count"] / frames, other["count"] / frames

    def mean(name: str) -> npt.NDArray[Any]:
        return np.asarray(weights[0] * one[name] + weights[1] * other[name])

    distance = weights[0] * weights[1] * (one["mean"] - other["mean"]) ** 2
    together: FeatureStats = {
        "min": np.minimum(one["min"], other["min"]),
        "max": np.maximum(one["max"], other["max"]),
        "mean": mean("mean"),
        "std": np.sqrt(weights[0] * one["std"] ** 2 + weights[1] * other["std"] ** 2 + distance),
        "count": frames,
    }
    return together | {name: mean(name) for name in QUANTILES if name in one and name in other}


def to_lists(stats: Mapping[str, FeatureStats]) -> dict[str, dict[str, Any]]:
    """Convert statistics to nested lists, for JSON."""
    return {key: {name: value.tolist() for name, value in entry.items()} for key, entry in stats.items()}


def from_lists(stats: Mapping[str, Mapping[str, Any]]) -> dict[str, FeatureStats]:
    """Convert nested lists back, see :func:`to_lists`.

    Raises:
        ValueError: If there is something else than finite numbers.
    """
    found = {key: {name: np.asarray(value) for name, value in entry.items()} for key, entry in stats.items()}
    if wrong := [
        key for key, entry in found.items() if any(value.dtype.kind not in "biuf" for value in entry.values())
    ]:
        raise ValueError(f"the statistics of {wrong[0]!r:.80} are no numbers")
    if wrong := [key for key, entry in found.items() if not all(np.isfinite(value).all() for value in entry.values())]:
        raise ValueError(f"the statistics of {wrong[0]!r:.80} hold NaN or infinity")
    return found
