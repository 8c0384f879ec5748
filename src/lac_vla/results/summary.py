"""Episodes are aggregated to the rows of the tables. The terminal and the reports show the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import numpy as np

from lac_vla.errors import InputError
from lac_vla.results.adaptivity import Adaptivity
from lac_vla.results.metrics import METRICS
from lac_vla.results.pace import Pace
from lac_vla.results.records import EpisodeRecord, Trial
from lac_vla.results.stats import Interval, Percentiles, bootstrap, bootstrap_ratio, mcnemar, percentiles, wilson

T = TypeVar("T")
Pair: TypeAlias = tuple[EpisodeRecord, EpisodeRecord]
"""Dense's episode and a method's, of one trial."""

DENSE = "dense"
"""The method that the others are compared with."""


@dataclass(frozen=True)
class Paired:
    """The comparison of a method with dense on the trials that both ran: how many, and who solved how many of them.

    Attributes:
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
class Speedup:
    """The net speed-up of a method over dense, on the trials that both solved.

    Attributes:
        pairs: Number of these trials, at least 1.
        ratio: Dense's time of all these episodes over the method's, see :attr:`EpisodeRecord.duration_ms`: above 1 the
            method is faster, longer episodes included.
        interval: 95 % bootstrap interval over the pairs, stratified by task; ``None`` if no pair differs from another
            of its task.
    """

    pairs: int
    ratio: float
    interval: Interval | None


@dataclass(frozen=True)
class MethodRow:
    """One method over all its episodes.

    Attributes:
        method: Its name.
        trials: Number of episodes.
        successes: Number of solved ones.
        interval: Wilson's 95 % interval of the success rate.
        paired: Comparison with dense; ``None`` for dense itself and where no trial is shared.
        speedup: Net speed-up over dense; ``None`` for dense itself and where nothing timed is paired.
        steps: World steps over all episodes.
        actions_per_call: Actions executed per call of the model; several if its episodes differ.
        metrics: Name of a metric → its aggregate over all calls; without those that have none.
        latency: Window or stage → percentiles over all calls, milliseconds.
        peak_memory_mb: The largest of all episodes; ``None`` if it was not recorded.
        adaptivity: How it varied what it reused.
        pace: What the world's clock showed; ``None`` of a world that waited.
    """

    method: str
    trials: int
    successes: int
    interval: Interval
    paired: Paired | None
    speedup: Speedup | None
    steps: int
    actions_per_call: tuple[int, ...]
    metrics: Mapping[str, float]
    latency: Mapping[str, Percentiles]
    peak_memory_mb: float | None
    adaptivity: Adaptivity
    pace: Pace | None = None

    @property
    def rate(self) -> float:
        """Give the success rate, in [0, 1]."""
        return self.successes / self.trials

    @property
    def ratio(self) -> float | None:
        """Give the mean effective cache ratio, in [0, 1]; ``None`` if it was not recorded."""
        return self.metrics.get("ratio_effective")


@dataclass(frozen=True)
class TaskRow:
    """One task; the outcomes are method → (successes, trials)."""

    task: int
    instruction: str
    outcomes: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Summary:
    """A run in numbers: one row per method (dense first, then in order of appearance), one per task."""

    methods: tuple[MethodRow, ...]
    tasks: tuple[TaskRow, ...]

    def row(self, method: str) -> MethodRow | None:
        """Find the row of a method, or ``None``."""
        return next((row for row in self.methods if row.method == method), None)


def summarize(episodes: Iterable[EpisodeRecord]) -> Summary:
    """Aggregate episodes.

    Methods are paired with ``dense`` on (suite, task, initial state, seed, stress, clock). Metrics and latencies are
    aggregated over calls of the model: long episodes weigh more.

    Raises:
        InputError: If there is no episode.
    """
    by_method: dict[str, list[EpisodeRecord]] = {}
    for episode in episodes:
        by_method.setdefault(episode.method, []).append(episode)
    if not by_method:
        raise InputError("there is no finished episode to summarise: let the run go on, or resume it")
    names = sorted(by_method, key=lambda name: name != DENSE)
    dense = {episode.trial: episode for episode in by_method.get(DENSE, [])}
    return Summary(
        methods=tuple(_method_row(name, by_method[name], dense) for name in names),
        tasks=tuple(_task_rows(names, by_method)),
    )


