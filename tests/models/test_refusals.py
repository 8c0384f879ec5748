"""Checkpoints that must not be loaded: each is refused by an error that says what it is and what to do."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from lac_vla import CachedVLA, Frame, LacError, LACPolicy, load_vla, random_vla, save_vla
from lac_vla.bundled import MINI, MINI_COGACT, MINI_VIT
from lac_vla.errors import CheckpointError, InputError
from lac_vla.models import FAMILIES, weights
from lac_vla.models.tokenizer import FileTokenizer, load_tokenizer

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 123456789\n"
PAGE = "\n<!DOCTYPE html><html><title>Sign in</title></html>"
FILES = ["config.json", "dataset_statistics.json", "tokenizer.json", "model.safetensors"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of a small model, to break."""
    return Path(shutil.copytree(MINI, tmp_path / "m"))


@pytest.fixture
def cogact(tmp_path: Path) -> Path:
    """The same, of CogACT."""
    return Path(shutil.copytree(MINI_COGACT, tmp_path / "c"))


def change_weights(
    folder: Path, change: Callable[[torch.Tensor], torch.Tensor], name: str = "projector.fc1.bias"
) -> None:
    state = load_file(folder / "model.safetensors")
    state[name] = change(state[name])
    save_file(state, folder / "model.safetensors")


# Numbers that are not finite, and numbers that are no plain values.


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_must_be_finite(folder: Path, cogact: Path, value: float) -> None:
    for model, name in ((folder, "projector.fc1.bias"), (cogact, "action_model.net.final_layer.linear.bias")):
        change_weights(model, lambda weight: weight.index_fill(0, torch.tensor([3]), value), name)
        with pytest.raises(CheckpointError, match=rf"NaN or infinity in the weights {name}"):
            load_vla(model)


def test_weights_must_be_finite_in_the_dtype_asked_for(folder: Path) -> None:
    change_weights(folder, lambda weight: weight.float().index_fill(0, torch.tensor([3]), 1e5))
    assert load_vla(folder, dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(CheckpointError, match="give dtype bfloat16"):
        load_vla(folder, dtype="float16")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.int64])
def test_quantised_weights_are_no_plain_values(folder: Path, cogact: Path, dtype: torch.dtype) -> None:
    for model in (folder, cogact):
        change_weights(model, lambda weight: weight.to(dtype))
        with pytest.raises(CheckpointError, match=r"quantised weights.*projector\.fc1\.bias.*bfloat16"):
            load_vla(model)


@pytest.mark.parametrize("kind", ["action", "proprio"])
@pytest.mark.parametrize("part", ["q01", "q99"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e39, None, "1", [1.0]])
def test_statistics_must_be_finite_numbers(folder: Path, kind: str, part: str, value: Any) -> None:
    data = json.loads((folder / "dataset_statistics.json").read_text())
    [stats] = data.values()
    stats[kind][part][0] = value
    (folder / "dataset_statistics.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=f'{part} of "{kind}" must be finite numbers'):
        load_vla(folder)


@pytest.mark.parametrize("stats", [None, {}, []])
def test_no_statistics_at_all(folder: Path, stats: Any) -> None:
    (folder / "dataset_statistics.json").unlink()
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(data | {"norm_stats": stats}))
    with pytest.raises(CheckpointError, match=r"no statistics.*dataset_statistics\.json"):
        load_vla(folder)


# What is in the folder, and nobody reads.


@pytest.mark.parametrize(
    "name",
    ["value_head--1_checkpoint.pt", "extra.safetensors", "pytorch_model.bin", "consolidated.00.pth",
     "last.ckpt", "model.gguf", "state_dict.pt"],
)  # fmt: skip
def test_weights_that_nobody_reads(folder: Path, cogact: Path, name: str) -> None:
    for model in (folder, cogact):
        (model / name).write_bytes(b"x")
        with pytest.raises(CheckpointError, match=rf"nobody reads.*{name}.*act without them"):
            load_vla(model)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin", "state.pt"])
