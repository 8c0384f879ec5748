"""CogACT as a whole: its official checkpoints, whole and broken; its prompt, actions and chance."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.heads import decode
from torch.torch_version import TorchVersion

from lac_vla import VLA, CachedVLA, Dense, Random, load_vla, random_vla, save_vla
from lac_vla.errors import CheckpointError, InputError
from lac_vla.models.cogact.build import build_cogact
from lac_vla.models.cogact.config import COGACT_7B, TINY_COGACT, CogACTConfig, head_config, vlm_config
from lac_vla.models.heads.diffusion import DiffusionHead, DiffusionModel
from lac_vla.models.heads.dit import DIT, DiTConfig
from lac_vla.models.heads.sampler import Sampling
from lac_vla.models.tokenizer import FileTokenizer, train_tokenizer
from lac_vla.types import Frame

Weights = dict[str, torch.Tensor]
Parts = dict[str, Any]
Write = Callable[..., Path]
STATS = {"demo": {"action": {"q01": [-2.0] * 7, "q99": [4.0] * 7, "mask": [True] * 6 + [False]}}}


def official(name: str) -> tuple[str, str]:
    """OpenVLA's name of a tensor → CogACT's part and name."""
    part, rest = name.split(".", 1)
    if part == "vision_backbone":
        tower, rest = rest.split(".", 1)
        tower = {"featurizer": "dino_featurizer", "fused_featurizer": "siglip_featurizer"}[tower]
        return part, f"{tower}.{rest.replace('scale_factor', 'gamma')}"
    if part == "projector":
        layer, kind = rest.split(".")
        return part, f"projector.{2 * int(layer.removeprefix('fc')) - 2}.{kind}"
    return "llm_backbone", f"llm.{rest}"


@pytest.fixture(scope="module")
def parts(golden_weights: Weights, fill_head: Callable[..., torch.Tensor]) -> Parts:
    """What an official file holds under ``model``: the golden VLM, a small head, an averaged copy of it."""
    parts: Parts = {"vision_backbone": {}, "projector": {}, "llm_backbone": {}}
    for name, weight in golden_weights.items():
        part, key = official(name)
        parts[part][key] = weight
    shapes = {
        key: list(weight.shape) for key, weight in DiffusionModel(DiTConfig(24, 2, 2, condition=32)).named_parameters()
    }
    shapes |= {"net.history_embedder.linear.weight": [24, 7], "net.history_embedder.linear.bias": [24]}
    parts["action_model"] = {key: fill_head(key, shape) for key, shape in shapes.items()}
    parts["ema_diffusion"] = dict(parts["action_model"])
    return parts


@pytest.fixture
def write(checkpoint: Path, tmp_path: Path) -> Write:
    """Write a run's folder. Its VLM and heads are spelt out, since the published are large."""
    vlm = json.loads((checkpoint / "config.json").read_text())

    def write(content: object, *, stats: object = STATS, heads: int = 2, **config: Any) -> Path:
        folder = tmp_path / "run"
        (folder / "checkpoints").mkdir(parents=True)
        data: dict[str, Any] = {"vla": {"base_vlm": "tiny"}, "vlm": vlm, "action_model": {"heads": heads}}
        (folder / "config.json").write_text(json.dumps(data | config))
        (folder / "dataset_statistics.json").write_text(json.dumps(stats))
        torch.save(content, folder / "checkpoints" / "step-1.pt")
        return folder

    return write


def encode(text: str) -> list[int]:
    """In place of a tokenizer."""
    return [1, 5, 6]


def load(folder: Path, **options: Any) -> VLA:
    vla = load_vla(folder, **{"encode": encode, **options})
    assert vla.family == "cogact"
    return vla


def head_of(vla: VLA) -> DiffusionHead:
    assert isinstance(vla.head, DiffusionHead)
    return vla.head


# Checkpoints.


def test_weights_are_those_of_the_file(parts: Parts, golden_weights: Weights, write: Write) -> None:
    vla = load(write({"model": parts}))
    state = vla.module.state_dict()
    for key, weight in state.items():
        head = key.removeprefix("action_model.")
        assert torch.equal(weight, parts["action_model"][head] if head != key else golden_weights[key])
    assert any("scale_factor" in key for key in state)
    assert (vla.name, vla.module.training) == ("run", False)


