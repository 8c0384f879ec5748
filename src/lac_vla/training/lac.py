"""The losses of ``lac train``: both networks of LAC learn beside a frozen VLA in two stages (paper, eqs. 6-8).

Stage I aligns the selector with the attention of dense passes. Stage II trains selector and predictor end to end on
windows of consecutive frames, each frame on the stale cache that the policy's own decisions left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from lac_vla.engine.budget import frames_of_age
from lac_vla.errors import InputError
from lac_vla.models import VLA
from lac_vla.policies.lac import LACConfig, LACPolicy
from lac_vla.policies.lac.deltas import mean_flow
from lac_vla.policies.lac.inputs import compose, words
from lac_vla.training.mixed import LayerKV, alignment_teacher
from lac_vla.training.relaxation import (
    bridge,
    candidate_masks,
    gumbel_noise,
    ratio_reward,
    soft_ratio,
    straight_through,
)
from lac_vla.training.store import FrameStore
from lac_vla.training.stored_model import StoredModel
from lac_vla.training.tower import MixedTower, VisionOutput
from lac_vla.types import IntArray


@dataclass(frozen=True)
class Temperatures:
    """Holds τ of the ratio (eq. 9) and τ_s of the mask (eq. 11)."""

    ratio: float
    score: float


@dataclass(frozen=True, eq=False)
class Choice:
    """The decision of both networks about a batch of frames.

    Attributes:
        mask: M, 1 = active, (B, N).
        scores: S, (B, N).
        probabilities: p̃ over the ratios, (B, C); ``None`` for a fixed ratio.
    """

    mask: torch.Tensor
    scores: torch.Tensor
    probabilities: torch.Tensor | None


class LACLoss(StoredModel):
    """Computes the losses of both stages from a frozen model, stored frames and a policy whose networks have gradients.

    Args:
        vla: The frozen model; its weights should want no gradient. Its head has the task loss.
        store: The frames.
        policy: What is trained.
        loss: ``"distill"`` or ``"demo"``.
        tower: Runs in the windows, too, with patches that grow stale as the policy's own decisions leave them; ``None``
            for stored embeddings alone, all of whose tokens are fresh.
        exact: Whether the model multiplies in its own dtype, as at inference, and not in a faster one.
    """

    def __init__(
        self,
        vla: VLA,
        store: FrameStore,
        policy: LACPolicy,
        loss: str,
        tower: MixedTower | None = None,
        *,
        exact: bool = False,
    ) -> None:
        policy.check_layout(store.grids)
        super().__init__(vla, store, exact=exact)
        self.policy, self.loss, self.tower = policy, loss, tower
        self.config: LACConfig = policy.config
        self.ratios = torch.tensor(self.config.ratios, device=self.device)
        policy.selector.to(self.device)
        policy.predictor.to(self.device)
        if policy.delta_network is not None:
            policy.delta_network.to(self.device)
        self._words = words(list(store.instructions)).to(self.device) if self.config.language else None

    def alignment(self, frames: IntArray) -> torch.Tensor:
        """Compute stage I's L_align = MSE(S, S_VLA), eq. 6, a scalar. ``frames``: none before which no call was."""
        with torch.no_grad():
            teacher = alignment_teacher(self.attention(frames))
        grids = self.store.grids.items()
        previous = [self.pixels(name, frames - self.store.stride) for name in self.store.grids]
        age = [torch.zeros(len(frames), *grid, device=self.device) for _, grid in grids]
        scores = self.policy.selector(self.inputs(frames, previous, age), self.text(frames))
        return F.mse_loss(scores, teacher)

    def attention(self, frames: IntArray) -> torch.Tensor:
        """Compute the attention of dense passes to the visual tokens, (B, N), float32.

        That is the attention of the rows that the head reads, in the upper half of the layers; of an expert behind the
        prefix, that of its own rows in all of its layers, at two random times.
        """
        if self.vla.head.reads == "kv":
            maps: list[torch.Tensor] = []
            context = self.decode(frames).context(maps=maps)
            targets = self.load(self.store.targets, frames)
            self.vla.head.loss(context, targets, torch.Generator().manual_seed(0))
            if maps:
                return torch.stack(maps).mean(dim=0)
        upper_half = tuple(range(self.vla.n_layers // 2, self.vla.n_layers))
        dense = self.decode(frames, probe_layers=upper_half)
        if dense.attention is None:  # pragma: no cover - it was asked for
            raise RuntimeError("the dense pass left no attention")
        return dense.attention

    def window(
        self,
        first: IntArray,
        length: int,
        temperatures: Temperatures,
        generator: torch.Generator | None,
        *,
        lam: float,
        task_weight: float = 1.0,
        learn: bool = True,
        deltas: bool = False,
    ) -> dict[str, float]:
        """Compute stage II's loss, eqs. 7-8, on windows of frames a stride apart; with ``learn``, add up gradients.

        The cache is detached between frames, so every frame is differentiated by itself, and memory does not grow with
        the window. So is what a tower that reuses remembers; the dense passes have whole towers.

        Args:
            first: First frame of every window, (B,).
            length: T.
            temperatures: Of both relaxations.
            generator: Draws all noise; ``None`` for argmax without Gumbel noise, as inference does, and a fixed seed
                for the head's own.
            lam: λ.
            task_weight: Of the task loss (0 in a test: the ratio reward alone).
            learn: Whether to differentiate.
            deltas: Whether the policy's predicted changes are added to reused slots. They alone learn then, so that
                the decisions are those of inference.

        Returns:
            Means over frames and windows: ``loss``, ``task``, ``chosen_ratio``, ``expected_ratio`` (by p̃; not for a
            fixed ratio).
        """
        size, head_generator = len(first), generator or torch.Generator().manual_seed(0)
        every = first[None, :] + self.store.stride * np.arange(length)[:, None]  # (T, B)
        with torch.no_grad():  # dense: all frames to distil from them, the first alone otherwise
            dense = self.decode(every.reshape(-1) if self.loss == "distill" else first)
            vision = None if self.tower is None else self._encode(self.tower, first)
        old = dense.store.slots.of(slice(size))
        reference = [self.pixels(name, first) for name in self.store.grids]
        age = [torch.zeros(size, *grid, device=self.device) for grid in self.store.grids.values()]
        sums: dict[str, float] = {}
        for index, frames in enumerate(every[1:], 1):
            with torch.set_grad_enabled(learn):
                choice = self.choose(frames, reference, age, temperatures, None if deltas else generator)
                if deltas:
                    old = self.changed(old, frames, age)
                if self.tower is not None:
                    vision = self._encode(self.tower, frames, choice.mask, vision)
                result = self.decode(frames, mask=choice.mask, old=old, vision=vision)
                own = slice(index * size, (index + 1) * size)
                teacher = dense.context(own) if self.loss == "distill" else None
                targets = self.load(self.store.targets, frames)
                task = self.vla.head.loss(result.context(), targets, head_generator, teacher)
                loss = task_weight * task.mean()
                if choice.probabilities is not None and not deltas:
                    loss = loss + lam * ratio_reward(choice.probabilities, self.ratios).mean()
            if learn:
                (loss / (length - 1)).backward()  # type: ignore[no-untyped-call]
            old = result.store.slots
            active = choice.mask.detach() > 0.5
            reference, age = self.refresh(frames, active, reference, age)
            row = {"loss": float(loss.detach()), "task": float(task.detach().mean())}
            row["chosen_ratio"] = 1 - float(active.float().mean())
            if choice.probabilities is not None:
                row["expected_ratio"] = -float(ratio_reward(choice.probabilities.detach(), self.ratios).mean())
            for name, value in row.items():
                sums[name] = sums.get(name, 0.0) + value / (length - 1)
        return sums

    @torch.no_grad()
    def ratios_chosen(self, first: IntArray, length: int) -> torch.Tensor:
        """Compute the ratios that inference chooses in windows, argmax without noise, (length - 1, B).

        The model is not run: decisions leave pixels and ages to the next ones, and nothing else. Slots do not grow
        older than a session lets them, by the age channel's maximum.

        Args:
            first: First frame of every window, computed in full, (B,).
            length: Frames of a window.
        """
        reference = [self.pixels(name, first) for name in self.store.grids]
        age = [torch.zeros(len(first), *grid, device=self.device) for grid in self.store.grids.values()]
        chosen, oldest = [], frames_of_age(self.config.max_age, self.store.stride)
        for index in range(1, length):
            frames = first + self.store.stride * index
            choice = self.choose(frames, reference, age, Temperatures(1.0, 1.0), None)
            if choice.probabilities is None:
                chosen.append(torch.full((len(first),), self.policy.ratio or 0.0))
            else:
                chosen.append(self.ratios[choice.probabilities.argmax(dim=1)].cpu())
            old = torch.cat([part.flatten(1) for part in age], dim=1) >= oldest
            reference, age = self.refresh(frames, (choice.mask > 0.5) | old, reference, age)
        return torch.stack(chosen)

    def choose(
        self,
        frames: IntArray,
        reference: Sequence[torch.Tensor],
        age: Sequence[torch.Tensor],
        temperatures: Temperatures,
        generator: torch.Generator | None,
    ) -> Choice:
        """Decide about a batch of frames, through the relaxations."""
        inputs, text = self.inputs(frames, reference, age), self.text(frames)
        scores = self.policy.selector(inputs, text)
        if self.policy.ratio is not None:
            return Choice(candidate_masks(scores, (self.policy.ratio,), temperatures.score)[:, 0], scores, None)
        logits = self.policy.predictor(inputs, text, self.states(frames))
        noise = 0.0 if generator is None else gumbel_noise(logits.shape, generator, self.device)
        probabilities = soft_ratio(logits, noise, temperatures.ratio)
        masks = candidate_masks(scores, self.config.ratios, temperatures.score)
        return Choice(bridge(straight_through(probabilities), masks), scores, probabilities)

    def changed(self, old: LayerKV, frames: IntArray, age: Sequence[torch.Tensor]) -> LayerKV:
        """Add to the preceding frame's slots how the policy predicts that they have changed."""
        network = self.policy.delta_network
        if network is None:
            raise InputError("this policy predicts no changes of reused slots")
        flow = None
        if network.reads_flow:
            loaded = [self.load(self.store.flow[name], frames) for name in self.store.grids]
            grids = self.store.grids.values()
            flow = torch.cat([mean_flow(part, *grid) for part, grid in zip(loaded, grids, strict=True)], dim=1)
        ages = torch.cat([part.flatten(1) for part in age], dim=1)
        added = network(flow, ages, network.embedding)
        parts = (
            [slots + part for slots, part in zip(every, changes, strict=True)]
            for every, changes in zip((old.keys, old.values), added, strict=True)
        )
        return LayerKV(*parts)

    def inputs(
        self, frames: IntArray, reference: Sequence[torch.Tensor], age: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Compose the networks' inputs of every camera; see :func:`lac_vla.policies.lac.inputs.compose`."""
        composed = []
        for name, pixels, old in zip(self.store.grids, reference, age, strict=True):
            flow = self.load(self.store.flow[name], frames) if self.config.flow != "none" else None
            composed.append(compose(self.config, self.pixels(name, frames), flow, pixels, old))
        return composed

    def _encode(
        self, tower: MixedTower, frames: IntArray, mask: torch.Tensor | None = None, old: VisionOutput | None = None
    ) -> VisionOutput:
        """Run the tower; with a mask, over its keys and values of the preceding frames."""
        images = {camera: self.load(self.store.tower_pixels[camera], frames) for camera in tower.cameras}
        return tower.encode(images, self._stored(frames), mask, None if old is None else old.slots)

    def text(self, frames: IntArray) -> torch.Tensor | None:
        """Make the bags of words of some frames' instructions, (B, WORDS); ``None`` for networks that read none."""
        return None if self._words is None else self._words[self.episode[frames]]

    def states(self, frames: IntArray) -> torch.Tensor | None:
        """Load the proprioception of some frames, (B, S); ``None`` for a predictor that reads none."""
        return self.load(self.store.state, frames) if self.config.proprio else None


def annealed(ends: tuple[float, float], progress: float) -> float:
    """Go from the first to the last value geometrically, ``progress`` in 0..1."""
    return float(ends[0] * (ends[1] / ends[0]) ** min(1.0, max(0.0, progress)))


def cosine(progress: float) -> float:
    """Compute the learning rate's factor, which falls from 1 to 0.1."""
    return 0.55 + 0.45 * math.cos(math.pi * min(1.0, progress))
