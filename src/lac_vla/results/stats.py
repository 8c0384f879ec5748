"""The statistics of the tables: Wilson's interval, McNemar's test, bootstraps, percentiles. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from lac_vla.errors import InputError

T = TypeVar("T")

Z95 = 1.959963984540054
"""The 0.975 quantile of the normal distribution."""

RESAMPLES = 10_000
"""Resamples of a bootstrap."""

EXACT = 12
"""Up to so many pairs a sign-flip test goes through all signs."""

SMALL_STRATUM = 5
"""Strata with fewer pairs are resampled together: resampling one pair within itself would hide all that varies."""


class Interval(NamedTuple):
    """A confidence interval of a proportion, of a difference of two, or of a ratio."""

    low: float
    high: float


class Percentiles(NamedTuple):
    """Median and 95th percentile of ``n`` measurements, in their unit."""

    p50: float
    p95: float
    n: int


def wilson(successes: int, trials: int, z: float = Z95) -> Interval:
    """Compute Wilson's score interval of a proportion (Wilson 1927), without continuity correction.

    Args:
        successes: In 0..trials.
        trials: At least 1.
        z: Normal quantile; the default gives 95 %.

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
    """Make McNemar's exact two-sided test: do two methods succeed equally often on the same trials?

    Only discordant pairs count; if the methods are alike, each of them falls to either side like a fair coin.

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
    """Bootstrap a paired difference of success rates (percentile, Efron 1979): 95 %, stratified, seeded.

    Pairs are drawn with replacement within each stratum, e.g. a task, so that an interval holds for these tasks and
    not for others like them. A resample is one multinomial draw of the three differences that a pair can have; the
    order of the pairs changes nothing.

    Args:
        strata: Strata of trials: whether the reference and whether the method succeeded.
        seed: Seed of the resampling.

    Returns:
        The interval of method minus reference; ``None`` if no pair differs from another of its stratum: resampling
        knows nothing then of what varies, and would claim certainty.
    """
    groups = _pooled([[int(method) - int(reference) for reference, method in pairs] for pairs in strata])
    if all(len(set(group)) < 2 for group in groups):
        return None
    counts = sorted((group.count(1), group.count(-1), group.count(0)) for group in groups)
    rng = np.random.default_rng(seed)
    total = np.zeros(RESAMPLES, dtype=np.int64)
    for count in counts:
        drawn = rng.multinomial(sum(count), np.array(count) / sum(count), size=RESAMPLES)
        total += drawn[:, 0] - drawn[:, 1]
    return _interval(total / sum(map(sum, counts)))


def bootstrap_ratio(strata: Iterable[Sequence[tuple[float, float]]]) -> Interval | None:
    """Bootstrap a ratio of totals, as :func:`bootstrap` does a difference: the reference's over the method's.

    The pairs are positive amounts of the reference and of the method.
    """
    groups = sorted(sorted(group) for group in _pooled(strata))
    if all(len(set(group)) < 2 for group in groups):
        return None
    rng = np.random.default_rng(0)
    totals = np.zeros((RESAMPLES, 2))
    for group in groups:
        totals += rng.multinomial(len(group), np.full(len(group), 1 / len(group)), size=RESAMPLES) @ np.array(group)
    return _interval(totals[:, 0] / totals[:, 1])


def sign_flips(differences: npt.NDArray[np.float64]) -> float:
    """Make a two-sided sign-flip test (Fisher 1935) of paired differences: if nothing differs, their signs are chance.

    Up to :data:`EXACT` pairs all signs are gone through, beyond that :data:`RESAMPLES` are drawn, seeded.

    Args:
        differences: Of independent pairs, (n,), n ≥ 1.

    Returns:
        The p-value, in (0, 1].
    """
    count = len(differences)
    if count <= EXACT:
        signs = 1 - 2 * (np.arange(1 << count)[:, None] >> np.arange(count) & 1)
    else:
        drawn = np.random.default_rng(0).choice([-1, 1], size=(RESAMPLES, count))
        signs = np.concatenate([np.ones((1, count), dtype=drawn.dtype), drawn])
    sums = np.abs(signs @ differences)
    return float((sums >= sums[0] * (1 - 1e-9)).mean())


def percentiles(values: Iterable[float]) -> Percentiles | None:
    """Compute the median and the 95th percentile, linearly interpolated (numpy's default); ``None`` without values.

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


def _pooled(strata: Iterable[Sequence[T]]) -> list[list[T]]:
    """Put small strata together, see :data:`SMALL_STRATUM`; none of the groups is empty."""
    groups: list[list[T]] = []
    pooled: list[T] = []
    for pairs in strata:
        if len(pairs) < SMALL_STRATUM:
            pooled += pairs
        else:
            groups.append(list(pairs))
    return [group for group in (*groups, pooled) if group]


def _interval(resamples: npt.NDArray[np.float64]) -> Interval:
    low, high = np.percentile(resamples, [2.5, 97.5])
    return Interval(float(low), float(high))