def test_what_a_trainer_leaves_is_none_of_the_models_weights(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"x")
    load_vla(folder)


def test_two_sets_of_weights(folder: Path, cogact: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "model-00001-of-00001.safetensors")
    with pytest.raises(CheckpointError, match=r"two sets.*model-00001-of-00001\.safetensors"):
        load_vla(folder)
    index = dict.fromkeys(load_file(folder / "model.safetensors"), "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(CheckpointError, match=r"two sets.* model\.safetensors beside"):
        load_vla(folder)
    (folder / "model.safetensors").unlink()
    load_vla(folder)
    (cogact / "checkpoints").mkdir()
    (cogact / "checkpoints" / "run.pt").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"two sets of weights, model\.safetensors and run\.pt"):
        load_vla(cogact)


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_must_be_merged_first(folder: Path, name: str, alone: bool) -> None:
    if alone:
        shutil.rmtree(folder)
        folder.mkdir()
    (folder / name).write_text("{}")
    with pytest.raises(CheckpointError, match=rf"LoRA adapter.*{name}.*merge"):
        load_vla(folder)


def test_an_adapter_in_a_subfolder_is_told(folder: Path) -> None:
    (folder / "checkpoint-500").mkdir()
    (folder / "checkpoint-500" / "adapter_config.json").write_text("{}")
    with pytest.warns(UserWarning, match=r"checkpoint-500/adapter_config\.json.*not read.*merged"):
        load_vla(folder)


