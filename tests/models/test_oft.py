"""OpenVLA-OFT, loaded from its official layout, against outputs of the official code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.models.oft_folder import Arrays, Fill, aloha_frame, golden, libero_frame, load_oft, part_of, write_oft

from lac_vla import VLA, CachedVLA, Frame, Random
from lac_vla.models.llama import LlamaDecoder
from lac_vla.models.protocols import PromptInputs
from lac_vla.sims.libero.env import openvla_gripper
from lac_vla.types import FloatArray

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def libero() -> Arrays:
    return golden("libero")[0]


@pytest.fixture(scope="module")
def aloha() -> Arrays:
    return golden("aloha")[0]


@pytest.fixture(scope="module")
def l1_folder(tmp_path_factory: pytest.TempPathFactory, golden_weights: Weights, fill: Fill) -> Path:
    return write_oft(tmp_path_factory.mktemp("l1"), golden_weights, fill)


@pytest.fixture(scope="module")
def l1(l1_folder: Path, libero: Arrays) -> VLA:
    return load_oft(l1_folder, libero["input_ids"])


@pytest.fixture(scope="module")
def discrete(tmp_path_factory: pytest.TempPathFactory, golden_weights: Weights, fill: Fill, libero: Arrays) -> VLA:
    folder = write_oft(tmp_path_factory.mktemp("discrete"), golden_weights, fill, parts=())
    return load_oft(folder, libero["input_ids"], proprio=False)


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory: pytest.TempPathFactory, golden_weights: Weights, fill: Fill, libero: Arrays) -> VLA:
    parts = ("diffusion", "proprio_projector", "noisy_action_projector")
    folder = write_oft(tmp_path_factory.mktemp("diffusion"), golden_weights, fill, parts=parts)
    return load_oft(folder, libero["input_ids"])


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory, golden_weights: Weights, fill: Fill, aloha: Arrays) -> VLA:
    parts = ("action_head", "proprio_projector", "vision_backbone")
    folder = write_oft(tmp_path_factory.mktemp("film"), golden_weights, fill, "aloha", parts)
    return load_oft(folder, aloha["input_ids"], "aloha")


def act(vla: VLA, frame: Frame) -> tuple[FloatArray, dict[str, Any], torch.Tensor]:
    """Action, what the head says of it, and the hidden states of the suffix, of a whole session's frame."""
    session, seen = CachedVLA(vla).session(), []
    head, decode = vla.head, vla.head.decode
    head.decode = lambda context: (seen.append(context.hidden), decode(context))[1]  # type: ignore[method-assign,func-returns-value]
    try:
        action = session.act(frame)
    finally:
        del head.decode
    assert session.last_info is not None
    return action, dict(session.last_info.metadata), seen[0]


@torch.inference_mode()
def sequence(vla: VLA, frame: Frame) -> torch.Tensor:
    prefix, suffix = vla.processor.embed(vla.processor.prompt(frame))
    return torch.cat([prefix, vla.encode_image(frame), suffix])


def test_libero_l1(l1: VLA, libero: Arrays) -> None:
    frame = libero_frame(libero)
    action, metadata, hidden = act(l1, frame)
    np.testing.assert_allclose(sequence(l1, frame).numpy(), libero["sequence"], **CLOSE)
    np.testing.assert_allclose(hidden.numpy(), libero["hidden_last"][513:], **CLOSE)
    rows = l1.head.rows(hidden)  # type: ignore[attr-defined]
    np.testing.assert_allclose(rows.numpy(), libero["action_hidden"], **CLOSE)
    np.testing.assert_allclose(metadata["normalized"], libero["l1.normalized"], **CLOSE)
    np.testing.assert_allclose(action, libero["l1.action"], **CLOSE)
    assert (action.shape, action.dtype, l1.horizon) == ((8, 7), np.float32, 8)


def test_features_and_state(l1: VLA, libero: Arrays) -> None:
    frame = libero_frame(libero)
    with torch.inference_mode():
        np.testing.assert_allclose(l1.encode_image(frame).numpy(), libero["projector"], **CLOSE)
        stem = l1.vision.encode_stem(frame, l1.processor.images(frame))
        np.testing.assert_allclose(l1.vision.encode_tokens(stem)[::8].numpy(), libero["features_8"], **CLOSE)
    prompt = l1.processor.prompt(frame)
    np.testing.assert_allclose(prompt.state, libero["state.normalized"], atol=1e-6)
    _, suffix = l1.processor.embed(prompt)
    np.testing.assert_allclose(suffix[0].detach().numpy(), libero["proprio_token"], **CLOSE)


