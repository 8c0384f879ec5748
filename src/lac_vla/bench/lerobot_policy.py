"""The baseline of SmolVLA, π0 and π0.5: LeRobot's own policy over the same weights. LeRobot must be installed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from lac_vla.cost import count_macs
from lac_vla.engine.step_info import StepInfo
from lac_vla.errors import InputError, MissingExtraError
from lac_vla.models import VLA, save_vla
from lac_vla.session import head_rng
from lac_vla.timing import STAGES
from lac_vla.types import Decision, FloatArray, Frame

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
        factory = _lerobot("policies.factory")
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


def _lerobot(name: str) -> Any:
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


class _Given:
    """Stands for a tokenizer: gives the ids that the model itself reads, padded as asked for."""

    pad_token_id = 0
    ids: Sequence[int] = ()

    def __call__(self, text: Any, *, max_length: int, padding: Any, **_: Any) -> dict[str, torch.Tensor]:
        length = max_length if padding == "max_length" else len(self.ids)
        ids, mask = torch.zeros(1, length, dtype=torch.int64), torch.zeros(1, length, dtype=torch.int64)
        ids[0, : len(self.ids)], mask[0, : len(self.ids)] = torch.tensor(self.ids), 1
        return {"input_ids": ids, "attention_mask": mask}


class LeRobotSession:
    """A robot's session on LeRobot's own policy: nothing is kept from one frame to the next.

    ``tower`` is all of ``embed_image``, the connector with it; ``prefill`` the prefix's pass; ``decode`` what is left
    of ``sample_actions``; ``preprocess`` the processors and the resizing.

    Args:
        model: One of :data:`FAMILIES`; its weights are written to a file and read by LeRobot.
        seed: Of the noise: the same as in a session of this seed.
        empty_cameras: Masked cameras that LeRobot computes besides, as many checkpoints of π0 and π0.5 have.

    Attributes:
        last_info: Report of the last frame.
        described: What it is, for tables.

    Raises:
        MissingExtraError: If there is no LeRobot.
        InputError: If it has no such policy.
    """

    def __init__(self, model: VLA, seed: int = 0, empty_cameras: int = 0) -> None:
        if model.family not in FAMILIES:
            raise InputError(f"{model.name} is no model of LeRobot's, {list(FAMILIES)}: leave out --lerobot")
        version = _lerobot("__version__").__version__
        self.last_info: StepInfo | None = None
        self._model, self._seed, self._rng, self._given = model, seed, head_rng(seed), _Given()
        with TemporaryDirectory() as folder:
            save_vla(model, folder, dtype=model.dtype)
            file = Path(folder) / "config.json"
            settings = json.loads(file.read_text(encoding="utf-8")) | {"empty_cameras": empty_cameras}
            file.write_text(json.dumps(settings), encoding="utf-8")
            self._opened = OpenedPolicy(Path(folder), model, self._given, own_processors=False)
        core = self._opened.policy.model
        self.described = f"LeRobot {version}'s own policy over the same weights, its processors included"
        self.described += f"; {empty_cameras} empty camera(s) besides" if empty_cameras else ""
        self._stack = core.vlm_with_expert if model.family == "smolvla" else core.paligemma_with_expert
        self._took: dict[str, float] = {}
        self._calls: dict[str, list[Callable[[], Any]]] = {}
        self._macs: Mapping[str, int] | None = None
        for owner, name in ((core, "sample_actions"), (self._stack, "embed_image"), (self._stack, "forward")):
            setattr(owner, name, self._timed(getattr(owner, name), name))

    def reset(self) -> None:
        """Begin a new episode."""
        self.last_info, self._rng = None, head_rng(self._seed)

    def _timed(self, work: Callable[..., Any], name: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            out = work(*args, **kwargs)
            took = 1e3 * (time.perf_counter() - began)
            if name != "forward" or not self._took.get(name):  # of the prefix and ten steps, the prefix comes first
                self._took[name] = self._took.get(name, 0.0) + took
                if self._macs is None:
                    self._calls.setdefault(name, []).append(lambda: work(*args, **kwargs))
            return out

        return timed

    @torch.inference_mode()
    def act(self, frame: Frame) -> FloatArray:
        """Answer an observation with a chunk in the robot's own units, float32."""
        model, head, opened = self._model, self._model.head, self._opened
        prompt = model.processor.prompt(frame)
        self._given.ids, self._took = prompt.ids, {}
        noise: Any = self._rng.standard_normal((head.horizon, model.config.flow.width), dtype=np.float32)
        began = time.perf_counter()
        batch = opened.before(opened.batch(frame, list(model.grids)))
        chunk = opened.policy.predict_action_chunk(batch, noise=torch.from_numpy(noise)[None].to(model.device))
        action = opened.after(chunk.clone())[0]
        whole = 1e3 * (time.perf_counter() - began)
        sampled, tower, prefill = (self._took[name] for name in ("sample_actions", "embed_image", "forward"))
        stages = dict.fromkeys(STAGES, 0.0)
        stages |= {"preprocess": whole - sampled, "tower": tower, "prefill": prefill}
        stages["decode"] = sampled - tower - prefill
        if self._macs is None:
            self._macs = {}  # what follows is counted once
            every, eyes, prefix = (
                sum(count_macs(call) for call in self._calls.pop(name))
                for name in ("sample_actions", "embed_image", "forward")
            )
            self._macs = {"tower": eyes, "prefill": prefix, "head": every - eyes - prefix}
        n = prompt.layout.n_visual
        self.last_info = StepInfo(
            layout=prompt.layout,
            decision=Decision.dense(n, model.n_layers),
            forced=np.zeros(n, dtype=np.bool_),
            age=np.zeros(n, dtype=np.int64),
            dense_reason="LeRobot's own policy",
            stages=stages,
            metadata={"normalized": chunk[0].float().cpu().tolist()},
            pixels=model.processor.images(frame),
        )
        answer: FloatArray = np.asarray(action.float().cpu().numpy(), dtype=np.float32)
        return answer

    def step(self, step: StepInfo) -> dict[str, int]:
        """Count as :meth:`lac_vla.cost.CostModel.step` does, but what LeRobot's own code multiplies."""
        parts = dict.fromkeys(("flow", "policy", "tower", "projector", "prefill", "decode", "head"), 0)
        return {**parts, **(self._macs or {})}
