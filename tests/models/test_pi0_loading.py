"""Loading π0 and π0.5: what may be absent, what is refused, and what is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models.conftest import GOLDENS
from tests.models.pi0_checkpoint import change, golden, observation, session_of, weights, write
from tests.models.test_pi0 import chunk, close

from lac_vla import CachedVLA, Frame, InputError, load_vla, random_vla, save_vla
from lac_vla.errors import CheckpointError
from lac_vla.models.tokenizer import WordHash, train_tokenizer

FAMILIES = ("pi0", "pi05")


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def folder(tmp_path: Path, family: str) -> Path:
    return write(tmp_path / "tiny", family)


def rewrite(folder: Path, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(edit(load_file(folder / "model.safetensors")), folder / "model.safetensors")


def answer(folder: Path, family: str, **options: Any) -> list[list[float]]:
    """The golden chunk, if all is well."""
    arrays = golden(family)
    session = session_of(load_vla(folder, **options), arrays)
    session.act(observation(arrays))
    return chunk(session)


def test_keys_without_their_prefix(folder: Path, family: str) -> None:
    rewrite(folder, lambda tensors: {key.removeprefix("model."): value for key, value in tensors.items()})
    close(answer(folder, family), golden(family)["chunk_normalised"])


def test_what_is_unused_is_not_loaded(folder: Path, family: str) -> None:
    """Neither the language model's output matrix nor the expert's is there, before or after."""
    rewrite(folder, lambda tensors: {key: value for key, value in tensors.items() if "lm_head" not in key})
    close(answer(folder, family), golden(family)["chunk_normalised"])
    parameters = sum(weight.numel() for weight in load_vla(folder).module.parameters())
    every = sum(tensor.numel() for tensor in weights(family).values())
    assert parameters == every - 336 * (32 + 16)


def test_statistics_among_the_weights(folder: Path, family: str) -> None:
    """Checkpoints of before LeRobot 0.4 have no processors."""
    statistics = load_file(next(folder.glob("policy_preprocessor*.safetensors")))
    for file in folder.glob("policy_*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="no statistics"):
        load_vla(folder)
    kept = {
        f"{side}.buffer_{feature.replace('.', '_')}.{name}": value.clone()
        for key, value in statistics.items()
        for feature, name in [key.rsplit(".", 1)]
        for side in ("normalize_inputs", "unnormalize_outputs", "normalize_targets")
    }
    rewrite(folder, lambda tensors: tensors | kept)
    arrays = golden(family)
    session = session_of(load_vla(folder), arrays)
    close(session.act(observation(arrays)), arrays["chunk"])


def test_a_tokenizer_from_elsewhere(folder: Path, family: str, tmp_path: Path) -> None:
    other = tmp_path / "paligemma"
    other.mkdir()
    with pytest.raises(CheckpointError, match=r"paligemma holds no tokenizer\.json.*google/paligemma-3b-pt-224"):
        load_vla(folder, tokenizer=other)
    (folder / "tokenizer.json").rename(other / "tokenizer.json")
    with pytest.raises(CheckpointError, match=r"tiny holds no tokenizer\.json.*google/paligemma-3b-pt-224"):
        load_vla(folder)
    close(answer(folder, family, tokenizer=other), golden(family)["chunk_normalised"])
    train_tokenizer(["pick up the bowl"], 700 if family == "pi0" else 600).save(str(other / "tokenizer.json"))
    big = json.loads((other / "tokenizer.json").read_text())
    big["model"]["vocab"] |= {f"word{i}": 1000 + i for i in range(300)}
    (other / "tokenizer.json").write_text(json.dumps(big))
    with pytest.raises(CheckpointError, match="vocabulary of"):
        load_vla(folder, tokenizer=other)
    vla = load_vla(folder, encode=WordHash(5000))
    with pytest.raises(CheckpointError, match="not in the model's vocabulary of 336"):
        vla.processor.prompt(observation(golden(family)))


def test_cameras(folder: Path, family: str) -> None:
    """Renamed, or fewer: the last ones are left out, as LeRobot masks what is missing."""
    arrays = golden(family)
    images = {"front": arrays["image_base"], "hand": arrays["image_wrist"]}
    frame = replace(observation(arrays), images=images)
    session = session_of(load_vla(folder, cameras=("front", "hand")), arrays)
    session.act(frame)
    close(chunk(session), arrays["chunk_normalised"])
    one = load_vla(folder, cameras=("front",))
    assert list(one.grids) == ["front"]
    assert CachedVLA(one).session().act(frame).shape == (10, 4)
    with pytest.raises(InputError, match=r"'hand'.* are missing"):
        load_vla(folder, cameras=("front", "hand")).processor.images(replace(frame, images={"front": images["front"]}))
    for names in ((), ("a", "a"), ("a", "b", "c")):
        with pytest.raises(InputError, match=r"up to 2 camera\(s\)"):
            load_vla(folder, cameras=names)


def test_a_processor_that_renames_cameras(folder: Path, family: str) -> None:
    file = folder / "policy_preprocessor.json"
    data = json.loads(file.read_text())
    data["steps"][0]["config"]["rename_map"] = {"observation.images.top": "observation.images.base_0_rgb"}
    file.write_text(json.dumps(data))
    assert list(load_vla(folder).grids) == ["top", "left_wrist_0_rgb"]


BAD_FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another type": (lambda f: change(f / "config.json", type="act"), "model_type is 'act'"),
    "the other model's type": (
        lambda f: change(
            f / "config.json", type="pi0" if json.loads((f / "config.json").read_text())["type"] == "pi05" else "pi05"
        ),
        "the weights are those of",
    ),
    "no features": (lambda f: change(f / "config.json", input_features=None), "no input_features"),
    "no action": (lambda f: change(f / "config.json", output_features={}), "no vector 'action'"),
    "no camera": (
        lambda f: change(f / "config.json", input_features={"observation.state": {"type": "STATE", "shape": [5]}}),
        "names no camera",
    ),
    "a state of another length": (
        lambda f: change(
            f / "config.json",
            input_features={
                "observation.images.a": {"type": "VISUAL", "shape": [3, 56, 56]},
                "observation.state": {"type": "STATE", "shape": [6]},
            },
        ),
        "have 5 values, the feature 6",
    ),
    "a picture of another size": (
        lambda f: change(f / "config.json", image_resolution=[56, 42]),
        r"image_resolution is \[56, 42\]",
    ),
    "no steps": (lambda f: change(f / "config.json", num_inference_steps=0), "cannot have"),
    "an unknown tower": (lambda f: change(f / "config.json", vision_heads=None), "give vision_heads"),
    "no processor": (lambda f: (f / "policy_postprocessor.json").unlink(), r"policy_postprocessor\.json is missing"),
    "no statistics": (
        lambda f: next(f.glob("policy_preprocessor*.safetensors")).unlink(),
        "cannot be read .no such file",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors missing"),
    "half the weights": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]),
        "truncated or damaged",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_checkpoints_are_refused(folder: Path, case: str) -> None:
    spoil, message = BAD_FILES[case]
    spoil(folder)
    with pytest.raises(CheckpointError, match=message):
        load_vla(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_statistics_that_are_not_finite_are_refused(folder: Path, family: str, value: float) -> None:
    file = next(folder.glob("policy_postprocessor*.safetensors"))
    statistics = load_file(file)
    for name in ("action.mean", "action.q01"):
        statistics[name][1] = value
    save_file(statistics, file)
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        load_vla(folder)


def test_a_feature_without_statistics_is_refused(folder: Path, family: str) -> None:
    file = next(folder.glob("policy_preprocessor*.safetensors"))
    save_file({"action.mean": torch.zeros(4)}, file)
    with pytest.raises(CheckpointError, match=r"no statistics '\w+' of 'observation.state'"):
        load_vla(folder)
    change(folder / "policy_preprocessor.json", steps=[])
    change(folder / "config.json", normalization_mapping={"STATE": "IDENTITY", "ACTION": "MEAN_STD"})
    with pytest.raises(CheckpointError, match=r"'observation\.state' is normalised by 'IDENTITY'"):
        load_vla(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [("../elsewhere.safetensors", "must be the name of a file beside it"), (300 * "x", "cannot be read")],
)
def test_a_state_file_is_a_file_of_the_folder(folder: Path, name: str, message: str) -> None:
    file = folder / "policy_preprocessor.json"
    data = json.loads(file.read_text())
    [step] = [step for step in data["steps"] if "state_file" in step]
    step["state_file"] = name
    file.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=message):
        load_vla(folder)


@pytest.mark.parametrize(
    "missing", ["state_proj.bias", "layers.3.mlp.up_proj.weight", "layers.0.self_attn.k_proj.weight"]
)
def test_missing_weights_are_named(folder: Path, family: str, missing: str) -> None:
    if family == "pi05" and missing.startswith("state_proj"):
        missing = "time_mlp_out.bias"
    rewrite(folder, lambda tensors: {key: value for key, value in tensors.items() if not key.endswith(missing)})
    with pytest.raises(CheckpointError, match=missing.replace(".", r"\.")):
        load_vla(folder)


def test_bad_options_are_refused(folder: Path, family: str) -> None:
    with pytest.raises(InputError, match="unknown image pipeline 'letterbox'"):
        load_vla(folder, image_pipeline="letterbox")
    with pytest.raises(InputError, match="leave unnorm_key out"):
        load_vla(folder, unnorm_key="libero")
    with pytest.raises(InputError, match="state_prompt 'all'"):
        load_vla(folder, state_prompt="all")
    if family == "pi0":
        with pytest.raises(InputError, match="π0 has none"):
            load_vla(folder, state_prompt="none")


def test_other_families_take_no_such_options(tmp_path: Path) -> None:
    save_vla(random_vla("tiny"), tmp_path)
    with pytest.raises(InputError, match="family 'openvla' takes no state_prompt, tokenizer"):
        load_vla(tmp_path, tokenizer=tmp_path, state_prompt="none")


def test_a_prompt_without_the_state(tmp_path: Path) -> None:
    """As openpi's π0.5 for LIBERO: nothing of the state reaches the model, so none need be given."""
    vla = load_vla(write(tmp_path / "tiny", "pi05"), state_prompt="none")
    arrays = golden("pi05")
    frame = observation(arrays)
    assert vla.processor.state_dim is None
    ids = vla.processor.prompt(replace(frame, proprio=None)).ids
    assert list(ids) == list(vla.processor.prompt(frame).ids) == [2, *vla.encode("pick up the black bowl\n")[1:]]
    answers = [session_of(vla, arrays).act(each) for each in (frame, replace(frame, proprio=None))]
    np.testing.assert_array_equal(*answers)


