"""Reading and writing checkpoints, whole and broken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.heads import decode

from lac_vla.errors import CheckpointError, InputError
from lac_vla.models import VLA, load_vla, random_vla, save_vla
from lac_vla.models.prismatic.build import build_prismatic
from lac_vla.models.prismatic.checkpoint import random_prismatic
from lac_vla.models.prismatic.config import VICUNA_PROMPT, PrismaticConfig
from lac_vla.models.prismatic.presets import MINI, OPENVLA_7B, PRESETS
from lac_vla.models.tokenizer import FileTokenizer, train_tokenizer
from lac_vla.types import Frame

Weights = dict[str, torch.Tensor]
Write = Callable[..., Path]


def encode(text: str) -> list[int]:
    """In place of a tokenizer."""
    return [1, 5, 6, 29871]


def load(folder: Path, **options: Any) -> VLA:
    """Load without a tokenizer."""
    return load_vla(folder, **{"encode": encode, **options})


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    """A golden checkpoint to break."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


@pytest.mark.parametrize("layout", ["checkpoint", "sharded"])
def test_weights_are_those_of_the_file(request: pytest.FixtureRequest, golden_weights: Weights, layout: str) -> None:
    vla = load(request.getfixturevalue(layout))
    state = vla.module.state_dict()
    assert all(torch.equal(weight, golden_weights[key]) for key, weight in state.items())
    unused = golden_weights.keys() - state.keys()
    assert {key.split(".")[2] for key in unused} == {"blocks", "norm", "attn_pool"}
    assert not vla.module.training
    assert (vla.family, vla.name) == ("openvla", request.getfixturevalue(layout).name)


def test_dtype(checkpoint: Path, frame: Frame) -> None:
    vla = load(checkpoint, dtype=torch.bfloat16)
    assert vla.dtype == torch.bfloat16
    assert {weight.dtype for weight in vla.module.parameters()} == {torch.bfloat16}
    with torch.inference_mode():
        assert vla.encode_image(frame).isfinite().all()
    assert load(checkpoint, dtype="auto").dtype == torch.float32
    with pytest.raises(InputError, match="auto"):
        load(checkpoint, dtype="fp16")


def test_rotary_frequencies_in_a_file_are_ignored(golden_weights: Weights, write: Write, tmp_path: Path) -> None:
    old = {"language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    load(write(tmp_path / "old", golden_weights | old))


def test_statistics_beside_the_checkpoint_replace_its_own(copy: Path) -> None:
    stats = {"mine": {"action": {"q01": [0.0] * 3, "q99": [1.0] * 3}}}
    (copy / "dataset_statistics.json").write_text(json.dumps(stats))
    assert load(copy).head.max_new_tokens == 3
    with pytest.raises(InputError, match=r"unknown unnorm_key 'demo': choose one of \['mine'\]"):
        load(copy, unnorm_key="demo")


def test_normalisation_is_that_of_the_official_image_processor(copy: Path) -> None:
    params = [{"inplace": False, "mean": [0.25] * 3, "std": [0.5] * 3}] * 2
    (copy / "preprocessor_config.json").write_text(json.dumps({"tvf_normalize_params": params}))
    values = load(copy).module.vision_backbone.normalize(torch.full((1, 2, 2, 3), 255, dtype=torch.uint8))
    assert torch.equal(values, torch.full((1, 6, 2, 2), 1.5))


def test_truncated_shard(sharded: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sharded, tmp_path / "copy"))
    shard = folder / "model-00002-of-00003.safetensors"
    for size in (shard.stat().st_size - 1, 40, 0):
        with shard.open("r+b") as file:
            file.truncate(size)
        message = r"model-00002-of-00003\.safetensors cannot be read.*truncated or damaged"
        with pytest.raises(CheckpointError, match=message):
            load(folder)
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors missing"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("projector.fc3.bias"), r"1 missing: projector.fc3.bias"),
        (lambda w: w.update(extra=torch.ones(1)), r"1 unexpected: extra"),
        (
            lambda w: w.update({"projector.fc3.bias": torch.ones(31)}),
            r"1 of another shape: projector.fc3.bias \(31,\) instead of \(32,\)",
        ),
        (
            lambda w: w.update({"vision_backbone.featurizer.blocks.4.norm1.weight": torch.ones(32)}),
            r"1 unexpected: vision_backbone.featurizer.blocks.4",
        ),
        (lambda w: w.clear(), r"110 missing: .*, …"),
    ],
)
def test_weights_of_another_model(
    golden_weights: Weights,
    write: Write,
    tmp_path: Path,
    change: Callable[[Weights], object],
    message: str,
) -> None:
    weights = dict(golden_weights)
    change(weights)
    with pytest.raises(CheckpointError, match=message):
        load(write(tmp_path / "changed", weights))