@torch.inference_mode()
def test_what_it_sees_is_what_the_official_code_sees(
    parts: Parts, golden: dict[str, np.ndarray[Any, Any]], write: Write
) -> None:
    projected = load(write({"model": parts})).encode_image(Frame({"agentview": golden["image"]}, "golden"))
    np.testing.assert_allclose(projected.numpy(), golden["projector"], rtol=1e-4, atol=1e-5)


def test_the_head_stays_in_single_precision(parts: Parts, frame: Frame, write: Write) -> None:
    folder = write({"model": parts})
    for vla in (load(folder, dtype=torch.bfloat16), random_vla(TINY_COGACT, dtype=torch.bfloat16)):
        assert vla.dtype == torch.bfloat16
        assert {weight.dtype for weight in vla.module.action_model.parameters()} == {torch.float32}
        assert {weight.dtype for weight in vla.module.language_model.parameters()} == {torch.bfloat16}
        assert np.isfinite(CachedVLA(vla).session().act(frame)).all()


def test_the_file_is_not_needed_after_loading(parts: Parts, frame: Frame, write: Write) -> None:
    folder = write({"model": parts})
    vla = load(folder)
    file = folder / "checkpoints" / "step-1.pt"
    file.write_bytes(bytes(file.stat().st_size))
    assert torch.equal(
        vla.module.action_model.net.positional_embedding, parts["action_model"]["net.positional_embedding"]
    )


