"""OpenVLA-OFT folders, whole and broken; and that nothing is taken for something else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.models.oft_folder import Fill, aloha_frame, golden, libero_frame, load_oft, part_of, write_oft

from lac_vla import VLA, CachedVLA, Frame, load_vla, random_vla, save_vla
from lac_vla.errors import CheckpointError, InputError, MissingExtraError
from lac_vla.models.oft.build import build_oft
from lac_vla.models.oft.config import PRESETS, TINY_OFT, OFTConfig
from lac_vla.models.prismatic.presets import NO_STATS
from lac_vla.models.tokenizer import FileTokenizer, train_tokenizer

Weights = dict[str, torch.Tensor]
IDS = np.array([1, 5, 6])


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, golden_weights: Weights, fill: Fill) -> Path:
    return write_oft(tmp_path_factory.mktemp("oft"), golden_weights, fill)


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """An official folder to break."""
    return Path(shutil.copytree(original, tmp_path / "copy"))


def statistics(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = folder / "dataset_statistics.json"
    data = json.loads(file.read_text())
    change(next(iter(data.values())))
    file.write_text(json.dumps(data))


# Which family it is.


def test_weights_are_those_of_the_files(original: Path, golden_weights: Weights, fill: Fill) -> None:
    vla = load_oft(original, IDS)
    state = vla.module.state_dict()
    head, proprio = part_of(fill, "libero", "action_head"), part_of(fill, "libero", "proprio_projector")
    expected = {f"action_head.{key.removeprefix('model.')}": value for key, value in head.items()}
    expected |= {f"proprio_projector.{key}": value for key, value in proprio.items()}
    assert {key for key in state if key not in golden_weights} == expected.keys()
    assert all(torch.equal(weight, (golden_weights | expected)[key]) for key, weight in state.items())
    assert (vla.family, vla.horizon, list(vla.grids)) == ("oft", 8, ["agentview", "wrist"])
    assert not vla.module.training


@pytest.mark.parametrize("mark", ["action_head", "proprio_projector", "noisy_action_projector", "vision_backbone"])
def test_a_folder_with_any_part_is_never_plain_openvla(folder: Path, mark: str) -> None:
    """``config.json`` is the same; it must be said for what robot it is, or nothing is loaded."""
    for file in folder.glob("*--*"):
        if not file.name.startswith(mark):
            file.unlink()
    if not list(folder.glob(f"{mark}--*")):
        torch.save({}, folder / f"{mark}--5_checkpoint.pt")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "openvla"
    with pytest.raises(InputError, match="does not say what robot"):
        load_vla(folder, encode=lambda text: [1, 5])


def test_openvla_is_never_taken_for_oft(checkpoint: Path, frame: Frame) -> None:
    vla = load_vla(checkpoint, encode=lambda text: [1, 5])
    assert (vla.family, vla.decoder.causal, vla.horizon) == ("openvla", True, 1)
    for options, message in (
        ({"platform": "libero"}, "dataset_statistics"),
        ({"chunk": 8, "bounds": "q99"}, "dataset_statistics"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_vla(checkpoint, encode=lambda text: [1, 5], **options)


def test_openvla_for_a_platform_lacks_its_projector(folder: Path) -> None:
    for file in folder.glob("*--*"):
        file.unlink()
    assert load_vla(folder, encode=lambda text: [1, 5]).family == "openvla"
    with pytest.raises(CheckpointError, match="holds no proprio_projector"):
        load_oft(folder, IDS)


def test_options_of_another_family(tmp_path: Path) -> None:
    save_vla(random_vla("cogact-tiny"), tmp_path)
    with pytest.raises(InputError, match="'cogact' takes no platform"):
        load_vla(tmp_path, encode=lambda text: [1], platform="libero")
    with pytest.raises(InputError, match="takes no platforms"):
        load_vla(tmp_path, encode=lambda text: [1], platforms="libero")


def test_parts_on_the_hub_are_downloaded_and_adapters_are_not(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, list[str]]] = []

    def download(hub_id: str, **patterns: list[str]) -> str:
        asked.append(patterns)
        return str(original)

    monkeypatch.setattr("lac_vla.hub.snapshot_download", download)
    assert load_oft("moojink/openvla-7b-oft", IDS).family == "oft"  # type: ignore[arg-type]
    assert {"action_head--*", "proprio_projector--*", "vision_backbone--*"} <= {*asked[0]["allow_patterns"]}
    adapter = "lora_adapter/adapter_model.safetensors"
    assert not any(fnmatch(adapter, pattern) for patterns in asked for pattern in patterns["allow_patterns"])


# Bad folders.


def write_state(folder: Path, part: str, state: object) -> None:
    torch.save(state, next(folder.glob(f"{part}--*")))


def another_chunk(folder: Path, fill: Fill) -> None:
    """An action head of ALOHA's 14 values."""
    write_state(folder, "action_head", part_of(fill, "aloha", "action_head"))


