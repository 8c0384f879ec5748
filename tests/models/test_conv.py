"""The convolutional towers."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lac_vla.errors import CheckpointError
from lac_vla.models.prismatic.conv import ConvTower
from lac_vla.models.prismatic.model import PrismaticVLA
from lac_vla.models.prismatic.presets import MINI, TINY
from lac_vla.models.prismatic.towers import ConvTowerConfig


def tower(*widths: int, groups: int = 4) -> ConvTower:
    """A tower with torch's own random initialisation."""
    torch.manual_seed(0)
    return ConvTower(ConvTowerConfig(widths, groups)).eval()


@torch.no_grad()
@pytest.mark.parametrize("widths", [(8, 8, 12), (8, 8, 16, 24), (4, 8, 8, 16, 24)])
@pytest.mark.parametrize("keep", [(0, 0, 2), (1, 0, 2), (0, 1, 2), (1, 1, 2), (2, 1, 3), (0, 0, 1)])
def test_keep_is_the_subset_of_the_full_output(widths: tuple[int, ...], keep: tuple[int, int, int]) -> None:
    model = tower(*widths)
    stride = ConvTowerConfig(widths, 4).stride
    pixels = torch.rand(2, 3, 6 * stride, 5 * stride) * 2 - 1
    full = model(pixels)
    assert full.shape == (2, 30, widths[-1])
    row, column, step = keep
    subset = full.unflatten(1, (6, 5))[:, row::step, column::step].flatten(1, 2)
    torch.testing.assert_close(model(pixels, keep), subset, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_tokens_know_where_they_are() -> None:
    features = tower(8, 8, 16, 24)(torch.zeros(1, 3, 64, 64))[0]
    assert torch.cdist(features, features).fill_diagonal_(1).min() > 1e-4


@torch.no_grad()
def test_shifted_content_keeps_its_coordinates() -> None:
    model = tower(8, 8, 16, 24, groups=0)
    pixels = torch.rand(1, 3, 96, 96)
    shift = torch.tensor([[8, 16]])
    moved = model(pixels.roll((8, 16), (2, 3)), shift=shift).unflatten(1, (12, 12))
    still = model(pixels).unflatten(1, (12, 12))
    torch.testing.assert_close(moved[:, 3:-2, 4:-2], still[:, 2:-3, 2:-4], rtol=1e-4, atol=1e-5)


def test_backbone_keeps_per_camera_and_gradients_reach_every_tower() -> None:
    model = PrismaticVLA(TINY)
    pixels = {"agentview": torch.rand(2, 3, 48, 48), "wrist": torch.rand(2, 3, 32, 32)}
    full = model.vision_backbone(pixels)
    assert full.shape == (2, 36 + 16, 24)
    part = model.vision_backbone(pixels, keep={"agentview": (1, 0, 2)})
    rows = torch.arange(36).view(6, 6)[1::2, ::2].flatten().tolist() + list(range(36, 52))
    torch.testing.assert_close(part, full[:, rows])
    part.square().sum().backward()
    assert all(weight.grad is not None for weight in model.vision_backbone.parameters())


def test_tower_of_the_small_model_is_cheap() -> None:
    camera = MINI.cameras[0]
    with torch.device("meta"):
        model = ConvTower(camera.tower or ConvTowerConfig())
        with FlopCounterMode(display=False) as count:
            model(torch.zeros(1, 3, camera.image_size, camera.image_size))
    assert count.get_total_flops() / 2 < 110e6


@pytest.mark.parametrize(("widths", "groups"), [((8, 8), 4), ((8, 9, 8), 4)])
def test_impossible_towers(widths: tuple[int, ...], groups: int) -> None:
    with pytest.raises(CheckpointError, match="width"):
        ConvTowerConfig(widths, groups)
