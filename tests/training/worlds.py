"""A tiny frozen model and stored frames made by hand, for the tests of `lac train`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from lac_vla import VLA, Session, random_vla, save_vla
from lac_vla.models.heads.base import Decoding, HeadContext, alone
from lac_vla.models.tokenizer import FileTokenizer, train_tokenizer
from lac_vla.policies.lac import LACConfig, LACPolicy
from lac_vla.training.lac import LACLoss
from lac_vla.training.store import FrameStore
from lac_vla.types import Frame

SIDE = 8
INSTRUCTION = "pick up the bowl"


def tiny(name: str = "tiny", seed: int = 3) -> VLA:
    vla = random_vla(name, seed=seed)
    vla.module.requires_grad_(False)
    return vla


def save_with_tokenizer(vla: VLA, folder: Path) -> Path:
    """A checkpoint with a tokenizer."""
    words = vla.module.config.vocab_size - vla.module.config.n_action_bins
    save_vla(replace(vla, encode=FileTokenizer(train_tokenizer([INSTRUCTION], max(words, 259)))), folder)
    return folder


def store_of(
    vla: VLA,
    episodes: int = 4,
    length: int = 8,
    *,
    draw: Callable[[np.random.Generator, int], np.ndarray] | None = None,
    paint: Callable[[np.random.Generator, int, tuple[int, int]], np.ndarray] | None = None,
    instructions: Sequence[str] = (INSTRUCTION,),
    seed: int = 0,
) -> FrameStore:
    """Stored frames of a made-up robot.

    Args:
        vla: Gives layout, prefix and suffix.
        episodes: How many.
        length: Frames of an episode.
        draw: Random generator, frame within the episode → visual embeddings (N, D); by default random every frame.
        paint: Random generator, frame, (rows, cols) → image, uint8; by default random every frame.
        instructions: Those of the episodes, in turn.
        seed: Of everything.
    """
    rng = np.random.default_rng(seed)
    grids = dict(vla.grids)
    n, width, total = sum(r * c for r, c in grids.values()), vla.decoder.shape.width, episodes * length
    visual = np.empty((total, n, width), np.float16)
    images = {name: np.empty((total, r * SIDE, c * SIDE, 3), np.uint8) for name, (r, c) in grids.items()}
    for frame in range(total):
        at = frame % length
        visual[frame] = rng.normal(size=(n, width)) if draw is None else draw(rng, at)
        for name, (rows, cols) in grids.items():
            shape = (rows * SIDE, cols * SIDE, 3)
            images[name][frame] = rng.integers(0, 256, shape) if paint is None else paint(rng, at, (rows, cols))
    texts = [instructions[episode % len(instructions)] for episode in range(episodes)]
    with torch.no_grad():
        prefix, _ = embedded(vla, texts[0])
        suffixes = [embedded(vla, text)[1].float().numpy() for text in texts]
    lengths = np.array([len(suffix) for suffix in suffixes])
    padded = [np.pad(suffix, ((0, lengths.max() - len(suffix)), (0, 0))) for suffix in suffixes]
    flow = {name: np.zeros((*image.shape[:3], 2), np.float16) for name, image in images.items()}
    stop = np.arange(1, episodes + 1) * length
    return FrameStore(
        grids=grids,
        visual=visual,
        prefix=prefix.float().numpy(),
        suffix=np.repeat(np.stack(padded), length, axis=0),
        suffix_length=np.repeat(lengths, length),
        targets=vla.head.with_states(
            vla.head.targets(rng.uniform(-1, 1, (total, 7))), np.zeros((total, vla.processor.state_dim or 0))
        ),
        images=images,
        flow=flow,
        instructions=texts,
        start=stop - length,
        stop=stop,
        has_actions=True,
    )


def embedded(vla: VLA, instruction: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What stands before and behind the visual tokens."""
    state = np.zeros(vla.processor.state_dim or 1, np.float32)
    blank = Frame({name: np.zeros((8, 8, 3), np.uint8) for name in vla.grids}, instruction, state)
    return vla.processor.embed(vla.processor.prompt(blank))


def losses_of(vla: VLA, store: FrameStore, loss: str = "distill", *, seed: int = 0, **options: object) -> LACLoss:
    torch.manual_seed(seed)
    config = LACConfig(grids=store.grids, **{"width": 16, "patch_pixels": SIDE, **options})  # type: ignore[arg-type]
    return LACLoss(vla, store, LACPolicy(config), loss)


@contextmanager
def captured_hidden(session: Session) -> Iterator[list[torch.Tensor]]:
    """Of every frame that is acted on, the hidden states of suffix and appended tokens as they stood in the end."""
    head, frames = session.model.head, []

    def spy(context: HeadContext) -> Decoding:
        decoding, rows, sent = alone(type(head).decode(head, context)), context.hidden, None
        while True:
            try:
                wanted = decoding.send(sent)
            except StopIteration as answer:
                frames.append(rows.clone())
                return answer.value  # type: ignore[no-any-return]
            sent = yield wanted
            rows = torch.cat([rows if wanted.at is None else rows[: context.layout.n_suffix + wanted.at], sent])

    head.decode = spy  # type: ignore[method-assign]
    try:
        yield frames
    finally:
        del head.decode
