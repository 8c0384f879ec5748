"""π0 and π0.5 checkpoints in LeRobot's layout, of LeRobot 0.4 to 0.6, and openpi's converted ones."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lac_vla.errors import CheckpointError
from lac_vla.files import write_object
from lac_vla.models.heads.flow_matching import FlowConfig
from lac_vla.models.lerobot_layout import (
    Features,
    Normalization,
    find_tokenizer,
    read_features,
    read_normalization,
    read_processors,
    relative_values,
    tokenizer_length,
    write_processors,
)
from lac_vla.models.pi0.build import build_pi0
from lac_vla.models.pi0.config import PiConfig
from lac_vla.models.pi0.gemma import GemmaConfig
from lac_vla.models.pi0.model import PRECISE, PiModel
from lac_vla.models.pi0.openpi import describe, is_openpi
from lac_vla.models.siglip import SiglipConfig
from lac_vla.models.tokenizer import Encode, WordHash, save_tokenizer
from lac_vla.models.vla import VLA
from lac_vla.models.weights import file_shapes, load_weights, randomise, write_weights

CONFIG = "config.json"
TOKENIZER_OF = "google/paligemma-3b-pt-224"
VISION_HEADS = {1152: 16, 768: 12}
"""Width of a tower → its heads, which no shape tells; ``vision_heads`` in config.json (not official) is for others."""
OPTIONS = ("tokenizer", "state_prompt", "relative_actions")

PARTS = {
    "paligemma_with_expert.paligemma.model.vision_tower.vision_model.": "vision.",
    "paligemma_with_expert.paligemma.model.multi_modal_projector.linear.": "projector.",
    "paligemma_with_expert.paligemma.model.language_model.": "prefix.",
    "paligemma_with_expert.gemma_expert.model.": "expert.",
}
"""LeRobot's names, without a leading ``model.`` → ours."""
EMBEDDING, TIED = "prefix.embed_tokens.weight", "paligemma_with_expert.paligemma.lm_head.weight"
TIME = "time_mlp_in.weight"
"""What π0.5 has and π0 does not."""
UNUSED = re.compile(
    r"paligemma_with_expert\.(paligemma|gemma_expert)\.lm_head\.weight|expert\.embed_tokens\.weight"
    r"|(un)?normalize_\w+\.buffer_.*"
)


def load_pi0(
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
    state_prompt: str | None = None,
    relative_actions: int | None = None,
) -> VLA:
    """Load a checkpoint whose ``config.json`` holds ``data``; see :func:`lac_vla.models.load_vla`."""
    found = file_shapes(folder)
    tied = not any(renamed(key) == EMBEDDING for key in found)

    def rename(key: str) -> str:
        return EMBEDDING if tied and key.removeprefix("model.") == TIED else renamed(key)

    shapes = {rename(key): shape for key, shape in found.items()}
    if is_openpi(data):
        data, features, normalization, max_tokens = describe(
            folder, data, "pi05" if TIME in shapes else "pi0", unnorm_key
        )
        preprocessor, unnorm_key = None, None
    else:
        preprocessor, _ = read_processors(folder)
        features, normalization = read_features(data, preprocessor), read_normalization(folder, data)
        max_tokens = tokenizer_length(preprocessor, int(data.get("tokenizer_max_length", 48)))
    config = read_config(data, features, normalization, max_tokens, shapes)
    relative = relative_values(data, preprocessor, config.action_dim)
    if relative_actions is not None:
        relative = tuple(index < relative_actions for index in range(config.action_dim))
    config = replace(config, relative=relative if any(relative) else ())
    encode = encode or find_tokenizer(folder, tokenizer, TOKENIZER_OF, config.vocab_size)
    with torch.device("meta"):
        model = PiModel(config)
    vla = build_pi0(
        model,
        encode,
        name=name,
        unnorm_key=unnorm_key,
        cameras=cameras,
        image_pipeline=image_pipeline,
        state_prompt=state_prompt,
    )
    load_weights(
        model,
        folder,
        dtype=dtype,
        device=device,
        unused=UNUSED,
        rename=rename,
        precise=re.compile(PRECISE),
    )
    model.eval()
    return vla


def save_pi0(vla: VLA, folder: Path, dtype: torch.dtype) -> None:
    """Write a model in LeRobot's layout; see :func:`lac_vla.models.save_vla`."""
    folder.mkdir(parents=True, exist_ok=True)
    config: PiConfig = vla.config
    write_weights(vla.module, folder, dtype, lambda key: f"model.{official(key)}")
    size = config.vision.pixels
    shape = [3, size, size]
    images = {f"observation.images.{name}": {"type": "VISUAL", "shape": shape} for name in vla.grids}
    data = {
        "type": config.family,
        "input_features": {**images, "observation.state": {"type": "STATE", "shape": [config.state_dim]}},
        "output_features": {"action": {"type": "ACTION", "shape": [config.action_dim]}},
        "chunk_size": config.flow.horizon,
        "n_action_steps": config.flow.horizon,
        "max_state_dim": config.state_width,
        "max_action_dim": config.flow.width,
        "num_inference_steps": config.flow.steps,
        "min_period": config.flow.min_period,
        "max_period": config.flow.max_period,
        "image_resolution": [size, size],
        "tokenizer_max_length": config.max_tokens,
        "normalization_mapping": {
            "VISUAL": "IDENTITY",
            "STATE": config.normalization.modes["observation.state"],
            "ACTION": config.normalization.modes["action"],
        },
        "vision_heads": config.vision.heads,
        "state_prompt": config.state_prompt,
        "openpi": config.openpi,
        "use_relative_actions": bool(config.relative),
        "relative_exclude_joints": ["absolute"],
        "action_feature_names": ["relative" if own else "absolute" for own in config.relative],
    }
    write_object(folder / CONFIG, data)
    write_processors(folder, config.normalization, data, config.max_tokens)
    save_tokenizer(vla.encode, folder)


