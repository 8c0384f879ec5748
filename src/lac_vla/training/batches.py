"""Makes augmented batches of demonstrations, with the targets of every frame."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from lac_vla.training.config import PretrainConfig
from lac_vla.training.frames import GRIPPER, FrameBank, quantiles, shift_images
from lac_vla.training.pretrain_losses.base import Batch, PretrainLoss, Targets
from lac_vla.types import IntArray


def statistics(bank: FrameBank, key: str) -> dict[str, Any]:
    """Compute the data set's statistics as a model keeps them, under a key; the gripper is not scaled."""
    scaled = [dim for dim in range(bank.action.shape[1]) if dim != GRIPPER]
    return {key: {"action": quantiles(bank.action, scaled), "proprio": quantiles(bank.state)}}


class Generators:
    """The random generators of a run, seeded alike.

    Attributes:
        rng: Draws what is shown, and how it is moved and tinted.
        generator: Draws the noise of pixels, tokens and actions.
    """

    def __init__(self, seed: int) -> None:
        self.rng, self.generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)


class Demonstrations:
    """Holds frames with their targets, as a model takes them: its prompts, and the units of its head.

    Attributes:
        bank: The frames.
        train: Those that are shown.
        held_out: Those of the episodes kept for validation.
    """

    def __init__(self, bank: FrameBank, loss: PretrainLoss, config: PretrainConfig) -> None:
        self.bank, self._config = bank, config
        self.train, self.held_out = bank.split(config.held_out, config.seed)
        self._chunks = loss.normalize_actions(bank.chunks(max(config.chunk, loss.vla.horizon)))
        processor = cast(Any, loss.vla.processor)
        self._proprio = processor.normalize_state(bank.state) if processor.state_dim else bank.state[:, :0]
        hindsight, self._ahead = bank.hindsight()
        self._hindsight = (hindsight - hindsight.mean(axis=(0, 1))) / hindsight.std(axis=(0, 1))
        prompts = [loss.text_ids(text) for text in bank.instructions]
        self._text_length = np.asarray([len(ids) for ids in prompts])
        self._text = pad_sequence([torch.tensor(ids) for ids in prompts], batch_first=True)
        self._text_of = bank.task[bank.episode]

    def batch(self, frames: IntArray, random: Generators | None) -> Batch:
        """Assemble frames.

        ``random`` augments: images are shifted and tinted, the proprioception is disturbed; ``None`` for neither.
        """
        images, shifts = self._images(frames, random)
        proprio = self._proprio[frames]
        if random is not None:
            proprio = proprio + random.rng.normal(0, self._config.proprio_noise, proprio.shape)
            proprio = proprio * (random.rng.random((len(frames), 1)) >= self._config.proprio_dropout)
        task = self._text_of[frames]
        longest = self._text_length[task].max()
        return Batch(
            images=images,
            shifts=shifts,
            proprio=torch.from_numpy(np.asarray(proprio, dtype=np.float32)),
            text=self._text[task, :longest],
            text_length=torch.from_numpy(self._text_length[task]),
            targets=Targets(
                torch.from_numpy(self._chunks[frames]),
                torch.from_numpy(np.asarray(self._hindsight[frames], dtype=np.float32)),
                torch.from_numpy(self._ahead[frames].astype(np.float32)),
            ),
        )

    def _images(
        self, frames: IntArray, random: Generators | None
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Normalise every camera's pixels; also return by how many their content was moved."""
        count, images, shifts = len(frames), {}, {}
        for camera, stored in self.bank.images.items():
            chosen = stored[frames]
            moved = np.zeros((count, 2), dtype=np.int64)
            if random is not None:
                limit = round(self._config.shift * chosen.shape[1])
                moved = random.rng.integers(-limit, limit + 1, size=(count, 2))
            pixels = torch.from_numpy(shift_images(chosen, moved)).permute(0, 3, 1, 2).float() / 127.5 - 1
            if random is not None:
                gain = torch.from_numpy(random.rng.uniform(0.85, 1.15, (count, 3, 1, 1))).float()
                offset = torch.from_numpy(random.rng.uniform(-0.1, 0.1, (count, 1, 1, 1))).float()
                pixels = pixels * gain + offset + 0.02 * torch.randn(pixels.shape, generator=random.generator)
            images[camera] = pixels
            shifts[camera] = torch.from_numpy(moved)
        return images, shifts
