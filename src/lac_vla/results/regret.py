"""Regret: how much further from dense a policy's decisions are than an oracle's, at equal mean active tokens.

The lines of ``regret/episodes.jsonl``, which ``lac train --oracle-frames`` writes, and what follows from them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lac_vla.errors import InputError
from lac_vla.files import read_lines, read_object, reading
from lac_vla.results.format import NONE, percent
from lac_vla.results.stats import Interval
from lac_vla.results.table import TextTable

FOLDER, SETTINGS, EPISODES, FIGURES = "regret", "config.json", "episodes.jsonl", "regret.json"
BUDGETS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3)
"""Shares of active tokens, in the mean over the frames, at which everything is compared."""
WAYS = {
    "drop": "oracle, true drops",
    "value": "oracle, first order",
    "lac": "selector, fixed ratio",
    "motion": "motion, other cameras kept",
    "random": "random",
}
"""Ways to choose tokens, and their names in tables; regret is against the first."""
PRICES = np.geomspace(1e-6, 1e3, 300)
"""Prices of a whole frame of active tokens, in units of the divergence, ascending."""
RESAMPLES = 1000
FEWEST = 3
"""With fewer episodes a bootstrap over them says nothing."""

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class FrameRegret:
    """A measured frame; the streams differ in their pictures' noise alone.

    Attributes:
        frame: Its number in the episode.
        tried: Way → for each stream, the divergence at each share of active tokens.
        chosen: Share of active tokens that the predictor chose, for each stream.
        active: Share that the policy really had active: recovery and maximum age come on top.
        own: Divergence of that, for each stream.
    """

    frame: int
    tried: Mapping[str, Sequence[Sequence[float]]]
    chosen: Sequence[float]
    active: float
    own: Sequence[float]


@dataclass(frozen=True)
class EpisodeRegret:
    """The measured frames of an episode, by its number in the data set."""

    episode: int
    frames: Sequence[FrameRegret]

    def to_json(self) -> dict[str, Any]:
        """Give the line of the log."""
        return asdict(self)

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> EpisodeRegret:
        """Read a line; whatever is wrong with it is a ``ValueError``, ``KeyError`` or ``TypeError``."""
        frames = [FrameRegret(**frame) for frame in line["frames"]]
        for frame in frames:
            if not np.isfinite(np.array([frame.tried[way] for way in WAYS], dtype=np.float64)).all():
                raise ValueError("a divergence is not finite")
        return cls(int(line["episode"]), frames)


@dataclass(frozen=True)
class Predicted:
    """The ratio predictor against a fixed ratio and against the best ratios, all with the selector's tokens.

    Attributes:
        active: Mean share of active tokens that it chose; the others are compared there.
        divergence: Of its choices.
        fixed: Of the same share in every frame.
        best: Of the best share for each frame.
        deviation: Standard deviation of its share within an episode, mean over the episodes.
    """

    active: float
    divergence: float
    fixed: float
    best: float
    deviation: float


@dataclass(frozen=True)
class Regret:
    """The figures of a run.

    Attributes:
        frames: How many were measured.
        episodes: Of how many episodes.
        streams: Noisy streams of each: 1 for pictures without noise, where oracles profit from luck.
        divergence: Way → mean divergence at each of :data:`BUDGETS`.
        best: The same of the selector's tokens with the best share for each frame, chosen on the other stream.
        gain: By how much, as a share, that is below the selector's at a fixed ratio, 95 % bootstrap over episodes;
            ``None`` for fewer than :data:`FEWEST`, and where the fixed ratio loses nothing.
        deviation: Standard deviation of the best share within an episode, mean over the episodes.
        predicted: The predictor; ``None`` for a policy of a fixed ratio.
        own: Mean divergence of the policy as it ran, with recovery and maximum age.
        active: Its mean share of active tokens.
    """

    frames: int
    episodes: int
    streams: int
    divergence: Mapping[str, Sequence[float]]
    best: Sequence[float]
    gain: Sequence[Interval | None]
    deviation: Sequence[float]
    predicted: Predicted | None
    own: float
    active: float

    @property
    def regret(self) -> dict[str, list[float]]:
        """Subtract the first oracle's divergence: way → at each budget."""
        limit, *_ = self.divergence.values()
        rows = {**self.divergence, "best": self.best}
        return {way: [value - least for value, least in zip(row, limit, strict=True)] for way, row in rows.items()}

    @property
    def closed(self) -> list[float | None]:
        """Compute what the selector closes of the gap between the motion rule and the oracle of first order."""
        rows = zip(*(self.divergence[way] for way in ("motion", "lac", "value")), strict=True)
        return [(rule - own) / (rule - limit) if rule > limit else None for rule, own, limit in rows]

    def to_json(self) -> dict[str, Any]:
        """Give plain data."""
        return {"budgets": BUDGETS, **asdict(self), "regret": self.regret, "closed": self.closed}

    @classmethod
    def of(cls, episodes: Sequence[EpisodeRegret], shares: Sequence[float], *, predicts: bool = True) -> Regret:
        """Sum up.

        Args:
            episodes: The log.
            shares: Shares of active tokens that were tried, ascending.
            predicts: Whether the policy chooses its ratio for every frame.

        Raises:
            InputError: If no frame was measured.
        """
        rows = [row for episode in episodes for row in episode.frames]
        if not rows:
            raise InputError("no frame was measured: give more --oracle-frames, or resume the run")
        of = np.repeat(np.arange(len(episodes)), [len(episode.frames) for episode in episodes])
        grid = np.array([*shares, 1.0])  # with every token active, all are dense
        tried = {way: np.array([row.tried[way] for row in rows]) for way in WAYS}  # (F, streams, shares)
        tried = {way: np.pad(part, ((0, 0), (0, 0), (0, 1))) for way, part in tried.items()}
        fixed = {way: np.interp(BUDGETS, grid, part.mean(axis=(0, 1))) for way, part in tried.items()}
        chosen = np.array([row.chosen for row in rows])
        at = np.abs(grid - chosen[..., None]).argmin(axis=-1)
        lac, mean = tried["lac"], float(chosen.mean())
        costs, divergences = priced(lac, grid)
        means, values = costs.mean(axis=1), divergences.mean(axis=1)
        return cls(
            frames=len(rows),
            episodes=len(np.unique(of)),
            streams=lac.shape[1],
            divergence={way: row.tolist() for way, row in fixed.items()},
            best=at_mean(means, values, BUDGETS).tolist(),
            gain=_gain(lac, grid, costs, divergences, of),
            deviation=at_mean(means, np.array([within(row, of) for row in costs]), BUDGETS).tolist(),
            predicted=Predicted(
                active=mean,
                divergence=float(np.take_along_axis(lac, at[..., None], axis=-1).mean()),
                fixed=float(np.interp(mean, grid, lac.mean(axis=(0, 1)))),
                best=float(at_mean(means, values, [mean])[0]),
                deviation=within(chosen.mean(axis=1), of),
            )
            if predicts
            else None,
            own=float(np.mean([row.own for row in rows])),
            active=float(np.mean([row.active for row in rows])),
        )

    def table(self) -> TextTable:
        """Make the terminal's table: thousandths of the divergence's unit, regret in brackets."""
        named = {**WAYS, "best": "selector, best ratio of each frame"}
        rows = {way: (self.best if way == "best" else self.divergence[way], self.regret[way]) for way in named}
        cells = [
            (named[way], *(f"{1e3 * value:.2f} ({1e3 * more:+.2f})" for value, more in zip(*row, strict=True)))
            for way, row in rows.items()
        ]
        gains = [NONE if gain is None else f"{percent(gain.low, 0)} to {percent(gain.high, 0)}" for gain in self.gain]
        cells.append(("gain of the best ratios, 95 %", *gains))
        cells.append(("gap from motion to first order closed", *(percent(value, 0) for value in self.closed)))
        notes = [
            f"{self.frames} held-out frames of {self.episodes} episodes, {self.streams} noisy stream(s) each; "
            "divergence from dense in thousandths, regret against the first row in brackets",
            f"the policy as it ran, recovery and maximum age included: {percent(self.active)} active, "
            f"divergence {1e3 * self.own:.2f}",
        ]
        if (one := self.predicted) is not None:
            notes.append(
                f"the predictor: {percent(one.active)} active, divergence {1e3 * one.divergence:.2f}; a fixed ratio "
                f"with this mean {1e3 * one.fixed:.2f}, the best ratios {1e3 * one.best:.2f}; its ratio deviates by "
                f"{one.deviation:.3f} within an episode, the best ones by {min(self.deviation):.2f} to "
                f"{max(self.deviation):.2f}"
            )
        headings = ("tokens chosen by", *(f"{percent(budget, 0)} active" for budget in BUDGETS))
        return TextTable("Divergence from dense, and regret", headings, tuple(cells), tuple(notes))


