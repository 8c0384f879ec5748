"""Our model, loaded from an official checkpoint, against outputs of the official code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.heads import decode

from lac_vla import VLA, CachedVLA, load_vla
from lac_vla.models.heads.base import AppendRows
from lac_vla.types import Frame

Arrays = dict[str, np.ndarray[Any, Any]]
PROMPTS = ("short", "longer")


def load(folder: Path, golden: Arrays, prompt: str = "short", **options: Any) -> VLA:
    """Load with the golden token ids in place of a tokenizer."""
    ids: list[int] = golden[f"{prompt}.ids"][0].tolist()
    return load_vla(folder, encode=lambda text: ids, **options)


def observation(golden: Arrays) -> Frame:
    """The golden image; the instruction is not used."""
    return Frame({"agentview": golden["image"]}, "golden")


def prompt_embeddings(vla: VLA, frame: Frame) -> torch.Tensor:
    """(1, length, width)."""
    prefix, suffix = vla.processor.embed(vla.processor.prompt(frame))
    return torch.cat([prefix, vla.encode_image(frame), suffix])[None]


@pytest.mark.parametrize("pipeline", ["resize-naive", "letterbox"])
def test_pixel_values(checkpoint: Path, golden: Arrays, pipeline: str) -> None:
    vla = load(checkpoint, golden, image_pipeline=pipeline)
    pixels = torch.tensor(vla.processor.images(observation(golden))["agentview"])[None]
    values = vla.module.vision_backbone.normalize(pixels)[0].numpy()
    expected = golden[f"pixel_{pipeline.replace('-', '_')}"].astype(np.float32)
    np.testing.assert_allclose(values, expected, rtol=2**-11, atol=1e-6)  # float16 holds 11 bits


@torch.inference_mode()
@pytest.mark.parametrize("layout", ["checkpoint", "sharded"])
def test_projected_features(request: pytest.FixtureRequest, golden: Arrays, layout: str) -> None:
    vla = load(request.getfixturevalue(layout), golden)
    projected = vla.encode_image(observation(golden))
    np.testing.assert_allclose(projected.numpy(), golden["projector"], rtol=1e-4, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("prompt", PROMPTS)
def test_logits(checkpoint: Path, golden: Arrays, prompt: str) -> None:
    vla = load(checkpoint, golden, prompt)
    logits = vla.module.language_model(inputs_embeds=prompt_embeddings(vla, observation(golden))).logits[0]
    for name, row in (("logits_last", -1), ("logits_row_128", 128)):
        np.testing.assert_allclose(logits[row].numpy(), golden[f"{prompt}.{name}"], rtol=1e-4, atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_tokens_and_action(checkpoint: Path, golden: Arrays, prompt: str) -> None:
    vla = load(checkpoint, golden, prompt, unnorm_key="demo")
    stock, frame = vla.module.language_model.model, observation(golden)
    sequence = prompt_embeddings(vla, frame)

    def last_hidden() -> torch.Tensor:
        hidden: torch.Tensor = stock(inputs_embeds=sequence).last_hidden_state[0]
        return hidden

    def extend(rows: AppendRows) -> torch.Tensor:
        nonlocal sequence
        sequence = torch.cat([sequence, rows.embeddings[None]], dim=1)
        return last_hidden()[-len(rows.embeddings) :]

    action, metadata = decode(vla, frame, last_hidden()[-vla.processor.prompt(frame).layout.n_suffix :], extend)
    assert metadata["tokens"] == golden[f"{prompt}.gen"].tolist()
    assert action.dtype == np.float32
    np.testing.assert_allclose(action, golden[f"{prompt}.action"], rtol=1e-6)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_sessions_action(checkpoint: Path, golden: Arrays, prompt: str) -> None:
    session = CachedVLA(load(checkpoint, golden, prompt, unnorm_key="demo")).session()
    np.testing.assert_allclose(session.act(observation(golden)), golden[f"{prompt}.action"], rtol=1e-6)
    assert session.last_info is not None
    assert session.last_info.metadata["tokens"] == golden[f"{prompt}.gen"].tolist()


def test_layout_is_bos_patches_text(checkpoint: Path, golden: Arrays) -> None:
    layout = load(checkpoint, golden, "longer").processor.prompt(observation(golden)).layout
    assert (layout.n_prefix, layout.grids, layout.n_suffix) == (1, {"agentview": (16, 16)}, 20)
