"""Measures once what every candidate ratio would cost a frame, for the ratio predictor to learn from.

Stage II shows the predictor one ratio's divergence at a time, and a gradient of first order. Here it sees, for a frame
on the stale cache that the policy's own decisions leave, the true divergence D_j at every candidate r_j, and learns by
regression what each costs: C_j = D_j + λ·(1 − r_j). Its logits are −log C_j but for a constant, so that the likeliest
ratio, which inference takes, is the one that is expected to cost least.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from lac_vla.engine.budget import frames_of_age
from lac_vla.errors import InputError
from lac_vla.files import locked, reading, write_whole, writing
from lac_vla.policies.base import cache_lowest
from lac_vla.results.format import percent
from lac_vla.results.regret import PRICES
from lac_vla.training.checksum import checksum
from lac_vla.training.lac import LACLoss
from lac_vla.training.robots import Robots, groups, side_by_side
from lac_vla.training.stream import HARD
from lac_vla.types import FloatArray, IntArray

EVERY = 2
"""Frames from one that is measured to the next; all are gone through."""
BATCH = 64
"""Frames that the predictor rates at once."""
COSTS = "held_out_costs_divergence"
"""The metric of what is chosen; two more are named after it."""


@dataclass(frozen=True, eq=False)
class RatioCosts:
    """Frames with what the predictor sees of them and what every candidate ratio does to the answer.

    Attributes:
        frames: In the store, int64, (F,).
        divergence: From the dense pass at every candidate ratio, float32, (F, C).
        age: Of the slots, in frames, float32, (F, N).
        reference: Of every camera, the pixels that its slots were computed from, uint8, (F, H, W, 3).
    """

    frames: IntArray
    divergence: FloatArray
    age: FloatArray
    reference: tuple[npt.NDArray[np.uint8], ...]

    def of(self, rows: npt.NDArray[Any]) -> RatioCosts:
        """Take some of the frames."""
        reference = tuple(part[rows] for part in self.reference)
        return RatioCosts(self.frames[rows], self.divergence[rows], self.age[rows], reference)

    def logits(self, losses: LACLoss) -> torch.Tensor:
        """Rate the candidates of every frame, (F, C)."""
        reference = [torch.from_numpy(part).to(losses.device) for part in self.reference]
        cameras = losses.store.layout.cameras
        age = [torch.from_numpy(self.age[:, camera.tokens]).view(-1, camera.rows, camera.cols) for camera in cameras]
        inputs = losses.inputs(self.frames, reference, [part.to(losses.device) for part in age])
        logits: torch.Tensor = losses.policy.predictor(inputs, losses.text(self.frames), losses.states(self.frames))
        return logits

    def loss(self, losses: LACLoss, lam: float, scale: float) -> tuple[torch.Tensor, float]:
        """Compute the deviance of an exponential distribution, mean of C_j/c·exp(z_j) − z_j, and the ratio chosen.

        Its least value is at exp(−z_j) = E[C_j]/c: what costs are expected, however few frames carry most of them.

        Args:
            losses: With the predictor.
            lam: λ, what all tokens active cost, in units of the divergence.
            scale: c, about the mean of all costs; logits are limited around it.

        Returns:
            The loss, a scalar, and the mean ratio of the likeliest candidates.
        """
        logits = self.logits(losses)
        costs = torch.from_numpy(self.divergence).to(losses.device) + lam * (1 - losses.ratios)
        chosen = losses.ratios[logits.detach().argmax(dim=1)]
        return (costs / scale * logits.exp() - logits).mean(), float(chosen.mean())

    @torch.no_grad()
    def compare(self, losses: LACLoss) -> dict[str, float]:
        """Compare what is chosen with a fixed ratio of the same mean, and with the best of each frame in hindsight.

        Hindsight is lucky where candidates differ by chance: a limit, and not to be reached.
        """
        parts = np.array_split(np.arange(len(self.frames)), math.ceil(len(self.frames) / BATCH))
        at = torch.cat([self.of(part).logits(losses).argmax(dim=1) for part in parts]).cpu().numpy()
        ratios, rows = losses.ratios.cpu().numpy(), np.arange(len(at))
        mean = float(ratios[at].mean())
        best, every = self.cheapest(ratios, self.price(ratios, mean)), self.divergence.mean(axis=0)
        return {
            **{f"divergence_at_{ratio:g}": float(each) for ratio, each in zip(ratios, every, strict=True)},
            "ratio": mean,
            "divergence": float(self.divergence[rows, at].mean()),
            "divergence_fixed": float(np.interp(mean, ratios, every)),
            "divergence_best": float(self.divergence[rows, best].mean()),
        }

    def cheapest(self, ratios: npt.NDArray[Any], lam: float) -> IntArray:
        """Number every frame's cheapest candidate at a price, (F,)."""
        return np.asarray((self.divergence + lam * (1 - ratios)).argmin(axis=1))

    def price(self, ratios: npt.NDArray[Any], target: float) -> float:
        """Find the λ at which the cheapest ratios have this mean, or the highest that is tried."""
        means = [float(ratios[self.cheapest(ratios, lam)].mean()) for lam in PRICES]
        return float(PRICES[min(int(np.searchsorted(means, target)), len(PRICES) - 1)])

    def save(self, path: Path) -> None:
        """Write all to a file."""
        content = io.BytesIO()
        arrays = {f"reference_{number}": part for number, part in enumerate(self.reference)}
        np.savez_compressed(content, **{**asdict(self), **arrays, "reference": len(arrays)})
        write_whole(path, content.getvalue())

    @classmethod
    def read(cls, path: Path) -> RatioCosts:
        """Read what :meth:`save` wrote.

        Raises:
            InputError: If it is damaged.
        """
        with (
            reading(path, "delete it: a run that begins its predictor's steps measures it again"),
            np.load(path, allow_pickle=False) as data,
        ):
            reference = tuple(data[f"reference_{number}"] for number in range(int(data["reference"])))
            return cls(data["frames"], data["divergence"], data["age"], reference)

    @classmethod
    def joined(cls, parts: Sequence[RatioCosts]) -> RatioCosts:
        """Join the frames of several parts."""
        return cls(
            np.concatenate([part.frames for part in parts]),
            np.concatenate([part.divergence for part in parts]),
            np.concatenate([part.age for part in parts]),
            tuple(np.concatenate(each) for each in zip(*(part.reference for part in parts), strict=True)),
        )