def priced(tried: Array, shares: Array) -> tuple[Array, Array]:
    """Let every frame take the share of active tokens that suits it best at each price of an active token.

    That minimises divergence and price together (a Lagrangian over the frames) on the other stream: what a frame
    profits from is then no luck of the noise that it is scored under.

    Args:
        tried: Divergences, (F, streams, shares).
        shares: Ascending; the last is 1, where everything is dense.

    Returns:
        Shares and divergences, each (prices, F), the mean over the streams; the shares fall with the price.
    """
    other = np.roll(tried, 1, axis=1)
    at = [(other + price * shares).argmin(axis=-1) for price in PRICES]
    taken = [np.take_along_axis(tried, each[..., None], axis=-1)[..., 0].mean(axis=1) for each in at]
    return np.array([shares[each].mean(axis=1) for each in at]), np.array(taken)


def at_mean(costs: Array, values: Array, means: Sequence[float]) -> Array:
    """Read values, (prices,), where the costs, falling with the price, have these means; between two, chance decides.

    A price of 0 stands for dense: a cost of 1 and a value of 0.
    """
    return np.interp(means, [*costs[::-1], 1.0], [*values[::-1], 0.0])


def within(values: Array, of: npt.NDArray[np.int64]) -> float:
    """Compute the standard deviation within each episode, mean over the episodes."""
    return float(np.mean([values[of == episode].std() for episode in np.unique(of)]))