def test_bad_frames_are_refused(folder: Path, family: str) -> None:
    vla, frame = load_vla(folder), observation(golden(family))
    session = CachedVLA(vla).session()
    session.act(frame)
    for bad, message in (
        (replace(frame, proprio=None), "needs 5 values in Frame.proprio, got none"),
        (replace(frame, proprio=np.zeros(6)), "needs 5 values in Frame.proprio, got 6"),
        (replace(frame, instruction="bowl " * 300), "more than"),
    ):
        with pytest.raises(InputError, match=message):
            session.act(bad)
    session.act(frame)
    session.reset()
    with pytest.raises(InputError, match="needs the cameras"):
        session.act(Frame({"other": frame.images["base_0_rgb"]}, "go", frame.proprio))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_is_loaded(family: str, tmp_path: Path, dtype: torch.dtype, frame: Frame) -> None:
    """In LeRobot's names; the tokenizer of random models is no file's."""
    vla = random_vla(f"{family}-tiny", seed=3)
    save_vla(vla, tmp_path, dtype=dtype)
    again = load_vla(tmp_path, encode=vla.encode)
    official = set(json.loads((GOLDENS / family / "keys.json").read_text()))
    written = {key for key in load_file(tmp_path / "model.safetensors") if "layers." not in key}
    assert written == {key for key in official if "layers." not in key and "lm_head" not in key}
    assert again.family == family
    expected, found = (CachedVLA(each).session().act(frame) for each in (vla, again))
    assert expected.shape == (4, 7)
    np.testing.assert_allclose(found, expected, atol=1e-6 if dtype == torch.float32 else 0.1)


