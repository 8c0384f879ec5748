"""The tiny SmolVLA in LeRobot's layout whose outputs the goldens hold, and what it was shown."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file
from tests.models.conftest import GOLDENS, Arrays, fill

from lac_vla import VLA, CachedVLA, Dense, Session
from lac_vla.types import Frame

FOLDER = GOLDENS / "smolvla"
TASK = "pick up the black bowl"


def write(folder: Path, variant: str | None = None, **config: Any) -> Path:
    """Write the checkpoint, with some settings changed, and tensors of other shapes that a variant has."""
    folder.mkdir(parents=True)
    for file in FOLDER.iterdir():
        if file.name not in ("golden.npz", "keys.json", "variant_keys.json"):
            shutil.copyfile(file, folder / file.name)
    data = json.loads((FOLDER / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(data | config))
    keys = json.loads((FOLDER / "keys.json").read_text())
    if variant is not None:
        keys |= json.loads((FOLDER / "variant_keys.json").read_text())[variant]
    save_file({key: fill(key, shape) for key, shape in keys.items()}, folder / "model.safetensors")
    return folder


def golden() -> Arrays:
    with np.load(FOLDER / "golden.npz") as file:
        return dict(file)


def observation(arrays: Arrays, instruction: str = TASK, **changed: Any) -> Frame:
    """What the official policy was shown, or with one input changed."""
    images = {name: arrays[f"image_{name}"] for name in ("camera1", "camera2")}
    images |= {name: image for name, image in changed.items() if name in images}
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
