"""How the numbers of a summary are written, and the terminal's table of them."""

from __future__ import annotations

from dataclasses import dataclass

from rich import box
from rich.table import Table

from lac_vla.results.stats import Interval, Percentiles
from lac_vla.results.summary import WINDOWS, MethodRow, Paired, Summary

NONE = "-"
"""Written where a number does not exist."""

CAPTION = "95 % intervals: Wilson; of a difference, paired bootstrap by task. p: McNemar, exact, against dense"


def percent(value: float | None, digits: int = 1) -> str:
    """A share, e.g. 0.25 → ``25.0 %``."""
    return NONE if value is None else f"{100 * value:.{digits}f} %"


def points(value: float) -> str:
    """A difference of shares in percentage points, with its sign, e.g. -0.02 → ``−2.0``."""
    return "±0.0" if round(100 * value, 1) == 0 else f"{100 * value:+.1f}".replace("-", "\N{MINUS SIGN}")


def p_value(value: float) -> str:
    """A p-value to three digits, e.g. ``0.125``; very small ones as ``<0.001``."""
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def count(value: float | None) -> str:
    """A number of operations with its prefix, e.g. 2.5e9 → ``2.50 G``."""
    if value is None:
        return NONE
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.2f} {prefix}"
    return f"{value:.0f}"


def milliseconds(value: float) -> str:
    """Milliseconds with three digits, e.g. ``8.25``, ``82.5``, ``825``."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def latency(value: Percentiles | None) -> str:
    """Median and 95th percentile, milliseconds, e.g. ``82.5 / 101``."""
    return NONE if value is None else f"{milliseconds(value.p50)} / {milliseconds(value.p95)}"


def decoding(summary: Summary) -> str:
    """Mean passes per action by method, and drafted tokens that stood, e.g. ``dense 2.1 (1.2 of the draft stood)``."""
    texts = []
    for row in summary.methods:
        if row.passes is not None:
            stood = "" if row.accepted is None else f" ({row.accepted:.1f} of the draft stood)"
            texts.append(f"{row.method} {row.passes:.1f}{stood}")
    return ", ".join(texts)


def memory(value: float | None) -> str:
    """Megabytes, e.g. ``812 MB``."""
    return NONE if value is None else f"{value:.0f} MB"


def range_of_points(value: Interval | None) -> str:
    """An interval of a difference in percentage points, e.g. ``[−8.0, +4.0]``."""
    return NONE if value is None else f"[{points(value.low)}, {points(value.high)}]"


def paired(value: Paired | None) -> str:
    """Difference to dense in percentage points, interval and p-value, e.g. ``−2.0 [−8.0, +4.0] (p 0.125)``."""
    if value is None:
        return NONE
    parts = [points(value.difference), range_of_points(value.interval), f"(p {p_value(value.p)})"]
    return " ".join(part for part in parts if part != NONE)


def success(row: MethodRow) -> str:
    """Successes, trials, rate and interval, e.g. ``45/50  90.0 % [78.6, 95.7]``."""
    low, high = row.interval
    return f"{row.successes}/{row.trials}  {percent(row.rate)} [{100 * low:.1f}, {100 * high:.1f}]"


def ratio(row: MethodRow) -> str:
    """Cache ratio, nominal and effective."""
    return f"{percent(row.ratio_nominal, 0)} / {percent(row.ratio_effective)}"


def terminal_tables(summary: Summary) -> tuple[Table, Table]:
    """The run for the terminal: what was solved, and what it cost; one row per method in each."""
    solved = Table(box=box.SIMPLE, caption=CAPTION)
    lines = ["latency: p50 / p95 in ms over all frames; FLOPs = 2 x MACs, per frame; DIS flow is not counted in them"]
    lines += [f"decoding passes behind the prefill: {text}" for text in filter(None, [decoding(summary)])]
    cost = Table(box=box.SIMPLE, caption="\n".join(lines))
    for table, headings in (
        (solved, ("success", "vs dense, points", "ratio nom. / eff.")),
        (cost, ("MACs", "FLOPs", *(window.replace("_", " ") for window in WINDOWS), "peak memory")),
    ):
        table.add_column("method", no_wrap=True)
        for heading in headings:
            table.add_column(heading, justify="right")
    for row in summary.methods:
        solved.add_row(row.method, success(row), paired(row.paired), ratio(row))
        windows = [latency(row.latency.get(window)) for window in WINDOWS]
        cost.add_row(row.method, count(row.macs), count(row.flops), *windows, memory(row.peak_memory_mb))
    return solved, cost


@dataclass(frozen=True)
class TextTable:
    """A table of texts, as the terminal and the report show it.

    Attributes:
        title: What it is.
        headings: Of its columns.
        rows: Cells, row by row.
        notes: Below it.
    """

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def to_terminal(self) -> Table:
        """For the terminal."""
        shown = Table(box=box.SIMPLE, title=self.title, title_justify="left", caption="\n".join(self.notes))
        shown.caption_justify = "left"
        for index, heading in enumerate(self.headings):
            word = max(map(len, heading.split()))
            shown.add_column(heading, justify="right" if index else "left", no_wrap=index == 0, min_width=word)
        for cells in self.rows:
            shown.add_row(*cells)
        return shown
