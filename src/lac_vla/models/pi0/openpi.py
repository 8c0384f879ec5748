"""openpi's converted checkpoints: a ``config.json`` that says little, LeRobot's weights, ``assets/…/norm_stats.json``.

What differs from LeRobot: 1e-6 is added to deviations and intervals, both ways; underscores and line breaks of π0's
instructions become spaces; pictures are resized as images, with antialiasing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lac_vla.checkpoint_files import read_json
from lac_vla.errors import CheckpointError
from lac_vla.models.heads.units import choose_stats
from lac_vla.models.lerobot_layout import ACTION, OPENPI_EPS, STATE, Features, Normalization

STATISTICS = "norm_stats.json"
CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
NAMES = {STATE: "state", ACTION: "actions"}
TOKENS = {"pi0": 48, "pi05": 200}
MODES = {"pi0": "MEAN_STD", "pi05": "QUANTILES"}


def is_openpi(data: Mapping[str, Any]) -> bool:
    """Tell openpi's ``config.json`` from LeRobot's."""
    return "action_horizon" in data and "input_features" not in data


def describe(
    folder: Path, data: Mapping[str, Any], family: str, unnorm_key: str | None
) -> tuple[dict[str, Any], Features, Normalization, int]:
    """Say in LeRobot's words what an openpi checkpoint is.

    Args:
        folder: The checkpoint's.
        data: Contents of its ``config.json``.
        family: ``pi0`` or ``pi05``.
        unnorm_key: Name of the folder in ``assets`` whose statistics count; may be ``None`` if there is only one.

    Returns:
        A ``config.json``, features, normalisation, and the longest prompt.

    Raises:
        CheckpointError: If there are no statistics, or they are not understood.
        InputError: If there are several, and ``unnorm_key`` is none of them.
    """
    assets = folder / "assets"
    files = {str(file.parent.relative_to(assets)): file for file in sorted(assets.rglob(STATISTICS))}
    if not files:
        raise CheckpointError(f"{assets} holds no {STATISTICS}: is the checkpoint's folder complete?")
    file: Any = choose_stats(files, unnorm_key)
    content = read_json(file).get("norm_stats")
    if not isinstance(content, Mapping) or not all(isinstance(content.get(own), Mapping) for own in NAMES.values()):
        raise CheckpointError(f"{file} holds no statistics of {list(NAMES.values())}")
    mode = MODES[family]
    kept = ("mean", "std") if mode == "MEAN_STD" else ("q01", "q99")
    statistics = {
        feature: {name: content[own][name] for name in kept if content[own].get(name) is not None}
        for feature, own in NAMES.items()
    }
    dims = [len(next(iter(parts.values()), ())) for parts in statistics.values()]
    found = Normalization.of(mode, statistics)
    features = Features({name: name for name in CAMERAS}, *dims)
    config = {**data, "type": family, "chunk_size": data["action_horizon"], "openpi": True}
    return config, features, Normalization(found.modes, found.statistics, OPENPI_EPS), TOKENS[family]