@pytest.mark.parametrize(("prefix", "advice"), [("module.", "DistributedDataParallel"), ("base_model.model.", "peft")])
def test_names_with_a_wrappers_prefix(folder: Path, prefix: str, advice: str) -> None:
    state = {prefix + key: value for key, value in load_file(folder / "model.safetensors").items()}
    save_file(state, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"all names begin with '{prefix}'.*{advice}"):
        load_vla(folder)


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A hub whose every repository is ``folder``; call it with the names that it lists, or an error."""
    listed: list[Any] = [FILES]

    class Api:
        def model_info(self, name: str, timeout: float) -> SimpleNamespace:
            if isinstance(listed[0], Exception):
                raise listed[0]
            return SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in listed[0]])

    monkeypatch.setattr(weights, "HfApi", Api)
    monkeypatch.setattr("lac_vla.hub.snapshot_download", lambda *_, **__: str(folder))
    return lambda names: listed.__setitem__(0, names)


def test_what_the_hub_lists_counts_although_it_is_not_downloaded(hub: Callable[..., None]) -> None:
    assert load_vla("someone/model").name == "model"
    hub([*FILES, "lora_adapter/adapter_model.safetensors", "optimizer.pt"])  # a subfolder is not the model's
    with pytest.warns(UserWarning, match=r"subfolder \(lora_adapter/adapter_model\.safetensors\), whose weights"):
        load_vla("someone/model")
    hub([*FILES, "action_head--150000_checkpoint.pt"])
    with pytest.raises(CheckpointError, match=r"action_head--150000_checkpoint\.pt"):
        load_vla("someone/model")
    hub(ConnectionError("no route"))
    load_vla("someone/model")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_says_which_files_it_reads(family: str, tmp_path: Path) -> None:
    vla = random_vla(FAMILIES[family].tiny)
    save_vla(vla, tmp_path, dtype="float32")
    assert load_vla(tmp_path, encode=vla.encode).dtype == torch.float32
    (tmp_path / "other.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="nobody reads"):
        load_vla(tmp_path, encode=vla.encode)


# Files that are something else.


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("content", "message"), [(POINTER, "git lfs pull"), (PAGE, "HTML page"), ("", "damaged|empty")]
)
def test_a_pointer_or_a_page_is_named(folder: Path, name: str, content: str, message: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(CheckpointError, match=rf"{name} (is|cannot be read).*({message})"):
        load_vla(folder)


@pytest.mark.parametrize("name", ["config.json", "policy.safetensors"])
@pytest.mark.parametrize(("content", "message"), [(POINTER, "git lfs pull"), (PAGE, "HTML page")])
def test_a_policys_pointer_or_page_is_named(folder: Path, name: str, content: str, message: str) -> None:
    (folder / "policy" / name).write_text(content)
    with pytest.raises(CheckpointError, match=f"{name} is .*{message}"):
        LACPolicy.from_pretrained(folder)


@pytest.mark.parametrize(("content", "message"), [(POINTER, "git lfs pull"), (PAGE, "HTML page")])
def test_a_pt_files_pointer_or_page_is_named(cogact: Path, content: str, message: str) -> None:
    (cogact / "model.safetensors").unlink()
    (cogact / "checkpoints").mkdir()
    (cogact / "checkpoints" / "run.pt").write_text(content)
    with pytest.raises(CheckpointError, match=rf"run\.pt is .*{message}"):
        load_vla(cogact)


def test_a_tokenizer_of_sentence_piece_alone(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model alone is not read.*save_pretrained"):
        load_vla(folder)


def test_a_tokenizer_that_makes_the_reader_panic(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["continuing_subword_prefix"] = 300 * "x"
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        load_vla(folder)


def test_padding_and_truncation_in_a_file_change_nothing(folder: Path) -> None:
    plain, text = load_tokenizer(folder), "pick up the black bowl and place it on the plate"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding(length=100)
    tokenizer.enable_truncation(4)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert FileTokenizer(Tokenizer.from_file(str(folder / "tokenizer.json")))(text) != plain(text)
    assert load_tokenizer(folder)(text) == plain(text)


# Values that make no sense.

DEEP: list[Any] = []
for _ in range(300):
    DEEP = [DEEP]
WRONG = [None, -1, 0, float("nan"), "4", [], {}, 10**30, True, DEEP, "\ud800"]
FIELDS = ["text_config", "cameras", "projector_hidden", "n_action_bins", "pad_to_multiple_of", "llm_max_length",
          "prompt_template", "prompt_end_id", "proprio_dim", "edge_token", "image_resize_strategy"]  # fmt: skip
INNER = ["hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "num_key_value_heads"]


def loads_or_refuses(folder: Path, read: Callable[[Path], object], data: Any) -> None:
    (folder / "config.json").write_text(json.dumps(data))
    with suppress(LacError):
        read(folder)


def act(folder: Path) -> None:
    vla = load_vla(folder)
    image = np.zeros((32, 32, 3), np.uint8)
    action = CachedVLA(vla).session().act(Frame(dict.fromkeys(vla.grids, image), "go", np.zeros(8, np.float32)))
    assert np.isfinite(action).all()


@pytest.mark.parametrize("name", [*FIELDS, *(f"text_config.{name}" for name in INNER)])
def test_wrong_values_in_a_configuration(folder: Path, name: str) -> None:
    data = json.loads((folder / "config.json").read_text())
    for value in WRONG:
        changed = copy.deepcopy(data)
        place = changed["text_config"] if "." in name else changed
        place[name.rpartition(".")[2]] = value
        loads_or_refuses(folder, act, changed)


@pytest.mark.parametrize("bundled", [MINI_VIT, MINI_COGACT])
def test_wrong_values_inside_towers_and_heads(bundled: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundled, tmp_path / "m"))
    data = json.loads((folder / "config.json").read_text())
    parts = [part for part in (data, data.get("vlm")) if part]
    towers = [camera["tower"] for part in parts for camera in part.get("cameras", ())]
    own = [data[name] for name in ("sampling", "action_model") if name in data]
    for inner in (*towers, *own):
        for name, good in list(inner.items()):
            for value in WRONG:
                inner[name] = value
                loads_or_refuses(folder, act, data)
            inner[name] = good


@pytest.mark.parametrize("name", ["grids", "ratios", "inputs", "flow", "language", "ratio", "recovery", "patch_pixels",
                                  "width", "depth", "max_age"])  # fmt: skip
def test_wrong_values_in_a_policys_configuration(folder: Path, name: str) -> None:
    data = json.loads((folder / "policy" / "config.json").read_text())
    for value in WRONG:
        loads_or_refuses(folder / "policy", LACPolicy.from_pretrained, data | {name: value})


@pytest.mark.parametrize("name", ["config.json", "dataset_statistics.json", "policy/config.json"])
@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, '{"a": ' + "9" * 5000 + "}", "[1]", "\x00"])
def test_json_that_is_too_deep_or_too_long(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    with pytest.raises(CheckpointError, match=r"\.json cannot be read"):
        LACPolicy.from_pretrained(folder) if "policy" in name else load_vla(folder)


def test_json_is_read_up_to_a_limit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lac_vla.files.MAX_OBJECT", 100)
    with pytest.raises(CheckpointError, match="longer than"):
        load_vla(folder)


@pytest.mark.parametrize("index", [{"a": 1}, {"a": "../model.safetensors"}, {"a": "/etc/hosts"}, [], "x"])
def test_an_index_names_files_of_its_folder(folder: Path, index: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(CheckpointError, match=r"index\.json (is damaged|cannot be read|names files outside)"):
        load_vla(folder)


# Where and as what.


@pytest.mark.parametrize("device", ["gpu", "tpu", "mps", "meta", "cpu:x", "cpu:3", "", "cuda:99"])
def test_devices_that_are_none(device: str) -> None:
    with pytest.raises(InputError, match=r"give cpu|CUDA device"):
        load_vla(MINI, device=device)
    if device != "meta":
        with pytest.raises(InputError, match=r"give cpu|CUDA device"):
            random_vla("tiny", device=device)


def test_cuda_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="no CUDA device here: give cpu"):
        load_vla(MINI, device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="no cuda:7"):
        load_vla(MINI, device="cuda:7")


@pytest.mark.parametrize("dtype", ["bfloat16", "torch.bfloat16", torch.bfloat16])
def test_dtypes_by_name(dtype: Any) -> None:
    assert load_vla(MINI, dtype=dtype).dtype == random_vla("tiny", dtype=dtype).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["int8", "fp16", "", torch.int8, torch.float8_e5m2, None])
def test_dtypes_that_no_model_computes_in(dtype: Any) -> None:
    with pytest.raises(InputError, match="bfloat16"):
        load_vla(MINI, dtype=dtype)


def test_home_and_names(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_vla("~/m").name == load_vla(Path("~/m")).name == "m"
    assert LACPolicy.from_pretrained("~/m").config
    snapshot = tmp_path / "models--openvla--openvla-7b" / "snapshots" / ("0" * 40)
    shutil.copytree(folder, snapshot)
    assert load_vla(snapshot).name == "openvla-7b"
    save_vla(load_vla("~/m"), "~/saved", dtype="bfloat16")
    assert (tmp_path / "saved" / "config.json").is_file()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("https://huggingface.co/openvla/openvla-7b/tree/main", "give the repository's name, 'openvla/openvla-7b'"),
        ("https://example.com/model", "is an address: download"),
        ("openvla/openvla-7b@main", "hf download openvla/openvla-7b --revision main"),
        (r"C:\models\openvla", "path of Windows"),
        ("no/such/folder", "neither a folder nor a hub id"),
    ],
)
def test_what_names_no_model(given: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_vla(given)


@pytest.mark.parametrize("name", ["model.safetensors", "checkpoints/step.pt"])
def test_a_file_in_place_of_its_folder(folder: Path, name: str) -> None:
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "step.pt").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=f"is a file: give the folder .*: {folder}$"):
        load_vla(folder / name)
