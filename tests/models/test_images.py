"""Image pipelines. Resize-naive and letterbox are also held to the goldens."""

from __future__ import annotations

import numpy as np
import pytest

from lac_vla.errors import InputError
from lac_vla.models.images import PIPELINES, make_pipeline
from lac_vla.types import UInt8Image


def gradient(height: int, width: int) -> UInt8Image:
    """Columns in red, rows in green."""
    image = np.zeros((height, width, 3), dtype=np.uint8)
    image[..., 0] = np.linspace(0, 255, width).round()
    image[..., 1] = np.linspace(0, 255, height).round()[:, None]
    return image


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("shape", [(1, 1), (90, 160), (160, 90), (256, 256), (64, 64)])
def test_result_is_a_square_of_the_size(name: str, shape: tuple[int, int]) -> None:
    image = gradient(*shape)
    before = image.copy()
    result = make_pipeline(name)(image, 64)
    assert result.shape == (64, 64, 3)
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(image, before)


def test_area_takes_the_mean_of_blocks() -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 32, 3)).astype(np.uint8)
    blocks = image.reshape(16, 4, 16, 2, 3).mean(axis=(1, 3))
    assert np.abs(make_pipeline("area")(image, 16) - blocks).max() <= 1


def test_resize_crop_keeps_the_middle() -> None:
    image = gradient(64, 128)
    np.testing.assert_array_equal(make_pipeline("resize-crop")(image, 64), image[:, 32:96])


def test_libero_crops_nine_tenths_of_the_area_about_the_centre() -> None:
    size, image = 224, gradient(224, 224)
    result = make_pipeline("libero")(image, size).astype(float)
    half = 0.9**0.5
    expected = 127.5 * (1 + np.linspace(-half, half, size))
    assert np.abs(result[size // 2, :, 0] - expected).max() < 4  # JPEG
    assert np.abs(result[:, size // 2, 1] - expected).max() < 4


def test_images_stay_as_they_are_where_nothing_is_to_do() -> None:
    image = gradient(64, 64)
    for name in ("resize-naive", "letterbox", "resize-crop", "area"):
        result = make_pipeline(name)(image, 64)
        np.testing.assert_array_equal(result, image)
        assert not np.shares_memory(result, image)  # cameras reuse their buffers


def test_unknown_pipeline() -> None:
    with pytest.raises(InputError, match="resize-naive"):
        make_pipeline("stretch")
