"""Action tokens and units."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lac_vla.errors import CheckpointError, InputError
from lac_vla.models.heads.tokens import ActionTokenizer
from lac_vla.models.heads.units import Range, choose_stats

TOKENIZER = ActionTokenizer(32000)
STATS = {"q01": [-1.0, 0.0, 2.0], "q99": [3.0, 0.5, 2.0], "mask": [True, True, True]}


def test_decoding_is_the_official_rule(decoding: dict[str, np.ndarray[Any, Any]]) -> None:
    np.testing.assert_array_equal(TOKENIZER.decode(decoding["token"]), decoding["normalized"])


def test_encoding_and_decoding_stay_within_half_a_bin() -> None:
    values = np.linspace(-1, 1, 999).reshape(3, -1)
    assert np.abs(TOKENIZER.decode(TOKENIZER.encode(values)) - values).max() <= 1 / 255 + 1e-12
    np.testing.assert_array_equal(TOKENIZER.encode(TOKENIZER.centers), 31999 - np.arange(255))


def test_values_beyond_the_range_are_clipped() -> None:
    np.testing.assert_array_equal(TOKENIZER.encode([-7.0, 7.0]), [31999, 31744])


def test_range_maps_quantiles_to_the_unit_range_and_back() -> None:
    scale = Range.of({"action": STATS}, "action")
    np.testing.assert_allclose(scale.normalize([-1.0, 0.5, 2.7]), [-1.0, 1.0, 0.0])
    np.testing.assert_allclose(scale.unnormalize([-1.0, 1.0, 0.3]), [-1.0, 0.5, 2.0])


def test_masked_dimensions_pass_through() -> None:
    scale = Range.of({"action": STATS | {"mask": [True, False, True]}}, "action")
    np.testing.assert_allclose(scale.unnormalize([0.0, 0.9, 0.0]), [1.0, 0.9, 2.0])
    np.testing.assert_allclose(scale.normalize([1.0, 0.9, 2.0]), [0.0, 0.9, 0.0])


@pytest.mark.parametrize("stats", [{}, {"action": {"q01": [0.0]}}, {"action": STATS | {"q99": [1.0]}}])
def test_incomplete_statistics(stats: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="action"):
        Range.of(stats, "action")


def test_statistics_are_chosen_by_key() -> None:
    stats = {"bridge": {"a": 1}, "libero_spatial_no_noops": {"a": 2}}
    assert choose_stats(stats, "bridge") == {"a": 1}
    assert choose_stats(stats, "libero_spatial") == {"a": 2}
    assert choose_stats({"only": {"a": 3}}, None) == {"a": 3}
    with pytest.raises(InputError, match=r"unknown unnorm_key 'x'.*'bridge', 'libero_spatial_no_noops'"):
        choose_stats(stats, "x")
    with pytest.raises(InputError, match=r"unnorm_key is missing.*'bridge'"):
        choose_stats(stats, None)
