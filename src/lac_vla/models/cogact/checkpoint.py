"""CogACT checkpoints: in their official layout, a training run's folder, and in ours.

Official: ``config.json`` and ``dataset_statistics.json``; ``checkpoints/*.pt`` with the state dicts of the parts under
``model``. A ``tokenizer.json`` (Llama 2's) must be put beside them: the official code fetches it with the language
model. Ours: ``model.safetensors`` in place of the ``.pt`` file, and ``config.json`` spells out whatever differs from
CogACT's own models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from lac_vla.checkpoint_files import check_finite_weights, check_tensors, read_json, read_safetensors, read_torch
from lac_vla.errors import CheckpointError
from lac_vla.models.cogact.build import CogACTVLA, build_cogact
from lac_vla.models.cogact.config import CogACTConfig, head_config, own_options, vlm_config
from lac_vla.models.prismatic.checkpoint import STATISTICS, fill, make_ready, unused_weights, write_folder
from lac_vla.models.tokenizer import Encode, WordHash, load_tokenizer
from lac_vla.models.vla import VLA
from lac_vla.models.weights import WEIGHTS, check_shapes

HUB_FILES = ("*.json", WEIGHTS, "checkpoints/*.pt")
HEAD = "action_model."
UNUSED = r"ema_diffusion\..*|action_model\.net\.history_embedder\..*"
"""Official weights that no output depends on: the averaged head, and an embedding of past actions."""

RENAMED = (
    (re.compile(r"^vision_backbone\.dino_featurizer\."), "vision_backbone.featurizer."),
    (re.compile(r"^vision_backbone\.siglip_featurizer\."), "vision_backbone.fused_featurizer."),
    (re.compile(r"^(vision_backbone\..*)\.gamma$"), r"\1.scale_factor"),
    (re.compile(r"^projector\.projector\.0\."), "projector.fc1."),
    (re.compile(r"^projector\.projector\.2\."), "projector.fc2."),
    (re.compile(r"^projector\.projector\.4\."), "projector.fc3."),
    (re.compile(r"^llm_backbone\.llm\."), "language_model."),
)
"""CogACT's names (part and name within it) → ours, which are OpenVLA's."""


def load_cogact(
    folder: Path,
    data: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    device: torch.device,
    encode: Encode | None,
    **build: Any,
) -> VLA:
    """Load a run whose ``config.json`` holds ``data``; see :func:`lac_vla.models.load_vla`."""
    vlm = vlm_config(data, read_json(folder / STATISTICS))
    encode = encode or load_tokenizer(folder)
    weights = _weights(folder)
    found = {key: tuple(tensor.shape) for key, tensor in weights.items()}
    config = CogACTConfig(vlm, head_config(data, found), **own_options(data))
    with torch.device("meta"):
        model = CogACTVLA(config)
    vla = build_cogact(config, model, encode, **build)
    wanted = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    unused = re.compile(f"{unused_weights(vlm).pattern}|{UNUSED}")
    check_shapes(wanted, {key: shape for key, shape in found.items() if not unused.fullmatch(key)})
    check_tensors(folder, {key: weights[key] for key in wanted})
    kept = {key: weights[key].to(device, torch.float32 if key.startswith(HEAD) else dtype, copy=True) for key in wanted}
    model.load_state_dict(kept, assign=True)
    check_finite_weights(folder, model, dtype)
    make_ready(model, device)
    return vla


def save_cogact(vla: VLA, folder: Path, dtype: torch.dtype) -> None:
    """Write a model as :func:`load_cogact` reads it, everything spelt out; see :func:`lac_vla.models.save_vla`."""
    config: CogACTConfig = vla.config
    vlm = config.vlm.to_json()
    statistics = vlm.pop("norm_stats")
    data = {
        "model_type": "cogact",
        "vlm": vlm,
        "action_model": {"heads": config.head.heads},
        "prompt_end": config.prompt_end,
        "sampling": asdict(config.sampling),
        "gripper": config.gripper,
        "ensemble": config.ensemble,
    }
    write_folder(vla, folder, dtype, data, statistics)


def random_cogact(config: CogACTConfig, *, name: str, seed: int, dtype: torch.dtype, device: torch.device) -> VLA:
    """Make a model with random weights in place; see :func:`lac_vla.models.random_vla`."""
    with torch.device("meta"):
        model = CogACTVLA(config).to(dtype)
        model.action_model.float()
    fill(model, seed, device)
    return build_cogact(config, model, WordHash(config.vlm.vocab_size - config.vlm.n_action_bins), name=name)


def new_cogact(config: CogACTConfig, statistics: Mapping[str, Any], encode: Encode, *, name: str) -> VLA:
    """Make a model to be trained; see :func:`lac_vla.models.untrained_vla`."""
    config = replace(config, vlm=replace(config.vlm, norm_stats=statistics))
    return build_cogact(config, CogACTVLA(config), encode, name=name)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    """Read a folder's tensors under our names: our own ``model.safetensors``, else the official ``.pt`` file."""
    files = sorted((folder / "checkpoints").glob("*.pt"))
    if (folder / WEIGHTS).is_file():
        if files:
            raise CheckpointError(f"{folder} holds two sets of weights, {WEIGHTS} and {files[0].name}: move one away")
        return read_safetensors(folder / WEIGHTS)
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise CheckpointError(f"{folder / 'checkpoints'} must hold just one .pt file, the one to load; found: {names}")
    file = files[0]
    parts = read_torch(file).get("model")
    if not isinstance(parts, dict) or not all(isinstance(part, dict) for part in parts.values()):
        raise CheckpointError(f"{file} holds no state dicts under 'model': another model family?")
    weights = {}
    for part, state in parts.items():
        for key, tensor in state.items():
            if not isinstance(tensor, torch.Tensor):
                raise CheckpointError(f"{file}: {part}.{key} is a {type(tensor).__name__}, not a tensor")
            name = f"{part}.{key}"
            for pattern, replacement in RENAMED:
                name = pattern.sub(replacement, name)
            weights[name] = tensor
    return weights