def random_pi0(config: PiConfig, *, name: str, seed: int, dtype: torch.dtype, device: torch.device) -> VLA:
    """Make a model with random weights in place; see :func:`lac_vla.models.random_vla`."""
    with torch.device("meta"):
        model = PiModel(config).cast(dtype)
    if device.type != "meta":
        model.to_empty(device=device)
        randomise(model, seed)
        model.reset_norms()
    model.eval()
    return build_pi0(model, WordHash(config.vocab_size), name=name)


def new_pi0(config: PiConfig, statistics: Mapping[str, Any], encode: Encode, *, name: str) -> VLA:
    """Refuse to make a model to be trained; see :func:`lac_vla.models.untrained_vla`."""
    raise CheckpointError(f"{name} is fine-tuned by LeRobot or openpi, not by `lac pretrain`")


def renamed(key: str) -> str:
    """Map LeRobot's name of a weight, with or without a leading ``model.``, to ours."""
    key = key.removeprefix("model.")
    for theirs, ours in PARTS.items():
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    return key


def official(key: str) -> str:
    """Map our name of a weight to LeRobot's, without the leading ``model.``."""
    for theirs, ours in PARTS.items():
        if key.startswith(ours):
            return theirs + key.removeprefix(ours)
    return key


def read_config(
    data: Mapping[str, Any],
    features: Features,
    normalization: Normalization,
    max_tokens: int,
    shapes: Mapping[str, tuple[int, ...]],
) -> PiConfig:
    """Read the configuration; sizes come from the weights.

    Args:
        data: Contents of ``config.json``.
        features: Inputs and outputs.
        normalization: Of both.
        max_tokens: Longest prompt.
        shapes: Our name → shape of the file's tensors.

    Raises:
        CheckpointError: If they are those of another model.
    """
    try:
        width, _, patch, _ = shapes["vision.embeddings.patch_embedding.weight"]
        table = round(shapes["vision.embeddings.position_embedding.weight"][0] ** 0.5)
        mlp_width = shapes["vision.encoder.layers.0.mlp.fc1.weight"][0]
        vocab_size = shapes[EMBEDDING][0]
        head_dim = shapes["prefix.layers.0.self_attn.k_proj.weight"][0]  # both of its Gemmas have one key head
        prefix, expert = (_gemma(shapes, part, head_dim) for part in ("prefix.", "expert."))
        action_width = shapes["action_in_proj.weight"][1]
        adaptive = TIME in shapes
        state_width = int(data.get("max_state_dim", 32)) if adaptive else shapes["state_proj.weight"][1]
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"the weights are not those of a π0 or π0.5 ({error} is missing or misshapen)") from error
    kind = data.get("type", "pi05" if adaptive else "pi0")
    if kind != ("pi05" if adaptive else "pi0"):
        raise CheckpointError(f"config.json says '{kind}', the weights are those of {'π0.5' if adaptive else 'π0'}")
    heads = data.get("vision_heads", VISION_HEADS.get(width))
    if not isinstance(heads, int):
        raise CheckpointError(f"vision tower of width {width}, not a published one: give vision_heads in config.json")
    depth = _depth(shapes, "vision.encoder.")
    resolution = list(data.get("image_resolution", [table * patch] * 2))
    if resolution != [table * patch] * 2:
        raise CheckpointError(
            f"config.json: image_resolution is {resolution}, the tower has positions for {table} × {table} patches of "
            f"{patch} pixels"
        )
    return PiConfig(
        cameras=features.cameras,
        state_dim=features.state_dim,
        action_dim=features.action_dim,
        normalization=normalization,
        vision=SiglipConfig(width, depth, heads, mlp_width, patch, table),
        prefix=prefix,
        expert=expert,
        vocab_size=vocab_size,
        flow=FlowConfig(
            horizon=int(data.get("chunk_size", 50)),
            width=action_width,
            steps=int(data.get("num_inference_steps", 10)),
            min_period=float(data.get("min_period", 0.004)),
            max_period=float(data.get("max_period", 4.0)),
        ),
        adaptive=adaptive,
        state_width=state_width,
        max_tokens=max_tokens,
        state_prompt=str(data.get("state_prompt", "given")),
        openpi=bool(data.get("openpi", False)),
    )


def _gemma(shapes: Mapping[str, tuple[int, ...]], part: str, head_dim: int) -> GemmaConfig:
    mlp_width, width = shapes[f"{part}layers.0.mlp.gate_proj.weight"]
    heads = shapes[f"{part}layers.0.self_attn.q_proj.weight"][0] // head_dim
    kv_heads = shapes[f"{part}layers.0.self_attn.k_proj.weight"][0] // head_dim
    return GemmaConfig(width, _depth(shapes, part), mlp_width, heads, kv_heads, head_dim)


def _depth(shapes: Mapping[str, tuple[int, ...]], part: str) -> int:
    found = (re.match(rf"{re.escape(part)}layers\.(\d+)\.", key) for key in shapes)
    return 1 + max((int(match.group(1)) for match in found if match), default=-1)
