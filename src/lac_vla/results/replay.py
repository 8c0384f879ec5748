"""Whole sessions of several policies over the same recorded frames, each on its own cache, compared frame by frame."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lac_vla.errors import InputError
from lac_vla.results.adaptivity import Adaptivity, varied
from lac_vla.results.replay_log import Calls, EpisodeReplay
from lac_vla.results.replay_saved import MEASURED, RESAMPLES, Saved, interval, saved
from lac_vla.results.stats import Interval, sign_flips


@dataclass(frozen=True)
class Phases:
    """A policy around gripper events, and in free motion.

    Attributes:
        contact: Mean share of active tokens around events.
        free: The same elsewhere.
        difference: Contact less free within an episode, mean over the episodes that have both.
        interval: 95 % of that, bootstrap over episodes; ``None`` for too few, see :func:`interval`.
        p: Sign-flip test of the episodes' differences, two-sided.
        episodes: How many have both.
        divergence: Mean divergence around events, and elsewhere.
    """

    contact: float
    free: float
    difference: float
    interval: Interval | None
    p: float
    episodes: int
    divergence: tuple[float, float]


@dataclass(frozen=True)
class MethodReplay:
    """One policy over all frames.

    Attributes:
        ratio: Mean effective ratio.
        tokens: Mean number of active tokens.
        divergence: From dense, mean.
        p50: Its median.
        p95: Its 95th percentile.
        adaptivity: How it varies what it reuses.
        saved: Against the baselines; ``None`` for a baseline, and where no baselines enclose its active tokens.
        phases: ``None`` where nothing is known of the gripper, or no episode has both phases.
    """

    ratio: float
    tokens: float
    divergence: float
    p50: float
    p95: float
    adaptivity: Adaptivity
    saved: Saved | None
    phases: Phases | None


@dataclass(frozen=True)
class Replay:
    """The figures of a run.

    Attributes:
        episodes: How many.
        frames: Calls of the model over all of them, the first ones left out.
        tokens: Visual tokens of the model.
        baselines: Policies that the others are compared with.
        contact: Frames around a gripper event that count as contact.
        contact_share: Share of the frames that do; ``None`` if nothing is known of the gripper.
        methods: Policy → its figures.
    """

    episodes: int
    frames: int
    tokens: int
    baselines: Sequence[str]
    contact: int
    contact_share: float | None
    methods: Mapping[str, MethodReplay]

    @classmethod
    def of(
        cls,
        episodes: Sequence[EpisodeReplay],
        baselines: Sequence[str],
        tokens: int,
        contact: int,
        adaptive: Sequence[str] = (),
    ) -> Replay:
        """Sum up.

        Args:
            episodes: The log.
            baselines: Policies that the others are compared with; none for no comparison.
            tokens: Visual tokens of the model.
            contact: Frames around a gripper event that count as contact.
            adaptive: Policies that choose their ratio for every frame.

        Raises:
            InputError: If there is no episode.
        """
        if not episodes:
            raise InputError("no episode was gone through: run the same command again")
        known = all(episode.gripper is not None for episode in episodes)
        near = [episode.contact(contact) for episode in episodes] if known else None
        methods = {}
        for name in episodes[0].methods:
            own = [episode.methods[name] for episode in episodes]
            active, divergence = (np.concatenate([getattr(calls, key) for calls in own]) for key in MEASURED)
            methods[name] = MethodReplay(
                ratio=float(1 - active.mean()),
                tokens=float(tokens * active.mean()),
                divergence=float(divergence.mean()),
                p50=float(np.quantile(divergence, 0.5)),
                p95=float(np.quantile(divergence, 0.95)),
                adaptivity=_adaptivity(own, adaptive=name in adaptive),
                saved=None if name in baselines else saved(episodes, name, baselines),
                phases=None if near is None else _phases(own, near),
            )
        share = None if near is None else float(np.concatenate(near).mean())
        frames = sum(len(episode.frames) for episode in episodes)
        return cls(len(episodes), frames, tokens, tuple(baselines), contact, share, methods)

    def to_json(self) -> dict[str, Any]:
        """Give plain data; shares of ratios by the ratio's text."""
        found = asdict(self)
        for method in found["methods"].values():
            shares = method["adaptivity"]["shares"]
            method["adaptivity"]["shares"] = {f"{ratio:g}": shares[ratio] for ratio in sorted(shares)}
        return found


def _adaptivity(own: Sequence[Calls], *, adaptive: bool) -> Adaptivity:
    """Describe how a policy varies what it reuses, over its episodes; the first call of each is not in the log."""
    aimed = Counter(round(ratio, 6) for calls in own for ratio in calls.nominal if ratio is not None)
    cameras = {camera: np.concatenate([calls.reuse[camera] for calls in own]) for camera in own[0].reuse}
    every = [varied([None, *(1 - share for share in calls.active)], [None, *calls.nominal]) for calls in own]
    spread = [float(np.std(ratios)) for ratios in every if ratios]
    return Adaptivity(
        {ratio: count / aimed.total() for ratio, count in aimed.most_common()},
        float(np.mean(spread)) if spread else None,
        {camera: float(reused.mean()) for camera, reused in cameras.items()},
        adaptive,
    )


def _phases(own: Sequence[Calls], near: Sequence[npt.NDArray[np.bool_]]) -> Phases | None:
    """Compare a policy around gripper events with itself elsewhere, episode by episode."""
    both = [(calls, at) for calls, at in zip(own, near, strict=True) if at.any() and not at.all()]
    if not both:
        return None
    contact, free = (
        [np.concatenate([np.array(getattr(calls, key))[at == where] for calls, at in both]) for key in MEASURED]
        for where in (True, False)
    )
    differences = np.array([np.array(c.active)[at].mean() - np.array(c.active)[~at].mean() for c, at in both])
    drawn = np.random.default_rng(0).integers(len(both), size=(RESAMPLES, len(both)))
    return Phases(
        contact=float(contact[0].mean()),
        free=float(free[0].mean()),
        difference=float(differences.mean()),
        interval=interval(differences[drawn].mean(axis=1), len(both)),
        p=sign_flips(differences),
        episodes=len(both),
        divergence=(float(contact[1].mean()), float(free[1].mean())),
    )