def two_heads(folder: Path, fill: Fill) -> None:
    file = next(folder.glob("action_head--*"))
    shutil.copy(file, folder / "action_head--latest_checkpoint.pt")


def two_steps(folder: Path, fill: Fill) -> None:
    file = next(folder.glob("action_head--*"))
    file.rename(folder / "action_head--5_checkpoint.pt")


def no_noisy_projector(folder: Path, fill: Fill) -> None:
    write_state(folder, "action_head", part_of(fill, "libero", "diffusion"))


def noisy_projector(folder: Path, fill: Fill) -> None:
    state = part_of(fill, "libero", "noisy_action_projector")
    torch.save(state, folder / "noisy_action_projector--150000_checkpoint.pt")


def no_layer(folder: Path, fill: Fill) -> None:
    state = part_of(fill, "libero", "action_head")
    write_state(folder, "action_head", {key: value for key, value in state.items() if "fc1" not in key})


def narrow(folder: Path, fill: Fill) -> None:
    state = part_of(fill, "libero", "action_head")
    write_state(folder, "action_head", state | {"model.fc1.weight": torch.ones(32, 96)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (two_heads, r"just one action_head.*150000_checkpoint\.pt, action_head--latest"),
        (two_steps, r"several steps, \['150000', '5'\]"),
        (lambda f, _: next(f.glob("proprio_projector--*")).unlink(), r"no proprio_projector.*proprio=False"),
        (another_chunk, "actions of 14 .* platform 'libero' has 7"),
        (no_noisy_projector, "a diffusion head and no noisy_action_projector"),
        (noisy_projector, "a noisy_action_projector and no action_head--. of diffusion"),
        (no_layer, r"2 missing: action_head\.fc1"),
        (narrow, r"action_head\.fc1\.weight \(32, 96\) instead of \(32, 224\)"),
        (lambda f, _: write_state(f, "action_head", {"resnet.fc1.weight": torch.ones(2)}), "holds no action head"),
        (lambda f, _: write_state(f, "action_head", {}), "holds no action head"),
        (lambda f, _: write_state(f, "proprio_projector", {"fc1.weight": 3}), "fc1.weight is a int, not a tensor"),
        (lambda f, _: write_state(f, "proprio_projector", [1]), "not the dictionary"),
        (lambda f, _: next(f.glob("action_head--*")).write_bytes(b"x"), "truncated"),
        (
            lambda f, _: torch.save({}, f / "value_head--5.pt"),
            r"nobody reads.*value_head--5\.pt",
        ),
        (lambda f, _: (f / "extra.safetensors").write_bytes(b""), r"nobody reads.*extra\.safetensors"),
        (lambda f, _: (f / "dataset_statistics.json").unlink(), "dataset_statistics"),
        (lambda f, _: statistics(f, lambda s: s["action"].pop("q99")), 'no "q01" and "q99" of "action"'),
        (lambda f, _: statistics(f, lambda s: s.pop("proprio")), 'no "q01" and "q99" of "proprio"'),
        (lambda f, _: statistics(f, lambda s: s["proprio"]["q01"].pop()), "must be vectors of one length"),
        (lambda f, _: statistics(f, lambda s: s["action"].update(q01=[float("nan")] * 7)), "must be finite numbers"),
        (lambda f, _: statistics(f, lambda s: s.update(proprio=s["action"])), "7 proprio values, a model of 8"),
        (lambda f, _: statistics(f, lambda s: s.update(action=s["proprio"])), "8 action values, an action head of 7"),
    ],
)
def test_folders_that_make_no_sense(
    folder: Path, fill: Fill, change: Callable[[Path, Fill], object], message: str
) -> None:
    change(folder, fill)
    with pytest.raises(CheckpointError, match=message):
        load_oft(folder, IDS)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"platform": None}, InputError, "'libero' | 'aloha' | 'bridge'"),
        ({"platform": None, "chunk": 8, "bounds": "q99"}, InputError, "cameras"),
        ({"platform": "droid"}, InputError, r"unknown platform 'droid': choose one of \['libero'"),
        ({"platform": "aloha"}, CheckpointError, "actions of 7 and proprioception of 8"),
        ({"cameras": ["a", "b", "c"]}, InputError, r"has the cameras \['agentview', 'wrist'\].*'c'"),
        ({"bounds": "mean"}, CheckpointError, "choose one of"),
        ({"chunk": -1}, CheckpointError, "give at least 1"),
        ({"proprio": False}, CheckpointError, "proprio=False, and the folder holds"),
        ({"unnorm_key": "bridge_orig"}, InputError, r"choose one of \['libero_spatial_no_noops'\]"),
        ({"image_pipeline": "magic"}, InputError, "magic"),
        ({"encode": None}, CheckpointError, r"tokenizer\.json"),
    ],
)
def test_options_that_do_not_fit(original: Path, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_oft(original, IDS, **options)


def test_extremes_that_are_missing(folder: Path) -> None:
    statistics(folder, lambda s: s["proprio"].pop("min"))
    assert load_oft(folder, IDS).family == "oft"  # nobody asks for them
    with pytest.raises(CheckpointError, match='no "min" and "max" of "proprio"'):
        load_oft(folder, IDS, bounds="minmax")


def test_statistics_of_the_base_model_are_not_used(original: Path) -> None:
    """``config.json`` still holds them."""
    assert load_oft(original, IDS, unnorm_key="libero_spatial").config.vlm.norm_stats.keys() == {
        "libero_spatial_no_noops"
    }


def test_of_two_cameras_a_third_in_the_frame_is_ignored(original: Path) -> None:
    arrays = golden("libero")[0]
    vla, frame = load_oft(original, arrays["input_ids"]), libero_frame(arrays)
    more = replace(frame, images={"overhead": frame.images["wrist"], **frame.images})
    np.testing.assert_array_equal(CachedVLA(vla).session().act(more), CachedVLA(vla).session().act(frame))
    with pytest.raises(InputError, match=r"\['wrist'\] are missing"):
        CachedVLA(vla).session().act(replace(frame, images={"agentview": frame.images["wrist"]}))
    with pytest.raises(InputError, match="needs 8 values"):
        CachedVLA(vla).session().act(replace(frame, proprio=None))


def test_cameras_of_bridge_are_the_users(original: Path, folder: Path) -> None:
    """7 values of proprioception are not LIBERO's 8; without it, the platform alone tells the rest."""
    next(folder.glob("proprio_projector--*")).unlink()
    vla = load_oft(folder, IDS, "bridge", cameras=["top", "side", "wrist"], proprio=False)
    assert (list(vla.grids), vla.horizon, vla.config.vlm.image_resize_strategy) == (
        ["top", "side", "wrist"],
        5,
        "libero",
    )


def test_libero_pixels_are_the_folders_own(original: Path) -> None:
    """An image of the size already is cropped alone; any other needs the official JPEG."""
    arrays = golden("libero")[0]
    pytest.importorskip("simplejpeg")
    vla = load_oft(original, arrays["input_ids"], image_pipeline=None)
    images = vla.processor.images(libero_frame(arrays, "raw"))
    for camera, name in (("agentview", "agent"), ("wrist", "wrist")):
        difference = np.abs(images[camera].astype(int) - arrays[f"image.{name}.cropped"])
        assert difference.max() <= 1
        assert np.count_nonzero(difference) <= difference.size / 10_000
    action = CachedVLA(vla).session().act(libero_frame(arrays, "raw"))
    np.testing.assert_allclose(action, arrays["l1.action"], atol=2e-3)


def test_a_missing_package_is_asked_for_before_anything_is_loaded(
    original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "simplejpeg", None)
    with pytest.raises(MissingExtraError, match=r"lac-vla\[jpeg\]"):
        load_oft(original, IDS, image_pipeline=None)


class Exploit:
    """Unpickling it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def test_nothing_but_tensors_is_unpickled(folder: Path, tmp_path: Path) -> None:
    write_state(folder, "proprio_projector", {"fc1.weight": Exploit(tmp_path / "trace")})
    with pytest.raises(CheckpointError, match="more than tensors"):
        load_oft(folder, IDS)
    assert not (tmp_path / "trace").exists()


# FiLM's file, in which LoRA is not merged.


@pytest.fixture
def film_folder(tmp_path: Path, golden_weights: Weights, fill: Fill) -> Path:
    return write_oft(
        tmp_path / "film", golden_weights, fill, "aloha", ("action_head", "proprio_projector", "vision_backbone")
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, n: s.pop(f"{n}.lora_B.default.weight"), "just one of LoRA's factors"),
        (lambda s, n: s.pop(f"{n}.lora_A.default.weight"), "no factor of LoRA that could be merged"),
        (lambda s, n: s.update({f"{n}.lora_B.default.weight": torch.ones(5, 32)}), "do not fit its weight"),
        (lambda s, n: s.pop("vision_backbone.featurizer.blocks.0.scale.bias"), r"1 missing: .*blocks\.0\.scale\.bias"),
        (lambda s, n: s.pop("vision_backbone.featurizer.pos_embed"), r"1 missing: .*featurizer\.pos_embed"),
    ],
)
def test_vision_backbones_that_are_not_whole(
    film_folder: Path, fill: Fill, change: Callable[[Weights, str], object], message: str
) -> None:
    """What is missing is never taken from the base model's towers, which are not fine-tuned."""
    state = part_of(fill, "aloha", "vision_backbone")
    change(state, "vision_backbone.featurizer.blocks.1.mlp.fc1".replace("blocks.1", "blocks.1.block"))
    write_state(film_folder, "vision_backbone", state)
    with pytest.raises(CheckpointError, match=message):
        load_oft(film_folder, IDS, "aloha")


def test_the_adapters_configuration_tells_the_scale(film_folder: Path, fill: Fill) -> None:
    name = "vision_backbone.featurizer.blocks.0.attn.qkv.weight"
    official = load_oft(film_folder, IDS, "aloha").module.state_dict()[name]
    (film_folder / "lora_adapter").mkdir()
    config = film_folder / "lora_adapter" / "adapter_config.json"
    key = "vision_backbone.featurizer.blocks.0.block.attn.qkv.base_layer.weight"
    base = part_of(fill, "aloha", "vision_backbone")[key]
    config.write_text(json.dumps({"r": 32, "lora_alpha": 32}))
    doubled = load_oft(film_folder, IDS, "aloha").module.state_dict()[name]
    torch.testing.assert_close(doubled - base, 2 * (official - base))
    config.write_text(json.dumps({"r": 32}))
    with pytest.raises(CheckpointError, match="lora_alpha is None"):
        load_oft(film_folder, IDS, "aloha")


# Ours.


def acts_alike(one: VLA, other: VLA, frame: Frame) -> None:
    np.testing.assert_array_equal(CachedVLA(one).session().act(frame), CachedVLA(other).session().act(frame))


def test_what_we_write_is_read_back_and_says_everything(original: Path, film_folder: Path, tmp_path: Path) -> None:
    for number, (source, robot, options) in enumerate(
        [(original, "libero", {"bounds": "minmax", "chunk": 4}), (film_folder, "aloha", {})]
    ):
        arrays = golden(robot)[0]
        vla = load_oft(source, arrays["input_ids"], robot, **options)
        folder = tmp_path / str(number)
        save_vla(vla, folder, dtype=torch.float32)
        assert sorted(file.name for file in folder.iterdir()) == [
            "config.json", "dataset_statistics.json", "model.safetensors",
        ]  # fmt: skip
        assert not any("lora" in key for key in load_file(folder / "model.safetensors"))
        again = load_oft(folder, arrays["input_ids"], None)
        assert (again.family, again.config, again.horizon) == ("oft", vla.config, vla.horizon)
        acts_alike(vla, again, libero_frame(arrays) if robot == "libero" else aloha_frame(arrays))


def test_what_a_checkpoint_of_ours_says_is_not_overruled(folder: Path, tmp_path: Path) -> None:
    save_vla(load_oft(folder, IDS), tmp_path / "ours")
    assert load_oft(tmp_path / "ours", IDS, None, chunk=8).horizon == 8
    for options in ({"chunk": 4}, {"platform": "libero"}, {"bounds": "minmax"}):
        with pytest.raises(InputError, match="says them itself"):
            load_oft(tmp_path / "ours", IDS, **{"platform": None, **options})
    shutil.copy(next(folder.glob("action_head--*")), tmp_path / "ours")
    with pytest.raises(CheckpointError, match="take them away"):
        load_oft(tmp_path / "ours", IDS, None)


@pytest.mark.parametrize(
    "change", [{"head": "l2"}, {"chunk": 0}, {"bounds": "x"}, {"sampling_steps": 51}, {"speed": 1}]
)
def test_configurations_that_make_no_sense(tmp_path: Path, change: dict[str, Any]) -> None:
    save_vla(random_vla(TINY_OFT), tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(data | {"oft": data["oft"] | change}))
    with pytest.raises(CheckpointError):
        load_vla(tmp_path, encode=lambda text: [1])


@pytest.mark.parametrize("head", ["l1", "discrete", "diffusion"])
def test_every_head_is_saved_and_loaded(tmp_path: Path, frame: Frame, head: str) -> None:
    config = replace(TINY_OFT, head=head, diffusion_steps=10, sampling_steps=5)
    vla = random_vla(config, seed=1)
    tokenizer = FileTokenizer(train_tokenizer([frame.instruction], 259))
    vla = build_oft(config, vla.module, tokenizer)
    save_vla(vla, tmp_path, dtype=torch.float32)
    acts_alike(vla, load_vla(tmp_path), frame)


def test_the_published_size() -> None:
    config = PRESETS["openvla-7b-oft"]
    vla = random_vla("openvla-7b-oft", device="meta", dtype=torch.bfloat16)
    sizes = {
        part: sum(weight.numel() for weight in getattr(vla.module, part).parameters())
        for part in ("action_head", "proprio_projector")
    }
    assert {part: round(size / 1e6) for part, size in sizes.items()} == {"action_head": 151, "proprio_projector": 17}
    layout = vla.processor.prompt(
        Frame({name: np.zeros((224, 224, 3), np.uint8) for name in vla.grids}, "go", np.zeros(8, np.float32))
    ).layout
    assert (layout.n_visual, layout.n_suffix - layout.n_unread) == (512, layout.n_suffix - 2)
    assert (vla.horizon, config.vlm.norm_stats["none"]["action"]) == (8, NO_STATS["none"]["action"])
    assert isinstance(vla.config, OFTConfig)
