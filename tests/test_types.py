"""Validation on entry, and the arithmetic of layouts and decisions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lac_vla import Decision, Frame, InputError, TokenLayout
from lac_vla.types import SkippedTokens

RGB = np.zeros((8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": {}}, "at least one camera"),
        ({"images": {"a": RGB.astype(np.float32)}}, "dtype float32"),
        ({"images": {"a": RGB[..., 0]}}, r"shape \(8, 8\)"),
        ({"images": {"a": RGB[:0]}}, "shape"),
        ({"images": {"a": [[0]]}}, "list"),
        ({"instruction": "  "}, "instruction is empty"),
        ({"proprio": np.array([0, np.nan], np.float32)}, "NaN"),
        ({"proprio": np.zeros((2, 2), np.float32)}, "vector"),
        ({"timestamp": float("nan")}, "timestamp"),
    ],
)
def test_frame_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Frame(**{"images": {"a": RGB}, "instruction": "go", **arguments})


def test_layout_offsets() -> None:
    layout = TokenLayout.of({"a": (2, 3), "b": (2, 2)}, n_prefix=1, n_suffix=5)
    assert (layout.n_visual, layout.length) == (10, 16)
    assert (layout.visual, layout.suffix) == (slice(1, 11), slice(11, 16))
    assert layout.cameras[1].tokens == slice(6, 10)


def test_patch_mean_is_raster_order() -> None:
    layout = TokenLayout.of({"a": (2, 2)}, 1, 1)
    image = np.array([[0, 2, 8, 8], [2, 0, 8, 8], [4, 4, 1, 1], [4, 4, 1, 5]])
    assert layout.patch_mean({"a": image}).tolist() == [1, 8, 4, 2]


def test_decision_ratio_counts_token_layer_pairs() -> None:
    decision = Decision(np.array([0, 4, 2, 4]), n_layers=4)
    assert decision.ratio == pytest.approx(6 / 16)
    assert decision.active.tolist() == [False, True, False, True]
    assert decision.with_active(np.array([True, False, False, False])).exit_layer.tolist() == [4, 4, 2, 4]


@pytest.mark.parametrize("depth", [np.array([5]), np.array([-1]), np.array([1.0]), np.zeros((2, 2), np.int64)])
def test_decision_refuses_impossible_depths(depth: Any) -> None:
    with pytest.raises(InputError):
        Decision(depth, n_layers=4, skipped=SkippedTokens.REUSE)
