"""A robot's data set, with its own camera names: ``python make_dataset.py FOLDER``; by LeRobot if it is here."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

FPS, EPISODES, STEPS, SIDE = 10, 3, 24, 64
TASK = "put the bowl on the plate"
CAMERAS = ("front_cam", "gripper_cam")


def frames(seed: int) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]]:
    """Images, state and action of an episode: something moves before a picture that stays."""
    rng = np.random.default_rng(seed)
    background = rng.integers(60, 190, (SIDE, SIDE, 3)).astype(np.uint8)
    for step in range(STEPS):
        image = background.copy()
        image[20:36, 2 * step : 2 * step + 12] = (200, 60, 40)
        numbers = np.full(8, step / STEPS, np.float32)
        yield dict.fromkeys(CAMERAS, image), numbers, numbers[:7]


def by_lerobot(folder: Path) -> None:
    """Write with LeRobot."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    features: dict[str, Any] = {
        f"observation.images.{name}": {
            "dtype": "video",
            "shape": (SIDE, SIDE, 3),
            "names": ["height", "width", "channels"],
        }
        for name in CAMERAS
    }
    features |= {
        "observation.state": {"dtype": "float32", "shape": (8,), "names": None},
        "action": {"dtype": "float32", "shape": (7,), "names": None},
    }
    dataset = LeRobotDataset.create("own/kitchen", FPS, features, root=folder, use_videos=True)
    for seed in range(EPISODES):
        for images, state, action in frames(seed):
            pictures = {f"observation.images.{name}": image for name, image in images.items()}
            dataset.add_frame({**pictures, "observation.state": state, "action": action, "task": TASK})
        dataset.save_episode()
    if hasattr(dataset, "finalize"):
        dataset.finalize()


def by_ourselves(folder: Path) -> None:
    """Write the same layout with this library."""
    from lac_vla.datasets.writer import DatasetWriter

    with DatasetWriter(folder, FPS) as dataset:
        for seed in range(EPISODES):
            images, states, actions = zip(*frames(seed), strict=True)
            pictures = {name: np.stack([each[name] for each in images]) for name in CAMERAS}
            dataset.add_episode(pictures, np.stack(states), np.stack(actions), TASK)


if __name__ == "__main__":
    try:
        import lerobot  # noqa: F401
    except ModuleNotFoundError:
        print("data set: by this library, in LeRobot's layout (LeRobot is not installed)")
        by_ourselves(Path(sys.argv[1]))
    else:
        print("data set: by LeRobot")
        by_lerobot(Path(sys.argv[1]))