def test_extremes_in_place_of_quantiles(l1_folder: Path, libero: Arrays) -> None:
    vla = load_oft(l1_folder, libero["input_ids"], bounds="minmax")
    prompt = vla.processor.prompt(libero_frame(libero))
    np.testing.assert_allclose(prompt.state, libero["state.normalized_minmax"], atol=1e-6)
    action = vla.head.unnormalize_actions(libero["l1.normalized"])  # type: ignore[attr-defined]
    np.testing.assert_allclose(action, libero["l1.action_minmax"], **CLOSE)


def test_discrete(discrete: VLA, libero: Arrays) -> None:
    action, metadata, hidden = act(discrete, libero_frame(libero, state=False))
    rows = discrete.head.rows(hidden)  # type: ignore[attr-defined]
    with torch.inference_mode():
        logits = discrete.head.logits(rows)[:, 31744:32000:16]  # type: ignore[attr-defined]
    np.testing.assert_allclose(logits.numpy(), libero["discrete.logits_16"], **CLOSE)
    assert metadata["tokens"] == libero["discrete.tokens"].tolist()
    np.testing.assert_allclose(action, libero["discrete.action"], **CLOSE)


def test_one_camera_without_proprioception(golden_weights: Weights, fill: Fill, libero: Arrays, tmp_path: Path) -> None:
    folder = write_oft(tmp_path, golden_weights, fill, parts=("action_head",))
    options = {"chunk": 8, "bounds": "q99", "cameras": ["agentview"], "proprio": False}
    vla = load_oft(folder, libero["input_ids"], None, **options)
    action, _, _ = act(vla, libero_frame(libero, state=False))
    np.testing.assert_allclose(action, libero["one_image.action"], **CLOSE)


