"""Opens LeRobot's own policy for a checkpoint of SmolVLA, π0 or π0.5, without a hub. LeRobot must be installed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from lac_vla.errors import MissingExtraError
from lac_vla.models import VLA
from lac_vla.types import Frame

FAMILIES = ("smolvla", "pi0", "pi05")
OURS = ("vision_heads", "state_prompt", "openpi")
"""Settings that this library adds to a config.json, and LeRobot does not know."""


class OpenedPolicy:
    """LeRobot's policy for a checkpoint, with its processors, and without a hub.

    A checkpoint holds neither a tokenizer nor all sizes; LeRobot asks the hub for them. Here they are the given ones.

    Args:
        folder: A checkpoint in LeRobot's layout.
        model: The same as this library reads it: it knows the sizes.
        tokenizer: Called as transformers' tokenizers are.
        own_processors: Whether the checkpoint's processors are LeRobot's own; if not, LeRobot makes new ones.

    Attributes:
        policy: A ``PreTrainedPolicy``.
        before: Pre-processor: an observation → what the policy takes.
        after: Post-processor: its actions → the robot's.

    Raises:
        MissingExtraError: If there is no LeRobot.
    """

    def __init__(self, folder: Path, model: VLA, tokenizer: Any, *, own_processors: bool = True) -> None:
        factory = lerobot_module("policies.factory")
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        with TemporaryDirectory() as scratch:
            settings = {key: value for key, value in kind.items() if key not in OURS}
            (Path(scratch) / "config.json").write_text(json.dumps(settings), encoding="utf-8")
            config = import_module("lerobot.configs.policies").PreTrainedConfig.from_pretrained(scratch)
        config.device = str(model.device)
        with _without_hub(model, tokenizer):
            policy_class = factory.get_policy_class(config.type)
            self.policy = policy_class.from_pretrained(folder, config=config, strict=False).eval()
            statistics = {
                feature: {name: torch.as_tensor(value).float() for name, value in parts.items()}
                for feature, parts in model.config.normalization.statistics.items()
            }
            options: dict[str, Any] = {"dataset_stats": statistics}
            if own_processors:
                overrides = {"device_processor": {"device": config.device}}
                options = {"pretrained_path": str(folder), "preprocessor_overrides": overrides}
            self.before, self.after = factory.make_pre_post_processors(config, **options)
        self._cameras = [key for key, feature in config.input_features.items() if "image" in key]

    def batch(self, frame: Frame, cameras: Sequence[str]) -> dict[str, Any]:
        """Make of a frame what LeRobot gives a pre-processor; ``cameras`` are the frame's, in the model's order."""
        images = {
            key: torch.from_numpy(frame.images[name]).permute(2, 0, 1).float() / 255
            for key, name in zip(self._cameras, cameras, strict=False)
        }
        state = torch.from_numpy(np.asarray(frame.proprio, dtype=np.float32))
        return {**images, "observation.state": state, "task": frame.instruction}


def lerobot_module(name: str) -> Any:
    """Import a module of LeRobot's."""
    try:
        return import_module(f"lerobot.{name}")
    except ModuleNotFoundError as error:
        raise MissingExtraError("lerobot", "LeRobot's own policy as a baseline") from error


@contextmanager
def _without_hub(model: VLA, tokenizer: Any) -> Iterator[None]:
    """Let LeRobot find tokenizer and sizes here."""
    config, family = model.config, model.family
    patches: list[tuple[str, str, Any]] = [
        ("lerobot.processor.tokenizer_processor", "AutoTokenizer", _giving(tokenizer)),
    ]
    if family == "smolvla":
        transformers = import_module("transformers")
        text = {**config.text.llama(), "model_type": "llama", "attention_bias": False}
        vision = {
            "hidden_size": config.vision.width,
            "intermediate_size": config.vision.mlp_width,
            "num_hidden_layers": config.vision.depth,
            "num_attention_heads": config.vision.heads,
            "image_size": config.vision.table * config.vision.patch,
            "patch_size": config.vision.patch,
        }
        vlm = transformers.SmolVLMConfig(text_config=text, vision_config=vision, scale_factor=config.shuffle)
        special = SimpleNamespace(tokenizer=SimpleNamespace(fake_image_token_id=0, global_image_token_id=0))
        where = "lerobot.policies.smolvla.smolvlm_with_expert"
        patches += [(where, "AutoConfig", _giving(vlm)), (where, "AutoProcessor", _giving(special))]
    else:
        where = f"lerobot.policies.{family}.modeling_{family}"
        module = import_module(where)
        sizes = {
            "gemma_2b" if own is config.prefix else "gemma_300m": module.GemmaConfig(
                own.width, own.depth, own.mlp_width, own.heads, own.kv_heads, own.head_dim
            )
            for own in (config.prefix, config.expert)
        }
        patches += [
            (where, "get_gemma_config", sizes.__getitem__),
            (where, "PaliGemmaForConditionalGenerationWithPiGemma",
             _sized(module.PaliGemmaForConditionalGenerationWithPiGemma, config)),
            (where, "PiGemmaForCausalLM", _sized(module.PiGemmaForCausalLM, config)),
        ]  # fmt: skip
    with ExitStack() as stack:
        for where, name, value in patches:
            stack.enter_context(patch.object(import_module(where), name, value))
        yield


def _giving(value: Any) -> Any:
    """Make something that is always found."""
    return SimpleNamespace(from_pretrained=lambda *_, **__: value)


def _sized(module: Callable[..., Any], ours: Any) -> Callable[..., Any]:
    """Make a module of π's with the sizes of tower and vocabulary that LeRobot has as constants."""

    def make(config: Any) -> Any:
        vision, text = getattr(config, "vision_config", None), getattr(config, "text_config", config)
        text.vocab_size = ours.vocab_size
        if vision is not None:
            config._vocab_size = config.image_token_index = ours.vocab_size
            for name, value in {
                "hidden_size": ours.vision.width,
                "num_hidden_layers": ours.vision.depth,
                "num_attention_heads": ours.vision.heads,
                "intermediate_size": ours.vision.mlp_width,
                "patch_size": ours.vision.patch,
                "image_size": ours.vision.pixels,
                "projection_dim": ours.prefix.width,
            }.items():
                setattr(vision, name, value)
        return module(config=config)

    return make
