"""Prismatic checkpoints in the official layout: configuration, weights, statistics, tokenizer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from lac_vla.checkpoint_files import read_json
from lac_vla.errors import CheckpointError
from lac_vla.files import write_object
from lac_vla.models.images import require_pipeline
from lac_vla.models.llama import reset_rotary
from lac_vla.models.prismatic.build import build_prismatic
from lac_vla.models.prismatic.config import PrismaticConfig
from lac_vla.models.prismatic.model import PrismaticVLA
from lac_vla.models.prismatic.towers import ViTConfig
from lac_vla.models.tokenizer import Encode, WordHash, load_tokenizer, save_tokenizer
from lac_vla.models.vla import VLA
from lac_vla.models.weights import load_weights, randomise, write_weights

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
STATISTICS = "dataset_statistics.json"


def load_prismatic(
    folder: Path,
    data: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    device: torch.device,
    encode: Encode | None,
    **build: Any,
) -> VLA:
    """Load a checkpoint whose ``config.json`` holds ``data``; see :func:`lac_vla.models.load_vla`."""
    config = official_config(folder, data)
    if (folder / STATISTICS).is_file():
        config = replace(config, norm_stats=read_json(folder / STATISTICS))
    require_pipeline(build.get("image_pipeline") or config.image_resize_strategy)
    encode = encode or load_tokenizer(folder)
    with torch.device("meta"):
        model = PrismaticVLA(config)
    vla = build_prismatic(model, encode, **build)
    load_weights(model, folder, dtype=dtype, device=device, unused=unused_weights(config))
    make_ready(model, device)
    return vla


def official_config(folder: Path, data: Mapping[str, Any]) -> PrismaticConfig:
    """Read a ``config.json``, and the towers' means and deviations as the image processor beside it has them."""
    config = PrismaticConfig.from_json(data)
    if not (folder / PREPROCESSOR).is_file():
        return config
    return replace(config, vit_towers=_normalised_as(config.vit_towers, read_json(folder / PREPROCESSOR)))


def save_prismatic(vla: VLA, folder: Path, dtype: torch.dtype) -> None:
    """Write a model in the official layout; see :func:`lac_vla.models.save_vla`."""
    write_folder(vla, folder, dtype, vla.config.to_json(), vla.config.norm_stats)


def random_prismatic(config: PrismaticConfig, *, name: str, seed: int, dtype: torch.dtype, device: torch.device) -> VLA:
    """Make a model with random weights in place; see :func:`lac_vla.models.random_vla`."""
    with torch.device("meta"):
        model = PrismaticVLA(config).to(dtype)
    fill(model, seed, device)
    return build_prismatic(model, WordHash(config.vocab_size - config.n_action_bins), name=name)


def new_prismatic(config: PrismaticConfig, statistics: Mapping[str, Any], encode: Encode, *, name: str) -> VLA:
    """Make a model to be trained; see :func:`lac_vla.models.untrained_vla`."""
    return build_prismatic(PrismaticVLA(replace(config, norm_stats=statistics)), encode, name=name)


def make_ready(model: PrismaticVLA, device: torch.device) -> None:
    """Do what is left to do on modules that were made on ``meta`` once their weights are on ``device``."""
    reset_rotary(model.language_model, device)
    cast(Any, model.vision_backbone).to(memory_format=torch.channels_last)  # as convolutions run fastest
    model.eval()


def fill(model: PrismaticVLA, seed: int, device: torch.device) -> None:
    """Give modules on ``meta`` random weights on another device; on ``meta`` itself, shapes are all there is."""
    if device.type != "meta":
        model.to_empty(device=device)
        randomise(model, seed)
    make_ready(model, device)


def write_folder(vla: VLA, folder: Path, dtype: torch.dtype, config: Any, statistics: Any) -> None:
    """Write weights, ``config.json``, statistics and tokenizer; see :func:`lac_vla.models.save_vla`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(vla.module, folder, dtype)
    for name, content in ((CONFIG, config), (STATISTICS, statistics)):
        write_object(folder / name, content)
    save_tokenizer(vla.encode, folder)


def unused_weights(config: PrismaticConfig) -> re.Pattern[str]:
    """Name the official weights that no output depends on: towers' last blocks and heads, rotary frequencies."""
    names = [r".*\.rotary_emb\.inv_freq"]
    for part, tower in zip(("featurizer", "fused_featurizer"), config.vit_towers, strict=False):
        names.append(rf"vision_backbone\.{part}\.(blocks\.{tower.depth - 1}|norm|fc_norm|attn_pool|head)\..*")
    return re.compile("|".join(names))


def _normalised_as(towers: tuple[ViTConfig, ...], preprocessor: Mapping[str, Any]) -> tuple[ViTConfig, ...]:
    """Take means and deviations from the official image processor: the published are rounded to bfloat16."""
    given = preprocessor.get("tvf_normalize_params", [])
    try:
        if len(given) != len(towers):
            return towers
        return tuple(
            replace(tower, mean=tuple(values["mean"]), std=tuple(values["std"]))
            for tower, values in zip(towers, given, strict=True)
        )
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"{PREPROCESSOR}: tvf_normalize_params holds no mean and std: {error!r}") from error
