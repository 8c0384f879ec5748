"""Image pipelines. Resize-naive and letterbox are also held to the goldens."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
from tests.models.oft_folder import golden

from lac_vla import Frame, random_vla
from lac_vla.errors import InputError, MissingExtraError
from lac_vla.models.images import PIPELINES, Pipeline, _centre_crop, _jpeg, _lanczos, make_pipeline, require_pipeline
from lac_vla.models.prismatic.presets import OPENVLA_7B
from lac_vla.models.prismatic.towers import TIMM_TOWERS
from lac_vla.types import UInt8Image

JPEG = ("libero", "aloha")
"""Pipelines that need the package simplejpeg."""


def pipeline(name: str) -> Pipeline:
    if name in JPEG:
        pytest.importorskip("simplejpeg")
    return make_pipeline(name)


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
    result = pipeline(name)(image, 64)
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
    """An image of the size already has been through JPEG and resizing: it is cropped alone."""
    size, image = 224, gradient(224, 224)
    result = make_pipeline("libero")(image, size).astype(float)
    half = 0.9**0.5
    expected = 127.5 * (1 + np.linspace(-half, half, size))
    assert np.abs(result[size // 2, :, 0] - expected).max() < 1.5
    assert np.abs(result[:, size // 2, 1] - expected).max() < 1.5
    np.testing.assert_array_equal(make_pipeline("aloha")(image, size), result)


@pytest.mark.parametrize("camera", ["agent", "wrist", "wide"])
def test_libero_is_the_official_pipeline(camera: str) -> None:
    """Single levels in about one of 10,000 values."""
    arrays = golden("libero")[0]
    raw = arrays[f"image.{camera}.raw"]
    cropped = pipeline("libero")(raw, 224).astype(int)
    expected = arrays["image.wide.cropped_3"] if camera == "wide" else arrays[f"image.{camera}.cropped"]
    difference = np.abs((cropped[::3, ::3] if camera == "wide" else cropped) - expected)
    assert difference.max() <= 1
    assert np.count_nonzero(difference) <= max(2, difference.size / 10_000)
    if camera != "wide":
        resized = _lanczos(_jpeg(raw), 224).astype(int)[::3, ::3]
        assert np.count_nonzero(resized - arrays[f"image.{camera}.resized_3"]) <= 2


def test_of_an_image_of_the_size_already_the_official_policy_takes_the_middle_alone() -> None:
    arrays = golden("libero")[0]
    resized = arrays["image.agent.resized_3"]
    np.testing.assert_array_equal(make_pipeline("libero")(resized, 75), _centre_crop(resized, 0.9))


def test_aloha_is_first_made_a_square_of_256() -> None:
    image = gradient(480, 640)
    expected = pipeline("libero")(make_pipeline("resize-naive")(image, 256), 224)
    np.testing.assert_array_equal(make_pipeline("aloha")(image, 224), expected)
    assert not np.array_equal(expected, make_pipeline("libero")(image, 224))


def test_the_border_has_the_mean_of_the_last_tower() -> None:
    dino, siglip = TIMM_TOWERS["vit_large_patch14_reg4_dinov2.lvd142m"], TIMM_TOWERS["vit_so400m_patch14_siglip_224"]
    for towers, expected in (((dino,), (123, 116, 103)), ((dino, siglip), (127, 127, 127))):
        vla = random_vla(replace(OPENVLA_7B, vit_towers=towers, image_resize_strategy="letterbox"), device="meta")
        image = vla.processor.images(Frame({"agentview": gradient(100, 224)}, "go"))["agentview"]
        assert tuple(image[0, 0]) == expected


@pytest.mark.parametrize("name", PIPELINES)
def test_a_package_that_is_missing_is_asked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    if name not in JPEG:
        require_pipeline(name)
        return
    with pytest.raises(MissingExtraError, match=r"pip install .lac-vla\[jpeg\]"):
        require_pipeline(name)
    with pytest.raises(MissingExtraError, match="jpeg"):
        make_pipeline(name)(gradient(100, 100), 64)


def test_letterbox_pads_both_sides_alike() -> None:
    """As the official code: an odd difference is stretched, not made good on one side."""
    image = np.full((60, 101, 3), 200, dtype=np.uint8)
    result = make_pipeline("letterbox", (10, 20, 30))(image, 101)
    padded = np.full((100, 101, 3), (10, 20, 30), dtype=np.uint8)
    padded[20:80] = 200
    np.testing.assert_array_equal(result, make_pipeline("resize-naive")(padded, 101))
    np.testing.assert_array_equal(result[0, 0], (10, 20, 30))


def test_images_stay_as_they_are_where_nothing_is_to_do() -> None:
    image = gradient(64, 64)
    for name in ("resize-naive", "letterbox", "resize-crop", "area"):
        result = make_pipeline(name)(image, 64)
        np.testing.assert_array_equal(result, image)
        assert not np.shares_memory(result, image)  # cameras reuse their buffers


def test_unknown_pipeline() -> None:
    with pytest.raises(InputError, match="resize-naive"):
        make_pipeline("stretch")
