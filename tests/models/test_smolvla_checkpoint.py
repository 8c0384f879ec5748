"""SmolVLA's checkpoints: what is read from where, what is written, and what is refused before anything is computed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models.conftest import Arrays
from tests.models.smolvla_checkpoint import TASK, golden, observation, session_of, write

from lac_vla import VLA, CachedVLA, CheckpointError, Dense, Frame, InputError, load_vla, random_vla, save_vla
from lac_vla.models.lerobot_layout import read_features
from lac_vla.models.smolvla.config import SMOLVLA_BASE
from lac_vla.models.smolvla.layout import config_json, read_config
from lac_vla.models.smolvla.model import SmolVLAModel
from lac_vla.models.tokenizer import train_tokenizer

STATISTICS = "policy_preprocessor_step_5_normalizer_processor.safetensors"
PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor.json", "policy_postprocessor.json"


@pytest.fixture(scope="module")
def arrays() -> Arrays:
    return golden()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "tiny")


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def chunk(vla: VLA, arrays: Arrays) -> np.ndarray[Any, Any]:
    return session_of(vla, arrays).act(observation(arrays))


# What is read.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_is_loaded(folder: Path, tmp_path: Path, arrays: Arrays, dtype: torch.dtype) -> None:
    saved = load_vla(folder)
    save_vla(saved, tmp_path / "saved", dtype=dtype)
    loaded = load_vla(tmp_path / "saved")
    assert replace(loaded.config, normalization=saved.config.normalization) == saved.config
    bound = 1e-5 if dtype is torch.float32 else 0.1
    assert np.abs(chunk(loaded, arrays) - arrays["chunk"]).max() <= bound * np.abs(arrays["chunk"]).max()
    assert not any("lm_head" in key for key in load_file(tmp_path / "saved" / "model.safetensors"))


def test_sizes_and_tokenizer_from_a_second_folder(folder: Path, tmp_path: Path, arrays: Arrays) -> None:
    """As LeRobot's folders are: neither is in them."""
    other = tmp_path / "vlm"
    other.mkdir()
    (folder / "vlm_config.json").rename(other / "config.json")
    (folder / "tokenizer.json").rename(other / "tokenizer.json")
    np.testing.assert_allclose(chunk(load_vla(folder, tokenizer=other), arrays), arrays["chunk"], rtol=1e-4, atol=1e-5)
    with pytest.raises(CheckpointError, match=r"smolvlm2-tiny.*vlm_config\.json.*tokenizer"):
        load_vla(folder)
    shutil.copy(other / "config.json", folder / "vlm_config.json")
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json.*SmolVLM2-500M.*`tokenizer`"):
        load_vla(folder)


def test_statistics_among_the_weights_of_old_checkpoints(folder: Path, arrays: Arrays) -> None:
    weights = load_file(folder / "model.safetensors")
    for prefix, file in (("normalize_inputs.buffer_", STATISTICS), ("unnormalize_outputs.buffer_", STATISTICS)):
        for key, value in load_file(folder / file).items():
            name, kind = key.rsplit(".", 1)
            weights[f"{prefix}{name.replace('.', '_')}.{kind}"] = value
    save_file(weights, folder / "model.safetensors")
    for file in folder.glob("policy_*"):
        file.unlink()
    np.testing.assert_allclose(chunk(load_vla(folder), arrays), arrays["chunk"], rtol=1e-4, atol=1e-5)


def test_sizes_of_the_published_model() -> None:
    """Read from nothing but shapes, config.json and the name of its language model."""
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in SmolVLAModel(SMOLVLA_BASE).state_dict().items()}
    data = config_json(SMOLVLA_BASE)
    names, given = SMOLVLA_BASE.cameras, SMOLVLA_BASE.normalization
    read = read_config(Path("nowhere"), data, read_features(data), given, names, shapes, None, 48)
    sized = replace(SMOLVLA_BASE, vision=replace(SMOLVLA_BASE.vision, image_size=512), expert_ffn=2048)
    assert read == sized


