"""Reads a SmolVLA's configuration from LeRobot's ``config.json`` and the weights' shapes, and writes it.

A checkpoint does not hold the language model's configuration. Sizes come from the weights' shapes; what these do not
tell, the width of a head, is that of the published models, or stands in ``vlm_config.json``, the ``config.json`` of a
language model of one's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt
from pathlib import Path
from typing import Any

from lac_vla.checkpoint_files import read_json
from lac_vla.errors import CheckpointError
from lac_vla.hub import find_folder
from lac_vla.models.heads.flow_matching import FlowConfig
from lac_vla.models.lerobot_layout import ACTION, IMAGES, KINDS, STATE, Features, Normalization
from lac_vla.models.siglip import SiglipConfig
from lac_vla.models.smolvla.config import SmolVLAConfig, TextConfig

VLM_CONFIG = "vlm_config.json"
VLM = "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"
PUBLISHED = "HuggingFaceTB/SmolVLM"
HEAD_DIM = 64
"""Width of a head in the published models' language models."""
VISION_HEADS = {768: 12, 1152: 16}
"""Width of a published SigLIP tower → its heads."""
NORM_EPS = 1e-5
TEXT, EXPERT, TOWER, CONNECTOR = (
    f"model.vlm_with_expert.{part}."
    for part in ("vlm.model.text_model", "lm_expert", "vlm.model.vision_model", "vlm.model.connector")
)