def told(found: Mapping[str, float]) -> str:
    """Tell what a validation of ``lac train`` found, see :meth:`RatioCosts.compare`; empty if it did not look."""
    if COSTS not in found:
        return ""
    chosen, fixed, best = (1e3 * found[f"{COSTS}{name}"] for name in ("", "_fixed", "_best"))
    saved = f" (saved: {percent(1 - chosen / fixed, 0)})" if fixed else ""
    return (
        f"held-out episodes, on the cache that the policy left before its predictor was trained: divergence "
        f"{chosen:.2f} thousandths at a mean ratio of {found['held_out_costs_ratio']:.3f}; a fixed ratio with this "
        f"mean (interpolated) {fixed:.2f}{saved}, the best of each frame in hindsight {best:.2f}"
    )


class KeptCosts:
    """The folder, within a store's, that keeps what was measured there of a policy: a file for every group of episodes.

    Runs that share the store and begin their predictor's steps alike find it by its name: that of the policy and of the
    whole model, whose weights the store itself knows in part.

    Args:
        losses: Model, frames and policy; exact, for distillation.
        folder: Of the store.
        name: Of the folder; by default that of the policy as it is.
    """

    def __init__(self, losses: LACLoss, folder: Path, name: str = "") -> None:
        self._losses = losses
        lengths = losses.store.stop - losses.store.start
        every = groups(losses.store, np.flatnonzero(lengths > EVERY * losses.store.stride))
        self.name = name or f"costs-{_key(losses, every)}"
        self.folder, self.lock = folder / self.name, folder / f"{self.name}.lock"
        self._groups = {self.folder / f"{number:04d}.npz": group for number, group in enumerate(every)}

    @property
    def whole(self) -> bool:
        """It is true once all is measured."""
        return {*self.folder.glob("*.npz")} == {*self._groups}  # more are of other groups

    def read(self) -> RatioCosts:
        """Read all of it.

        Raises:
            InputError: If a file is damaged.
        """
        return RatioCosts.joined([RatioCosts.read(path) for path in self._groups])

    def measure(self, max_seconds: float = math.inf) -> bool:
        """Measure what is not there yet, recovery and maximum age included, every candidate ratio tried.

        Args:
            max_seconds: Stop, resumably, after this time; a group is measured in any case, unless another process is
                at it all the while: that one is waited for.

        Returns:
            Whether all is there.

        Raises:
            InputError: If all episodes are too short, or the folder cannot be written.
        """
        store, begun = self._losses.store, time.monotonic()
        if not self._groups:
            raise InputError(f"what ratios cost is measured every {EVERY} frames: no episode is longer")
        with writing(self.folder, "--store"), ExitStack() as stack:
            if not self._lock(stack, max_seconds):
                return False
            left = {path: group for path, group in self._groups.items() if not path.exists()}
            total, rest = (
                sum(int((store.stop - store.start)[group].sum()) for group in part.values())
                for part in (self._groups, left)
            )
            with tqdm(total=total, initial=total - rest, desc="measuring what ratios cost", unit="frame") as bar:
                for number, (path, group) in enumerate(left.items()):
                    if number and time.monotonic() - begun >= max_seconds:
                        return False
                    RatioCosts.joined([*_gone_through(self._losses, group, bar)]).save(path)
        return True

    def _lock(self, stack: ExitStack, max_seconds: float) -> bool:
        """Keep other processes off the folder; tell whether it is free by then."""
        busy = f"another process measures what ratios cost in {self.folder}: waiting for it"
        try:
            stack.enter_context(locked(self.lock, busy))
        except InputError:
            tqdm.write(busy)
            try:
                stack.enter_context(locked(self.lock, busy, seconds=max_seconds))
            except InputError:
                return False
        return True