def test_the_published_model_has_its_size() -> None:
    vla = random_vla("smolvla-base", device="meta")
    parts = {
        "vision": vla.module.vision,
        "connector": vla.module.connector,
        "embedding": vla.module.text.embed_tokens,  # type: ignore[union-attr]
        "layers": vla.module.text.layers,  # type: ignore[union-attr]
        "expert": vla.module.expert,
    }
    millions = {
        name: round(sum(weight.numel() for weight in part.parameters()) / 1e6)  # type: ignore[union-attr]
        for name, part in parts.items()
    }
    assert millions == {"vision": 86, "connector": 12, "embedding": 47, "layers": 157, "expert": 98}
    assert dict(vla.grids) == dict.fromkeys(("camera1", "camera2", "camera3"), (8, 8))
    assert (vla.horizon, vla.n_layers, vla.decoder.shape.queries) == (50, 16, 960)


def test_fewer_cameras_leave_the_last_ones_out(folder: Path, arrays: Arrays) -> None:
    """As LeRobot masks what is missing: the others keep their places, and their names do not matter."""
    vla = load_vla(folder, cameras=["front"])
    assert dict(vla.grids) == {"front": (4, 4)}
    alone = Frame({"front": arrays["image_camera1"]}, TASK, arrays["state"])
    session = session_of(vla, arrays)
    session.act(alone)
    rows = np.r_[0:16]
    first = session.engine.store.values[0][:, rows].numpy()
    np.testing.assert_allclose(first, arrays["prefix_value_0"][:, rows], rtol=1e-4, atol=1e-5)
    state = session.engine.store.values[0][:, 16 + 9].numpy()
    np.testing.assert_allclose(state, arrays["prefix_value_0"][:, -1], rtol=1e-4, atol=1e-5)