class GoldenNoise:
    """In place of a generator."""

    def __init__(self, noise: np.ndarray[Any, Any]) -> None:
        self.noise, self.draws = noise, 0
        self.bit_generator = self

    @property
    def state(self) -> dict[str, int]:
        return {"draws": self.draws}

    def standard_normal(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
        assert shape == self.noise.shape
        self.draws += 1
        return self.noise.copy()


@pytest.mark.parametrize("steps", [50, 10])
def test_diffusion(diffusion: VLA, libero: Arrays, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    head: Any = diffusion.head
    monkeypatch.setattr(head, "steps", steps)
    session = CachedVLA(diffusion).session()
    session._head_rng = noise = GoldenNoise(libero["diffusion.noise"])  # type: ignore[assignment]
    suffixes, predicted = [], []
    put, predict = head.put, head.model.forward
    monkeypatch.setattr(head, "put", lambda *args, **kwargs: suffixes.append(put(*args, **kwargs)) or suffixes[-1])
    monkeypatch.setattr(head.model, "forward", lambda rows: predicted.append(predict(rows)) or predicted[-1])
    action = session.act(libero_frame(libero))
    np.testing.assert_allclose(action, libero[f"diffusion{steps}.action"], **CLOSE)
    assert session.last_info is not None
    assert session.last_info.prompt_passes == steps
    assert noise.draws == 1  # the first pass looks ahead, and draws from a copy
    if steps == 50:
        np.testing.assert_allclose(predicted[0].numpy(), libero["diffusion.eps_first"], **CLOSE)
        np.testing.assert_allclose(suffixes[0][1].numpy(), libero["diffusion.time_embedding_first"], **CLOSE)
        np.testing.assert_allclose(suffixes[-1][-89:].numpy(), libero["diffusion.sequence_last_step_tail"][1:], **CLOSE)
        np.testing.assert_allclose(head.schedule.alpha_bar, libero["diffusion.alphas_cumprod"], rtol=1e-4)


def test_aloha_with_film(film: VLA, aloha: Arrays) -> None:
    frame = aloha_frame(aloha)
    language = film.processor.language(frame.instruction)  # type: ignore[attr-defined]
    np.testing.assert_allclose(language.detach().numpy(), aloha["film.language_mean"], **CLOSE)
    with torch.inference_mode():
        stem = film.vision.encode_stem(frame, film.processor.images(frame))
        features = film.vision.encode_tokens(stem)
        np.testing.assert_allclose(features[::32].numpy(), aloha["film.features_32"], **CLOSE)
        np.testing.assert_allclose(film.vision.project(features)[::32].numpy(), aloha["projector_32"], **CLOSE)
    prompt = film.processor.prompt(frame)
    np.testing.assert_allclose(prompt.state, aloha["state.normalized"], atol=1e-6)
    np.testing.assert_allclose(sequence(film, frame)[768:792].numpy(), aloha["sequence_tail"], **CLOSE)
    action, metadata, hidden = act(film, frame)
    np.testing.assert_allclose(hidden[7::8].numpy(), aloha["hidden_last_tail_8"][1:], **CLOSE)
    np.testing.assert_allclose(metadata["normalized"], aloha["l1.normalized"], **CLOSE)
    np.testing.assert_allclose(action, aloha["l1.action"], **CLOSE)
    assert action.shape == (25, 14)


def test_gripper_of_libero(libero: Arrays) -> None:
    """Exactly half open is neither."""
    np.testing.assert_array_equal(openvla_gripper(libero["gripper.in"]), libero["gripper.out"])


# The goldens' traps.


def test_causal_attention_is_another_model(l1: VLA, libero: Arrays) -> None:
    causal = replace(l1, decoder=LlamaDecoder(l1.module.language_model))
    action, _, _ = act(causal, libero_frame(libero))
    np.testing.assert_allclose(action, libero["trap.causal_action"], **CLOSE)
    assert np.abs(action - libero["l1.action"]).max() > 0.2


def test_bfloat16_is_off_as_the_official_code_is(l1_folder: Path, libero: Arrays) -> None:
    vla = load_oft(l1_folder, libero["input_ids"], dtype=torch.bfloat16)
    assert {weight.dtype for weight in vla.module.parameters()} == {torch.bfloat16}
    action, _, _ = act(vla, libero_frame(libero))
    assert np.abs(action - libero["l1.action"]).max() < 0.05


@pytest.mark.parametrize("trap", ["late rows", "no stop", "placeholders", "cameras", "no end of prompt"])
def test_traps_are_seen_by_the_goldens(l1: VLA, libero: Arrays, trap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of these ways to be wrong is a long way from the tolerance."""
    vla, frame = l1, libero_frame(libero)
    processor: Any = type(l1.processor)
    embed: Callable[[Any, PromptInputs], tuple[torch.Tensor, torch.Tensor]] = processor.embed
    if trap == "late rows":
        monkeypatch.setattr(vla.head, "n_before", vla.head.n_before - 1)
    elif trap == "no stop":
        monkeypatch.setattr(processor, "embed", lambda *a: (embed(*a)[0], _zeroed(embed(*a)[1], slice(-1, None))))
    elif trap == "placeholders":
        monkeypatch.setattr(
            processor,
            "embed",
            lambda *a: (embed(*a)[0], _filled(embed(*a)[1], l1.decoder.embed([1]))),  # type: ignore[attr-defined]
        )
    elif trap == "cameras":
        images = frame.images
        frame = replace(frame, images={"agentview": images["wrist"], "wrist": images["agentview"]})
    else:
        monkeypatch.setattr(vla.processor, "prompt_ids", lambda text: [int(i) for i in libero["input_ids"]])
    _, metadata, _ = act(vla, frame)
    assert np.abs(np.array(metadata["normalized"]) - libero["l1.normalized"]).max() > 2e-3


def _zeroed(suffix: torch.Tensor, rows: slice) -> torch.Tensor:
    changed = suffix.clone()
    changed[rows] = 0
    return changed


def _filled(suffix: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    changed = suffix.clone()
    changed[-57:-1] = row
    return changed


@torch.inference_mode()
def test_no_mask_is_ever_made(l1: VLA, libero: Arrays, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense and with partial rows: so that the fastest attention kernels apply."""
    masks = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def spy(*args: Any, **options: Any) -> torch.Tensor:
        masks.append((options.get("attn_mask"), options.get("is_causal", False)))
        return attention(*args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    session = CachedVLA(l1, Random(0.5)).session()
    for _ in range(2):
        session.act(libero_frame(libero))
    assert session.last_info is not None
    assert session.last_info.ratio > 0
    assert len(masks) > 6
    assert all(mask is None and not causal for mask, causal in masks)


def test_lora_is_folded_by_its_own_scale(fill: Fill) -> None:
    """Half of B·A for the official rank of 32; in place of it, what the adapter's configuration says."""
    from lac_vla.models.oft.official import film_name, fold_lora

    state = {film_name(key): value for key, value in part_of(fill, "aloha", "vision_backbone").items()}
    name = "vision_backbone.featurizer.blocks.0.attn.qkv"
    base, down, up = (state[f"{name}.{part}.weight"] for part in ("base_layer", "lora_A.default", "lora_B.default"))
    torch.testing.assert_close(fold_lora(state)[f"{name}.weight"], base + 0.5 * up @ down)
    torch.testing.assert_close(fold_lora(state, 64)[f"{name}.weight"], base + 2.0 * up @ down)
    proj = "vision_backbone.featurizer.patch_embed.proj"
    base, down, up = (state[f"{proj}.{part}.weight"] for part in ("base_layer", "lora_A.default", "lora_B.default"))
    expected = base + 0.5 * torch.einsum("or,rchw->ochw", up[..., 0, 0], down)
    torch.testing.assert_close(fold_lora(state)[f"{proj}.weight"], expected)
