"""Model families behind the ``Backbone`` protocol: loaded from a checkpoint, or made with random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import overload

import torch

from lac_vla.errors import CheckpointError, InputError
from lac_vla.models.base import Backbone, DecoderLayer, Extend, Rotary
from lac_vla.models.cogact.backbone import CogACTBackbone
from lac_vla.models.cogact.checkpoint import HUB_FILES as COGACT_FILES
from lac_vla.models.cogact.checkpoint import load_cogact, random_cogact, save_cogact
from lac_vla.models.cogact.config import PRESETS as COGACT_PRESETS
from lac_vla.models.cogact.config import CogACTConfig, Sampling
from lac_vla.models.prismatic.backbone import PrismaticBackbone
from lac_vla.models.prismatic.checkpoint import CONFIG, load_prismatic, random_prismatic, save_prismatic
from lac_vla.models.prismatic.config import PrismaticConfig
from lac_vla.models.prismatic.presets import PRESETS
from lac_vla.models.prismatic.prompt import Encode
from lac_vla.models.weights import find_folder, read_json

__all__ = [
    "Backbone",
    "CogACTBackbone",
    "CogACTConfig",
    "DecoderLayer",
    "Extend",
    "PrismaticBackbone",
    "PrismaticConfig",
    "Rotary",
    "Sampling",
    "load_vla",
    "random_vla",
    "save_vla",
]

LOADERS: dict[str, Callable[..., Backbone]] = {"openvla": load_prismatic, "cogact": load_cogact}
"""``model_type`` in a checkpoint's ``config.json`` → loader."""
MORE_FILES: dict[str, Iterable[str]] = {"cogact": COGACT_FILES}
"""Family → further files to download from the hub."""


def load_vla(
    path_or_hub_id: str | Path,
    *,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
    unnorm_key: str | None = None,
    cameras: Sequence[str] | None = None,
    image_pipeline: str | None = None,
    encode: Encode | None = None,
) -> Backbone:
    """Load a VLA from a checkpoint in its official layout.

    Weights are read from safetensors; official CogACT's from the ``.pt`` file of its run, of which tensors alone are
    unpickled.
    A CogACT run holds no tokenizer: put Llama 2's ``tokenizer.json`` beside its ``config.json``, or pass ``encode``.

    Args:
        path_or_hub_id: A folder, or ``owner/name`` on the Hugging Face hub (downloaded once).
        dtype: Of the weights in memory; ``"auto"`` for bfloat16 on a GPU and float32 elsewhere.
        device: Where to put them.
        unnorm_key: Data set whose statistics give actions their units; needed if the checkpoint has several.
        cameras: Names of the cameras in ``Frame.images``, in the model's order; ``None`` for its own names.
        image_pipeline: ``"resize-naive"``, ``"letterbox"``, ``"resize-crop"``, ``"libero"`` (OpenVLA's LIBERO
            evaluation) or ``"area"``; ``None`` for the checkpoint's own.
        encode: Text → token ids, in place of the checkpoint's tokenizer.

    Returns:
        The model, in evaluation mode.

    Raises:
        CheckpointError: If the checkpoint is missing, truncated, inconsistent or of an unknown family.
        InputError: If ``unnorm_key``, ``cameras``, ``image_pipeline`` or ``dtype`` do not fit it.
    """
    device = torch.device(device)
    folder = find_folder(path_or_hub_id)
    data = read_json(folder / CONFIG)
    family = _family(data)
    if family not in LOADERS:
        raise CheckpointError(f"{folder / CONFIG}: model_type is {family!r}; known are {list(LOADERS)}")
    if family in MORE_FILES:
        folder = find_folder(path_or_hub_id, MORE_FILES[family])
    return LOADERS[family](
        folder,
        data,
        name=Path(path_or_hub_id).resolve().name,
        dtype=_dtype(dtype, device),
        device=device,
        unnorm_key=unnorm_key,
        cameras=cameras,
        image_pipeline=image_pipeline,
        encode=encode,
    )


def save_vla(
    backbone: PrismaticBackbone | CogACTBackbone, folder: str | Path, *, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write a model so that :func:`load_vla` reads it: configuration, weights, statistics, tokenizer.

    Args:
        backbone: What to write.
        folder: Made if need be; files of these names in it are replaced.
        dtype: Of the weights in the file.
    """
    if isinstance(backbone, CogACTBackbone):
        save_cogact(backbone, Path(folder), dtype)
    else:
        save_prismatic(backbone, Path(folder), dtype)


@overload
def random_vla(
    config: PrismaticConfig,
    *,
    seed: int = 0,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
) -> PrismaticBackbone: ...


@overload
def random_vla(
    config: CogACTConfig,
    *,
    seed: int = 0,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
) -> CogACTBackbone: ...


@overload
def random_vla(
    config: str,
    *,
    seed: int = 0,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
) -> PrismaticBackbone | CogACTBackbone: ...


def random_vla(
    config: PrismaticConfig | CogACTConfig | str,
    *,
    seed: int = 0,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
) -> PrismaticBackbone | CogACTBackbone:
    """Make a model of any size with random weights, to test and to time with. No file is read.

    Args:
        config: A configuration, or ``"openvla-7b"``, ``"mini"``, ``"mini-vit"``, ``"tiny"``,
            ``"cogact-7b"``, ``"mini-cogact"``, ``"cogact-tiny"``.
        seed: Of the weights.
        dtype: Of the weights; ``"auto"`` as in :func:`load_vla`.
        device: Where they are made; ``"meta"`` for shapes only.

    Raises:
        InputError: If there is no configuration of that name.
    """
    device = torch.device(device)
    presets: Mapping[str, PrismaticConfig | CogACTConfig] = {**PRESETS, **COGACT_PRESETS}
    if isinstance(config, str) and config not in presets:
        raise InputError(f"unknown model '{config}': choose one of {list(presets)}")
    name = config if isinstance(config, str) else "random"
    config = presets[config] if isinstance(config, str) else config
    dtype = _dtype(dtype, device)
    if isinstance(config, CogACTConfig):
        return random_cogact(config, name=name, seed=seed, dtype=dtype, device=device)
    return random_prismatic(config, name=name, seed=seed, dtype=dtype, device=device)


def _family(data: Mapping[str, object]) -> object:
    """Of a ``config.json``; that of CogACT, a training run's, does not say so."""
    return data.get("model_type", "cogact" if "vla" in data else None)


def _dtype(dtype: torch.dtype | str, device: torch.device) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        raise InputError(f"dtype {dtype!r}: give a torch.dtype or 'auto'")
    return torch.bfloat16 if device.type == "cuda" else torch.float32