def test_bfloat16_is_close_and_keeps_what_is_around_the_expert(folder: Path, family: str) -> None:
    arrays = golden(family)
    vla = load_vla(folder, dtype="bfloat16")
    kept = {name for name, weight in vla.module.named_parameters() if weight.dtype == torch.float32}
    assert {name.split(".")[0] for name in kept if "norm" not in name} == {
        name for name, _ in vla.module.named_children() if name.startswith(("action", "time", "state"))
    }
    assert not any("vision" in name for name in kept)
    session = session_of(vla, arrays)
    session.act(observation(arrays))
    assert np.abs(np.asarray(chunk(session)) - arrays["chunk_normalised"]).max() < 0.15


@pytest.mark.parametrize(("name", "billions"), [("pi0", 3.24), ("pi05", 3.35)])
def test_real_sizes(name: str, billions: float) -> None:
    """4.03 and 4.14 billion less the unused output matrices (0.527 + 0.263)."""
    vla = random_vla(name, device="meta", dtype="bfloat16")
    assert vla.family == name
    assert sum(weight.numel() for weight in vla.module.parameters()) / 1e9 == pytest.approx(billions, abs=0.02)
    assert vla.grids == dict.fromkeys(("base_0_rgb", "left_wrist_0_rgb"), (16, 16))
    assert (vla.n_layers, vla.horizon, vla.decoder.shape.kv_width) == (18, 50, 256)


