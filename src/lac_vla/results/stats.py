"""The statistics of a success table: Wilson's interval, McNemar's test, a bootstrap, percentiles. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from lac_vla.errors import InputError

Z95 = 1.959963984540054
"""The 0.975 quantile of the normal distribution."""


RESAMPLES = 10_000
"""Of the bootstrap."""

SMALL_STRATUM = 5
"""Strata with fewer pairs are resampled together: resampling one pair within itself would hide all that varies."""


class Interval(NamedTuple):
    """A confidence interval of a proportion, within [0, 1], or of a difference of two, within [-1, 1]."""

    low: float
    high: float


class Percentiles(NamedTuple):
    """Median and 95th percentile of ``n`` measurements, in their unit."""

    p50: float
    p95: float
    n: int


def wilson(successes: int, trials: int, z: float = Z95) -> Interval:
    """Wilson's score interval of a proportion (Wilson 1927), without continuity correction.

    Args:
        successes: In 0..trials.
        trials: At least 1.
        z: Normal quantile; the default gives 95 %.

    Returns:
        The interval.

    Raises:
        InputError: If the counts make no sense.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise InputError(f"{successes} successes of {trials} trials: give 0 ≤ successes ≤ trials, trials ≥ 1")
    share = successes / trials
    scale = 1.0 / (1.0 + z * z / trials)
    centre = (share + z * z / (2 * trials)) * scale
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)) * scale
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == trials else min(1.0, centre + half)
    return Interval(low, high)


def mcnemar(only_first: int, only_second: int) -> float:
    """McNemar's exact two-sided test: do two methods succeed equally often on the same trials?

    Only discordant pairs count; if the methods are alike, each of them falls to either side like a fair coin.

    Args:
        only_first: Trials in which only the first method succeeded.
        only_second: Trials in which only the second did.

    Returns:
        The p-value, in (0, 1]; 1 without discordant pairs.

    Raises:
        InputError: If a count is negative.
    """
    if only_first < 0 or only_second < 0:
        raise InputError(f"discordant pairs {only_first} and {only_second}: counts cannot be negative")
    pairs = only_first + only_second
    tail = sum(math.comb(pairs, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / (1 << pairs))


def bootstrap(strata: Iterable[Sequence[tuple[bool, bool]]], seed: int = 0) -> Interval | None:
    """Percentile bootstrap (Efron 1979) of a paired difference of success rates: 95 %, stratified, seeded.

    Pairs are drawn with replacement within each stratum, e.g. a task, so that an interval holds for these tasks and
    not for others like them. A resample is one multinomial draw of the three differences that a pair can have; the
    order of the pairs changes nothing.

    Args:
        strata: Per stratum, and in it per trial: whether the reference and whether the method succeeded.
        seed: Of the resampling.

    Returns:
        The interval of method minus reference; ``None`` if no pair differs from another of its stratum: resampling
        knows nothing then of what varies, and would claim certainty.
    """
    groups: list[list[int]] = []
    pooled: list[int] = []
    for pairs in strata:
        differences = [int(method) - int(reference) for reference, method in pairs]
        if len(differences) < SMALL_STRATUM:
            pooled += differences
        else:
            groups.append(differences)
    groups += [pooled]
    if all(len(set(group)) < 2 for group in groups):
        return None
    counts = sorted((group.count(1), group.count(-1), group.count(0)) for group in groups if group)
    rng = np.random.default_rng(seed)
    total = np.zeros(RESAMPLES, dtype=np.int64)
    for count in counts:
        drawn = rng.multinomial(sum(count), np.array(count) / sum(count), size=RESAMPLES)
        total += drawn[:, 0] - drawn[:, 1]
    low, high = np.percentile(total / sum(map(sum, counts)), [2.5, 97.5])
    return Interval(float(low), float(high))


def percentiles(values: Iterable[float]) -> Percentiles | None:
    """Median and 95th percentile, linearly interpolated (numpy's default).

    Args:
        values: Measurements, any number of them.

    Returns:
        ``None`` if there are none.

    Raises:
        InputError: If one is not finite.
    """
    array = np.fromiter(values, dtype=np.float64)
    if array.size == 0:
        return None
    if not np.isfinite(array).all():
        raise InputError("a measurement is NaN or infinite: the episode that holds it must be run again")
    p50, p95 = np.percentile(array, [50, 95])
    return Percentiles(float(p50), float(p95), int(array.size))
