"""From episodes to the rows of a table. The terminal and the report show the same numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lac_vla import timing
from lac_vla.errors import InputError
from lac_vla.results.records import EpisodeRecord, Trial
from lac_vla.results.stats import Interval, Percentiles, bootstrap, mcnemar, percentiles, wilson

DENSE = "dense"
"""The method that the others are compared with."""

WINDOWS = tuple(timing.WINDOWS)
"""The latency windows that are always reported together, from the narrowest to the widest."""


@dataclass(frozen=True)
class Paired:
    """A method against dense on the trials that both ran.

    Attributes:
        pairs: Number of these trials.
        both: Solved by both.
        only_dense: Solved by dense alone.
        only_method: Solved by the method alone.
        difference: Success rate of the method minus that of dense, over the pairs, in [-1, 1].
        interval: 95 % bootstrap interval of the difference, stratified by task; ``None`` if no pair differs
            from another of its task.
        p: McNemar's exact two-sided test.
    """

    pairs: int
    both: int
    only_dense: int
    only_method: int
    difference: float
    interval: Interval | None
    p: float


@dataclass(frozen=True)
class MethodRow:
    """One method over all its episodes.

    Attributes:
        method: Its name.
        trials: Episodes.
        successes: Of them.
        interval: Wilson's 95 % interval of the success rate.
        paired: Against dense; ``None`` for dense itself and where no trial is shared.
        frames: Control steps over all episodes.
        ratio_nominal: Mean of the ratio aimed at, over the frames that have one; ``None`` if none has.
        ratio_effective: Mean over frames; ``None`` if it was not recorded.
        oldest_age: The oldest slot of all frames, ≥ 1; ``None`` if nothing was ever reused, or it was not recorded.
        macs: Mean multiply-accumulates per frame; ``None`` if they were not recorded.
        passes: Mean decoding passes behind the prefill; ``None`` if they were not recorded.
        accepted: Mean number of drafted tokens that stood; ``None`` without drafts.
        latency: Window or stage → percentiles over all frames, milliseconds.
        peak_memory_mb: The largest of all episodes; ``None`` if it was not recorded.
    """

    method: str
    trials: int
    successes: int
    interval: Interval
    paired: Paired | None
    frames: int
    ratio_nominal: float | None
    ratio_effective: float | None
    oldest_age: int | None
    macs: float | None
    latency: dict[str, Percentiles]
    peak_memory_mb: float | None
    passes: float | None = None
    accepted: float | None = None

    @property
    def rate(self) -> float:
        """Success rate, in [0, 1]."""
        return self.successes / self.trials

    @property
    def flops(self) -> float | None:
        """Mean floating-point operations per frame: two per multiply-accumulate."""
        return None if self.macs is None else 2 * self.macs


@dataclass(frozen=True)
class TaskRow:
    """One task: (successes, trials) by method."""

    suite: str
    task: int
    instruction: str
    outcomes: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Summary:
    """A run in numbers: one row per method (dense first, then in order of appearance), one per task."""

    methods: tuple[MethodRow, ...]
    tasks: tuple[TaskRow, ...]

    def row(self, method: str) -> MethodRow | None:
        """The row of a method, or ``None``."""
        return next((row for row in self.methods if row.method == method), None)

    def to_json(self) -> dict[str, Any]:
        """All numbers, for ``summary.json``."""
        rows = []
        for row in self.methods:
            content = dataclasses.asdict(row)
            content |= {"rate": row.rate, "flops": row.flops, "interval": row.interval._asdict()}
            if row.paired is not None and row.paired.interval is not None:
                content["paired"]["interval"] = row.paired.interval._asdict()
            content["latency"] = {name: value._asdict() for name, value in row.latency.items()}
            rows.append(content)
        return {"methods": rows, "tasks": [dataclasses.asdict(task) for task in self.tasks]}


def summarize(episodes: Iterable[EpisodeRecord]) -> Summary:
    """Aggregate episodes.

    Methods are paired with ``dense`` on (suite, task, initial state, seed, stress). Means and percentiles are over
    frames: long episodes weigh more.

    Args:
        episodes: At least one, of any number of methods.

    Returns:
        The rows.

    Raises:
        InputError: If there is no episode.
    """
    by_method: dict[str, list[EpisodeRecord]] = {}
    for episode in episodes:
        by_method.setdefault(episode.method, []).append(episode)
    if not by_method:
        raise InputError("there is no finished episode to summarise: let the run go on, or resume it")
    names = sorted(by_method, key=lambda name: name != DENSE)
    dense = {episode.trial: episode.success for episode in by_method.get(DENSE, [])}
    return Summary(
        methods=tuple(_method_row(name, by_method[name], dense) for name in names),
        tasks=tuple(_task_rows(names, by_method)),
    )


def _method_row(name: str, episodes: Sequence[EpisodeRecord], dense: dict[Trial, bool]) -> MethodRow:
    successes = sum(episode.success for episode in episodes)
    windows: dict[str, list[float]] = {}
    for episode in episodes:
        for window, values in episode.latency_ms.items():
            windows.setdefault(window, []).extend(values)
    latency = {window: percentiles(values) for window, values in windows.items()}
    ages = [age for episode in episodes for age in episode.oldest_age if age]
    memory = [episode.peak_memory_mb for episode in episodes if episode.peak_memory_mb is not None]
    return MethodRow(
        method=name,
        trials=len(episodes),
        successes=successes,
        interval=wilson(successes, len(episodes)),
        paired=None if name == DENSE else _pair(episodes, dense),
        frames=sum(episode.steps for episode in episodes),
        ratio_nominal=_mean(ratio for episode in episodes for ratio in episode.ratio_nominal),
        ratio_effective=_mean(ratio for episode in episodes for ratio in episode.ratio_effective),
        oldest_age=max(ages, default=None),
        macs=_mean(macs for episode in episodes for macs in episode.macs),
        latency={window: value for window, value in latency.items() if value is not None},
        peak_memory_mb=max(memory, default=None),
        passes=_mean(passes for episode in episodes for passes in episode.passes),
        accepted=_mean(tokens for episode in episodes for tokens in episode.accepted),
    )


def _pair(episodes: Sequence[EpisodeRecord], dense: dict[Trial, bool]) -> Paired | None:
    by_task: dict[tuple[str, int], list[tuple[bool, bool]]] = {}
    for episode in episodes:
        if episode.trial in dense:
            pair = (dense[episode.trial], episode.success)
            by_task.setdefault((episode.suite, episode.task), []).append(pair)
    pairs = [pair for task in by_task.values() for pair in task]
    if not pairs:
        return None
    only_dense = sum(first and not second for first, second in pairs)
    only_method = sum(second and not first for first, second in pairs)
    return Paired(
        pairs=len(pairs),
        both=sum(first and second for first, second in pairs),
        only_dense=only_dense,
        only_method=only_method,
        difference=(only_method - only_dense) / len(pairs),
        interval=bootstrap(by_task.values()),
        p=mcnemar(only_dense, only_method),
    )


def _task_rows(names: Sequence[str], by_method: dict[str, list[EpisodeRecord]]) -> list[TaskRow]:
    rows: dict[tuple[str, int], TaskRow] = {}
    for name in names:
        for episode in by_method[name]:
            key = (episode.suite, episode.task)
            row = rows.setdefault(key, TaskRow(episode.suite, episode.task, episode.instruction, {}))
            successes, trials = row.outcomes.get(name, (0, 0))
            row.outcomes[name] = (successes + bool(episode.success), trials + 1)
    return [rows[key] for key in sorted(rows)]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