def read_config(
    folder: Path,
    data: Mapping[str, Any],
    features: Features,
    normalization: Normalization,
    cameras: tuple[str, ...],
    shapes: Mapping[str, tuple[int, ...]],
    other: str | Path | None,
    max_tokens: int,
) -> SmolVLAConfig:
    """Read a checkpoint's configuration.

    Args:
        folder: The checkpoint's.
        data: Contents of its ``config.json``.
        features: What these say of inputs and outputs.
        normalization: Of both.
        cameras: Names in ``Frame.images``.
        shapes: Name → shape of the weights.
        other: Folder or hub id that may hold the language model's ``config.json``; ``None`` for none.
        max_tokens: Most tokens of an instruction.

    Raises:
        CheckpointError: If something is missing, or is not supported.
    """
    refuse_unsupported(data)
    resize: Sequence[int] = data.get("resize_imgs_with_padding") or []
    if len(resize) != 2 or resize[0] != resize[1]:
        raise CheckpointError(
            f"resize_imgs_with_padding is {resize or None}: give a square, or the patches do not make tokens"
        )
    try:
        (width, ffn), table = shapes[f"{TEXT}layers.0.mlp.down_proj.weight"], shapes[f"{TEXT}embed_tokens.weight"]
        kv_width = shapes[f"{TEXT}layers.0.self_attn.k_proj.weight"][0]
        q_width = shapes[f"{TEXT}layers.0.self_attn.q_proj.weight"][0]
        expert_width, expert_ffn = shapes[f"{EXPERT}layers.0.mlp.down_proj.weight"]
        vision_width, _, patch, _ = shapes[f"{TOWER}embeddings.patch_embedding.weight"]
        positions = shapes[f"{TOWER}embeddings.position_embedding.weight"][0]
        mlp_width = shapes[f"{TOWER}encoder.layers.0.mlp.fc1.weight"][0]
        joined = shapes[f"{CONNECTOR}modality_projection.proj.weight"][1]
        flow_width, state_width = shapes["model.action_out_proj.weight"][0], shapes["model.state_proj.weight"][1]
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"{folder}: the weights are not a SmolVLA's: {error} is missing or misshapen") from error
    head_dim, vision_heads, eps = _vlm(folder, data, vision_width, other)
    layers = _depth(shapes, f"{TEXT}layers.")
    try:
        wanted, own = int(data["num_vlm_layers"]), int(data["num_expert_layers"])
        every = int(data["self_attn_every_n_layers"]) if data["attention_mode"] == "cross_attn" else 1
        flow = FlowConfig(
            int(data["chunk_size"]),
            flow_width,
            int(data["num_steps"]),
            float(data["min_period"]),
            float(data["max_period"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"config.json does not describe a SmolVLA: {error}") from error
    layers = wanted if wanted > 0 else layers
    if own > 0 and own != layers:
        raise CheckpointError(f"num_expert_layers {own} for {layers} of the language model: they must be as many")
    if q_width % head_dim or kv_width % head_dim:
        raise CheckpointError(f"queries of {q_width} and keys of {kv_width} channels in heads of {head_dim}")
    return SmolVLAConfig(
        TextConfig(width, ffn, layers, q_width // head_dim, kv_width // head_dim, head_dim, table[0], eps),
        SiglipConfig(
            vision_width,
            _depth(shapes, f"{TOWER}encoder.layers."),
            vision_heads,
            mlp_width,
            patch,
            isqrt(positions),
            int(resize[0]),
        ),
        cameras,
        features.state_dim,
        features.action_dim,
        normalization,
        flow,
        expert_width,
        isqrt(joined // vision_width),
        expert_ffn,
        max(0, every),
        state_width,
        max_tokens,
    )


def refuse_unsupported(data: Mapping[str, Any]) -> None:
    """Refuse settings under which LeRobot computes something else.

    Raises:
        CheckpointError: If there is one.
    """
    if data.get("add_image_special_tokens"):
        raise CheckpointError(
            "add_image_special_tokens puts text tokens between the cameras' tokens, which must lie in a row to be "
            "cached: train without it, as smolvla_base is"
        )
    for key in ("adapt_to_pi_aloha", "use_delta_joint_actions_aloha"):
        if data.get(key):
            raise CheckpointError(f"{key} is not supported: it changes states and actions beyond the statistics")
    if data.get("attention_mode") not in ("cross_attn", "self_attn"):
        raise CheckpointError(f"attention_mode is {data.get('attention_mode')!r}; known are cross_attn and self_attn")


def config_json(config: SmolVLAConfig) -> dict[str, Any]:
    """Make the contents of a ``config.json``, under LeRobot's names."""
    size, every = config.vision.pixels, config.self_attention_every
    images = {f"{IMAGES}{name}": {"type": "VISUAL", "shape": [3, size, size]} for name in config.cameras}
    return {
        "type": "smolvla",
        "input_features": {**images, STATE: {"type": "STATE", "shape": [config.state_dim]}},
        "output_features": {ACTION: {"type": "ACTION", "shape": [config.action_dim]}},
        "normalization_mapping": {
            "VISUAL": "IDENTITY",
            **{kind: config.normalization.modes[name] for name, kind in KINDS.items()},
        },
        "chunk_size": config.flow.horizon,
        "n_action_steps": config.flow.horizon,
        "max_state_dim": config.state_width,
        "max_action_dim": config.flow.width,
        "resize_imgs_with_padding": [size, size],
        "empty_cameras": 0,
        "tokenizer_max_length": config.max_tokens,
        "num_steps": config.flow.steps,
        "vlm_model_name": VLM,
        "add_image_special_tokens": False,
        "attention_mode": "self_attn" if every == 1 else "cross_attn",
        "prefix_length": -1,
        "pad_language_to": "longest",
        "num_expert_layers": -1,
        "num_vlm_layers": config.text.layers,
        "self_attn_every_n_layers": every or -1,
        "expert_width_multiplier": config.expert_width / config.text.width,
        "min_period": config.flow.min_period,
        "max_period": config.flow.max_period,
    }


def vlm_json(config: SmolVLAConfig) -> dict[str, Any]:
    """Make what a ``vlm_config.json`` must say beyond the weights' shapes."""
    return {
        "text_config": {"head_dim": config.text.head_dim, "rms_norm_eps": config.text.eps},
        "vision_config": {"num_attention_heads": config.vision.heads},
    }


def _vlm(folder: Path, data: Mapping[str, Any], vision_width: int, other: str | Path | None) -> tuple[int, int, float]:
    """Find the width of a head, the tower's heads, and the norms' epsilon."""
    files = [folder / VLM_CONFIG] + ([] if other is None else [find_folder(other, ("config.json",)) / "config.json"])
    for file in files:
        content = read_json(file) if file.is_file() else {}
        text, vision = content.get("text_config"), content.get("vision_config")
        if isinstance(text, Mapping) and isinstance(vision, Mapping):
            try:
                head_dim = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
                heads = vision.get("num_attention_heads") or VISION_HEADS[vision_width]
                return int(head_dim), int(heads), float(text.get("rms_norm_eps", NORM_EPS))
            except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
                raise CheckpointError(f"{file} does not describe a SmolVLM: {error}") from error
    name = str(data.get("vlm_model_name"))
    if not name.startswith(PUBLISHED) or vision_width not in VISION_HEADS:
        raise CheckpointError(
            f"{folder} does not tell how wide a head of '{name}' is: put the config.json of that language model there "
            f"as {VLM_CONFIG}, or pass `tokenizer`, a folder or hub id that holds it and the tokenizer.json"
        )
    return HEAD_DIM, VISION_HEADS[vision_width], NORM_EPS


def _depth(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> int:
    """Count the layers whose weights begin with a name."""
    return len({key.removeprefix(prefix).split(".")[0] for key in shapes if key.startswith(prefix)})
