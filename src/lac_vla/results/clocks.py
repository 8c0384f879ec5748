"""All clocks in one table, beside the world that waits: what a faster policy is worth."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lac_vla.results import format as write
from lac_vla.results import table
from lac_vla.results.format import NONE
from lac_vla.results.records import EpisodeRecord
from lac_vla.results.summary import MethodRow, Paired, compare, summarize
from lac_vla.results.table import TextTable

WAITING = "no latency"
"""The clock of a world that waits."""
NOTES = (
    "solved: within the horizon, in the world's steps; " + table.SUCCESS_NOTE,
    "vs no latency: the same method on the same trials in a world that waits, points; p: McNemar, exact",
    "effective Hz: answers per second; stale, held: share of the world's steps driven by an answer to an observation "
    "older than one step; share without an answer",
    "task time: mean of the solved episodes; net speed-up: dense over method, world's time of what both solved",
)


@dataclass(frozen=True)
class ClockRow:
    """A method under one clock.

    Attributes:
        clock: Clock, mode and deadline; empty for a world that waits.
        row: Its numbers.
        degradation: Its comparison with itself in a world that waits; ``None`` without common trials, or if this is it.
    """

    clock: str
    row: MethodRow
    degradation: Paired | None


def clock_rows(episodes: Iterable[EpisodeRecord]) -> list[ClockRow]:
    """Compare all methods under all clocks, the waiting world first, clocks in order of appearance.

    Methods are compared with dense under the same clock, and with themselves in the waiting world, on common trials.
    """
    by_clock: dict[str, list[EpisodeRecord]] = {}
    for episode in episodes:
        by_clock.setdefault(episode.clock, []).append(episode)
    calm = {(e.method, *e.trial[:-1]): e for e in by_clock.get("", [])}
    rows = []
    for clock in sorted(by_clock, key=bool):
        for row in summarize(by_clock[clock]).methods:
            own = [e for e in by_clock[clock] if e.method == row.method] if clock else []
            pairs = [(calm[key], e) for e in own if (key := (e.method, *e.trial[:-1])) in calm]
            rows.append(ClockRow(clock, row, compare(pairs)))
    return rows


def clock_table(rows: Sequence[ClockRow], notes: Sequence[str] = ()) -> TextTable:
    """Make the table of all clocks; ``notes`` say what holds for all of it."""
    headings = (
        "clock", "method", "solved", "vs dense, points", "vs no latency, points", "effective Hz", "stale", "held",
        "answer p50 / p95, ms", "task time, s", table.SPEEDUP.heading,
    )  # fmt: skip
    return TextTable("A world that does not wait", headings, tuple(map(_cells, rows)), (*NOTES, *notes))


def _cells(found: ClockRow) -> tuple[str, ...]:
    row, pace = found.row, found.row.pace
    loss = found.degradation
    return (
        found.clock or WAITING,
        row.method,
        table.solved(row),
        table.versus_dense(row),
        NONE if loss is None else f"{write.points(loss.difference)} (p {write.p_value(loss.p)})\n{loss.pairs} pairs",
        NONE if pace is None else f"{pace.effective_hz:.1f}",
        NONE if pace is None else write.percent(pace.stale, 0),
        NONE if pace is None else write.percent(pace.held, 0),
        NONE if pace is None else write.latency(pace.answer_ms),
        NONE if pace is None or pace.task_s is None else f"{pace.task_s:.2f}",
        table.net_speedup(row) if pace is not None else NONE,
    )