NAMES = ["shoulder", "elbow", "Left Gripper", "wrist"]


@pytest.mark.parametrize(
    ("step", "moved"),
    [
        ({"enabled": False, "exclude_joints": ["gripper"], "action_names": NAMES}, [0, 0, 0, 0]),
        ({"enabled": True, "exclude_joints": ["gripper"], "action_names": NAMES}, [1, 1, 0, 1]),
        ({"enabled": True, "exclude_joints": [], "action_names": NAMES}, [1, 1, 1, 1]),
        ({"enabled": True, "exclude_joints": ["gripper"], "action_names": None}, [1, 1, 1, 1]),
        ({"enabled": True, "exclude_joints": ["elbow"], "action_names": NAMES[:2]}, [1, 0, 1, 1]),
    ],
)
def test_relative_actions(folder: Path, family: str, tmp_path: Path, step: dict[str, Any], moved: list[int]) -> None:
    """The state is added to what the statistics make of the chunk, but for excluded joints; and taken from targets."""
    file = folder / "policy_preprocessor.json"
    data = json.loads(file.read_text())
    for each in data["steps"]:
        if each["registry_name"] == "relative_actions_processor":
            each["config"] = step
    file.write_text(json.dumps(data))
    arrays, vla = golden(family), load_vla(folder)
    expected = arrays["chunk"] + arrays["state"][:4] * np.array(moved)
    close(session_of(vla, arrays).act(observation(arrays)), expected)
    save_vla(vla, tmp_path / "again", dtype=torch.float32)
    close(session_of(load_vla(tmp_path / "again"), arrays).act(observation(arrays)), expected)
    states = np.repeat(arrays["state"][None], 2, axis=0)
    targets = vla.head.with_states(vla.head.targets(np.stack([expected, expected])), states)
    close(targets[:, -40:].reshape(2, 10, 4)[1], arrays["chunk_normalised"])


def test_relative_actions_need_a_state_as_long(folder: Path) -> None:
    change(
        folder / "config.json",
        input_features={
            "observation.images.a": {"type": "VISUAL", "shape": [3, 56, 56]},
            "observation.state": {"type": "STATE", "shape": [3]},
        },
    )
    file = next(folder.glob("policy_preprocessor*.safetensors"))
    save_file({key: value[:3].clone() for key, value in load_file(file).items()}, file)
    load_vla(folder)
    with pytest.raises(CheckpointError, match="cannot be relative to a state of 3"):
        load_vla(folder, relative_actions=4)