class Exploit:
    """Unpickling it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("new_format", [True, False])
def test_nothing_but_tensors_is_unpickled(parts: Parts, tmp_path: Path, write: Write, new_format: bool) -> None:
    folder, trace = write(None), tmp_path / "trace"
    content = {"model": parts, "config": Exploit(trace)}
    torch.save(content, folder / "checkpoints" / "step-1.pt", _use_new_zipfile_serialization=new_format)
    with pytest.raises(CheckpointError, match="more than tensors" if new_format else "no file of torch"):
        load(folder)
    assert not trace.exists()


def test_torch_whose_restriction_is_broken_is_refused(
    parts: Parts, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.5.1"))
    with pytest.raises(CheckpointError, match=r"torch ≥ 2\.6, this is 2\.5\.1"):
        load(write({"model": parts}))


def without(part: str, key: str) -> Callable[[Parts], object]:
    return lambda parts: parts[part].pop(key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("projector", "projector.4.bias"), r"1 missing: projector\.fc3\.bias"),
        (without("action_model", "net.t_embedder.mlp.2.bias"), r"1 missing: action_model\.net\.t_embedder"),
        (lambda p: p.pop("vision_backbone"), r"missing: vision_backbone"),
        (lambda p: p.pop("action_model"), "no CogACT action head"),
        (lambda p: p["action_model"].update({"net.positional_embedding": torch.ones(17)}), "of another shape"),
        (lambda p: p["action_model"].update({"net.x_embedder.linear.weight": torch.ones(3)}), "no CogACT action head"),
        (lambda p: p["llm_backbone"].update({"llm.lm_head.weight": torch.ones(2, 2)}), r"lm_head\.weight \(2, 2\)"),
        (lambda p: p.update(cross_attention={"weight": torch.ones(2)}), r"1 unexpected: cross_attention\.weight"),
        (lambda p: p.update(projector=[1]), "no state dicts"),
        (lambda p: p["projector"].update(extra=3), "extra is a int, not a tensor"),
        (lambda p: p["action_model"].update({"net.z_embedder.linear.weight": torch.ones(24, 16)}), "width 16"),
    ],
)
def test_weights_of_another_model(parts: Parts, write: Write, change: Callable[[Parts], object], message: str) -> None:
    changed = {part: dict(state) for part, state in parts.items()}
    change(changed)
    with pytest.raises(CheckpointError, match=message):
        load(write({"model": changed}))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"vlm": None}, "base_vlm is 'tiny'; only 'prism-dinosiglip-224px"),
        ({"vlm": None, "vla": "x"}, "base_vlm is None"),
        ({"action_model": None}, "action head of width 24, none of the published"),
        ({"heads": 5}, "no multiple of 5 heads"),
        ({"sampling": {"speed": 3}}, "does not describe a CogACT model"),
        ({"gripper": [1]}, "does not describe a CogACT model"),
        ({"gripper": [1, 1]}, "closed and open must differ"),
        ({"ensemble": 17}, "give 1 to 16"),
        ({"stats": {"demo": {"action": {"q01": [0.0] * 6, "q99": [1.0] * 6}}}}, "statistics of 6 .* head of 7"),
        ({"stats": []}, "holds no JSON object"),
    ],
)
def test_configurations_that_make_no_sense(parts: Parts, write: Write, config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(write({"model": parts}, **config))


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {}}, {"model": {}}])
def test_files_of_something_else(write: Write, content: object) -> None:
    with pytest.raises(CheckpointError, match=r"another model family|not the dictionary"):
        load(write(content))


def test_damaged_and_missing_files(parts: Parts, write: Write) -> None:
    folder = write({"model": parts})
    file = folder / "checkpoints" / "step-1.pt"
    second = file.with_name("step-2.pt")
    second.write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match=r"just one .*: step-1\.pt, step-2\.pt"):
        load(folder)
    second.unlink()
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 100)
    with pytest.raises(CheckpointError, match="truncated"):
        load(folder)
    file.unlink()
    with pytest.raises(CheckpointError, match="found: none"):
        load(folder)
    (folder / "dataset_statistics.json").unlink()
    with pytest.raises(CheckpointError, match="dataset_statistics"):
        load(folder)


def test_options_that_do_not_fit(parts: Parts, write: Write) -> None:
    folder = write({"model": parts})
    for options, message in (
        ({"unnorm_key": "other"}, r"unknown unnorm_key 'other': choose one of \['demo'\]"),
        ({"cameras": ["a", "b"]}, "1 camera"),
        ({"image_pipeline": "magic"}, "magic"),
    ):
        with pytest.raises(InputError, match=message):
            load(folder, **options)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        load_vla(folder)


@pytest.mark.parametrize("name", DIT)
def test_published_runs_are_understood(name: str) -> None:
    """An official config.json names its VLM; which head it is, the weights tell."""
    vlm = vlm_config({"vla": {"base_vlm": "prism-dinosiglip-224px+7b"}, "seed": 42}, COGACT_7B.vlm.norm_stats)
    with torch.device("meta"):
        head = DiffusionModel(DIT[name])
    shapes = {f"action_model.{key}": tuple(weight.shape) for key, weight in head.named_parameters()}
    assert CogACTConfig(vlm, head_config({}, shapes)) == replace(COGACT_7B, head=DIT[name])


def test_runs_on_the_hub_are_downloaded_with_their_weights(
    parts: Parts, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    folder = write({"model": parts})

    def download(hub_id: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr("lac_vla.hub.snapshot_download", download)
    assert load("CogACT/CogACT-Tiny").name == "CogACT-Tiny"  # type: ignore[arg-type]
    assert "checkpoints/*.pt" not in asked[0]  # not of a family that has none
    assert "checkpoints/*.pt" in asked[-1]


# The prompt, the actions, and chance.


@pytest.fixture(scope="module")
def vla() -> VLA:
    return random_vla(TINY_COGACT, seed=2)


def test_the_prompt_ends_with_the_cognition_token() -> None:
    assert COGACT_7B.prompt_end == (29871, 2)
    seen: list[str] = []

    def remember(text: str) -> list[int]:
        seen.append(text)
        return [1, 5, 6]

    module = random_vla(TINY_COGACT).module
    ended = build_cogact(replace(TINY_COGACT, prompt_end=(9, 2)), module, remember)
    prompt = ended.processor.prompt(Frame({name: np.zeros((48, 48, 3), np.uint8) for name in ended.grids}, "Pick Up"))
    embedding = module.language_model.get_input_embeddings().weight
    assert torch.equal(ended.processor.embed(prompt)[1], embedding[[5, 6, 9, 2]])
    assert prompt.layout.n_suffix == 4
    assert seen == ["pick up"]
    assert COGACT_7B.vlm.prompt_template.startswith("In: What action should the robot take to {instruction}?\nOut:")


@torch.inference_mode()
def test_actions_come_from_the_last_hidden_state_alone(vla: VLA, frame: Frame) -> None:
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))

    def act(rows: torch.Tensor, seed: int = 0) -> np.ndarray[Any, Any]:
        return decode(vla, frame, rows, seed=seed)[0]

    actions = act(hidden)
    assert (actions.shape, actions.dtype) == ((16, 7), np.float32)
    np.testing.assert_array_equal(act(hidden[-1:]), actions)
    assert not np.array_equal(act(hidden + torch.eye(5)[-1][:, None]), actions)
    assert not np.array_equal(act(hidden, seed=1), actions)


@torch.inference_mode()
def test_units_and_gripper(frame: Frame) -> None:
    """Clipped to [-1, 1]; the gripper is 0 or 1, split at 0.5, and not scaled."""
    vla = random_vla(replace(TINY_COGACT, vlm=replace(TINY_COGACT.vlm, norm_stats=STATS)))
    drawn = torch.zeros(1, 16, 7)
    drawn[0, 0] = torch.tensor([0.0, 0.5, -1.0, 1.0, 7.0, -7.0, 0.5])
    drawn[0, 1, -1] = 0.49
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vla.module.action_model, "sample", lambda *_: drawn)
        actions, metadata = decode(vla, frame, torch.zeros(1, 32))
    np.testing.assert_allclose(actions[0], [1.0, 2.5, -2.0, 4.0, 4.0, -2.0, 1.0])
    np.testing.assert_allclose(metadata["normalized"][0], [0, 0.5, -1, 1, 1, -1, 1])
    assert actions[1, -1] == 0


OURS = replace(
    TINY_COGACT,
    vlm=replace(TINY_COGACT.vlm, norm_stats=STATS, proprio_dim=None),
    prompt_end=(2,),
    sampling=Sampling(steps=5, guidance=2.0),
    gripper=(1.0, -1.0),
    ensemble=3,
)


@torch.inference_mode()
def test_a_gripper_in_other_units(frame: Frame) -> None:
    """1 closes, −1 opens: there and back."""
    vla = random_vla(OURS)
    actions = head_of(vla).unnormalize_actions([[0.0] * 6 + [0.0], [0.5] * 6 + [1.0]])
    np.testing.assert_allclose(actions, [[1.0] * 7, [2.5] * 6 + [-1.0]])
    np.testing.assert_allclose(head_of(vla).normalize_actions(actions), [[0.0] * 7, [0.5] * 6 + [1.0]])
    chunk, metadata = decode(vla, frame, torch.randn(1, 32))
    np.testing.assert_array_equal(chunk[:, 6], 1 - 2 * np.array(metadata["normalized"])[:, 6])


def test_what_we_write_is_read_back(frame: Frame, tmp_path: Path) -> None:
    encode = FileTokenizer(train_tokenizer(["pick up the bowl"], 259))
    vla = build_cogact(OURS, random_vla(OURS).module, encode)
    save_vla(vla, tmp_path, dtype=torch.float32)
    found = load_vla(tmp_path)
    assert (found.family, found.config, found.ensemble) == ("cogact", OURS, 3)
    assert found.encode("pick up") == encode("pick up")
    expected = CachedVLA(vla).session().act(frame)
    np.testing.assert_array_equal(CachedVLA(found).session().act(frame), expected)
    half = load_vla(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert {weight.dtype for weight in half.module.action_model.parameters()} == {torch.float32}
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        load_vla(tmp_path)


def test_noise_is_the_sessions_own(vla: VLA, frame: Frame) -> None:
    """The same seed draws the same chunks, whatever the policy draws beside; another seed draws others."""

    def chunks(policy: Dense | Random, seed: int) -> list[Any]:
        session = CachedVLA(vla, policy).session(seed)
        first = [session.act(frame) for _ in range(3)]
        session.reset()
        np.testing.assert_array_equal([session.act(frame) for _ in range(3)], first)
        return first

    dense = chunks(Dense(), 1)
    np.testing.assert_allclose(chunks(Random(0.5), 1), dense, atol=1e-4)  # an unchanged frame: reuse is exact
    assert not np.allclose(dense[0], dense[1], atol=1e-3)
    assert not np.allclose(chunks(Dense(), 2)[0], dense[0], atol=1e-3)


def test_sampling_can_be_chosen(frame: Frame) -> None:
    vla = random_vla(TINY_COGACT, seed=2)
    drawn = []
    for sampling in (Sampling(), Sampling(guidance=3.0), Sampling(steps=5), Sampling("ddpm")):
        head_of(vla).sampling = sampling
        drawn.append(CachedVLA(vla).session().act(frame))
    for i, chunk in enumerate(drawn):
        assert all(not np.allclose(chunk, other, atol=1e-4) for other in drawn[:i])
