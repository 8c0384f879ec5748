"""Recorded episodes of unequal length, a tiny model beside them, and a real session that goes through one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tests.training.worlds import INSTRUCTION, SIDE, save_with_tokenizer

from lac_vla import VLA, CachedVLA, Frame, LACPolicy, StepInfo, load_vla, random_vla
from lac_vla.datasets import LeRobotDataset
from lac_vla.datasets.writer import DatasetWriter
from lac_vla.engine.options import EngineOptions
from lac_vla.models.prismatic.presets import MINI, TINY
from lac_vla.policies import CachePolicy
from lac_vla.policies.lac import LACConfig
from lac_vla.types import IntArray

LENGTHS = (9, 5, 13, 2)
MAX_AGE, STATE = 4, 8


@dataclass(frozen=True)
class Recorded:
    """A dataset, and a model and a policy whose pictures are as small as the model's own.

    Attributes:
        dataset: Its folder.
        model: The model's.
        policy: The policy's: it varies its ratio, and recovers often.
    """

    dataset: Path
    model: Path
    policy: Path

    def vla(self) -> VLA:
        vla = load_vla(str(self.model), device="cpu", dtype="auto")
        vla.module.requires_grad_(False)
        return vla

    def frames(self, number: int) -> list[Frame]:
        episode = LeRobotDataset(self.dataset).episode(number)
        images = {camera: episode.images[camera] for camera in episode.images}
        every = range(len(episode))
        return [
            Frame({c: clip[at] for c, clip in images.items()}, episode.instruction, episode.state[at]) for at in every
        ]


def told() -> VLA:
    """A tiny model that takes proprioception."""
    vla = random_vla(replace(TINY, proprio_dim=STATE, norm_stats=MINI.norm_stats), seed=3)
    vla.module.requires_grad_(False)
    return vla


def record(folder: Path) -> Recorded:
    rng = np.random.default_rng(1)
    with DatasetWriter(folder / "demos", 20) as writer:
        for length in LENGTHS:
            still = {
                camera: rng.integers(0, 255, (8, 8, 3)).repeat(8, 0).repeat(8, 1) for camera in ("agentview", "wrist")
            }
            images = {
                camera: np.stack([np.roll(image, 2 * at, axis=1) for at in range(length)]).astype(np.uint8)
                for camera, image in still.items()
            }
            action = rng.uniform(-1, 1, (length, 7)).astype(np.float32)
            action[:, 6] = np.where(np.arange(length) < length // 2, 1.0, -1.0)  # it closes half way
            state = rng.normal(size=(length, STATE)).cumsum(axis=0).astype(np.float32)
            writer.add_episode(images, state, action, INSTRUCTION)
    vla = told()
    torch.manual_seed(2)
    options = {"width": 8, "patch_pixels": SIDE, "recovery": 0.2, "max_age": MAX_AGE, "proprio": STATE}
    policy = LACPolicy(LACConfig(dict(vla.grids), ratios=(0.0, 0.3, 0.6, 0.9), **options))  # type: ignore[arg-type]
    policy.predictor.standardise(torch.randn(100, STATE))
    with torch.no_grad():
        torch.nn.init.normal_(policy.predictor.hidden.weight[:, -STATE:], std=0.3)
    torch.nn.init.normal_(policy.predictor.head.weight, std=3.0)
    policy.save_pretrained(folder / "policy")
    return Recorded(folder / "demos", save_with_tokenizer(vla, folder / "tiny"), folder / "policy")


def session_of(
    world: Recorded, vla: VLA, policy: CachePolicy, number: int, seed: int = 0
) -> Iterator[tuple[IntArray, dict[str, np.ndarray], StepInfo]]:
    """Ages and reference pixels before every frame from the second on, and what a real session did with it."""
    beside = CachedVLA(vla, policy, max_age=MAX_AGE, scene_cut=1.0, options=EngineOptions.parse("none"))
    session = beside.session()
    session._rng = np.random.default_rng([seed, number])
    for at, frame in enumerate(world.frames(number)):
        age, reference = session.memory.age.copy(), {c: image.copy() for c, image in session.memory.reference.items()}
        session.act(frame)
        assert session.last_info is not None
        if at:
            yield age, reference, session.last_info
