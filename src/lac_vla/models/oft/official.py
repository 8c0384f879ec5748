"""The official layout of OpenVLA-OFT: a merged OpenVLA, and beside it a ``.pt`` file for every part that is new.

``config.json`` is plain OpenVLA's. A part's file is ``NAME--STEP_checkpoint.pt``, a state dict whose names may begin
with ``module.``. What no file says (:class:`~lac_vla.models.oft.config.Platform`) has to be given.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lac_vla.checkpoint_files import read_json, read_torch
from lac_vla.errors import CheckpointError, InputError
from lac_vla.models.oft.config import PLATFORMS, OFTConfig, with_cameras, with_film
from lac_vla.models.prismatic.config import PrismaticConfig

HEAD, PROPRIO, NOISY, VISION = PARTS = (
    "action_head",
    "proprio_projector",
    "noisy_action_projector",
    "vision_backbone",
)
MARKS = tuple(f"{part}--*" for part in PARTS)
"""Patterns of the files that tell OpenVLA-OFT from OpenVLA."""
ADAPTER = "lora_adapter/adapter_config.json"
DIFFUSION, L1 = "noise_predictor.mlp_resnet.", "model."
MOST_ALPHA = 16
"""The official training's α of LoRA is its rank, at most this."""


@dataclass(frozen=True, eq=False)
class OFTParts:
    """The parts of a folder beside the merged OpenVLA.

    Attributes:
        files: Part → its file.
        weights: Tensors under the names of :class:`lac_vla.models.oft.build.OFTVLA`.
        head: One of :data:`lac_vla.models.oft.config.HEADS`.
    """

    files: Mapping[str, Path]
    weights: Mapping[str, torch.Tensor]
    head: str

    def size(self, name: str, axis: int) -> int | None:
        """Get a weight's size along an axis; ``None`` if it is not there."""
        weight = self.weights.get(name)
        return None if weight is None or weight.ndim <= axis else int(weight.shape[axis])


def read_parts(folder: Path) -> OFTParts:
    """Read the parts of a folder.

    Raises:
        CheckpointError: If there are two files of one part, or of two steps; or a file is damaged or something else.
    """
    files = find_parts(folder)
    weights: dict[str, torch.Tensor] = {}
    head = "discrete"
    for part, file in files.items():
        state = {key.removeprefix("module."): value for key, value in read_torch(file).items()}
        for key, value in state.items():
            if not isinstance(value, torch.Tensor):
                raise CheckpointError(f"{file}: {key} is a {type(value).__name__}, not a tensor")
        if part == HEAD:
            prefix = next((p for p in (DIFFUSION, L1) if all(key.startswith(p) for key in state)), None)
            if prefix is None or not state:
                raise CheckpointError(f"{file} holds no action head of OpenVLA-OFT")
            head = "diffusion" if prefix == DIFFUSION else "l1"
            state = {key.removeprefix(prefix): value for key, value in state.items()}
        if part == VISION:
            weights |= fold_lora({film_name(key): value for key, value in state.items()}, _alpha(folder))
        else:
            weights |= {f"{part}.{key}": value for key, value in state.items()}
    return OFTParts(files, weights, head)


def find_parts(folder: Path) -> dict[str, Path]:
    """Find the file of every part that a folder holds.

    Raises:
        CheckpointError: If there are two of one part, or of two steps.
    """
    files: dict[str, Path] = {}
    for part, mark in zip(PARTS, MARKS, strict=True):
        found = sorted(folder.glob(mark))
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise CheckpointError(f"{folder} must hold just one {part}, the one to load; found: {names}")
        files |= dict.fromkeys([part] if found else [], *found)
    steps = {file.name.partition("--")[2].removesuffix("_checkpoint.pt") for file in files.values()}
    if len(steps) > 1:
        raise CheckpointError(f"{folder} holds parts of several steps, {sorted(steps)}: keep those of one")
    return files


