"""Measures once what every candidate ratio would cost a frame, for the ratio predictor to learn from.

Stage II shows the predictor one ratio's divergence at a time, and a gradient of first order. Here it sees, for a frame
on the stale cache that the policy's own decisions leave, the true divergence D_j at every candidate r_j, and learns by
regression what each costs: C_j = D_j + λ·(1 − r_j). Its logits are −log C_j but for a constant, so that the likeliest
ratio, which inference takes, is the one that is expected to cost least.
"""

from __future__ import annotations

import io
import json
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from lac_vla.engine.budget import frames_of_age
from lac_vla.errors import InputError
from lac_vla.files import reading, write_whole
from lac_vla.policies.base import cache_lowest
from lac_vla.results.format import percent
from lac_vla.results.regret import PRICES
from lac_vla.training.lac import LACLoss
from lac_vla.training.regret import checksum
from lac_vla.training.robots import Robots, groups, side_by_side
from lac_vla.training.stream import HARD
from lac_vla.types import FloatArray, IntArray

FILE = "costs.npz"
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
        logits: torch.Tensor = losses.policy.predictor(inputs, losses.text(self.frames))
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
        best = self.cheapest(ratios, self.price(ratios, mean))
        return {
            "ratio": mean,
            "divergence": float(self.divergence[rows, at].mean()),
            "divergence_fixed": float(np.interp(mean, ratios, self.divergence.mean(axis=0))),
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


def costs_of(losses: LACLoss, folder: Path) -> RatioCosts:
    """Read what was measured of a policy on a store, or measure it and keep it in the store's ``folder``.

    Args:
        losses: See :func:`measure_costs`.
        folder: Of the store, which runs may share.
    """
    shape = zlib.crc32(json.dumps(losses.config.to_json(), sort_keys=True).encode())
    path = folder / f"costs-{checksum(losses.policy)}-{shape:08x}.npz"
    if not path.exists():
        measure_costs(losses).save(path)
    return RatioCosts.read(path)


def measure_costs(losses: LACLoss) -> RatioCosts:
    """Go through all stored episodes as the policy does, recovery and maximum age included, and try every candidate.

    Args:
        losses: Model, frames and policy; exact, for distillation.

    Raises:
        InputError: If all episodes are too short.
    """
    store = losses.store
    if int((store.stop - store.start).max()) <= EVERY * store.stride:
        raise InputError(f"what ratios cost is measured every {EVERY} frames: no episode is longer")
    with tqdm(total=len(store), desc="measuring what ratios cost", unit="frame") as bar:
        every = groups(store, np.arange(len(store.start)))
        parts = [part for group in every for part in _gone_through(losses, group, bar)]
    return RatioCosts(
        np.concatenate([part.frames for part in parts]),
        np.concatenate([part.divergence for part in parts]),
        np.concatenate([part.age for part in parts]),
        tuple(np.concatenate(each) for each in zip(*(part.reference for part in parts), strict=True)),
    )


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
