"""Puts an OpenVLA's trained parts into a SmolVLA: one camera's vision transformer, and the language model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lac_vla.errors import CheckpointError

GAIN = 4.0
"""By how much the residual stream grows. Normalised layers do not notice; but a SmolVLA multiplies embeddings by the
root of the width, so that without it their weights would be too small beside a step of Adam."""
RIDGE = 1e-3
VLM = "model.vlm_with_expert.vlm.model."


def from_mini_vit(
    start: Any, camera: str, vocab_size: int
) -> tuple[dict[str, torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]:
    """Name the weights of an OpenVLA with a vision transformer for ``camera`` as a SmolVLA's.

    Of its vocabulary the first ``vocab_size`` tokens are taken: its last ones are actions.

    Returns:
        The weights; and the old model's embeddings of normalised pixels, (B, 3, H, W) → (B, patches, width), in the new
        one's scale.

    Raises:
        CheckpointError: If it has no such tower.
    """
    try:
        tower = start.vision_backbone.get_submodule(f"towers.{camera}")
        text, vit = start.language_model.model, dict(tower.state_dict())
        weights = {f"{VLM}vision_model.{_tower_name(name)}": value for name, value in vit.items() if "blocks" in name}
        weights = {name: value for name, value in _apart(weights)}
        for part in ("weight", "bias"):
            weights[f"{VLM}vision_model.embeddings.patch_embedding.{part}"] = vit[f"patch_embed.proj.{part}"]
        weights[f"{VLM}vision_model.embeddings.position_embedding.weight"] = vit["pos_embed"][0]
    except (AttributeError, KeyError) as error:
        raise CheckpointError(
            f"it is no SmolVLA, and has no vision transformer of its own for camera '{camera}': {error}"
        ) from error
    scale = {"embed_tokens.weight": GAIN / text.config.hidden_size**0.5}
    for name, value in text.state_dict().items():
        out = name.endswith(("o_proj.weight", "down_proj.weight"))
        kept = value[:vocab_size] if name in scale else value
        weights[f"{VLM}text_model.{name}"] = kept * (GAIN if out else scale.get(name, 1.0))

    def project(pixels: torch.Tensor) -> torch.Tensor:
        projected: torch.Tensor = start.projector(tower(pixels)) * GAIN
        return projected

    return weights, project


def _tower_name(name: str) -> str:
    for old, new in (
        ("blocks.", "encoder.layers."),
        (".norm1.", ".layer_norm1."),
        (".norm2.", ".layer_norm2."),
        (".attn.proj.", ".self_attn.out_proj."),
        (".attn.qkv.", ".self_attn.qkv_proj."),
    ):
        name = name.replace(old, new)
    return name


def _apart(weights: dict[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    """Cut the joint projections of queries, keys and values."""
    parts = []
    for name, value in weights.items():
        if "qkv_proj" in name:
            own = zip("qkv", value.chunk(3), strict=True)
            parts += [(name.replace("qkv_proj", f"{letter}_proj"), part) for letter, part in own]
        else:
            parts.append((name, value))
    return parts


def fit_linear(features: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Solve ridge regression without offset: (n, p) and (n, q) → (p, q)."""
    gram = features.T @ features
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
    solved: torch.Tensor = torch.linalg.solve(gram, features.T @ targets)
    return solved
