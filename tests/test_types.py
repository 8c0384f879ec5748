"""Validation on entry, and the arithmetic of layouts and decisions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

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
        ({"timestamp": float("inf")}, "timestamp"),
        ({"timestamp": 10**400}, "timestamp"),
        ({"timestamp": "2026-01-01"}, "timestamp"),
        ({"timestamp": np.datetime64("2026-01-01")}, "timestamp"),
        ({"images": [RGB]}, "a list; give a mapping"),
        ({"images": RGB}, "a ndarray; give a mapping"),
        ({"images": None}, "a NoneType; give a mapping"),
        ({"images": {3: RGB}}, "the camera 3; give names"),
        ({"instruction": None}, "a NoneType; give a text"),
        ({"instruction": b"go"}, "a bytes; give a text"),
        ({"instruction": "go \ud800"}, "lone surrogate"),
        ({"proprio": ["1,0", "2,0"]}, "real numbers"),
        ({"proprio": {"joint": 1.0}}, "real numbers"),
        ({"proprio": [None, 1.0]}, "real numbers"),
        ({"proprio": np.ones(8) * 1j}, "real numbers"),
        ({"proprio": [[0.0, 1.0], [2.0]]}, "vector of numbers"),
        ({"proprio": torch.ones(2, requires_grad=True)}, "vector of numbers"),
        ({"proprio": [1e300]}, "infinity"),
    ],
)
def test_frame_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Frame(**{"images": {"a": RGB}, "instruction": "go", **arguments})


def test_a_frame_owns_its_state_and_its_mapping() -> None:
    state, images = np.zeros(3, np.float32), {"a": RGB}
    frame = Frame(images, "go", state)
    state[:] = 1
    images["b"] = RGB
    assert frame.proprio is not None
    assert frame.proprio.tolist() == [0, 0, 0]
    assert list(frame.images) == ["a"]


@pytest.mark.parametrize("state", [[1, 2], (1.0, 2.0), np.array([1, 2], np.int8), torch.tensor([1.0, 2.0])])
@pytest.mark.parametrize("timestamp", [None, 3, 3.5, np.float32(3), np.int64(3)])
def test_a_frame_takes_numbers_of_any_kind(state: Any, timestamp: Any) -> None:
    proprio = Frame({"a": RGB}, "go", state, timestamp).proprio
    assert proprio is not None
    assert (proprio.dtype, proprio.tolist()) == (np.float32, [1, 2])


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
