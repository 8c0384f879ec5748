"""Targets read off recordings, and the augmentation, on hand-made frames."""

from __future__ import annotations

import numpy as np
import pytest

from lac_vla.training.frames import FrameBank, quantiles, shift_images


def bank(opened: float = -1.0, closed: float = 1.0) -> FrameBank:
    """Two episodes of 6 and 3 frames; the hand moves along x; the first closes at frame 2 and opens at frame 4."""
    action = np.zeros((9, 7), np.float32)
    action[:, 0] = np.arange(9)
    action[:, 6] = opened
    action[2:4, 6] = closed
    state = np.zeros((9, 8), np.float32)
    state[:, 0] = np.arange(9) / 10
    return FrameBank(
        {"a": np.zeros((9, 4, 4, 3), np.uint8)},
        state,
        action,
        np.array([0, 6]),
        np.array([6, 9]),
        np.array([1, 0]),
        ("put", "take"),
    )


@pytest.mark.parametrize(("opened", "closed"), [(-1, 1), (1, 0)], ids=["libero", "widowx"])
def test_hindsight_targets_lie_ahead(opened: float, closed: float) -> None:
    targets, ahead = bank(opened, closed).hindsight()
    assert targets[:6, 0, 0].tolist() == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert targets[:3, 1, 0].tolist() == pytest.approx([0.2] * 3)
    assert targets[:5, 2, 0].tolist() == pytest.approx([0.4] * 5)
    assert ahead[:6].tolist() == [[1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 0, 1], [1, 0, 1], [1, 0, 0]]
    assert ahead[6:].tolist() == [[1, 0, 0]] * 3  # an episode that never closes


def test_chunks_repeat_the_last_action_and_do_not_cross_episodes() -> None:
    chunks = bank().chunks(3)[..., 0]
    assert chunks[3].tolist() == [3, 4, 5]
    assert chunks[4].tolist() == [4, 5, 5]
    assert chunks[8].tolist() == [8, 8, 8]


def test_split_keeps_episodes_whole() -> None:
    train, held = bank().split(0.5, seed=0)
    assert sorted([*train, *held]) == list(range(9))
    assert {len(train), len(held)} == {6, 3}


def test_shift_moves_the_content_and_repeats_the_border() -> None:
    image = np.arange(16, dtype=np.uint8).reshape(1, 4, 4, 1).repeat(3, axis=3)
    moved = shift_images(image, np.array([[1, -1]]))[0, ..., 0]
    assert moved.tolist() == [[1, 2, 3, 3], [1, 2, 3, 3], [5, 6, 7, 7], [9, 10, 11, 11]]


def test_quantiles_leave_the_gripper_raw() -> None:
    table = quantiles(np.linspace(0, 1, 101, dtype=np.float32)[:, None].repeat(7, axis=1), range(6))
    assert table["q01"][0] == pytest.approx(0.01)
    assert table["q99"][0] == pytest.approx(0.99)
    assert table["mask"] == [True] * 6 + [False]
