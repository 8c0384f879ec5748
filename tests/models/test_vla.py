"""The parts of a VLA that the engine runs, and models at random."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.heads import decode

from lac_vla.errors import CheckpointError, InputError
from lac_vla.models import random_vla
from lac_vla.models.heads.base import AppendRows
from lac_vla.models.prismatic.build import build_prismatic
from lac_vla.models.prismatic.config import CameraConfig, PrismaticConfig
from lac_vla.models.prismatic.presets import MINI, MINI_VIT, OPENVLA_7B, TINY
from lac_vla.models.prismatic.towers import ViTConfig
from lac_vla.models.tokenizer import WordHash
from lac_vla.types import Frame

PUBLISHED_PARAMETERS = 7_541_237_184
"""Of openvla/openvla-7b, by the index of its safetensors files (15,082,474,368 bytes of bfloat16)."""

SMALL_VIT = ViTConfig(32, 3, 2, 64, registers=2, class_token=True, layer_scale=True)
TWO_CAMERAS = replace(
    TINY,
    vision_backbone_id="dinov2-vit-l",
    vit_towers=(SMALL_VIT, replace(SMALL_VIT, width=48, mean=(0.1, 0.2, 0.3))),
    cameras=(CameraConfig("agentview", 42), CameraConfig("wrist", 42)),
)


@torch.inference_mode()
@pytest.mark.parametrize("config", [TINY, MINI, MINI_VIT, TWO_CAMERAS], ids=["tiny", "mini", "mini-vit", "vit"])
def test_shapes_agree_with_the_layout(config: PrismaticConfig, frame: Frame) -> None:
    vla = random_vla(config)
    prompt, pixels = vla.processor.prompt(frame), vla.processor.images(frame)
    layout, (prefix, suffix) = prompt.layout, vla.processor.embed(prompt)
    features = vla.vision.encode_tokens(vla.vision.encode_stem(frame, pixels))
    assert features.shape == (layout.n_visual, config.features)
    assert vla.vision.project(features).shape == (layout.n_visual, config.width)
    assert prefix.shape == (layout.n_prefix, config.width)
    assert suffix.shape == (layout.n_suffix, config.width)
    assert list(pixels) == list(layout.grids)
    for camera in layout.cameras:
        assert pixels[camera.name].shape[0] % camera.rows == pixels[camera.name].shape[1] % camera.cols == 0
    assert layout.patch_mean({name: image[..., 0] for name, image in pixels.items()}).shape == (layout.n_visual,)


@torch.inference_mode()
def test_cameras_come_one_after_the_other(frame: Frame) -> None:
    vla = random_vla(TWO_CAMERAS)
    pixels = vla.processor.images(frame)
    features = vla.vision.encode_tokens(vla.vision.encode_stem(frame, pixels))
    pixels["wrist"] = np.invert(pixels["wrist"])
    changed = (vla.vision.encode_tokens(vla.vision.encode_stem(frame, pixels)) - features).abs().amax(dim=1) > 1e-6
    assert changed.tolist() == [False] * 9 + [True] * 9


def test_causal_visibility(frame: Frame) -> None:
    vla = random_vla("tiny")
    visible = vla.decoder.visible(vla.processor.prompt(frame).layout, torch.tensor([1, 3]), torch.arange(4))
    assert visible.tolist() == [[True, True, False, False], [True, True, True, True]]


@torch.inference_mode()
def test_decoding_is_greedy_and_appends_all_but_the_last_token(frame: Frame) -> None:
    vla = random_vla("tiny")
    output = vla.module.language_model.lm_head.weight
    hidden = output[[400, 500, 7]]
    appended: list[torch.Tensor] = []

    def extend(rows: AppendRows) -> torch.Tensor:
        assert rows.at == len(appended)
        appended.append(rows.embeddings)
        row: torch.Tensor = hidden[len(appended) % 3][None] * 100
        return row

    action, metadata = decode(vla, frame, hidden[1:2] * 100, extend)
    assert len(metadata["tokens"]) == vla.head.max_new_tokens == len(appended) + 1 == 7
    assert metadata["tokens"][0] == int((output @ hidden[1]).argmax())
    np.testing.assert_allclose(action, metadata["normalized"], rtol=1e-6)
    embedding = vla.module.language_model.model.embed_tokens.weight
    assert all(torch.equal(row[0], embedding[i]) for row, i in zip(appended, metadata["tokens"], strict=False))


def test_cameras_can_be_renamed(frame: Frame) -> None:
    plain = random_vla("tiny")
    vla = build_prismatic(plain.module, WordHash(200), cameras=["front", "hand"])
    renamed = Frame({"front": frame.images["agentview"], "hand": frame.images["wrist"]}, "go")
    assert list(vla.processor.prompt(renamed).layout.grids) == list(vla.grids) == ["front", "hand"]
    with torch.inference_mode():
        assert torch.equal(vla.encode_image(renamed), plain.encode_image(frame))
    for cameras in (["front"], ["front", "front"]):
        with pytest.raises(InputError, match="2 camera"):
            build_prismatic(plain.module, WordHash(200), cameras=cameras)


def test_missing_camera_is_named_and_further_ones_are_ignored(frame: Frame) -> None:
    processor = random_vla("tiny").processor
    assert list(processor.images(Frame({**frame.images, "back": frame.images["wrist"]}, "go"))) == [
        "agentview",
        "wrist",
    ]
    with pytest.raises(InputError, match=r"\['wrist'\] are missing"):
        processor.images(Frame({"agentview": frame.images["agentview"]}, "go"))


def test_proprio_is_normalised_and_clipped() -> None:
    stats = {"q01": [-2.0] * 7 + [1.0], "q99": [2.0] * 7 + [1.0]}
    config = replace(MINI, norm_stats={"x": {**MINI.norm_stats["none"], "proprio": stats}})
    normal = random_vla(config).processor.normalize_state(np.array([0, 1, 2, 3, 9, -2, -9, 5], dtype=np.float32))
    np.testing.assert_allclose(normal, [0, 0.5, 1, 1.5, 1.5, -1, -1.5, 0])
    assert normal.dtype == np.float32


@torch.inference_mode()
def test_proprio_is_the_first_token_of_the_suffix(frame: Frame) -> None:
    processor = random_vla("mini").processor
    _, suffix = processor.embed(processor.prompt(frame))
    assert frame.proprio is not None
    _, other = processor.embed(processor.prompt(replace(frame, proprio=frame.proprio + 0.1)))
    assert (suffix - other).abs().amax(dim=1).gt(0).tolist() == [True] + [False] * (len(suffix) - 1)


@pytest.mark.parametrize("proprio", [None, np.zeros(7, np.float32)])
def test_wrong_proprio(frame: Frame, proprio: np.ndarray[tuple[int], np.dtype[np.float32]] | None) -> None:
    with pytest.raises(InputError, match=r"8 values in Frame.proprio, got (none|7)"):
        random_vla("mini").processor.prompt(replace(frame, proprio=proprio))
    with pytest.raises(InputError, match="takes no proprioception"):
        random_vla("tiny").processor.normalize_state(proprio)


def test_statistics_of_another_robot() -> None:
    stats = {**MINI.norm_stats["none"], "proprio": {"q01": [0.0] * 6, "q99": [1.0] * 6}}
    with pytest.raises(CheckpointError, match="6 proprio values, a model of 8"):
        random_vla(replace(MINI, norm_stats={"x": stats}))


def test_random_models_are_seeded() -> None:
    first, same, other = (random_vla("tiny", seed=seed).module.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(weight, same[key]) for key, weight in first.items())
    assert not torch.equal(first["projector.fc1.weight"], other["projector.fc1.weight"])


@torch.inference_mode()
def test_random_models_carry_the_image_to_the_logits(frame: Frame) -> None:
    vla = random_vla("tiny")
    dark = Frame({name: np.right_shift(image, 1) for name, image in frame.images.items()}, frame.instruction)

    def logits(seen: Frame) -> torch.Tensor:
        prefix, suffix = vla.processor.embed(vla.processor.prompt(seen))
        embeddings = torch.cat([prefix, vla.encode_image(seen), suffix])
        last: torch.Tensor = vla.module.language_model(inputs_embeds=embeddings[None]).logits[0, -1]
        return last

    assert (logits(frame) - logits(dark)).abs().max() > 1e-3


def test_unknown_preset() -> None:
    with pytest.raises(InputError, match="openvla-7b"):
        random_vla("huge")


def test_openvla_7b_has_the_published_number_of_parameters() -> None:
    vla = random_vla("openvla-7b", dtype=torch.bfloat16, device="meta")
    used = sum(weight.numel() for weight in vla.module.parameters())
    dino, siglip = OPENVLA_7B.vit_towers

    def block(vit: ViTConfig) -> int:
        w, m = vit.width, vit.mlp_width
        return (4 * w * w + 4 * w) + (2 * w * m + m + w) + 4 * w + (2 * w if vit.layer_scale else 0)

    pool = block(siglip) - 4 * siglip.width + 3 * siglip.width  # a norm and a query instead of two norms
    norms = 2 * (dino.width + siglip.width)
    assert used + block(dino) + block(siglip) + pool + norms == PUBLISHED_PARAMETERS
    assert (vla.dtype, vla.device.type) == (torch.bfloat16, "meta")
    assert (vla.n_layers, vla.decoder.kv_heads, vla.decoder.head_dim) == (32, 32, 128)