def _method_row(name: str, episodes: Sequence[EpisodeRecord], dense: Mapping[Trial, EpisodeRecord]) -> MethodRow:
    successes = sum(episode.success for episode in episodes)
    latency = {window: percentiles(ms) for window, ms in _pooled(e.latency_ms for e in episodes).items()}
    values = _pooled(episode.metrics for episode in episodes)
    metrics = {key: metric.aggregate(values[key]) for key, metric in METRICS.items() if values.get(key)}
    memory = [episode.peak_memory_mb for episode in episodes if episode.peak_memory_mb is not None]
    pairs = [] if name == DENSE else [(dense[e.trial], e) for e in episodes if e.trial in dense]
    return MethodRow(
        method=name,
        trials=len(episodes),
        successes=successes,
        interval=wilson(successes, len(episodes)),
        paired=compare(pairs),
        speedup=_speedup(pairs),
        steps=sum(episode.steps for episode in episodes),
        actions_per_call=tuple(sorted({episode.actions_per_call for episode in episodes})),
        metrics={key: value for key, value in metrics.items() if value is not None},
        latency={window: value for window, value in latency.items() if value is not None},
        peak_memory_mb=max(memory, default=None),
        adaptivity=Adaptivity.of(episodes),
        pace=Pace.of(episodes),
    )


def _pooled(series: Iterable[Mapping[str, Sequence[float | None]]]) -> dict[str, list[float]]:
    """Join what the episodes have under every key, without ``None``."""
    pooled: dict[str, list[float]] = {}
    for episode in series:
        for key, values in episode.items():
            pooled.setdefault(key, []).extend(value for value in values if value is not None)
    return pooled


def _by_task(pairs: Sequence[Pair], value: Callable[[EpisodeRecord], T]) -> list[list[tuple[T, T]]]:
    tasks: dict[tuple[str, int], list[tuple[T, T]]] = {}
    for dense, method in pairs:
        tasks.setdefault((method.suite, method.task), []).append((value(dense), value(method)))
    return list(tasks.values())


def compare(pairs: Sequence[Pair]) -> Paired | None:
    """Compare the successes of pairs, each of dense, or of a method in another world, and of a method."""
    if not pairs:
        return None
    only_dense = sum(dense.success and not method.success for dense, method in pairs)
    only_method = sum(method.success and not dense.success for dense, method in pairs)
    return Paired(
        pairs=len(pairs),
        both=sum(dense.success and method.success for dense, method in pairs),
        only_dense=only_dense,
        only_method=only_method,
        difference=(only_method - only_dense) / len(pairs),
        interval=bootstrap(_by_task(pairs, lambda episode: episode.success)),
        p=mcnemar(only_dense, only_method),
    )


def _speedup(pairs: Sequence[Pair]) -> Speedup | None:
    solved = [pair for pair in pairs if all(episode.success and episode.duration_ms for episode in pair)]
    if not solved:
        return None
    tasks = _by_task(solved, lambda episode: episode.duration_ms or 0.0)
    dense, method = np.sum([times for task in tasks for times in task], axis=0)
    return Speedup(len(solved), float(dense / method), bootstrap_ratio(tasks))


def _task_rows(names: Sequence[str], by_method: dict[str, list[EpisodeRecord]]) -> list[TaskRow]:
    rows: dict[tuple[str, int], TaskRow] = {}
    for name in names:
        for episode in by_method[name]:
            key = (episode.suite, episode.task)
            row = rows.setdefault(key, TaskRow(episode.task, episode.instruction, {}))
            successes, trials = row.outcomes.get(name, (0, 0))
            row.outcomes[name] = (successes + bool(episode.success), trials + 1)
    return [rows[key] for key in sorted(rows)]