def _key(losses: LACLoss, every: Sequence[IntArray]) -> str:
    """Name all that what ratios cost depends on, beside the store: files are named by groups of episodes."""
    together = [group.tolist() for group in every]
    shape = json.dumps({**losses.config.to_json(), "every": EVERY, "groups": together}, sort_keys=True)
    named = [checksum(losses.policy.networks), checksum(losses.vla.module), shape]
    return hashlib.sha256("".join(named).encode()).hexdigest()[:16]


@torch.no_grad()
def _gone_through(losses: LACLoss, episodes: IntArray, bar: Any) -> Iterator[RatioCosts]:
    """Go through some episodes side by side."""
    store, policy = losses.store, losses.policy
    robots, oldest = Robots(losses, episodes), frames_of_age(policy.config.max_age, store.stride)
    for count, (rows, frames) in enumerate(side_by_side(store, episodes), 1):
        bar.update(len(frames) * store.stride)
        robots.keep(rows)
        choice, ages = losses.choose(frames, robots.reference, robots.age, HARD, None), robots.ages
        if count % EVERY == 0:
            tried = _tried(losses, frames, choice.scores, robots.slots)
            seen = tuple(part.cpu().numpy() for part in robots.reference)
            yield RatioCosts(frames, tried.cpu().numpy(), ages.cpu().numpy(), seen)
        robots.commit(frames, (choice.mask > 0.5) | (ages >= oldest) | robots.draws(policy.recovery))


def _tried(losses: LACLoss, frames: IntArray, scores: torch.Tensor, old: Any) -> torch.Tensor:
    """Compute every frame's divergence at every candidate ratio, (B, C); chance is the same for all candidates."""
    dense, head = losses.decode(frames).context(), losses.vla.head
    targets, found = losses.load(losses.store.targets, frames), []
    for ratio in losses.config.ratios:
        if not ratio:
            found.append(torch.zeros(len(frames), device=losses.device))  # all is dense
            continue
        masks = np.stack([~cache_lowest(own, ratio) for own in scores.cpu().numpy()])
        mask = torch.from_numpy(masks).to(losses.device, scores.dtype)
        mixed = losses.decode(frames, mask=mask, old=old, compact=True)
        found.append(head.loss(mixed.context(), targets, torch.Generator().manual_seed(0), dense).float())
    return torch.stack(found, dim=1)
