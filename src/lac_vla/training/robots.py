"""Robots that go through stored episodes side by side, each on the cache that its own decisions leave."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from lac_vla.training.mixed import MixedOutput
from lac_vla.training.store import FrameStore
from lac_vla.training.stored_model import StoredModel
from lac_vla.types import IntArray, PolicyInput

TOGETHER = 6
"""Episodes that are gone through side by side."""


class Robots:
    """Sessions of one policy in several episodes, a call of the model after the other; scene cuts aside.

    Args:
        model: Over the stored frames.
        episodes: Their numbers in the store; the first frame of each is computed in full.
        seed: Of their chance, which is the same for every policy.

    Attributes:
        slots: Keys and values of the visual tokens, of all robots that still run.
        reference: Of every camera, the pixels that the slots were computed from, uint8, (B, H, W, 3).
    """

    def __init__(self, model: StoredModel, episodes: IntArray, seed: int = 0) -> None:
        store, frames = model.store, model.store.start[episodes]
        self._model, self._rows = model, np.arange(len(episodes))
        self._rngs = [
            np.random.default_rng([seed, store.numbers[episode] if store.numbers else episode]) for episode in episodes
        ]
        with torch.no_grad():
            self.slots = model.decode(frames).store.slots
        self.reference = [model.pixels(name, frames) for name in store.grids]
        self.age = [torch.zeros(len(frames), *grid, device=model.device) for grid in store.grids.values()]

    @property
    def ages(self) -> torch.Tensor:
        """Age of every slot, in frames, (B, N)."""
        return torch.cat([part.flatten(1) for part in self.age], dim=1)

    def keep(self, rows: IntArray) -> None:
        """Forget the robots whose episodes have ended; ``rows`` number the others as they were at first."""
        left = np.flatnonzero(np.isin(self._rows, rows))
        if len(left) < len(self._rows):
            at = torch.from_numpy(left).to(self._model.device)
            self._rows, self._rngs = self._rows[left], [self._rngs[row] for row in left]
            self.slots, self.reference = self.slots.of(at), [part[at] for part in self.reference]
            self.age = [part[at] for part in self.age]

    def inputs(self, frames: IntArray) -> list[PolicyInput]:
        """Make what a policy decides by, for every robot."""
        return [
            self._model.policy_input(int(frame), [part[row] for part in self.reference], age, rng)
            for row, (frame, age, rng) in enumerate(zip(frames, self.ages, self._rngs, strict=True))
        ]

    def draws(self, chance: float) -> torch.Tensor:
        """Draw which slots are recovered as a session's policy does, bool, (B, N)."""
        drawn = np.stack([rng.random(self.ages.shape[1]) < chance for rng in self._rngs])
        return torch.from_numpy(drawn).to(self._model.device)

    @torch.no_grad()
    def commit(self, frames: IntArray, active: torch.Tensor) -> MixedOutput:
        """Run the frames with these tokens computed, bool, (B, N), and remember what that leaves."""
        output = self._model.decode(frames, mask=active.float(), old=self.slots)
        self.slots = output.store.slots
        self.reference, self.age = self._model.refresh(frames, active, self.reference, self.age)
        return output


def side_by_side(store: FrameStore, episodes: IntArray) -> Iterator[tuple[IntArray, IntArray]]:
    """Go through episodes at once, a stride at a time, from the second frame on that the model is called for.

    Yields:
        Which of them still run, by their places in ``episodes``, and their frames.
    """
    first, stop = store.start[episodes], store.stop[episodes]
    for count in range(1, math.ceil(int((stop - first).max()) / store.stride)):
        frames = first + count * store.stride
        rows = np.flatnonzero(frames < stop)
        yield rows, frames[rows]


def groups(store: FrameStore, episodes: IntArray) -> list[IntArray]:
    """Divide episodes into groups that are gone through side by side, the longest first, beside others of their length.

    Args:
        store: With the frames.
        episodes: Their numbers in the store.
    """
    order = episodes[np.argsort((store.start - store.stop)[episodes], kind="stable")]
    return np.array_split(order, math.ceil(len(order) / TOGETHER)) if len(order) else []