def configure(
    parts: OFTParts,
    vlm: PrismaticConfig,
    *,
    unnorm_values: int,
    cameras: Sequence[str] | None = None,
    platform: str | None = None,
    chunk: int | None = None,
    bounds: str | None = None,
    proprio: bool = True,
) -> OFTConfig:
    """Make the configuration of a folder's parts; what no file says is the platform's, or given.

    Args:
        parts: Of the folder.
        vlm: The OpenVLA that its ``config.json`` describes.
        unnorm_values: Values of an action in the statistics.
        cameras: Names of the cameras, in the model's order.
        platform: A key of :data:`lac_vla.models.oft.config.PLATFORMS`.
        chunk: Actions of a chunk, if not the platform's.
        bounds: Way of normalising, if not the platform's.
        proprio: Whether the model was trained with proprioception.

    Raises:
        InputError: If something that no file says is not given, or does not go together.
        CheckpointError: If parts are missing, or are not the platform's.
    """
    known = None
    if platform is not None:
        if platform not in PLATFORMS:
            raise InputError(f"unknown platform {platform!r}: choose one of {list(PLATFORMS)}")
        known = PLATFORMS[platform]
    names = tuple(cameras) if cameras is not None else () if known is None else known.cameras
    chunk = chunk if known is None else chunk or known.chunk
    bounds = bounds if known is None else bounds or known.bounds
    if not names or chunk is None or bounds is None:
        raise InputError(
            "an OpenVLA-OFT checkpoint does not say what robot it is for: "
            f"give platform={' | '.join(map(repr, PLATFORMS))}, or chunk, bounds ('q99' | 'minmax') and cameras"
        )
    if known is not None and len(names) != len(known.cameras) and platform != "bridge":
        raise InputError(
            f"platform {platform!r} has the cameras {list(known.cameras)}, `cameras` names {list(names)}: give as "
            "many; or, for a robot of your own, chunk, bounds and cameras without a platform"
        )
    action_dim = parts.size("action_head.fc2.weight", 0) or unnorm_values
    dim = parts.size("proprio_projector.fc1.weight", 1)
    if known is not None and (action_dim, dim or known.proprio_dim) != (known.action_dim, known.proprio_dim):
        raise CheckpointError(
            f"the weights are of actions of {action_dim} and proprioception of {dim} values; platform {platform!r} has "
            f"{known.action_dim} and {known.proprio_dim}"
        )
    if (dim is None) == proprio:
        raise CheckpointError(
            f"the folder holds no {PROPRIO}--*: fetch it, or pass proprio=False for a model that was trained without"
            if proprio
            else f"proprio=False, and the folder holds a {PROPRIO}--*"
        )
    if (parts.head == "diffusion") != (NOISY in parts.files):
        missing, there = (NOISY, "a diffusion head") if parts.head == "diffusion" else (HEAD, f"a {NOISY}")
        raise CheckpointError(f"the folder holds {there} and no {missing}--* of diffusion: fetch it")
    vlm = replace(with_cameras(vlm, names), proprio_dim=dim)
    vlm = replace(vlm, image_resize_strategy="libero" if known is None else known.image_pipeline)
    return OFTConfig(with_film(vlm) if VISION in parts.files else vlm, action_dim, chunk, parts.head, bounds)


def film_name(key: str) -> str:
    """Make our name of an official one: of blocks that are wrapped for FiLM."""
    return re.sub(r"(\.blocks\.\d+)\.block\.", r"\1.", key)


def fold_lora(state: Mapping[str, torch.Tensor], alpha: float | None = None) -> dict[str, torch.Tensor]:
    """Merge LoRA's factors into the weights that they change: W + α/r · B·A.

    Args:
        state: ``X.base_layer.weight``, ``X.lora_A.default.weight`` (r, in) and ``X.lora_B.default.weight`` (out, r),
            or of a convolution; and whatever is not changed.
        alpha: α; ``None`` for the official training's.

    Returns:
        Weights under their plain names, in float32 where they were merged.

    Raises:
        CheckpointError: If a factor is missing, or does not fit.
    """
    merged = {key.replace(".base_layer.", "."): value for key, value in state.items() if ".lora_" not in key}
    factors = {key for key in state if ".lora_" in key}
    for key in sorted(key for key in factors if ".lora_A." in key):
        name, down = key.partition(".lora_A.")[0], state[key]
        up = state.get(key.replace(".lora_A.", ".lora_B."))
        weight = merged.get(f"{name}.weight")
        if up is None or weight is None:
            raise CheckpointError(f"{name} has just one of LoRA's factors, or no weight that they change")
        rank = len(down)
        scale = (min(rank, MOST_ALPHA) if alpha is None else alpha) / rank
        try:
            change = (up.float().flatten(1) @ down.float().flatten(1)).view_as(weight)
        except RuntimeError as error:
            raise CheckpointError(f"LoRA's factors of {name} do not fit its weight: {error}") from error
        merged[f"{name}.weight"] = weight.float() + scale * change
        factors -= {key, key.replace(".lora_A.", ".lora_B.")}
    if factors:
        raise CheckpointError(f"{sorted(factors)[0]} is no factor of LoRA that could be merged")
    return merged


def _alpha(folder: Path) -> float | None:
    """Read LoRA's α, if the adapter's configuration lies in the folder."""
    if not (folder / ADAPTER).is_file():
        return None
    alpha: Any = read_json(folder / ADAPTER).get("lora_alpha")
    if not isinstance(alpha, int | float) or alpha <= 0:
        raise CheckpointError(f"{folder / ADAPTER}: lora_alpha is {alpha!r}, no positive number")
    return float(alpha)
