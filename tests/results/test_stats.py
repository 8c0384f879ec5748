from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from lac_vla.errors import InputError
from lac_vla.results.stats import Percentiles, bootstrap, bootstrap_ratio, mcnemar, percentiles, sign_flips, wilson


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [  # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_the_published_intervals(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson(successes, trials) == pytest.approx((low, high), abs=5e-5)


def test_wilson_by_hand() -> None:
    # z = 2, 1 of 4: centre (1/4 + 1/2) / 2 = 3/8, half width 2 sqrt(3/64 + 1/16) / 2 = sqrt(7) / 8
    assert wilson(1, 4, z=2) == pytest.approx(((3 - math.sqrt(7)) / 8, (3 + math.sqrt(7)) / 8))


def test_wilson_is_symmetric_and_reaches_its_ends() -> None:
    low, high = wilson(7, 10)
    assert wilson(3, 10) == pytest.approx((1 - high, 1 - low))
    assert wilson(0, 5).low == 0.0
    assert wilson(5, 5).high == 1.0


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (-1, 4), (5, 4)])
def test_wilson_refuses_nonsense(successes: int, trials: int) -> None:
    with pytest.raises(InputError, match="successes"):
        wilson(successes, trials)


@pytest.mark.parametrize(
    ("first", "second", "p"),
    [
        (0, 0, 1.0),
        (4, 4, 1.0),
        (0, 1, 1.0),
        (0, 5, 2 / 32),
        (1, 9, 2 * (1 + 10) / 1024),
        (2, 10, 2 * (1 + 12 + 66) / 4096),
    ],
)
def test_mcnemar_by_hand(first: int, second: int, p: float) -> None:
    assert mcnemar(first, second) == pytest.approx(p)
    assert mcnemar(second, first) == pytest.approx(p)


def test_mcnemar_with_many_pairs_stays_a_probability() -> None:
    assert 0 < mcnemar(1000, 1400) < 1e-10


def test_mcnemar_refuses_negative_counts() -> None:
    with pytest.raises(InputError, match="negative"):
        mcnemar(-1, 2)


def test_bootstrap_agrees_with_all_resamples() -> None:
    pairs = [(True, False), (True, False), (False, True), (True, True), (False, False)]
    differences = [method - reference for reference, method in pairs]
    exact = [sum(drawn) / 5 for drawn in product(differences, repeat=5)]
    low, high = np.percentile(exact, [2.5, 97.5])
    assert bootstrap([pairs]) == pytest.approx((low, high))


def test_bootstrap_of_many_trials_is_the_normal_interval() -> None:
    # 30 lost and 10 won of 100: mean -0.2, standard error sqrt(0.4 - 0.04) / 10 = 0.06
    interval = bootstrap([[(True, False)] * 30 + [(False, True)] * 10 + [(True, True)] * 60])
    assert interval == pytest.approx((-0.2 - 1.96 * 0.06, -0.2 + 1.96 * 0.06), abs=0.0101)


def test_bootstrap_draws_within_tasks() -> None:
    lost, kept = [(True, False)] * 20, [(True, True)] * 19 + [(False, True)]
    within, together = bootstrap([lost, kept]), bootstrap([lost + kept])
    assert within is not None
    assert together is not None
    assert (within.low, within.high) == pytest.approx((-0.5, -0.425))
    assert together.low < -0.6
    assert together.high > -0.35


def test_bootstrap_of_single_trials_pools_the_tasks() -> None:
    interval = bootstrap([[(True, task < 2)] for task in range(10)])
    assert interval is not None
    assert interval.low < -0.8 < interval.high


def test_bootstrap_does_not_depend_on_the_order_and_claims_no_certainty() -> None:
    first, second = [(True, False), (True, True)] * 5, [(False, True), (True, True), (True, True)] * 3
    assert bootstrap([first, second]) == bootstrap([second[::-1], first])
    assert bootstrap([first, second], seed=1) == pytest.approx(bootstrap([first, second]), abs=0.06)
    assert bootstrap([[(True, False)] * 9, [(True, True)] * 9, [(True, True)] * 3]) is None
    assert bootstrap([]) is None


def test_bootstrap_ratio_agrees_with_all_resamples() -> None:
    pairs = [(9.0, 3.0), (4.0, 4.0), (5.0, 2.0), (6.0, 9.0), (8.0, 4.0)]
    exact = [sum(d for d, _ in drawn) / sum(m for _, m in drawn) for drawn in product(pairs, repeat=5)]
    assert bootstrap_ratio([pairs]) == pytest.approx(np.percentile(exact, [2.5, 97.5]), rel=0.02)
    assert bootstrap_ratio([pairs[::-1]]) == bootstrap_ratio([pairs])


def test_bootstrap_ratio_draws_within_tasks_and_claims_no_certainty() -> None:
    fast, slow = [(100.0, 10.0)] * 5 + [(100.0, 20.0)], [(1.0, 2.0)] * 6
    within, together = bootstrap_ratio([fast, slow]), bootstrap_ratio([fast + slow])
    assert within is not None
    assert together is not None
    assert within.high - within.low < together.high - together.low
    assert bootstrap_ratio([[(1.0, 2.0)] * 9, [(3.0, 2.0)] * 9]) is None
    assert bootstrap_ratio([[(1.0, 2.0)]]) is None
    assert bootstrap_ratio([]) is None


def test_percentiles_by_hand() -> None:
    assert percentiles(range(1, 102)) == Percentiles(51.0, 96.0, 101)
    assert percentiles([3.0]) == Percentiles(3.0, 3.0, 1)
    assert percentiles([1.0, 2.0]) == pytest.approx((1.5, 1.95, 2))
    assert percentiles([]) is None


def test_percentiles_refuse_what_is_not_finite() -> None:
    with pytest.raises(InputError, match="NaN"):
        percentiles([1.0, float("nan")])


def test_signs_are_flipped_in_every_way() -> None:
    differences = np.array([0.3, -0.1, 0.4, 0.2, 0.05])
    sums = [abs(float(np.dot(signs, differences))) for signs in product((1, -1), repeat=5)]
    assert sign_flips(differences) == pytest.approx(np.mean([value >= sums[0] - 1e-12 for value in sums]))
    assert sign_flips(np.ones(5)) == pytest.approx(2 / 2**5)
    assert sign_flips(np.zeros(4)) == 1.0
    many = np.random.default_rng(0).normal(size=13)
    assert sign_flips(many) == pytest.approx(
        np.mean([abs(np.dot(signs, many)) >= abs(many.sum()) - 1e-12 for signs in product((1, -1), repeat=13)]),
        abs=0.02,
    )
    assert sign_flips(10 + many) < 0.001
