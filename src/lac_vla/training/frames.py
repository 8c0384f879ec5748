"""Holds demonstration frames in memory: images at the model's size, and the targets of behaviour cloning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from lac_vla.dataset_keys import DatasetKeys
from lac_vla.datasets.lerobot import LeRobotDataset
from lac_vla.errors import InputError
from lac_vla.types import BoolArray, FloatArray, IntArray, UInt8Image

GRIPPER = 6
"""Index of the gripper in an action. Most episodes begin with it open, whatever the number for that."""


@dataclass(frozen=True, eq=False)
class FrameBank:
    """Holds all frames of a dataset, episode after episode.

    Attributes:
        images: Camera → uint8, (F, size, size, 3).
        state: Proprioception, float32, (F, S): end-effector position in metres first.
        action: float32, (F, A).
        start: First frame of every episode, (E,); an episode ends where the next begins.
        stop: One past the last frame of every episode, (E,).
        task: Index into ``instructions`` of every episode, (E,).
        instructions: The tasks' texts.
    """

    images: dict[str, npt.NDArray[np.uint8]]
    state: FloatArray
    action: FloatArray
    start: IntArray
    stop: IntArray
    task: IntArray
    instructions: tuple[str, ...]

    @classmethod
    def load(
        cls,
        root: Path,
        sizes: Mapping[str, int],
        resize: Callable[[UInt8Image, int], UInt8Image],
        keys: DatasetKeys | None = None,
    ) -> FrameBank:
        """Decode a LeRobot dataset: every camera's images at its side in pixels, by the model's own geometry.

        Raises:
            InputError: If a camera, the state or the action is missing, or the dataset is empty.
        """
        keys = keys or DatasetKeys()
        dataset = LeRobotDataset(root, keys.cameras(sizes), keys)
        if not len(dataset):
            raise InputError(f"{root} holds no episodes: collect some first (lac collect)")
        for option, key in (("--state-key", keys.state_key), ("--action-key", keys.action_key)):
            if key not in dataset.features:
                raise InputError(f"{root} has no column '{key}'; {option} takes one of {dataset.number_columns}")
        images: dict[str, list[npt.NDArray[np.uint8]]] = {camera: [] for camera in sizes}
        states, actions, lengths, texts = [], [], [], []
        for index in tqdm(range(len(dataset)), desc="decoding demonstrations", unit="episode"):
            episode = dataset.episode(index)
            for camera, size in sizes.items():
                clip = episode.images.window(camera, 0, len(episode))
                images[camera].append(np.stack([resize(image, size) for image in clip]))
            states.append(episode.state)
            actions.append(episode.action)
            lengths.append(len(episode.action))
            texts.append(episode.instruction)
        stop = np.cumsum(lengths).astype(np.int64)
        instructions = tuple(sorted(set(texts)))
        return cls(
            {camera: np.concatenate(parts) for camera, parts in images.items()},
            np.concatenate(states).astype(np.float32),
            np.concatenate(actions).astype(np.float32),
            (stop - np.asarray(lengths)).astype(np.int64),
            stop,
            np.asarray([instructions.index(text) for text in texts], dtype=np.int64),
            instructions,
        )

    def __len__(self) -> int:
        return len(self.action)

    @property
    def episode(self) -> IntArray:
        """Number the episode of every frame, (F,)."""
        return np.repeat(np.arange(len(self.start)), self.stop - self.start)

    def split(self, held_out: float, seed: int) -> tuple[IntArray, IntArray]:
        """Divide the frames by episode: for training, and for validation a share of ``held_out``."""
        episodes = np.random.default_rng(seed).permutation(len(self.start))
        chosen = np.isin(self.episode, episodes[: round(held_out * len(episodes))])
        return np.flatnonzero(~chosen), np.flatnonzero(chosen)

    def chunks(self, horizon: int) -> FloatArray:
        """Gather the next actions of every frame, (F, horizon, A); the last one is repeated past the episode's end."""
        last = self.stop[self.episode] - 1
        steps = np.minimum(np.arange(len(self))[:, None] + np.arange(horizon), last[:, None])
        return np.asarray(self.action[steps])

    def hindsight(self) -> tuple[FloatArray, BoolArray]:
        """Read off the recording where the hand is now, where it will close and where it will open again.

        Returns:
            Positions in metres, (F, 3, 3), and which of them lie ahead or now, bool, (F, 3). What lies behind is no
            target: it cannot be seen any more.
        """
        targets = np.repeat(self.state[:, None, :3], 3, axis=1)
        ahead = np.zeros((len(self), 3), dtype=np.bool_)
        ahead[:, 0] = True
        gripper = self.action[:, GRIPPER]
        above = gripper > (gripper.min() + gripper.max()) / 2
        opens_above = above[self.start].mean() > 0.5
        for start, stop in zip(self.start, self.stop, strict=True):
            closed = above[start:stop] != opens_above
            if not closed.any():
                continue
            close = start + int(np.argmax(closed))
            reopened = ~closed[close - start :]
            targets[start : close + 1, 1] = self.state[close, :3]
            ahead[start : close + 1, 1] = True
            if reopened.any():
                release = close + int(np.argmax(reopened))
                targets[start : release + 1, 2] = self.state[release, :3]
                ahead[start : release + 1, 2] = True
        return targets.astype(np.float32), ahead


def shift_images(images: npt.NDArray[np.uint8], shifts: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """Move images, uint8, (B, H, W, 3), by whole pixels down and right, (B, 2), repeating their borders."""
    margin = int(np.abs(shifts).max(initial=0))
    if not margin:
        return images
    height, width = images.shape[1:3]
    moved = np.empty_like(images)
    for target, image, (down, right) in zip(moved, images, shifts, strict=True):
        padded = cv2.copyMakeBorder(image, margin, margin, margin, margin, cv2.BORDER_REPLICATE)
        target[:] = padded[margin - down : margin - down + height, margin - right : margin - right + width]
    return moved


def quantiles(values: FloatArray, columns: Sequence[int] | None = None) -> dict[str, list[float] | list[bool]]:
    """Compute statistics of values, (F, D), in the layout of OpenVLA's ``dataset_statistics.json``.

    Columns that are not in ``columns`` (by default all are) keep their raw values: the gripper.
    """
    mask = np.ones(values.shape[1], dtype=np.bool_) if columns is None else np.isin(range(values.shape[1]), columns)
    table: dict[str, list[float] | list[bool]] = {
        "q01": np.quantile(values, 0.01, axis=0).tolist(),
        "q99": np.quantile(values, 0.99, axis=0).tolist(),
        "mean": values.mean(axis=0).tolist(),
        "std": values.std(axis=0).tolist(),
        "min": values.min(axis=0).tolist(),
        "max": values.max(axis=0).tolist(),
        "mask": mask.tolist(),
    }
    return table
