"""The columns that the terminal and the reports share, and tables of texts made of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table

from lac_vla.results import format as write
from lac_vla.results.format import NONE
from lac_vla.results.metrics import METRICS, Metric
from lac_vla.results.pace import Pace
from lac_vla.results.records import WHOLE
from lac_vla.results.summary import DENSE, MethodRow, Summary

WINDOWS = {
    "decoder_prefill": "the language model reading the prompt: the part that caching shortens",
    "model_call": "camera image to action inside the model: vision tower, prefill, action tokens",
    WHOLE: "everything between an observation and its action, caching's own work included",
}
"""Latency window → its meaning, from the narrowest to the widest; all of them are always reported together."""

SUCCESS_NOTE = "95 % intervals: Wilson; of a difference, paired bootstrap by task. p: McNemar, exact, against dense"
TIME_NOTE = (
    "p50 / p95 in ms over all calls; below it, dense's p50 over the method's. "
    "Latencies of a run with several processes are not worth comparing, see `lac bench`"
)
FLAG = "◂"
"""Stands behind the label of a flagged row."""


@dataclass(frozen=True)
class Column:
    """One column of a table of methods: ``cell`` writes that of a method, next to dense (``None`` if not run)."""

    heading: str
    cell: Callable[[MethodRow, MethodRow | None], str]
    help: str = ""


def solved(row: MethodRow) -> str:
    """Write successes, trials, rate and interval, e.g. ``45/50 90.0 % [78.6, 95.7]``."""
    low, high = row.interval
    return f"{row.successes}/{row.trials} {write.percent(row.rate)}\n[{100 * low:.1f}, {100 * high:.1f}]"


def versus_dense(row: MethodRow) -> str:
    """Write the paired difference in points, its p-value and interval, e.g. ``−2.0 (p 0.125) [−8.0, +4.0]``."""
    if row.paired is None:
        return NONE
    interval = row.paired.interval
    ends = f"\n[{write.points(interval.low)}, {write.points(interval.high)}]" if interval else ""
    return f"{write.points(row.paired.difference)} (p {write.p_value(row.paired.p)}){ends}"


def net_speedup(row: MethodRow) -> str:
    """Write the net speed-up and its interval, e.g. ``1.25 × [1.10, 1.41]``."""
    if row.speedup is None:
        return NONE
    interval = row.speedup.interval
    return write.times(row.speedup.ratio) + (f"\n[{interval.low:.2f}, {interval.high:.2f}]" if interval else "")


def _window(name: str, meaning: str) -> Column:
    def cell(row: MethodRow, dense: MethodRow | None) -> str:
        own, reference = row.latency.get(name), dense.latency.get(name) if dense else None
        faster = f"\n{write.times(reference.p50 / own.p50)}" if own and own.p50 and reference else ""
        return write.latency(own) + faster

    return Column(name.replace("_", " "), cell, meaning)


def _of_metric(metric: Metric) -> Column:
    name, text = metric.name, metric.text
    return Column(metric.heading, lambda row, _: text(row.metrics[name]) if name in row.metrics else NONE, metric.help)


SUCCESS = (
    Column("solved", lambda row, _: solved(row), "success rate; with few episodes the true one can lie anywhere in it"),
    Column("vs dense, points", lambda row, _: versus_dense(row), "success rate minus that of dense, pair by pair"),
)
SPEEDUP = Column(
    "net speed-up",
    lambda row, _: net_speedup(row),
    "time of the trials that both solved, dense over the method: observation to action, summed over an episode's calls"
    "; of a world that did not wait, the world's own time",
)


def _chosen(row: MethodRow, _: MethodRow | None) -> str:
    """Write the commonest ratios and their shares, e.g. ``90 %: 81 %``."""
    found = [*row.adaptivity.shares.items()]
    shown = [f"{write.percent(ratio, 0)}: {write.percent(share, 0)}" for ratio, share in found[:3]]
    return "\n".join([*shown, *(["…"] if len(found) > 3 else [])]) or NONE


def _cameras(row: MethodRow, _: MethodRow | None) -> str:
    return "\n".join(f"{camera} {write.percent(share, 0)}" for camera, share in row.adaptivity.cameras.items()) or NONE


def _deviation(row: MethodRow, _: MethodRow | None) -> str:
    value = row.adaptivity.deviation
    return NONE if value is None else f"{value:.3f}"


ADAPTIVITY = (
    Column("ratios chosen", _chosen, "the ratios aimed at and their shares of the calls, the commonest three"),
    Column(
        "deviation in an episode",
        _deviation,
        "standard deviation of the effective ratio within an episode, without full frames, mean over the episodes",
    ),
    Column("reused of each camera", _cameras, "share of the camera's tokens, over all layers, that was not computed"),
)


def _of_pace(heading: str, cell: Callable[[Pace], str], text: str) -> Column:
    return Column(heading, lambda row, _: NONE if row.pace is None else cell(row.pace), text)


PACE = (
    _of_pace("effective Hz", lambda pace: f"{pace.effective_hz:.1f}", "answers that acted, per second of the world"),
    _of_pace(
        "predicted Hz",
        lambda pace: NONE if pace.predicted_hz is None else f"{pace.predicted_hz:.1f}",
        "on the wall clock: the same by this machine's latency table",
    ),
    _of_pace(
        "stale",
        lambda pace: write.percent(pace.stale, 0),
        "share of the world's steps driven by an answer to an observation older than one step",
    ),
    _of_pace(
        "held", lambda pace: write.percent(pace.held, 0), "share of the world's steps without an answer to act on"
    ),
    _of_pace("answer p50 / p95, ms", lambda pace: write.latency(pace.answer_ms), "observation to answer, world's time"),
    _of_pace(
        "task time, s",
        lambda pace: NONE if pace.task_s is None else f"{pace.task_s:.2f}",
        "world's time of the solved episodes, mean",
    ),
)
TIME = tuple(_window(name, meaning) for name, meaning in WINDOWS.items())
MEMORY = Column("peak memory", lambda row, _: write.memory(row.peak_memory_mb), "of the process so far, all methods")


def metric_columns() -> tuple[Column, ...]:
    """Make one column for every metric, and those of what varies."""
    return (*map(_of_metric, METRICS.values()), *ADAPTIVITY)


def metric_notes() -> list[str]:
    """Explain every column of :func:`metric_columns` in a line."""
    return [f"{column.heading}: {column.help}" for column in metric_columns()]


def run_notes(summary: Summary) -> list[str]:
    """Say what net speed-ups rest on, how many actions were executed per call, and whose ratio never varies."""
    pairs = [f"{row.method} {row.speedup.pairs}" for row in summary.methods if row.speedup]
    actions = {row.method: " or ".join(map(str, row.actions_per_call)) for row in summary.methods}
    numbers = set(actions.values())
    same = numbers.pop() if len(numbers) == 1 else ", ".join(map(" ".join, actions.items()))
    return [
        f"net speed-up: {SPEEDUP.help}. Pairs: {', '.join(pairs) or 'none'}. "
        "Latencies of a run with several processes are not worth comparing",
        f"actions per call of the model: {same}",
        *(f"{row.method}: {warning}" for row in summary.methods if (warning := row.adaptivity.warning)),
    ]


def paced(summary: Summary) -> bool:
    """Tell whether the world did not wait in a run."""
    return any(row.pace is not None for row in summary.methods)


def pace_notes(summary: Summary) -> list[str]:
    """Name the clocks of a run, and explain its columns."""
    clocks = sorted({clock for row in summary.methods if row.pace is not None for clock in row.pace.clocks})
    return [f"clock: {'; '.join(clocks)}", *(f"{column.heading}: {column.help}" for column in PACE)]


@dataclass(frozen=True)
class TextTable:
    """A table of texts, as the terminal and the report show it; the ``flagged`` rows stand out, a note says why."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    flagged: Collection[int] = ()

    @classmethod
    def of(
        cls,
        title: str,
        rows: Sequence[tuple[str, MethodRow | None]],
        columns: Sequence[Column],
        notes: Sequence[str],
        flagged: Collection[int] = (),
        dense: MethodRow | None = None,
    ) -> TextTable:
        """Fill a table of methods, rows of label and numbers (``None``: not run), without columns that stay empty."""
        cells = [[NONE if row is None else column.cell(row, dense) for _, row in rows] for column in columns]
        used = [k for k, column in enumerate(cells) if set(column) != {NONE}]
        labels = [label for label, _ in rows]
        headings = ("method", *(columns[k].heading for k in used))
        return cls(title, headings, tuple(zip(labels, *(cells[k] for k in used), strict=True)), tuple(notes), flagged)

    @property
    def flagged_rows(self) -> list[tuple[bool, tuple[str, ...]]]:
        """Pair every row with whether it is flagged; if so, :data:`FLAG` stands behind its label."""
        marked = [(index in self.flagged, row) for index, row in enumerate(self.rows)]
        return [(flag, (f"{row[0]} {FLAG}", *row[1:]) if flag else row) for flag, row in marked]

    def to_terminal(self) -> Table:
        """Make the terminal's table."""
        shown = Table(box=box.SIMPLE, title=self.title, title_justify="left", caption="\n".join(self.notes))
        shown.caption_justify = "left"
        for index, heading in enumerate(self.headings):
            word = max(map(len, heading.split()))
            shown.add_column(heading, justify="right" if index else "left", no_wrap=index == 0, min_width=word)
        for flag, cells in self.flagged_rows:
            shown.add_row(*cells, style="bold" if flag else "")
        return shown


def method_tables(summary: Summary, notes: Sequence[str] = (), time_notes: Sequence[str] = ()) -> list[TextTable]:
    """Make the tables of a run: what was solved, what every call did, and how long it took.

    Args:
        summary: The run in numbers.
        notes: What holds for the whole run, e.g. altered rendering; below the first table.
        time_notes: What holds for its times.
    """
    rows, dense = [(row.method, row) for row in summary.methods], summary.row(DENSE)
    pace = [TextTable.of("A world that does not wait", rows, PACE, pace_notes(summary))] if paced(summary) else []
    return [
        TextTable.of("Success", rows, (*SUCCESS, SPEEDUP), [SUCCESS_NOTE, *run_notes(summary), *notes], dense=dense),
        *pace,
        TextTable.of("Per call of the model", rows, metric_columns(), metric_notes(), dense=dense),
        TextTable.of("Time", rows, (*TIME, MEMORY), [TIME_NOTE, *time_notes], dense=dense),
    ]
