"""SmolVLA checkpoints in LeRobot's layout: reading, writing, random weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lac_vla.errors import InputError
from lac_vla.files import write_object
from lac_vla.models.heads.units import choose_stats
from lac_vla.models.lerobot_layout import (
    ACTION,
    STATE,
    Normalization,
    find_tokenizer,
    read_features,
    read_normalization,
    read_processors,
    tokenizer_length,
    write_processors,
)
from lac_vla.models.smolvla.build import build_smolvla
from lac_vla.models.smolvla.config import SmolVLAConfig
from lac_vla.models.smolvla.layout import VLM, VLM_CONFIG, config_json, read_config, vlm_json
from lac_vla.models.smolvla.model import SmolVLAModel
from lac_vla.models.tokenizer import Encode, WordHash, save_tokenizer
from lac_vla.models.vla import VLA
from lac_vla.models.weights import file_shapes, load_weights, randomise, write_weights

CONFIG = "config.json"
UNUSED = re.compile(
    r"model\.vlm_with_expert\.vlm\.lm_head\.weight|.*\.rotary_emb\.inv_freq|"
    r"(model\.)?(normalize_inputs|normalize_targets|unnormalize_outputs)\..*"
)
"""Weights that no action depends on, and the statistics of checkpoints of before LeRobot 0.4."""


def load_smolvla(
    folder: Path,
    data: Mapping[str, Any],
    *,
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    unnorm_key: str | None = None,
    cameras: Sequence[str] | None = None,
    image_pipeline: str | None = None,
    encode: Encode | None = None,
    tokenizer: str | Path | None = None,
) -> VLA:
    """Load a checkpoint whose ``config.json`` holds ``data``; see :func:`lac_vla.models.load_vla`.

    ``cameras`` may name fewer than the model has: what is behind them is left out, as LeRobot does with missing ones.
    ``tokenizer`` may hold the language model's ``config.json``, too.
    """
    if unnorm_key is not None or image_pipeline not in (None, "lerobot"):
        raise InputError(
            "a SmolVLA has one data set's statistics and one way to resize: leave `unnorm_key` and `image_pipeline` out"
        )
    before, _ = read_processors(folder)
    features = read_features(data, before)
    names = tuple(features.cameras.values()) if cameras is None else tuple(cameras)
    if not 1 <= len(names) <= len(features.cameras) or len(set(names)) != len(names):
        raise InputError(
            f"{name} has the cameras {list(features.cameras.values())}; `cameras` names {list(names)}: give their "
            "names in Frame.images in this order, one to all of them"
        )
    max_tokens = tokenizer_length(before, int(data.get("tokenizer_max_length", 48)))
    normalization = read_normalization(folder, data)
    config = read_config(folder, data, features, normalization, names, file_shapes(folder), tokenizer, max_tokens)
    encode = encode or find_tokenizer(folder, tokenizer, VLM, config.text.vocab_size)
    with torch.device("meta"):
        model = SmolVLAModel(config)
    vla = build_smolvla(config, model, encode, name=name)
    load_weights(model, folder, dtype=dtype, device=device, unused=UNUSED)
    model.reset_rotary(device)
    model.eval()
    return vla


def save_smolvla(vla: VLA, folder: Path, dtype: torch.dtype) -> None:
    """Write a model in LeRobot's layout, with tokenizer and sizes; see :func:`lac_vla.models.save_vla`."""
    folder.mkdir(parents=True, exist_ok=True)
    config: SmolVLAConfig = vla.config
    write_weights(vla.module, folder, dtype)
    data = config_json(config)
    write_processors(folder, config.normalization, data, config.max_tokens)
    for file, content in ((CONFIG, data), (VLM_CONFIG, vlm_json(config))):
        write_object(folder / file, content)
    save_tokenizer(vla.encode, folder)


def random_smolvla(config: SmolVLAConfig, *, name: str, seed: int, dtype: torch.dtype, device: torch.device) -> VLA:
    """Make a model with random weights in place; see :func:`lac_vla.models.random_vla`."""
    with torch.device("meta"):
        model = SmolVLAModel(config).to(dtype)
    if device.type != "meta":
        model.to_empty(device=device)
        model.reset_rotary(device)
        randomise(model, seed)
    model.eval()
    return build_smolvla(config, model, WordHash(config.text.vocab_size), name=name)


def new_smolvla(config: SmolVLAConfig, statistics: Mapping[str, Any], encode: Encode, *, name: str) -> VLA:
    """Make a model to be trained; see :func:`lac_vla.models.untrained_vla`."""
    stats = choose_stats(statistics, None)
    normalization = Normalization.of("MEAN_STD", {STATE: _numbers(stats, "proprio"), ACTION: _numbers(stats, "action")})
    config = replace(config, normalization=normalization)
    return build_smolvla(config, SmolVLAModel(config), encode, name=name)


def _numbers(stats: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Take mean and deviation of a data set's statistics."""
    return {name: value for name, value in stats.get(kind, {}).items() if name in ("mean", "std")}
