"""An episode's stored frames over the cache that a policy's decisions leave, to try other decisions on every frame."""

from __future__ import annotations

import numpy as np
import torch

from lac_vla.training.lac import Choice, LACLoss, Temperatures
from lac_vla.training.mixed import LayerKV, MixedOutput
from lac_vla.types import PolicyInput

ROWS = 32
"""Decisions tried in one pass of the model."""
HARD = Temperatures(ratio=1.0, score=1.0)
"""Without noise, temperatures change no decision."""


class Stream:
    """One robot that goes through an episode: at every frame, before it is decided about, anything can be tried.

    Args:
        losses: Model, stored frames, and the policy whose inputs are made.
        first: The episode's first frame, computed in full.

    Attributes:
        losses: As given.
        frame: The frame looked at.
        age: Of every slot, in frames, (N,).
    """

    def __init__(self, losses: LACLoss, first: int) -> None:
        self.losses, self.frame = losses, first
        frames, grids, device = np.array([first]), losses.store.grids, losses.device
        self._look()
        self._rows = self._rows_together()
        self._old: LayerKV = self._dense.store.slots
        self._reference = [losses.pixels(name, frames) for name in grids]
        self._age = [torch.zeros(1, *grid, device=device) for grid in grids.values()]

    @property
    def age(self) -> torch.Tensor:
        """Age of every slot, in frames, (N,)."""
        return torch.cat([part.flatten() for part in self._age]).cpu()

    def next(self) -> None:
        """Go on to the next frame, a stride further."""
        self.frame += self.losses.store.stride
        self._look()

    @torch.no_grad()
    def _look(self) -> None:
        """Run the dense pass of the frame."""
        self._dense: MixedOutput = self.losses.decode(np.array([self.frame]))

    @torch.no_grad()
    def _rows_together(self) -> int:
        """Count the decisions of a pass: what a head draws it draws for a whole batch, and alone all meet the same."""
        generator, context = torch.Generator().manual_seed(0), self._dense.context()
        before = generator.get_state()
        self.losses.vla.head.loss(context, self._targets(1), generator, context)
        return ROWS if torch.equal(generator.get_state(), before) else 1

    def divergence(self, masks: torch.Tensor) -> torch.Tensor:
        """Compute how far the frame's answer is from the dense pass's under each decision, on the present cache.

        Args:
            masks: M, 1 = active, (B, N); may want a gradient.

        Returns:
            By the head's loss against the dense pass, (B,), on the CPU.
        """
        if masks.requires_grad or not ((masks == 0) | (masks == 1)).all():
            return torch.cat([self._divergence(part) for part in torch.split(masks, self._rows)])
        counts, found = masks.sum(dim=1), torch.zeros(len(masks))
        for count in torch.unique(counts):
            for at in torch.split((counts == count).nonzero()[:, 0], self._rows):
                found[at] = self._divergence(masks[at], compact=True).to(found.dtype)
        return found

    def _divergence(self, masks: torch.Tensor, *, compact: bool = False) -> torch.Tensor:
        same = torch.zeros(len(masks), dtype=torch.int64, device=self.losses.device)
        mixed = self._mixed(masks, compact=compact)
        generator = torch.Generator().manual_seed(0)
        head, teacher = self.losses.vla.head, self._dense.context(same)
        return head.loss(mixed.context(), self._targets(len(masks)), generator, teacher).cpu()

    def _mixed(self, masks: torch.Tensor, *, compact: bool) -> MixedOutput:
        same = torch.zeros(len(masks), dtype=torch.int64, device=self.losses.device)
        frames = np.full(len(masks), self.frame)
        mask = masks.to(self.losses.device)
        return self.losses.decode(frames, mask=mask, old=self._old.of(same), compact=compact)

    def _targets(self, rows: int) -> torch.Tensor:
        return self.losses.load(self.losses.store.targets, np.full(rows, self.frame))

    @torch.no_grad()
    def choice(self) -> Choice:
        """Decide about the frame as the policy does at inference, without recovery."""
        return self.losses.choose(np.array([self.frame]), self._reference, self._age, HARD, None)

    def inputs(self, rng: np.random.Generator) -> PolicyInput:
        """Make what a rule decides by; the pictures are as small as the policy's networks see them."""
        return self.losses.policy_input(self.frame, [old[0] for old in self._reference], self.age, rng)

    @torch.no_grad()
    def commit(self, mask: torch.Tensor) -> None:
        """Leave the cache as a decision about the frame leaves it, M (N,)."""
        self._old = self._mixed(mask[None], compact=True).store.slots
        active = mask[None].to(self.losses.device) > 0.5
        frames = np.array([self.frame])
        self._reference, self._age = self.losses.refresh(frames, active, self._reference, self._age)