def test_pickled_weights_are_not_read(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled"):
        load(copy)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "octo"}, "model_type is 'octo'"),
        ({"text_config": {"model_type": "phi"}}, "'phi' is not supported"),
        ({"text_config": None}, "does not describe a Prismatic VLA"),
        ({"vit_towers": None}, "unknown vision towers"),
        ({"timm_override_act_layers": ["quick_gelu"]}, "overrides activations"),
        ({"image_sizes": [224, 384]}, "same size"),
        ({"cameras": [{"image_size": 224}]}, "name"),
        ({"cameras": [{"name": "a.b", "image_size": 224}]}, "dot"),
        ({"cameras": [{"name": "a", "image_size": 224}] * 2}, "each once"),
        ({"vision_backbone_id": "conv"}, "a tower per camera"),
        ({"prompt_template": "go"}, "{instruction}"),
    ],
)
def test_configurations_that_make_no_sense(copy: Path, config: dict[str, Any], message: str) -> None:
    data = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(data | config))
    with pytest.raises(CheckpointError, match=message):
        load(copy)


@pytest.mark.parametrize("content", ["{", "[]", None])
def test_damaged_configuration(copy: Path, content: str | None) -> None:
    (copy / "config.json").unlink()
    if content is not None:
        (copy / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config.json (is damaged|cannot be read)"):
        load(copy)


def test_no_such_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="neither a folder nor a hub id"):
        load(tmp_path / "nothing")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="the hub says"):
        load_vla("nobody/nothing-of-that-name")


def test_tokenizer_is_asked_for(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        load_vla(checkpoint)


def test_published_configuration_is_understood() -> None:
    config = PrismaticConfig.from_json(
        {
            "arch_specifier": "no-align+fused-gelu-mlp",
            "image_sizes": [224, 224],
            "llm_backbone_id": "llama2-7b-pure",
            "model_type": "openvla",
            "norm_stats": OPENVLA_7B.norm_stats,
            "pad_token_id": 32000,
            "text_config": {"model_type": "llama", "pad_token_id": 32000, "vocab_size": 32064},
            "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
            "timm_override_act_layers": [None, None],
            "vision_backbone_id": "dinosiglip-vit-so-224px",
        }
    )
    expected = replace(OPENVLA_7B, text_config={"model_type": "llama", **OPENVLA_7B.text_config})
    assert config == expected
    assert config.vocab_size == 32000


def test_first_version_has_one_tower_two_layers_and_the_vicuna_prompt() -> None:
    config = PrismaticConfig.from_json(
        {
            "llm_backbone_id": "vicuna-v15-7b",
            "text_config": {"vocab_size": 32064},
            "timm_model_ids": ["vit_so400m_patch14_siglip_224"],
            "image_resize_strategy": "letterbox",
        }
    )
    assert config.prompt_template == VICUNA_PROMPT
    assert (config.features, config.projector_hidden) == (1152, (4096,))


@pytest.mark.parametrize("name", PRESETS)
def test_configurations_survive_json(name: str) -> None:
    assert PrismaticConfig.from_json(json.loads(json.dumps(PRESETS[name].to_json()))) == PRESETS[name]


def test_saved_model_acts_like_the_original(tmp_path: Path, frame: Frame) -> None:
    stats = {
        "proprio": {"q01": [-2.0] * 8, "q99": [2.0] * 8},
        "action": {"q01": [-3.0] * 7, "q99": [3.0] * 7},
    }
    made = random_prismatic(
        replace(MINI, norm_stats={"sim": stats}),
        name="mini",
        seed=3,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    tokenizer = FileTokenizer(train_tokenizer([frame.instruction], 300))
    original = build_prismatic(made.module, tokenizer)
    save_vla(original, tmp_path / "saved", dtype=torch.float32)
    again = load_vla(tmp_path / "saved")
    assert again.family == original.family == "openvla"
    assert again.config == original.config
    prompts = [vla.processor.prompt(frame) for vla in (again, original)]
    assert prompts[0].layout == prompts[1].layout
    with torch.inference_mode():
        embedded = [vla.processor.embed(prompt) for vla, prompt in zip((again, original), prompts, strict=True)]
        assert all(torch.equal(one, other) for one, other in zip(*embedded, strict=True))
        assert torch.equal(again.encode_image(frame), original.encode_image(frame))
        hidden = torch.randn(3, original.config.width)
        actions = [decode(vla, frame, hidden, lambda rows: rows.embeddings)[0] for vla in (original, again)]
    np.testing.assert_array_equal(actions[0], actions[1])


def test_saving_halves_precision_and_spares_loaded_models(tmp_path: Path) -> None:
    made = random_vla("tiny")
    save_vla(made, tmp_path)
    assert {weight.dtype for weight in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    loaded = load(tmp_path, dtype=torch.bfloat16)
    before = {key: weight.clone() for key, weight in loaded.module.state_dict().items()}
    save_vla(random_vla("tiny", seed=1), tmp_path)
    assert all(torch.equal(weight, before[key]) for key, weight in loaded.module.state_dict().items())
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "config.json",
        "dataset_statistics.json",
        "model.safetensors",
    ]


def test_weights_are_converted_to_the_dtype_asked_for(golden_weights: Weights, copy: Path) -> None:
    wide = {key: weight.to(torch.float64) for key, weight in golden_weights.items()}
    save_file(wide, copy / "model.safetensors")
    assert {weight.dtype for weight in load(copy).module.parameters()} == {torch.float32}
