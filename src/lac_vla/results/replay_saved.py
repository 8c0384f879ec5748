"""Compares a policy's divergence with its baselines' over the same frames, at equal cost if there are two."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lac_vla.results.replay_log import EpisodeReplay
from lac_vla.results.stats import Interval

RESAMPLES = 2000
FEWEST = 8
"""With fewer episodes a bootstrap over them covers far less than it claims."""

MEASURED = ("active", "divergence")
"""Of every call."""

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Saved:
    """A policy against the baselines.

    Attributes:
        divergence: Of the baseline; of several, interpolated at the policy's mean share of active tokens.
        share: By how much, as a share, the policy's mean divergence is below that.
        interval: 95 %, bootstrap over episodes; ``None`` for fewer than :data:`FEWEST`.
        active: The policy's mean share of active tokens less the baseline's; 0 against several.
    """

    divergence: float
    share: float
    interval: Interval | None
    active: float


def saved(episodes: Sequence[EpisodeReplay], name: str, baselines: Sequence[str]) -> Saved | None:
    """Compare a policy with the baselines, over the same frames; episodes are drawn whole."""
    if not baselines:
        return None
    sums = {
        method: np.array([[sum(getattr(e.methods[method], key)) for key in MEASURED] for e in episodes])
        for method in (name, *baselines)
    }  # (E, 2) of each
    counts = np.array([len(episode.frames) for episode in episodes], dtype=np.float64)
    whole = np.ones((1, len(episodes)))
    (active, own), *others = (_means(sums[method], counts, whole)[0] for method in (name, *baselines))
    if len(baselines) > 1 and not min(other[0] for other in others) <= active <= max(other[0] for other in others):
        return None
    fixed = _at(active, others)
    if fixed <= 0:
        return None
    drawn = np.random.default_rng(0).multinomial(len(episodes), whole[0] / len(episodes), size=RESAMPLES)
    means = [_means(sums[method], counts, drawn) for method in (name, *baselines)]
    resampled = [_at(mean[0], [part[at] for part in means[1:]]) for at, mean in enumerate(means[0])]
    shares = 1 - means[0][:, 1] / np.where(np.array(resampled) > 0, resampled, np.nan)
    return Saved(
        divergence=fixed,
        share=float(1 - own / fixed),
        interval=interval(shares, len(episodes)),
        active=0.0 if len(baselines) > 1 else float(active - others[0][0]),
    )


def _means(sums: Array, counts: Array, drawn: npt.NDArray[Any]) -> Array:
    """Compute the means over the frames of drawn episodes: (E, 2), (E,), and how often each, (R, E) → (R, 2)."""
    return np.asarray((drawn @ sums) / (drawn @ counts)[:, None])


def _at(active: float, baselines: Sequence[Array]) -> float:
    """Interpolate the baselines' divergence at a share of active tokens; one is taken as it is.

    Beyond their ends, where a resample may lie, the last segment goes on, below a convex curve: that claims nothing
    which is not there. Of baselines at one share the better counts.
    """
    lowest: dict[float, float] = {}
    for share, divergence in sorted(map(tuple, baselines), reverse=True):
        lowest[float(share)] = float(divergence)
    shares = sorted(lowest)
    if len(shares) == 1:
        return lowest[shares[0]]
    at = min(max(bisect(shares, active), 1), len(shares) - 1)
    left, right = shares[at - 1 : at + 1]
    return lowest[left] + (active - left) / (right - left) * (lowest[right] - lowest[left])


def interval(resamples: Array, episodes: int) -> Interval | None:
    """Take the middle 95 % of bootstrap resamples; ``None`` for fewer episodes than :data:`FEWEST`."""
    if episodes < FEWEST or not np.isfinite(resamples).all():
        return None
    low, high = np.percentile(resamples, [2.5, 97.5])
    return Interval(float(low), float(high))
