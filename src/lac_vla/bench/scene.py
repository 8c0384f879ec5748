"""Frames for the models: a synthetic moving scene, or a robot's recorded ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from lac_vla.dataset_keys import DatasetKeys
from lac_vla.errors import InputError
from lac_vla.models import VLA
from lac_vla.types import Frame, UInt8Image

INSTRUCTION = "pick up the black bowl next to the plate and place it on the plate"
SIDE = 256
"""Side of the synthetic images, pixels."""
OBJECT_SIDE = 56
NOISE = 2.0
"""Standard deviation of the synthetic sensor noise, in grey levels of 255."""
PERIOD = 80
"""Frames after which the synthetic object is back where it was."""


@dataclass(frozen=True, eq=False)
class Scene:
    """Frames to replay.

    Attributes:
        source: Where they come from, in words.
        frames: In order of time.
        starts: Numbers of the frames that begin an episode.
    """

    source: str
    frames: tuple[Frame, ...]
    starts: frozenset[int]


def make_scene(model: VLA, replay: Path | None, length: int, seed: int, keys: DatasetKeys | None = None) -> Scene:
    """Make the synthetic frames that fit a model; or read those of a LeRobot dataset, which may be fewer.

    Raises:
        InputError: If the dataset lacks a camera or the state that the model needs.
        DatasetError: If it cannot be read.
    """
    cameras = tuple(model.grids)
    state = model.processor.state_dim
    if replay is None:
        return synthetic(cameras, state, length, seed)
    return replayed(replay, cameras, state, length, keys or DatasetKeys())


def synthetic(cameras: tuple[str, ...], state: int | None, length: int, seed: int) -> Scene:
    """Make a textured background at rest, a textured object that goes round before it, and sensor noise.

    Every camera sees its own scene; ``state`` is the length of the proprioception vector, or ``None``.
    """
    rng = np.random.default_rng(seed)
    backgrounds = {camera: _texture(rng, SIDE) for camera in cameras}
    thing = _texture(rng, OBJECT_SIDE)
    frames = []
    for index in range(length):
        angle = 2 * np.pi * index / PERIOD
        images = {camera: _shot(rng, background, thing, angle) for camera, background in backgrounds.items()}
        proprio = None if state is None else np.sin(angle + np.arange(state)).astype(np.float32)
        frames.append(Frame(images, INSTRUCTION, proprio))
    source = f"synthetic: static background, moving object, noise of {NOISE:g}/255; {SIDE}×{SIDE} per camera"
    return Scene(source, tuple(frames), frozenset({0}))


def _texture(rng: np.random.Generator, side: int) -> UInt8Image:
    """Make a smooth random pattern with fine grain, uint8, side × side × 3."""
    coarse = rng.uniform(30, 220, (max(4, side // 16), max(4, side // 16), 3)).astype(np.float32)
    smooth = cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC)
    return np.asarray(np.clip(smooth + rng.normal(0, 12, smooth.shape), 0, 255), dtype=np.uint8)


def _shot(rng: np.random.Generator, background: UInt8Image, thing: UInt8Image, angle: float) -> UInt8Image:
    """Make one camera's image, uint8, H×W×3."""
    margin = (SIDE - OBJECT_SIDE) / 2
    top, left = (round(margin * (1 + 0.8 * wave(angle))) for wave in (np.sin, np.cos))
    image = background.astype(np.float32)
    image[top : top + OBJECT_SIDE, left : left + OBJECT_SIDE] = thing
    image += NOISE * rng.standard_normal(image.shape, dtype=np.float32)
    return np.asarray(np.clip(image, 0, 255), dtype=np.uint8)


def replayed(folder: Path, cameras: tuple[str, ...], state: int | None, length: int, keys: DatasetKeys) -> Scene:
    """Read the first frames, ``length`` at most, of a LeRobot dataset; see :func:`make_scene`."""
    from lac_vla.datasets import LeRobotDataset  # needs an optional dependency

    dataset = LeRobotDataset(folder, keys.cameras(cameras), keys)
    frames: list[Frame] = []
    starts = set()
    for index in range(len(dataset)):
        if len(frames) >= length:
            break
        starts.add(len(frames))
        episode = dataset.episode(index)
        if state is not None and episode.state.shape[1] != state:
            raise InputError(
                f"the model needs {state} values of proprioception; {folder} has {episode.state.shape[1]} in "
                f"'{keys.state_key}': --state-key takes one of {dataset.number_columns}"
            )
        count = min(len(episode), length - len(frames))
        images = {camera: episode.images.window(camera, 0, count) for camera in cameras}
        for step in range(count):
            proprio = None if state is None else episode.state[step]
            shot = {camera: clip[step] for camera, clip in images.items()}
            frames.append(Frame(shot, episode.instruction, proprio))
    return Scene(f"{folder.name}: {len(starts)} episode(s)", tuple(frames), frozenset(starts))
