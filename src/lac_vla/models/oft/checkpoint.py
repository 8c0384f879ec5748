"""OpenVLA-OFT checkpoints: in their official layout (:mod:`lac_vla.models.oft.official`), and in ours.

Ours is one ``model.safetensors`` with all parts, and a ``config.json`` of the ``model_type`` "oft" that says whatever
the official files leave open.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lac_vla.checkpoint_files import read_json
from lac_vla.errors import CheckpointError, InputError
from lac_vla.models.heads.units import Range, choose_stats
from lac_vla.models.images import require_pipeline
from lac_vla.models.oft.build import OFTVLA, build_oft
from lac_vla.models.oft.config import BOUNDS, OFTConfig
from lac_vla.models.oft.official import MARKS, OFTParts, configure, read_parts
from lac_vla.models.prismatic.checkpoint import (
    STATISTICS,
    fill,
    make_ready,
    official_config,
    unused_weights,
    write_folder,
)
from lac_vla.models.tokenizer import Encode, WordHash, load_tokenizer
from lac_vla.models.vla import VLA
from lac_vla.models.weights import HUB_FILES as WEIGHT_FILES
from lac_vla.models.weights import load_weights

HUB_FILES = (*WEIGHT_FILES, *MARKS)
OPTIONS = ("platform", "chunk", "bounds", "proprio")


def load_oft(
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
    **options: Any,
) -> VLA:
    """Load a folder whose ``config.json`` holds ``data``; see :func:`lac_vla.models.load_vla`.

    Args:
        folder: The folder.
        data: Contents of its ``config.json``.
        name: For tables and error messages.
        dtype: Of the weights in memory.
        device: Where to put them.
        unnorm_key: Data set of the statistics.
        cameras: Names of the cameras; of an official checkpoint their number, too.
        image_pipeline: See :data:`lac_vla.models.images.PIPELINES`.
        encode: The tokenizer.
        options: See :func:`lac_vla.models.oft.official.configure`. A checkpoint of ours says them itself.
    """
    parts = read_parts(folder)
    statistics = read_json(folder / STATISTICS)
    if data.get("model_type") == "oft":
        config = _own(data, statistics, parts, options)
    else:
        values = _action_values(choose_stats(statistics, unnorm_key))
        vlm = replace(official_config(folder, data), norm_stats=statistics)
        config = configure(parts, vlm, unnorm_values=values, cameras=cameras, **options)
    require_pipeline(image_pipeline or config.vlm.image_resize_strategy)
    encode = encode or load_tokenizer(folder)
    with torch.device("meta"):
        model = OFTVLA(config)
    vla = build_oft(
        config, model, encode, name=name, unnorm_key=unnorm_key, cameras=cameras, image_pipeline=image_pipeline
    )
    unused = unused_weights(config.vlm)
    load_weights(
        model,
        folder,
        dtype=dtype,
        device=device,
        unused=unused,
        beside={key: weight for key, weight in parts.weights.items() if not unused.fullmatch(key)},
    )
    make_ready(model, device)
    return vla


def save_oft(vla: VLA, folder: Path, dtype: torch.dtype) -> None:
    """Write a model as :func:`load_oft` reads it, everything spelt out; see :func:`lac_vla.models.save_vla`."""
    config: OFTConfig = vla.config
    vlm = config.vlm.to_json()
    statistics = vlm.pop("norm_stats")
    data = {"model_type": "oft", "vlm": vlm, "oft": config.to_json()}
    write_folder(vla, folder, dtype, data, statistics)


def random_oft(config: OFTConfig, *, name: str, seed: int, dtype: torch.dtype, device: torch.device) -> VLA:
    """Make a model with random weights in place; see :func:`lac_vla.models.random_vla`."""
    with torch.device("meta"):
        model = OFTVLA(config).to(dtype)
    vla = build_oft(config, model, WordHash(config.vlm.vocab_size - config.vlm.n_action_bins), name=name)
    fill(model, seed, device)
    return vla


def new_oft(config: OFTConfig, statistics: Mapping[str, Any], encode: Encode, *, name: str) -> VLA:
    """Make a model to be trained; see :func:`lac_vla.models.untrained_vla`."""
    config = replace(config, vlm=replace(config.vlm, norm_stats=statistics))
    return build_oft(config, OFTVLA(config), encode, name=name)


def _own(
    data: Mapping[str, Any], statistics: Mapping[str, Any], parts: OFTParts, options: Mapping[str, Any]
) -> OFTConfig:
    if parts.files:
        names = [file.name for file in parts.files.values()]
        raise CheckpointError(f"{names} beside a checkpoint that holds these parts itself: take them away")
    config = OFTConfig.from_json(data, statistics)
    if given := [key for key, value in options.items() if value is not None and value != getattr(config, key, None)]:
        raise InputError(f"{given} cannot be given: this checkpoint says them itself ({config.to_json()})")
    return config


def _action_values(stats: Mapping[str, Any]) -> int:
    """Count the values of an action in a data set's statistics, whichever they are."""
    for bounds in BOUNDS.values():
        if set(bounds) <= set(stats.get("action", ())):
            return Range.of(stats, "action", bounds).dim
    raise CheckpointError(f'{STATISTICS} holds neither quantiles nor extremes of "action"')
