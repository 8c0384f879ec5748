"""A policy varies what it reuses: from frame to frame, and from camera to camera."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lac_vla.errors import InputError
from lac_vla.results.format import percent
from lac_vla.results.records import EpisodeRecord

COLLAPSED = 0.95
"""A predictor that chooses one ratio in so large a share of the frames is no better than a fixed ratio."""

SHARE = "held_out_share_"
"""Metrics of ``lac train``: the share of held-out frames with the ratio that follows."""


@dataclass(frozen=True)
class Adaptivity:
    """The choices of a method over all its episodes.

    Attributes:
        shares: Ratio aimed at → share of the calls, the commonest first; empty if it aims at none.
        deviation: Standard deviation of the effective ratio within an episode, mean over the episodes; calls that
            had to compute everything are left out. ``None`` if it was not recorded.
        cameras: Camera → share of its tokens that was reused, over all calls and layers; empty if it was not recorded.
        adaptive: Whether the policy chooses its ratio for every frame.
    """

    shares: Mapping[float, float]
    deviation: float | None
    cameras: Mapping[str, float]
    adaptive: bool

    @classmethod
    def of(cls, episodes: Sequence[EpisodeRecord]) -> Adaptivity:
        """Sum the episodes of a method up."""
        aimed = Counter(ratio for e in episodes for ratio in _known(e.metrics.get("ratio_nominal", ())))
        spread = [
            float(np.std(ratios))
            for e in episodes
            if (ratios := varied(e.metrics.get("ratio_effective", ()), e.metrics.get("ratio_nominal", ())))
        ]
        cameras: dict[str, list[float]] = {}
        for episode in episodes:
            for camera, reused in episode.reuse.items():
                cameras.setdefault(camera, []).extend(reused)
        return cls(
            {ratio: count / aimed.total() for ratio, count in aimed.most_common()},
            float(np.mean(spread)) if spread else None,
            {camera: float(np.mean(reused)) for camera, reused in cameras.items() if reused},
            any(episode.adaptive for episode in episodes),
        )

    @property
    def warning(self) -> str | None:
        """Say that a policy that could vary its ratio does not; ``None`` if it does, or could not."""
        return collapse_warning(self.shares) if self.adaptive else None


def collapse_warning(shares: Mapping[float, float]) -> str | None:
    """Say that a predictor chooses always the same; the shares are ratio → share of the frames."""
    ratio = max(shares, key=lambda each: shares[each], default=None)
    if ratio is None or shares[ratio] < COLLAPSED:
        return None
    return (
        f"the ratio predictor has collapsed to one value: {percent(ratio, 0)} in {percent(shares[ratio], 0)} of the "
        "frames, which a fixed ratio would do as well"
    )


def shares_chosen(row: Mapping[str, float]) -> dict[float, float]:
    """Read ratio → share of the held-out frames off a validation row of ``lac train``; empty for other rows.

    Raises:
        InputError: If the row is damaged.
    """
    found = {name.removeprefix(SHARE): share for name, share in row.items() if name.startswith(SHARE)}
    try:
        return {float(ratio): float(share) for ratio, share in found.items()}
    except (TypeError, ValueError) as error:
        raise InputError(f"metrics.jsonl has a damaged row ({error}): delete its line") from error


def varied(effective: Sequence[float | None], nominal: Sequence[float | None]) -> list[float]:
    """Leave out the calls that the policy was not asked in: they aim at no ratio, nor could an episode's first reuse.

    Of a policy that never aims at one, only what computed everything is known.
    """
    if not _known(nominal):
        return [ratio for ratio in _known(effective) if ratio]
    if not any(_known(effective)):
        return []  # dense
    calls = enumerate(zip(effective, nominal, strict=False))
    return _known(ratio for at, (ratio, aim) in calls if aim is not None and (at or ratio))


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]
