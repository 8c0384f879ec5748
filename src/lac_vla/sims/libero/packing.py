"""Pack staged demonstrations (``lac collect``), one ``.npz`` file per episode, into a dataset."""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from lac_vla.datasets.layout import DatasetError
from lac_vla.datasets.lerobot import LeRobotDataset
from lac_vla.datasets.writer import DatasetWriter
from lac_vla.files import locked, writing
from lac_vla.sims.libero.collect import load_episode, load_metadata
from lac_vla.sims.libero.env import CONTROL_HZ

IMAGES = "images."
RENAMED = {"executed": "executed_action", "success": "next.success"}
"""Staged array → column, where the two differ."""
ORDER = ("suite", "task", "init_state", "seed")
PER_EPISODE = ("task", "instruction", "init_state", "sigma", "steps")
STATE_NAMES = ("x", "y", "z", "axis_angle_x", "axis_angle_y", "axis_angle_z", "finger_left", "finger_right")
ACTION_NAMES = ("x", "y", "z", "axis_angle_x", "axis_angle_y", "axis_angle_z", "gripper")


def pack(staging_dir: Path, out: Path) -> LeRobotDataset:
    """Pack staged episodes into a dataset, ordered by suite, task, initial state and seed.

    ``state`` and ``action`` (the clean one) become the dataset's; all other arrays become columns of the
    same name, except that ``executed`` is called ``executed_action`` and ``success`` ``next.success``, which
    LeRobot does not take for inputs or outputs of a policy. An episode's metadata goes to the episode table;
    what all episodes have in common goes to :attr:`LeRobotDataset.provenance` too.

    Args:
        staging_dir: Folder with ``.npz`` files, at any depth.
        out: Folder of the new dataset; what is there is replaced.

    Returns:
        The dataset, opened.

    Raises:
        DatasetError: If there is no staged file, or one is damaged; the message names it.
    """
    notes = {path: load_metadata(path) for path in sorted(staging_dir.rglob("*.npz"))}
    if not notes:
        raise DatasetError(f"there is no .npz file in {staging_dir}: collect demonstrations first")
    paths = sorted(notes, key=lambda path: (*(notes[path][key] for key in ORDER), path.name))
    common = {
        key: value
        for key, value in notes[paths[0]].items()
        if key not in PER_EPISODE and all(note.get(key) == value for note in notes.values())
    }
    lock = locked(out.with_name(f"{out.name}.lock"), f"another process writes {out}: give another --dataset")
    with (
        writing(out, "--dataset"),
        lock,
        DatasetWriter(
            out,
            CONTROL_HZ,
            state_names=STATE_NAMES,
            action_names=ACTION_NAMES,
            robot_type="panda",
            provenance=common,
            overwrite=True,
        ) as writer,
    ):
        for path in tqdm(paths, desc="packing", unit="episode"):
            arrays, note = load_episode(path)
            try:
                images = {key.removeprefix(IMAGES): arrays.pop(key) for key in list(arrays) if key.startswith(IMAGES)}
                state, action = arrays.pop("state"), arrays.pop("action")
                columns = {RENAMED.get(key, key): array for key, array in arrays.items()}
                writer.add_episode(images, state, action, note["instruction"], columns=columns, metadata=note)
            except DatasetError as error:
                raise DatasetError(f"{path}: {error}; delete the file or collect it again") from error
    return LeRobotDataset(out)
