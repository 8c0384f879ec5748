"""The tiny official-layout checkpoint whose outputs the goldens hold, and frames to look at."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lac_vla.types import Frame

GOLDENS = Path(__file__).parents[1] / "goldens"
TOWERS = [
    {
        "width": 32, "depth": 4, "heads": 2, "mlp_width": 128, "registers": 4, "class_token": True,
        "layer_scale": True, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
    },
    {"width": 48, "depth": 3, "heads": 4, "mlp_width": 96},
]  # fmt: skip

Weights: TypeAlias = dict[str, torch.Tensor]
Arrays: TypeAlias = dict[str, np.ndarray[Any, Any]]


def fill(key: str, shape: list[int]) -> torch.Tensor:
    """Weights as a pure function of their name."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
    if len(shape) > 1:
        return x / float(x[0].numel() ** 0.5)
    gain = key.endswith(("norm.weight", "norm1.weight", "norm2.weight", "layernorm.weight", "scale_factor"))
    return float(gain) + 0.3 * x


def fill_action_head(key: str, shape: list[int]) -> torch.Tensor:
    """:func:`fill` of CogACT's action head: every vector is 0.3 · normal."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
    return x / float(x[0].numel() ** 0.5) if len(shape) > 1 else 0.3 * x


def write_checkpoint(folder: Path, weights: Weights, *, shards: int = 1, **config: Any) -> Path:
    """Write config.json (the golden one with changes) and one or several safetensors files.

    The towers' shapes are spelt out, since the timm names in the golden config do not tell them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    official = json.loads((GOLDENS / "openvla_config.json").read_text())
    (folder / "config.json").write_text(json.dumps(official | {"vit_towers": TOWERS} | config))
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    weight_map: dict[str, str] = {}
    for i in range(shards):
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: weights[key] for key in sorted(weights)[i::shards]}
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="session")
def golden() -> Arrays:
    """Outputs of the official code."""
    with np.load(GOLDENS / "openvla_golden.npz") as data:
        return dict(data)


@pytest.fixture(scope="session")
def decoding() -> Arrays:
    """Decoded actions of the official code."""
    with np.load(GOLDENS / "openvla_action_decoding.npz") as data:
        return dict(data)


@pytest.fixture(scope="session")
def golden_weights() -> Weights:
    """All tensors of the golden checkpoint, the unused ones included."""
    keys = json.loads((GOLDENS / "openvla_keys.json").read_text())
    return {key: fill(key, shape) for key, shape in keys.items()}


@pytest.fixture(scope="session", name="fill")
def fill_fixture() -> Callable[[str, list[int]], torch.Tensor]:
    """:func:`fill`."""
    return fill


@pytest.fixture(scope="session")
def fill_head() -> Callable[[str, list[int]], torch.Tensor]:
    """:func:`fill_action_head`."""
    return fill_action_head


@pytest.fixture(scope="session")
def write() -> Callable[..., Path]:
    """:func:`write_checkpoint`."""
    return write_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, golden_weights: Weights) -> Path:
    """The golden checkpoint in one file. Not to be changed."""
    return write_checkpoint(tmp_path_factory.mktemp("golden"), golden_weights)


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory, golden_weights: Weights) -> Path:
    """The golden checkpoint in three shards. Not to be changed."""
    return write_checkpoint(tmp_path_factory.mktemp("sharded"), golden_weights, shards=3)


@pytest.fixture
def frame() -> Frame:
    """Two cameras, an instruction and a state of 8 values."""
    rng = np.random.default_rng(0)
    images = {name: rng.integers(0, 256, (96, 120, 3)).astype(np.uint8) for name in ("agentview", "wrist")}
    return Frame(images, "pick up the bowl", proprio=rng.normal(size=8).astype(np.float32))