# What is refused.


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"type": "act"}, "'act'; known are"),
        ({"add_image_special_tokens": True}, "must lie in a row to be cached"),
        ({"adapt_to_pi_aloha": True}, "adapt_to_pi_aloha is not supported"),
        ({"attention_mode": "both"}, "attention_mode is 'both'"),
        ({"resize_imgs_with_padding": None}, "give a square"),
        ({"resize_imgs_with_padding": [128, 96]}, "give a square"),
        ({"resize_imgs_with_padding": [100, 100]}, "multiple of 8"),
        ({"resize_imgs_with_padding": [256, 256]}, "up to 128"),
        ({"resize_imgs_with_padding": [40, 40]}, "5 × 5 patches do not make tokens of 4 × 4"),
        ({"num_expert_layers": 2}, "must be as many"),
        ({"num_vlm_layers": 3}, "unexpected"),
        ({"num_vlm_layers": 6}, "missing"),
        ({"attention_mode": "self_attn"}, "of another shape"),
        ({"chunk_size": 0}, "head cannot have"),
        ({"num_steps": None}, "does not describe a SmolVLA"),
        ({"input_features": {}}, "names no camera"),
        ({"output_features": {}}, "no vector 'action'"),
        ({"normalization_mapping": {}, "input_features": None}, "input_features"),
    ],
)
def test_settings_that_are_not_supported(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_vla(write(tmp_path / "tiny", **config))


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [("vision_config", "num_attention_heads", -2), ("text_config", "head_dim", -16), ("text_config", "head_dim", 1)],
)
def test_heads_that_no_model_has(tmp_path: Path, part: str, name: str, value: int) -> None:
    folder = write(tmp_path / "tiny")
    content = json.loads((folder / "vlm_config.json").read_text())
    content[part][name] = value
    (folder / "vlm_config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError):
        load_vla(folder)


def drop_statistics(folder: Path) -> None:
    steps = json.loads((folder / PREPROCESSOR).read_text())["steps"]
    for step in steps:
        step.pop("state_file", None)
    change(folder / PREPROCESSOR, steps=steps)


def drop_mean(folder: Path) -> None:
    kept = {key: value for key, value in load_file(folder / STATISTICS).items() if not key.endswith("state.mean")}
    save_file(kept, folder / STATISTICS)


def spoil_mean(folder: Path) -> None:
    values = load_file(folder / STATISTICS)
    values["observation.state.std"][1] = torch.inf
    save_file(values, folder / STATISTICS)


def shorten_mean(folder: Path) -> None:
    values = load_file(folder / STATISTICS)
    save_file(values | {"observation.state.mean": torch.zeros(4)}, folder / STATISTICS)


def shard(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    save_file({key: weights[key] for key in names[::2]}, folder / "model-00001-of-00002.safetensors")
    index = {key: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def drop_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.vlm_with_expert.lm_expert.layers.1.self_attn.o_proj.weight"]
    save_file(weights, folder / "model.safetensors")


def another_tokenizer(folder: Path) -> None:
    train_tokenizer([f"word{number} {TASK}" for number in range(900)], 900).save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop_statistics, "no statistics 'mean' of 'observation.state'"),
        (drop_mean, "no statistics 'mean' of 'observation.state'"),
        (spoil_mean, "NaN or infinity"),
        (shorten_mean, "4 values, the feature 5"),
        (lambda folder: (folder / STATISTICS).unlink(), "cannot be read .no such file"),
        (lambda folder: (folder / POSTPROCESSOR).unlink(), "policy_postprocessor.json is missing"),
        (shard, "model-00002-of-00002.safetensors missing"),
        (truncate, "truncated or damaged"),
        (drop_weight, "1 missing: .*o_proj"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors missing"),
        (another_tokenizer, "vocabulary of .* tokens, the model one of 336"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "damaged"),
    ],
)
def test_folders_that_are_not_complete(folder: Path, spoil: Any, message: str) -> None:
    spoil(folder)
    with pytest.raises(CheckpointError, match=message):
        load_vla(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cameras": []}, "one to all"),
        ({"cameras": ["a", "b", "c"]}, r"has the cameras \['camera1', 'camera2'\]"),
        ({"cameras": ["a", "a"]}, "one to all"),
        ({"unnorm_key": "bridge"}, "leave `unnorm_key`"),
        ({"image_pipeline": "letterbox"}, "leave `unnorm_key`"),
        ({"state_prompt": "given"}, "takes no state_prompt"),
    ],
)
def test_arguments_that_do_not_fit(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_vla(folder, **options)


def test_frames_that_do_not_fit_leave_the_session_as_it_was(folder: Path, arrays: Arrays) -> None:
    good = observation(arrays)
    vla = load_vla(folder)
    session = CachedVLA(vla, Dense()).session()
    before = session.act(good)
    images = dict(good.images)
    for bad, message in (
        (replace(good, proprio=None), "needs 5 values in Frame.proprio, got none"),
        (replace(good, proprio=good.proprio[:4]), "needs 5 values in Frame.proprio, got 4"),  # type: ignore[index]
        (replace(good, instruction="pick up " * 20), "tokens; tiny takes up to 24"),
        (replace(good, images={"camera1": images["camera1"], "hand": images["camera2"]}), r"\['camera2'\] are missing"),
    ):
        fresh = CachedVLA(vla, Dense()).session()
        with pytest.raises(InputError, match=message):
            fresh.act(bad)
        if bad.shapes == good.shapes:
            with pytest.raises(InputError, match=message):
                session.act(bad)
    session.reset()
    np.testing.assert_array_equal(session.act(good), before)


def test_tokens_beyond_the_vocabulary(folder: Path, arrays: Arrays) -> None:
    vla = load_vla(folder, encode=lambda text: [3, 336])
    with pytest.raises(InputError, match=r"token 336.*knows 336"):
        CachedVLA(vla, Dense()).session().act(observation(arrays))
