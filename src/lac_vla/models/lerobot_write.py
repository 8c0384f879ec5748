"""Writes what LeRobot's processors keep beside the weights: their JSON and their statistics."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lac_vla.models.lerobot_layout import ACTION, POSTPROCESSOR, PREPROCESSOR, STATE, Units

STEPS = ((PREPROCESSOR, "normalizer_processor"), (POSTPROCESSOR, "unnormalizer_processor"))
KINDS = {STATE: "STATE", ACTION: "ACTION"}


def write_processors(folder: Path, units: Mapping[str, Units]) -> None:
    """Write both processors, so that :func:`lac_vla.models.lerobot_layout.read_units` reads them.

    Args:
        folder: Where to.
        units: Feature (``observation.state``, ``action``) → its units.
    """
    statistics: dict[str, torch.Tensor] = {}
    modes, features = {"VISUAL": "IDENTITY"}, {}
    for name, own in units.items():
        low, high = ("mean", "std") if own.centred else ("q01", "q99")
        modes[KINDS[name]] = "MEAN_STD" if own.centred else "QUANTILES"
        features[name] = {"type": KINDS[name], "shape": [own.dim]}
        statistics[f"{name}.{low}"] = torch.tensor(own.offset)
        statistics[f"{name}.{high}"] = torch.tensor(own.factor if own.centred else own.offset + own.divisor)
    for file, step in STEPS:
        state_file = f"{Path(file).stem}_step_0_{step}.safetensors"
        config = {"eps": 1e-8, "features": features, "norm_map": modes}
        steps: list[dict[str, Any]] = [{"registry_name": step, "config": config, "state_file": state_file}]
        content = {"name": Path(file).stem, "steps": steps}
        (folder / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        save_file(statistics, folder / state_file)
