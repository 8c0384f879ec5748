"""The layout of the paper's LIBERO tables, filled with a model's own figures; the terminal and the report show them.

A verdict is a flagged row: who solved most, who is fastest, which points of the curve no other point dominates. It goes
by the numbers, chance or not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from lac_vla.evaluation.reproduce import DENSE as DENSE_ROW
from lac_vla.evaluation.reproduce import LAC, ReproduceConfig, Reproduction, Row
from lac_vla.evaluation.runner import describe_model
from lac_vla.evaluation.stress import describe_stress
from lac_vla.results import format as write
from lac_vla.results import table
from lac_vla.results.clocks import clock_rows, clock_table
from lac_vla.results.format import NONE
from lac_vla.results.records import WHOLE
from lac_vla.results.summary import DENSE, MethodRow, Summary, summarize
from lac_vla.results.table import Column, TextTable
from lac_vla.sims.libero.suites import N_TASKS

Rows = list[tuple[str, MethodRow | None]]
"""Label, and numbers if the method was run."""


def _stage(name: str) -> Column:
    return Column(name, lambda row, _: write.milliseconds(row.latency[name].p50) if name in row.latency else NONE)


OVERHEADS = (*map(_stage, ("flow", "policy", "bookkeeping")), table.MEMORY)
OVERHEADS_NOTE = "Flow, policy, bookkeeping: p50 in ms, part of observation to action"


def paper_tables(done: Reproduction) -> list[TextTable]:
    """Fill the tables that have rows. Each is narrow enough for a terminal: a table of the paper is three of ours."""
    suites = {name: [e for e in done.episodes if e.suite == name] for name in done.config.suites}
    by_suite = {name: summarize(episodes) for name, episodes in suites.items() if episodes}
    everything = summarize(done.episodes)
    success = [_solved_in(name, by_suite.get(name)) for name in suites]
    if len(suites) > 1:
        success.append(Column("average", lambda row, _: _average(row.method, by_suite, len(suites))))
    success += [*table.SUCCESS[1:], table.SPEEDUP]
    wanted = _wanted(done.config, done.config.trials)
    tables = [_setting(done, everything)]
    for name, chosen in (("Table 1", done.table_1), ("Tables 2 and 5, LAC without its parts", done.ablations)):
        rows, incomplete = _labelled(chosen, everything, wanted)
        if not rows:
            continue
        most, fastest = _best(rows, lambda row: row.rate), []
        if done.workers == 1:
            fastest = _best(rows, lambda row: 1 / row.latency[WHOLE].p50 if WHOLE in row.latency else 0)
        success_notes = [table.SUCCESS_NOTE, *table.run_notes(everything), *incomplete, f"{table.FLAG} solved most"]
        time_notes = [table.TIME_NOTE, *([f"{table.FLAG} fastest from observation to action"] if fastest else [])]
        calls, meanings = table.metric_columns(), table.metric_notes()
        dense = everything.row(DENSE)
        tables += [
            TextTable.of(f"{name}: success", rows, success, success_notes, most, dense),
            TextTable.of(f"{name}: per call of the model", rows, calls, meanings, dense=dense),
            TextTable.of(f"{name}: time", rows, table.TIME, time_notes, fastest, dense),
        ]
    rows, _ = _labelled(done.rows, everything, wanted)
    tables.append(TextTable.of("What the paper leaves out: overheads", rows, OVERHEADS, [OVERHEADS_NOTE]))
    if done.seeds:
        seeds = (done.config.model_options.seed, *done.config.more_seeds)
        pooled = summarize(done.seeds)
        rows, incomplete = _labelled((DENSE_ROW, LAC), pooled, wanted * len(seeds))
        title = f"Dense and LAC with seeds {', '.join(map(str, seeds))}"
        notes = [table.SUCCESS_NOTE, *table.run_notes(pooled), *incomplete]
        tables.append(TextTable.of(title, rows, (*table.SUCCESS, table.SPEEDUP), notes))
    if done.curve:
        tables.append(_curve(done))
    if done.stress_rows:
        tables.append(_stress(done))
    return [*tables, *([_clocks(done)] if done.clock_rows else [])]


def _setting(done: Reproduction, everything: Summary) -> TextTable:
    """Say whose figures these are; what keeps them from being the paper's or the benchmark's is flagged."""
    model, config = describe_model(done.config.model), done.config
    size = f", {model['parameters'] / 1e6:.1f} M parameters" if model.get("parameters") else ""
    incomplete = sum(
        _trials(everything.row(row.method)) < _wanted(config, done.trials(row))
        for row in (*done.rows, *done.extra_rows)
    )
    rendering = "reflections and multisampling are off: not the benchmark's pixels"
    rows = [
        ("model", f"{model['name']}{size}: not to be compared with the paper's figures, OpenVLA-7B's", True),
        ("rendering", f"fast, {rendering}" if config.rendering == "fast" else "official", config.rendering == "fast"),
        ("processes", f"{done.workers}", done.workers > 1),
        ("incomplete", f"{incomplete} rows, marked *; the same command goes on with them", incomplete > 0),
    ]
    flagged = [index for index, (_, _, flag) in enumerate(rows) if flag]
    note = f"{table.FLAG} to be kept in mind with every number below"
    return TextTable("Setting", ("setting", "value"), tuple(row[:2] for row in rows), (note,), flagged)


def _labelled(rows: Sequence[Row], summary: Summary, wanted: int) -> tuple[Rows, list[str]]:
    """Label the rows; incomplete ones are marked, and listed in a note."""
    found = [(row.label, summary.row(row.method)) for row in rows]
    missing = [f"{label}: {_trials(row)} of {wanted} trials" for label, row in found if _trials(row) < wanted]
    labelled: Rows = [(label if _trials(row) >= wanted else f"{label} *", row) for label, row in found]
    return labelled, [f"* incomplete: {'; '.join(missing)}"] if missing else []


def _best(rows: Rows, value: Callable[[MethodRow], float]) -> list[int]:
    """Find the rows with the largest value above 0, if there is more than one row to compare."""
    values = {index: value(row) for index, (_, row) in enumerate(rows) if row is not None}
    return [index for index, own in values.items() if own == max(values.values()) > 0] if len(values) > 1 else []


def _curve(done: Reproduction) -> TextTable:
    """List the points of the trade-off curve, each with the best point that solves and leaves out no less, if any."""
    summary = summarize(done.curve_episodes)
    found = [(row.label, summary.row(row.method)) for row in (*done.rows, *done.curve)]
    points = [(label, row.rate, row.ratio, row) for label, row in found if row is not None and row.ratio is not None]
    cells, flagged = [], []
    for index, (label, rate, ratio, row) in enumerate(points):
        others = [p for p in points if p[1] >= rate and p[2] >= ratio and p[1:3] != (rate, ratio)]
        dominated_by = max(others, key=lambda p: p[1:3])[0] if others else NONE
        if not others:
            flagged.append(index)
        cells.append((label, table.solved(row), write.percent(ratio), dominated_by))
    notes = [f"{table.FLAG} no other point solves and leaves out as much, and more of one", *table.run_notes(summary)]
    headings = ("method", "solved", "ratio, effective", "dominated by")
    return TextTable("Trade-off curve", headings, tuple(cells), tuple(notes), flagged)


def _stress(done: Reproduction) -> TextTable:
    """Count the episodes solved under every stress, beside those of the same initial states without.

    Those under all stresses are counted, not tested: an initial state is among them once for every stress.
    """
    config, methods = done.config, {row.method for row in done.stress_rows}
    columns = {"undisturbed": [e for e in done.undisturbed if e.method in methods]}
    columns |= {name: [e for e in done.stressed if e.stress == name] for name in config.stresses}
    columns |= {"all stresses": done.stressed}
    summaries = {name: summarize(episodes) for name, episodes in columns.items() if episodes}

    def found(name: str, row: Row) -> MethodRow | None:
        return summaries[name].row(row.method) if name in summaries else None

    def cell(row: MethodRow | None) -> str:
        if row is None:
            return NONE
        return f"{row.successes}/{row.trials}" + (f"\n{write.percent(row.ratio, 0)}" if row.ratio else "")

    cells = []
    for row in done.stress_rows:
        everywhere = found("all stresses", row)
        speedup = table.net_speedup(everywhere) if everywhere else NONE
        cells.append((row.label, *(cell(found(name, row)) for name in columns), speedup))
    wanted = _wanted(config, config.under_stress)
    single = [found(name, row) for name in ("undisturbed", *config.stresses) for row in done.stress_rows]
    short = sum(_trials(row) < wanted for row in single)
    notes = [
        "Solved, and below it the share of the visual tokens left out. All stresses: the same states under each",
        *(table.run_notes(summaries["all stresses"]) if done.stressed else []),
        *map(describe_stress, config.stresses),
        *([f"incomplete: {short} of the cells have fewer than {wanted} trials"] if short else []),
    ]
    headings = ("method", *columns, table.SPEEDUP.heading)
    return TextTable("Under stress, on the same initial states", headings, tuple(cells), tuple(notes))


def _clocks(done: Reproduction) -> TextTable:
    """All clocks in all modes, beside the world that waits."""
    found = clock_table(clock_rows(done.all_clocks))
    return replace(found, notes=(*found.notes, *(world.note for world in done.config.worlds)))


def _trials(row: MethodRow | None) -> int:
    return row.trials if row else 0


def _wanted(config: ReproduceConfig, trials: int) -> int:
    """Count the trials that a row should have over all suites, with so many initial states per task."""
    return trials * (len(config.tasks) or N_TASKS) * len(config.suites)


def _solved_in(suite: str, summary: Summary | None) -> Column:
    def cell(row: MethodRow, _: MethodRow | None) -> str:
        found = summary.row(row.method) if summary else None
        return table.solved(found) if found else NONE

    return Column(f"{suite.removeprefix('libero_')} solved", cell)


def _average(method: str, by_suite: Mapping[str, Summary], suites: int) -> str:
    """Average the suites' success rates, if all of them were run."""
    rates = [row.rate for summary in by_suite.values() if (row := summary.row(method))]
    return write.percent(sum(rates) / suites) if len(rates) == suites else NONE
