"""A tiny frozen model and stored frames made by hand, for the tests of `lac train`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from lac_vla import PrismaticBackbone, random_vla
from lac_vla.models import CogACTBackbone
from lac_vla.policies.lac import LACConfig, LACPolicy
from lac_vla.training.lac import Learner
from lac_vla.training.store import FrameStore
from lac_vla.training.tasks import task_of
from lac_vla.types import Frame

SIDE = 8
INSTRUCTION = "pick up the bowl"


def tiny(name: str = "tiny", seed: int = 3) -> PrismaticBackbone | CogACTBackbone:
    backbone = random_vla(name, seed=seed)
    backbone.model.requires_grad_(False)
    return backbone


def store_of(
    backbone: PrismaticBackbone | CogACTBackbone,
    episodes: int = 4,
    length: int = 8,
    *,
    draw: Callable[[np.random.Generator, int], np.ndarray] | None = None,
    paint: Callable[[np.random.Generator, int, tuple[int, int]], np.ndarray] | None = None,
    seed: int = 0,
) -> FrameStore:
    """Stored frames of a made-up robot.

    Args:
        backbone: Gives layout, prefix and suffix.
        episodes: How many.
        length: Frames of an episode.
        draw: Random generator, frame within the episode → visual embeddings (N, D); by default random every frame.
        paint: Random generator, frame, (rows, cols) → image, uint8; by default random every frame.
        seed: Of everything.
    """
    rng = np.random.default_rng(seed)
    grids = dict(backbone.grids)
    n, width, total = sum(r * c for r, c in grids.values()), backbone.shape.width, episodes * length
    visual = np.empty((total, n, width), np.float16)
    images = {name: np.empty((total, r * SIDE, c * SIDE, 3), np.uint8) for name, (r, c) in grids.items()}
    for frame in range(total):
        at = frame % length
        visual[frame] = rng.normal(size=(n, width)) if draw is None else draw(rng, at)
        for name, (rows, cols) in grids.items():
            shape = (rows * SIDE, cols * SIDE, 3)
            images[name][frame] = rng.integers(0, 256, shape) if paint is None else paint(rng, at, (rows, cols))
    blank = Frame({name: np.zeros((8, 8, 3), np.uint8) for name in grids}, INSTRUCTION)
    with torch.no_grad():
        text, prefix = backbone.suffix(blank).float().numpy(), backbone.prefix(blank).float().numpy()
    flow = {name: np.zeros((*image.shape[:3], 2), np.float16) for name, image in images.items()}
    stop = np.arange(1, episodes + 1) * length
    return FrameStore(
        grids=grids,
        visual=visual,
        prefix=prefix,
        suffix=np.repeat(text[None], total, axis=0),
        suffix_length=np.full(total, len(text)),
        targets=task_of(backbone).targets(rng.uniform(-1, 1, (total, 7))),
        images=images,
        flow=flow,
        instructions=[INSTRUCTION] * episodes,
        start=stop - length,
        stop=stop,
        has_actions=True,
    )


def learner_of(
    backbone: PrismaticBackbone | CogACTBackbone,
    store: FrameStore,
    loss: str = "distill",
    *,
    seed: int = 0,
    **options: object,
) -> Learner:
    torch.manual_seed(seed)
    config = LACConfig(grids=store.grids, **{"width": 16, "patch_pixels": SIDE, **options})  # type: ignore[arg-type]
    return Learner(backbone, task_of(backbone), store, LACPolicy(config), loss)
