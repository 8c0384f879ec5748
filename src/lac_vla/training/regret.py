"""Measures how far a policy's decisions are from oracles', frame by frame on held-out episodes.

All decisions about a frame are tried on one cache, the one that the policy's own earlier decisions left. An oracle that
looks at the answer also fits what is luck in it, so two streams of every episode are kept, alike but for the noise of
their pictures: what an oracle chooses on one is scored on the other.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from lac_vla.files import cut_unfinished, read_lines, write_object
from lac_vla.models import VLA
from lac_vla.policies.base import cache_lowest
from lac_vla.policies.lac import LACPolicy
from lac_vla.policies.motion import Motion
from lac_vla.policies.random import Random
from lac_vla.provenance import provenance
from lac_vla.results.regret import BUDGETS, EPISODES, FIGURES, EpisodeRegret, FrameRegret, read_regret
from lac_vla.training.checksum import checksum
from lac_vla.training.config import TrainConfig
from lac_vla.training.lac import LACLoss
from lac_vla.training.noise import PixelNoise
from lac_vla.training.oracle import drop_order, first_masks, value_order
from lac_vla.training.run_files import append, check_settings
from lac_vla.training.store import FrameStore
from lac_vla.training.stream import Stream
from lac_vla.types import BoolArray

CHUNKS = 14
"""Into so many chunks the tokens are divided for the oracle of true drops."""
BETWEEN = (0.0, 0.5, 0.75)
"""Shares of active tokens that are tried besides the budgets, so that the best share of a frame can be another."""


@dataclass(frozen=True)
class RegretConfig:
    """The settings of a measurement.

    Attributes:
        frames: Held-out frames to measure, evenly spread over the held-out episodes.
        noise: Standard deviation of the pictures' noise, grey levels; without any, oracles profit from luck.
        recovery: Chance of a reused token to be refreshed, in the decisions that the cache is left by.
        max_age: Age in frames at which a token is refreshed there.
        seed: Of recovery and of the random rule.
    """

    frames: int
    noise: float = 2.0
    recovery: float = 0.05
    max_age: int = 16
    seed: int = 0

    def settings(self, policy: LACPolicy) -> dict[str, Any]:
        """Give what a measurement of a policy is bound to, plain data."""
        named = {"fixed_ratio": policy.ratio, "policy": checksum(policy.networks)}
        return {**asdict(self), "shares": shares_tried(policy), **named}


class RegretMeter:
    """Measures a policy on streams of the same episodes.

    Args:
        streams: Losses over stores that are alike but for noise, each exact, for distillation.
        config: What is measured.

    Attributes:
        shares: Shares of active tokens that every way to choose tokens is tried at, ascending.
    """

    def __init__(self, streams: Sequence[LACLoss], config: RegretConfig) -> None:
        self._streams, self.config, store = streams, config, streams[0].store
        self._policy, self._store, self._n = streams[0].policy, store, store.layout.n_visual
        self.shares = shares_tried(self._policy)
        self._chunk = math.ceil(self._n / CHUNKS)
        others = "+".join(list(store.grids)[1:])
        self._rules: dict[str, Motion | Random] = {"motion": Motion(keep=others), "random": Random()}

    def episode(self, number: int, every: int, bar: Any) -> EpisodeRegret:
        """Measure every so manieth frame of an episode."""
        store, config = self._store, self.config
        rng, rules_rng = (np.random.default_rng([config.seed, number, k]) for k in range(2))
        first, stop = int(store.start[number]), int(store.stop[number])
        streams = [Stream(losses, first) for losses in self._streams]
        rows = []
        for frame in range(first + store.stride, stop, store.stride):
            for stream in streams:
                stream.next()
            choices = [stream.choice() for stream in streams]
            mask = choices[0].mask[0].cpu()
            old = (streams[0].age >= config.max_age) | torch.from_numpy(rng.random(self._n) < config.recovery)
            lived = torch.where(old, torch.ones_like(mask), mask)
            if (frame // store.stride) % every == 0:
                active = [float(choice.mask.mean()) for choice in choices]
                scores = [choice.scores[0].cpu().numpy() for choice in choices]
                with torch.no_grad():
                    own = [float(stream.divergence(lived[None])) for stream in streams]
                tried = self._tried(streams, scores, rules_rng)
                rows.append(FrameRegret(frame - first, tried, active, float(lived.mean()), own))
                bar.update()
            for stream in streams:
                stream.commit(lived)
        return EpisodeRegret(int(store.numbers[number]), rows)

    def _tried(
        self, streams: Sequence[Stream], scores: Sequence[Any], rng: np.random.Generator
    ) -> dict[str, list[list[float]]]:
        """Try every way to choose tokens at every share: way → for each stream, a divergence for each share."""
        values = [value_order(stream.divergence, self._n) for stream in streams]
        limit = math.ceil(max(BUDGETS) * self._n)
        orders = {
            "value": values,
            "drop": [
                drop_order(stream.divergence, order, self._chunk, limit)
                for stream, order in zip(streams, values, strict=True)
            ],
        }
        tried: dict[str, list[list[float]]] = {}
        ratios = [1 - share for share in self.shares]
        counts = [int((~cache_lowest(np.zeros(self._n), ratio)).sum()) for ratio in ratios]
        for index, stream in enumerate(streams):
            inputs = stream.inputs(rng)
            masks = {name: first_masks(found[index - 1], counts) for name, found in orders.items()}
            masks["lac"] = _stacked(~cache_lowest(scores[index], ratio) for ratio in ratios)
            for name, rule in self._rules.items():
                masks[name] = _stacked(replace(rule, ratio=ratio).decide(inputs).active for ratio in ratios)
            with torch.no_grad():
                found = stream.divergence(torch.cat(list(masks.values()))).view(len(masks), -1)
            for name, row in zip(masks, found.tolist(), strict=True):
                tried.setdefault(name, []).append(row)
        return tried


def shares_tried(policy: LACPolicy) -> list[float]:
    """List the shares of active tokens, ascending: those of the tables, and all that the policy can choose."""
    own = [1 - ratio for ratio in (*policy.config.ratios, policy.ratio) if ratio]
    return sorted({round(share, 6) for share in (*BUDGETS, *BETWEEN, *own)})


def check_measured(folder: Path, settings: Mapping[str, Any], changeable: tuple[str, ...] = ()) -> None:
    """Refuse to go on measuring with other settings.

    Args:
        folder: Of the measurement.
        settings: See :meth:`RegretConfig.settings`.
        changeable: Those that may differ.

    Raises:
        InputError: If others differ, or the file of the settings is damaged.
    """
    check_settings(folder, settings, changeable, f"delete {folder}, its streams with it, to measure anew")


def measure(streams: Sequence[LACLoss], config: RegretConfig, folder: Path, *, max_seconds: float = math.inf) -> bool:
    """Measure, or go on measuring, and write a line for every episode to ``folder``.

    Args:
        streams: See :class:`RegretMeter`.
        config: What is measured.
        folder: Holds settings and log.
        max_seconds: Stop, resumably, after this time.

    Returns:
        Whether all is measured.
    """
    meter, store, begun = RegretMeter(streams, config), streams[0].store, time.monotonic()
    log = folder / EPISODES
    cut_unfinished(log)
    done = (
        {line.episode for _, line in read_lines(log, "lac train", EpisodeRegret.from_json)} if log.exists() else set()
    )
    every = math.ceil((len(store) - len(store.start)) / (store.stride * config.frames))
    with (
        log.open("a", encoding="utf-8") as file,
        tqdm(total=config.frames, desc="measuring regret", unit="frame") as bar,
    ):
        for number, episode in enumerate(store.numbers):
            if episode not in done and time.monotonic() - begun < max_seconds:
                append(file, meter.episode(number, every, bar).to_json())
                done.add(episode)
                if (found := read_regret(folder)) is not None:
                    figures = {**found.to_json(), "settings": config.settings(streams[0].policy)}
                    write_object(folder / FIGURES, {**figures, "measured_with": provenance()})
    return done.issuperset(store.numbers)


def held_out_streams(
    vla: VLA, policy: LACPolicy, config: TrainConfig, episodes: Sequence[int], folder: Path
) -> list[LACLoss]:
    """Store some episodes under each stream's noise, and put model and policy beside them.

    Args:
        vla: The frozen model.
        policy: What is measured.
        config: The training run, which names data set and noise.
        episodes: Their numbers in the data set.
        folder: Takes the stores.
    """
    stores = (
        FrameStore.build(
            vla,
            config.dataset,
            folder / f"stream-{seed}",
            flow=config.flow,
            patch_pixels=config.patch_pixels,
            episodes=episodes,
            stride=config.stride,
            keys=config.keys,
            noise=PixelNoise(config.oracle_noise, seed),
        )
        for seed in range(2 if config.oracle_noise else 1)
    )
    return [LACLoss(vla, store, policy, "distill", exact=True) for store in stores]


def _stacked(masks: Iterable[BoolArray]) -> torch.Tensor:
    return torch.from_numpy(np.stack([*masks])).float()