def _gain(tried: Array, shares: Array, costs: Array, best: Array, of: npt.NDArray[np.int64]) -> list[Interval | None]:
    """Bootstrap what the best shares save against a fixed one, over episodes; see :attr:`Regret.gain`."""
    rng, episodes, gains = np.random.default_rng(0), np.unique(of), []
    if len(episodes) < FEWEST:
        return [None] * len(BUDGETS)
    for _ in range(RESAMPLES):
        drawn = np.concatenate([np.flatnonzero(of == e) for e in rng.choice(episodes, len(episodes))])
        fixed = np.interp(BUDGETS, shares, tried[drawn].mean(axis=(0, 1)))
        found = at_mean(costs[:, drawn].mean(axis=1), best[:, drawn].mean(axis=1), BUDGETS)
        gains.append(1 - found / np.where(fixed > 0, fixed, np.nan))
    low, high = np.percentile(gains, [2.5, 97.5], axis=0)
    return [None if np.isnan(a) else Interval(float(a), float(b)) for a, b in zip(low, high, strict=True)]


def read_regret(folder: Path) -> Regret | None:
    """Read what was measured, a run's :data:`FOLDER`; ``None`` if nothing was.

    Raises:
        InputError: If a file is damaged.
    """
    log = folder / EPISODES
    if not log.exists():
        return None
    path, advice = folder / SETTINGS, f"delete {folder} and resume the run, which measures anew"
    settings = read_object(path, advice)
    episodes = [episode for _, episode in read_lines(log, "lac train", EpisodeRegret.from_json)]
    if not any(episode.frames for episode in episodes):
        return None
    with reading(path, advice):
        shares = np.array(settings["shares"], dtype=np.float64)
        if shares.ndim != 1 or not np.isfinite(shares).all() or (np.diff(shares) <= 0).any():
            raise ValueError("its shares are not ascending numbers")
        for frame in (frame for episode in episodes for frame in episode.frames):
            if {len(row) for way in WAYS for row in frame.tried[way]} != {len(shares)}:
                raise ValueError("its shares are not those of the log")
        fixed = settings.get("fixed_ratio")
    return Regret.of(episodes, shares.tolist(), predicts=fixed is None)
