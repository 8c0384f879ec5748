"""Pack staged demonstrations (``lac collect``), one ``.npz`` file per episode, into a dataset."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from lac_vla.datasets.layout import DatasetError
from lac_vla.datasets.lerobot import LeRobotDataset
from lac_vla.datasets.writer import DatasetWriter
from lac_vla.errors import LacError
from lac_vla.sims.libero.collect import load_episode

IMAGES = "images."
RENAMED = {"executed": "executed_action", "success": "next.success"}
"""Staged array → column, where the two differ."""

PER_EPISODE = ("task", "instruction", "init_state", "sigma", "steps")
STATE_NAMES = ("x", "y", "z", "axis_angle_x", "axis_angle_y", "axis_angle_z", "finger_left", "finger_right")
ACTION_NAMES = ("x", "y", "z", "axis_angle_x", "axis_angle_y", "axis_angle_z", "gripper")


def pack(
    staging_dir: str | Path,
    out: str | Path,
    fps: int = 20,
    *,
    overwrite: bool = False,
    progress: bool = True,
) -> LeRobotDataset:
    """Pack staged episodes into a dataset, ordered by suite, task, initial state and seed.

    ``state`` and ``action`` (the clean one) become the dataset's; all other arrays become columns of the
    same name, except that ``executed`` is called ``executed_action`` and ``success`` ``next.success``, which
    LeRobot does not take for inputs or outputs of a policy. An episode's metadata goes to the episode table;
    what all episodes have in common goes to :attr:`LeRobotDataset.provenance` too.

    Args:
        staging_dir: Folder with ``.npz`` files, at any depth.
        out: Folder of the new dataset.
        fps: Frames per second.
        overwrite: Replace what is at ``out``.
        progress: Show a progress bar.

    Returns:
        The dataset, opened.

    Raises:
        DatasetError: If there is no staged file, or one is damaged; the message names it.
    """
    paths = sorted(Path(staging_dir).rglob("*.npz"))
    if not paths:
        raise DatasetError(f"there is no .npz file in {staging_dir}: collect demonstrations first")
    notes = {path: _metadata(path) for path in paths}
    paths.sort(key=lambda path: (*_order(notes[path]), path.name))
    with DatasetWriter(
        out,
        fps,
        state_names=STATE_NAMES,
        action_names=ACTION_NAMES,
        robot_type="panda",
        provenance=_common(list(notes.values())),
        overwrite=overwrite,
    ) as writer:
        for path in tqdm(paths, desc="packing", unit="episode", disable=not progress):
            try:
                _add(writer, *load_episode(path))
            except (LacError, KeyError, OSError, ValueError, zipfile.BadZipFile) as error:
                raise DatasetError(f"{path}: {error}; delete the file or collect it again") from error
    return LeRobotDataset(out)


def _add(writer: DatasetWriter, arrays: Mapping[str, npt.NDArray[Any]], note: Mapping[str, Any]) -> None:
    images = {name.removeprefix(IMAGES): array for name, array in arrays.items() if name.startswith(IMAGES)}
    columns = {
        RENAMED.get(name, name): array
        for name, array in arrays.items()
        if name not in ("state", "action") and not name.startswith(IMAGES)
    }
    writer.add_episode(
        images, arrays["state"], arrays["action"], str(note["instruction"]), columns=columns, metadata=note
    )


def _metadata(path: Path) -> dict[str, Any]:
    """The metadata alone: the arrays, which are large, are not read."""
    try:
        with np.load(path, allow_pickle=False) as file:
            note = json.loads(str(file["meta"]))
    except (KeyError, OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DatasetError(f"{path} is no staged episode ({error}): delete it or collect it again") from error
    if not isinstance(note, dict):
        raise DatasetError(f"{path} has no metadata: delete it or collect it again")
    return note


def _order(note: Mapping[str, Any]) -> tuple[str, int, int, int]:
    task, init_state, seed = (int(note.get(key, 0)) for key in ("task", "init_state", "seed"))
    return str(note.get("suite")), task, init_state, seed


def _common(notes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Collect what all episodes say alike, without what tells one from another."""
    return {
        key: value
        for key, value in notes[0].items()
        if key not in PER_EPISODE and all(note.get(key) == value for note in notes)
    }