def write_openpi(folder: Path, family: str, assets: tuple[str, ...] = ("libero",)) -> Path:
    """The golden weights as openpi's converter writes them."""
    folder.mkdir()
    own = {"action_dim": 32, "action_horizon": 10, "precision": "float32"}
    variants = {"paligemma_variant": "gemma_2b", "action_expert_variant": "gemma_300m"}
    (folder / "config.json").write_text(json.dumps({**own, **variants, "vision_heads": 4}))
    (folder / "tokenizer.json").write_bytes((GOLDENS / family / "tokenizer.json").read_bytes())
    tensors = weights(family)
    kept = {key.removeprefix("model."): value for key, value in tensors.items() if "lm_head" not in key}
    save_file(kept, folder / "model.safetensors")
    statistics = load_file(next((GOLDENS / family).glob("policy_pre*.safetensors")))
    found = {
        "state": {name: statistics[f"observation.state.{name}"].tolist() for name in ("mean", "std", "q01", "q99")},
        "actions": {name: statistics[f"action.{name}"].tolist() for name in ("mean", "std", "q01", "q99")},
    }
    for name in assets:
        (folder / "assets" / name).mkdir(parents=True)
        (folder / "assets" / name / "norm_stats.json").write_text(json.dumps({"norm_stats": found}))
    return folder


def test_openpi(tmp_path: Path, family: str) -> None:
    """The same model, but for 1e-6 in the statistics; pictures that need no resizing show it."""
    folder = write_openpi(tmp_path / "tiny", family)
    arrays, cameras = golden(family), ("base_0_rgb", "left_wrist_0_rgb")
    vla = load_vla(folder, cameras=cameras)
    assert vla.family == family
    assert load_vla(folder).grids == dict.fromkeys((*cameras, "right_wrist_0_rgb"), (4, 4))
    pictures = [((picture + 1) * 127.5).round().astype(np.uint8).transpose(1, 2, 0) for picture in arrays["pixels"]]
    frame = Frame(dict(zip(cameras, pictures, strict=False)), "pick up the\nblack_bowl", arrays["state"])
    lerobot = load_vla(write(tmp_path / "lerobot", family))
    ours, theirs = (session_of(each, arrays) for each in (vla, lerobot))
    if family == "pi0":  # in LeRobot as it stands, in openpi without underscore and line break
        cleaned = replace(frame, instruction="pick up the black bowl")
        assert vla.processor.prompt(frame).ids == lerobot.processor.prompt(cleaned).ids
        np.testing.assert_allclose(ours.act(frame), theirs.act(cleaned), atol=1e-4)
    else:
        np.testing.assert_allclose(ours.act(frame), theirs.act(frame), atol=1e-4)
    std = load_file(next((GOLDENS / family).glob("policy_post*.safetensors")))
    span = std["action.std"] if family == "pi0" else std["action.q99"] - std["action.q01"]
    np.testing.assert_allclose(vla.config.normalization.units("action", 4).factor, span + 1e-6, rtol=1e-7)
    moved = session_of(load_vla(folder, cameras=cameras, relative_actions=3), arrays).act(frame)
    np.testing.assert_allclose(moved - session_of(vla, arrays).act(frame), [[*arrays["state"][:3], 0]] * 10, atol=1e-5)


def test_openpis_pictures(tmp_path: Path, family: str) -> None:
    """Shrunk with antialiasing: stripes of one pixel become grey; black around, in the middle."""
    vla = load_vla(write_openpi(tmp_path / "tiny", family), cameras=("base_0_rgb",))
    stripes = np.zeros((112, 224, 3), np.uint8)
    stripes[:, ::2] = 255
    image = vla.processor.images(Frame({"base_0_rgb": stripes}, "go"))["base_0_rgb"]
    assert not image[:14].any()
    assert not image[42:].any()
    assert np.abs(image[14:42].astype(int) - 127).max() < 12


def test_openpis_statistics(tmp_path: Path, family: str) -> None:
    folder = write_openpi(tmp_path / "tiny", family, ("droid", "some/libero"))
    with pytest.raises(InputError, match=r"unnorm_key is missing: choose one of \['droid', 'some/libero'\]"):
        load_vla(folder)
    load_vla(folder, unnorm_key="some/libero")
    file = folder / "assets" / "droid" / "norm_stats.json"
    file.write_text(json.dumps({"norm_stats": {"state": {}, "actions": {}}}))
    with pytest.raises(CheckpointError, match="statistics"):
        load_vla(folder, unnorm_key="droid")
    for each in folder.rglob("norm_stats.json"):
        each.unlink()
    with pytest.raises(CheckpointError, match=r"holds no norm_stats\.json"):
        load_vla(folder)
