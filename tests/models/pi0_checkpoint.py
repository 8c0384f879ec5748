"""The tiny π0 and π0.5 in LeRobot's layout whose outputs the goldens hold, and what they were shown."""

from __future__ import annotations

import json
import shutil
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tests.models.conftest import GOLDENS, Arrays

from lac_vla import VLA, CachedVLA, Dense, Session
from lac_vla.types import Frame

TASK = "pick up the\nblack_bowl"
CAMERAS = {"base_0_rgb": "image_base", "left_wrist_0_rgb": "image_wrist"}
HEADS = {"vision_heads": 4}
"""What no shape of the tiny tower tells."""


def fill(key: str, shape: list[int]) -> torch.Tensor:
    """Weights as a pure function of their name; Gemma's norms multiply by 1 + weight."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
    if len(shape) > 1:
        return x / float(x[0].numel() ** 0.5)
    return float(key.endswith(("layer_norm1.weight", "layer_norm2.weight", "post_layernorm.weight"))) + 0.3 * x


def weights(family: str, version: str = "") -> dict[str, torch.Tensor]:
    """All tensors of the golden checkpoint, the unused ones included."""
    keys = json.loads((GOLDENS / family / f"keys{version}.json").read_text())
    return {key: fill(key, shape) for key, shape in keys.items()}


def write(folder: Path, family: str, version: str = "", **config: Any) -> Path:
    """Write the checkpoint of LeRobot 0.6.1, or ``_0_4_4``, with some settings changed."""
    own = GOLDENS / family
    folder.mkdir(parents=True)
    for file in [own / "tokenizer.json", *own.glob("*.safetensors")]:
        shutil.copyfile(file, folder / file.name)
    for name in ("config", "policy_preprocessor", "policy_postprocessor"):
        shutil.copyfile(own / f"{name}{version}.json", folder / f"{name}.json")
    change(folder / "config.json", **HEADS, **config)
    [before] = (
        step["state_file"]
        for step in json.loads((folder / "policy_preprocessor.json").read_text())["steps"]
        if "state_file" in step
    )
    [statistics] = folder.glob("policy_preprocessor*.safetensors")
    statistics.rename(folder / before)  # its number differs between versions
    save_file(weights(family, version), folder / "model.safetensors")
    return folder


def change(file: Path, **values: Any) -> None:
    """Change some values of a JSON file; ``None`` removes one."""
    data = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def golden(family: str, version: str = "") -> Arrays:
    with np.load(GOLDENS / family / f"golden{version}.npz") as file:
        return dict(file)


def observation(arrays: Arrays, instruction: str = TASK, **changed: Any) -> Frame:
    """What the official policy was shown, or with one input changed."""
    images = {name: changed.get(own, arrays[own]) for name, own in CAMERAS.items()}
    return Frame(images, instruction, changed.get("state", arrays["state"]))


@dataclass
class FixedNoise:
    """A session's chance that always draws the same."""

    noise: np.ndarray[Any, Any]
    bit_generator: Any = field(default_factory=lambda: np.random.default_rng(0).bit_generator)

    def standard_normal(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
        assert shape == self.noise.shape
        return self.noise.astype(dtype)


def session_of(vla: VLA, arrays: Arrays) -> Session:
    """A session that draws the golden noise in every frame."""
    session = CachedVLA(vla, Dense()).session()
    session._head_rng = FixedNoise(arrays["noise"][0])  # type: ignore[assignment]
    return session
