"""Official OpenVLA-OFT folders whose weights are functions of their names, as the goldens' are."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from lac_vla import VLA, Frame, load_vla

GOLDENS = Path(__file__).parents[1] / "goldens"
OFT = GOLDENS / "oft"
TOWERS = [
    {
        "width": 32, "depth": 4, "heads": 2, "mlp_width": 128, "registers": 4, "class_token": True,
        "layer_scale": True, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
    },
    {"width": 48, "depth": 3, "heads": 4, "mlp_width": 96},
]  # fmt: skip
Arrays = dict[str, np.ndarray[Any, Any]]
Fill = Callable[[str, list[int]], torch.Tensor]
KEYS = {
    "action_head": ("action_head", "action_head."),
    "diffusion": ("diffusion_action_head", "action_head."),
    "proprio_projector": ("proprio_projector", "proprio_projector."),
    "noisy_action_projector": ("noisy_action_projector", "noisy_action_projector."),
    "vision_backbone": ("film_vision_backbone", "film."),
}
"""Part → its entry among the goldens' keys, and what the keys that are filled begin with."""


def golden(name: str) -> tuple[Arrays, dict[str, Any]]:
    """Arrays and description of ``libero`` or ``aloha``."""
    with np.load(OFT / f"oft_{name}.npz") as data:
        return dict(data), json.loads((OFT / f"oft_{name}.json").read_text())


def part_of(fill: Fill, robot: str, part: str) -> dict[str, torch.Tensor]:
    """A part's state dict under its official names."""
    entry, begin = KEYS[part]
    shapes = golden(robot)[1]["keys"][entry]
    return {key: fill(begin + key, shape) for key, shape in shapes.items()}


def write_oft(
    folder: Path,
    weights: Mapping[str, torch.Tensor],
    fill: Fill,
    robot: str = "libero",
    parts: tuple[str, ...] = ("action_head", "proprio_projector"),
    step: str = "150000",
) -> Path:
    """Write a folder as the official code does."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((OFT / "oft_config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vit_towers": TOWERS}))
    statistics = (OFT / f"oft_{robot}_dataset_statistics.json").read_text()
    (folder / "dataset_statistics.json").write_text(statistics)
    save_file(dict(weights), folder / "model.safetensors")
    for part in parts:
        state = part_of(fill, robot, part)
        if part != "vision_backbone":  # DistributedDataParallel's prefix; FiLM's file has none
            state = {f"module.{key}": value for key, value in state.items()}
        name = "action_head" if part == "diffusion" else part
        torch.save(state, folder / f"{name}--{step}_checkpoint.pt")
    return folder


def load_oft(folder: Path, ids: np.ndarray[Any, Any], platform: str | None = "libero", **options: Any) -> VLA:
    """Load with the golden token ids in place of a tokenizer, for images that are cropped already."""
    tokens: list[int] = ids.tolist()
    options = {"image_pipeline": "resize-naive", "encode": lambda text: tokens, "platform": platform, **options}
    return load_vla(folder, **options)


def libero_frame(arrays: Arrays, images: str = "cropped", *, state: bool = True) -> Frame:
    """The golden observation of LIBERO."""
    pictures = {"agentview": arrays[f"image.agent.{images}"], "wrist": arrays[f"image.wrist.{images}"]}
    return Frame(pictures, "golden", arrays["state"] if state else None)


def aloha_frame(arrays: Arrays) -> Frame:
    """The golden observation of ALOHA."""
    agent = golden("libero")[0]["image.agent.cropped"]
    pictures = {"agentview": agent, **{f"{side}_wrist": arrays[f"image.{side}.cropped"] for side in ("left", "right")}}
    return Frame(pictures, "golden", arrays["state"])
