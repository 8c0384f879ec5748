"""Our model, loaded from an official checkpoint, against outputs of the official code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lac_vla.models import PrismaticBackbone, load_vla
from lac_vla.types import Frame

Arrays = dict[str, np.ndarray[Any, Any]]
PROMPTS = ("short", "longer")


def load(folder: Path, golden: Arrays, prompt: str = "short", **options: Any) -> PrismaticBackbone:
    """Load with the golden token ids in place of a tokenizer."""
    ids: list[int] = golden[f"{prompt}.ids"][0].tolist()
    backbone = load_vla(folder, encode=lambda text: ids, **options)
    assert isinstance(backbone, PrismaticBackbone)
    return backbone


def look(golden: Arrays) -> Frame:
    """The golden image; the instruction is not used."""
    return Frame({"agentview": golden["image"]}, "golden")


def prompt_embeddings(backbone: PrismaticBackbone, frame: Frame) -> torch.Tensor:
    """(1, length, width)."""
    visual = backbone.project(backbone.see(backbone.pixels(frame)))
    return torch.cat([backbone.prefix(frame), visual, backbone.suffix(frame)])[None]


@pytest.mark.parametrize("pipeline", ["resize-naive", "letterbox"])
def test_pixel_values(checkpoint: Path, golden: Arrays, pipeline: str) -> None:
    backbone = load(checkpoint, golden, image_pipeline=pipeline)
    pixels = torch.tensor(backbone.pixels(look(golden))["agentview"])[None]
    values = backbone.model.vision_backbone.normalize(pixels)[0].numpy()
    expected = golden[f"pixel_{pipeline.replace('-', '_')}"].astype(np.float32)
    np.testing.assert_allclose(values, expected, rtol=2**-11, atol=1e-6)  # float16 holds 11 bits


@torch.inference_mode()
@pytest.mark.parametrize("layout", ["checkpoint", "sharded"])
def test_projected_features(request: pytest.FixtureRequest, golden: Arrays, layout: str) -> None:
    backbone = load(request.getfixturevalue(layout), golden)
    projected = backbone.project(backbone.see(backbone.pixels(look(golden))))
    np.testing.assert_allclose(projected.numpy(), golden["projector"], rtol=1e-4, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("prompt", PROMPTS)
def test_logits(checkpoint: Path, golden: Arrays, prompt: str) -> None:
    backbone = load(checkpoint, golden, prompt)
    logits = backbone.model.language_model(inputs_embeds=prompt_embeddings(backbone, look(golden))).logits[0]
    for name, row in (("logits_last", -1), ("logits_row_128", 128)):
        np.testing.assert_allclose(logits[row].numpy(), golden[f"{prompt}.{name}"], rtol=1e-4, atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_tokens_and_action(checkpoint: Path, golden: Arrays, prompt: str) -> None:
    backbone = load(checkpoint, golden, prompt, unnorm_key="demo")
    decoder, frame = backbone.model.language_model.model, look(golden)
    sequence = prompt_embeddings(backbone, frame)

    def last_hidden() -> torch.Tensor:
        hidden: torch.Tensor = decoder(inputs_embeds=sequence).last_hidden_state[0]
        return hidden

    def extend(embeddings: torch.Tensor, at: int | None = None) -> torch.Tensor:
        nonlocal sequence
        sequence = torch.cat([sequence, embeddings[None]], dim=1)
        return last_hidden()[-len(embeddings) :]

    action, info = backbone.act(frame, last_hidden()[-backbone.layout(frame).n_suffix :], extend)
    assert info["tokens"] == golden[f"{prompt}.gen"].tolist()
    assert action.dtype == np.float32
    np.testing.assert_allclose(action, golden[f"{prompt}.action"], rtol=1e-6)


def test_layout_is_bos_patches_text(checkpoint: Path, golden: Arrays) -> None:
    layout = load(checkpoint, golden, "longer").layout(look(golden))
    assert (layout.n_prefix, layout.grids, layout.n_suffix) == (1, {"agentview": (16, 16)}, 20)
