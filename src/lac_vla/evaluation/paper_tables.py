"""The layout of the paper's LIBERO tables, filled with a model's own figures; the terminal and the report show them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from lac_vla.evaluation.reproduce import DENSE as DENSE_ROW
from lac_vla.evaluation.reproduce import LAC, ReproduceConfig, Reproduction, Row
from lac_vla.evaluation.runner import describe_model
from lac_vla.evaluation.stress import describe_stress
from lac_vla.policies import PolicySpec
from lac_vla.results import table as write
from lac_vla.results.records import EpisodeRecord
from lac_vla.results.stats import mcnemar
from lac_vla.results.summary import DENSE, MethodRow, Summary, summarize
from lac_vla.sims.libero import SUITES

PREFILL, CALL, WHOLE = "decoder_prefill", "model_call", "observation_to_action"
SMALL = 1e9
"""Parameters below which a model is called small."""

LATENCY = (
    "Latency: p50 / p95 over all frames; faster: dense's p50 over it. "
    "FLOPs = 2 x MACs, per frame; flow by DIS has no matrix products and counts 0"
)
SHARED = "Several processes shared the machine: not worth comparing, see `lac bench`"
STAGES = (
    "Flow, policy, bookkeeping: p50 in ms, part of observation to action. "
    "Peak memory: of the process so far, which all methods share"
)


Column: TypeAlias = tuple[str, Callable[[MethodRow, MethodRow | None], str]]
"""A heading, and the cell of a method, next to dense."""


def _window(name: str) -> Column:
    return f"{name.replace('_', ' ')}, ms", lambda row, _: write.latency(row.latency.get(name))


def _times_faster(name: str, heading: str = "faster") -> Column:
    def cell(row: MethodRow, dense: MethodRow | None) -> str:
        own, reference = row.latency.get(name), dense.latency.get(name) if dense else None
        return write.NONE if own is None or reference is None else f"{reference.p50 / own.p50:.2f} ×"

    return heading, cell


def _stage(name: str) -> Column:
    def cell(row: MethodRow, _: MethodRow | None) -> str:
        spent = row.latency.get(name)
        return write.NONE if spent is None else write.milliseconds(spent.p50)

    return name, cell


PAIRED: tuple[Column, ...] = (
    ("vs dense, points", lambda row, _: write.paired(row.paired).replace(" [", "\n[")),
    ("ratio nom. / eff.", lambda row, _: write.ratio(row)),
)
WORK: tuple[Column, ...] = (
    ("MACs", lambda row, _: write.count(row.macs)),
    ("FLOPs", lambda row, _: write.count(row.flops)),
    _window(PREFILL),
    _times_faster(PREFILL),
)
PARTS: tuple[Column, ...] = (_window(PREFILL), _times_faster(PREFILL), _window(WHOLE), _times_faster(WHOLE))
WINDOWS: tuple[Column, ...] = (_window(PREFILL), _window(CALL), _window(WHOLE), _times_faster(WHOLE))
OVERHEADS: tuple[Column, ...] = (
    *(_stage(name) for name in ("flow", "policy", "bookkeeping")),
    ("oldest token", lambda row, _: write.NONE if row.oldest_age is None else str(row.oldest_age)),
    ("peak memory", lambda row, _: write.memory(row.peak_memory_mb)),
)


def paper_tables(done: Reproduction) -> list[write.TextTable]:
    """Fill the tables that have rows. Each is narrow enough for a terminal: a table of the paper is two of ours."""
    suites = {name: [e for e in done.episodes if e.suite == name] for name in done.config.suites}
    by_suite = {name: summarize(episodes) for name, episodes in suites.items() if episodes}
    everything = summarize(done.episodes)
    success = [(f"{name.removeprefix('libero_')} solved", _success(by_suite.get(name))) for name in suites]
    if len(suites) > 1:
        success.append(("average", lambda row, _: _average(row.method, by_suite, len(suites))))
    timing = f"{LATENCY}. {SHARED}" if done.workers > 1 else LATENCY
    wanted, seeds = _wanted(done.config, done.config.trials), (done.config.seed, *done.config.more_seeds)
    layouts: list[tuple[str, Sequence[Row], Sequence[Column], str]] = [
        ("Table 1: success", done.table_1, (*success, *PAIRED), write.CAPTION),
        ("Table 1: cost", done.table_1, WORK, timing),
        ("Tables 2 and 5, LAC without its parts: success", done.ablations, (*success, *PAIRED), write.CAPTION),
        ("Tables 2 and 5, LAC without its parts: latency", done.ablations, PARTS, timing),
        ("What the paper leaves out: three windows", done.rows, WINDOWS, timing),
        ("What the paper leaves out: overheads", done.rows, OVERHEADS, STAGES),
    ]
    tables = [_fill(title, rows, columns, wanted, everything, note) for title, rows, columns, note in layouts if rows]
    if done.seeds:
        pooled = summarize(done.seeds)
        columns = (("solved", lambda row, _: write.success(row)), *PAIRED)
        title = f"Dense and LAC with seeds {', '.join(map(str, seeds))}"
        tables.insert(1, _fill(title, (DENSE_ROW, LAC), columns, wanted * len(seeds), pooled, write.CAPTION))
    return [*tables, *([_stress_table(done)] if done.stress_rows else [])]


def _fill(
    title: str, rows: Sequence[Row], columns: Sequence[Column], wanted: int, summary: Summary, note: str
) -> write.TextTable:
    dense, cells, incomplete = summary.row(DENSE), [], []
    for row in rows:
        found = summary.row(row.method)
        trials = found.trials if found else 0
        mark = " *" if trials < wanted else ""
        if mark:
            incomplete.append(f"{row.label}: {trials} of {wanted} trials")
        cells.append((row.label + mark, *(cell(found, dense) if found else write.NONE for _, cell in columns)))
    notes = [note, *([f"* incomplete: {'; '.join(incomplete)}"] if incomplete else [])]
    return write.TextTable(title, ("method", *(heading for heading, _ in columns)), tuple(cells), tuple(notes))


def _stress_table(done: Reproduction) -> write.TextTable:
    """Episodes solved under every stress, beside those of the same initial states without.

    Those under all stresses are counted, not tested: an initial state is among them once for every stress.
    """
    config, methods = done.config, {row.method for row in done.stress_rows}
    columns = {"calm": [e for e in done.calm if e.method in methods]}
    columns |= {name: [e for e in done.stressed if e.stress == name] for name in config.stresses}
    columns |= {"all stresses": done.stressed}
    summaries = {name: summarize(episodes) for name, episodes in columns.items() if episodes}

    def found(name: str, row: Row) -> MethodRow | None:
        return summaries[name].row(row.method) if name in summaries else None

    def cell(of: MethodRow | None) -> str:
        if of is None:
            return write.NONE
        reused = f"\n{write.percent(of.ratio_effective, 0)}" if of.ratio_effective else ""
        return f"{of.successes}/{of.trials}{reused}"

    cells = [(row.label, *(cell(found(name, row)) for name in columns)) for row in done.stress_rows]
    wanted = _wanted(config, config.under_stress)
    single = [found(name, row) for name in ("calm", *config.stresses) for row in done.stress_rows]
    short = sum(of is None or of.trials < wanted for of in single)
    notes = [
        "Solved, and below it the share of the visual tokens left out. All stresses: the same states under each",
        *map(describe_stress, config.stresses),
    ]
    if short:
        notes.append(f"incomplete: {short} of the cells have fewer than {wanted} trials")
    return write.TextTable("Under stress, on the same initial states", ("method", *columns), tuple(cells), tuple(notes))


def _wanted(config: ReproduceConfig, trials: int) -> int:
    """Trials that a row should have over all suites, with so many initial states per task."""
    return sum(trials * (len(config.tasks) or SUITES[suite].n_tasks) for suite in config.suites)


def _success(summary: Summary | None) -> Callable[[MethodRow, MethodRow | None], str]:
    def cell(row: MethodRow, _: MethodRow | None) -> str:
        found = summary.row(row.method) if summary else None
        return write.success(found).replace(" [", "\n[").replace("  ", " ") if found else write.NONE

    return cell


def _average(method: str, by_suite: Mapping[str, Summary], suites: int) -> str:
    """Mean of the suites' success rates, if all of them were run."""
    rates = [row.rate for summary in by_suite.values() if (row := summary.row(method))]
    return write.percent(sum(rates) / suites) if len(rates) == suites else write.NONE


def statements(done: Reproduction) -> list[str]:
    """What must be said before the numbers: who leads, whose figures these are, what was altered, what is missing."""
    config = done.config
    about = describe_model(config.model)
    size = about.get("parameters")
    small = f"our small model '{about['name']}' ({size / 1e6:.1f} M parameters)" if size and size < SMALL else None
    said = verdict(done)
    if done.curve:
        said.append(curve_verdict(done))
    if done.stressed:
        said.append(stress_verdict(done))
    said.append(
        f"These are figures of {small or about['name']}, never to be set beside the paper's, which are OpenVLA-7B's."
    )
    if config.rendering == "fast":
        said.append("Altered rendering: reflections and multisampling are off. These are not the benchmark's pixels.")
    summary = summarize(done.episodes)
    missing = sum(
        (found.trials if (found := summary.row(row.method)) else 0) < _wanted(config, done.trials(row))
        for row in (*done.rows, *done.further)
    )
    if done.seeds and (pair := summarize(done.seeds).row(LAC.method)) and (paired := pair.paired):
        told = f"{paired.both + paired.only_method} solved by LAC, {paired.both + paired.only_dense} by dense"
        said.insert(1, f"Over {paired.pairs} pairs with {1 + len(config.more_seeds)} seeds: {told}.")
    if missing:
        said.append(f"Incomplete rows, marked *: {missing}. The same command goes on with them.")
    return said


def _why(best: MethodRow, lac: MethodRow, episodes: Sequence[EpisodeRecord]) -> str:
    """Why another method solved more than LAC, as far as numbers tell."""
    solved = {name: {e.trial: e.success for e in episodes if e.method == name} for name in (best.method, lac.method)}
    pairs = [
        (solved[best.method][trial], solved[lac.method][trial])
        for trial in solved[lac.method].keys() & solved[best.method]
    ]
    only_best, only_lac = pairs.count((True, False)), pairs.count((False, True))
    said = f" On {len(pairs)} shared trials it solved {only_best} that LAC lost, and lost {only_lac} that LAC solved"
    said += f" (p {write.p_value(mcnemar(only_best, only_lac))})."
    if best.ratio_effective is None or lac.ratio_effective is None:
        return said
    left_out = (
        f"{write.percent(best.ratio_effective, 0)} of the visual tokens, LAC {write.percent(lac.ratio_effective, 0)}"
    )
    if best.ratio_effective < lac.ratio_effective:
        return f"{said} It leaves out {left_out}: what is computed anew cannot be out of date."
    return f"{said} It leaves out {left_out}, so its choice was the better one here: the gallery shows what LAC lost."


def curve_verdict(done: Reproduction) -> str:
    """Whether LAC leads the trade-off curve: whether for every other point it has one no worse in both respects.

    By the numbers, chance or not. LAC without one of its parts counts neither as LAC nor as another method.
    """
    summary = summarize(done.points)
    ours, ahead, others = [], [], 0
    found = [(row, summary.row(row.method)) for row in (*done.rows, *done.curve)]
    points = [(row, point) for row, point in found if point is not None and point.ratio_effective is not None]
    for row, point in points:
        spec = PolicySpec.parse(row.spec)
        if spec.name == LAC.method and spec.options.keys() <= {"ratio"}:
            ours.append(point)
    for row, point in points:
        if row.method == DENSE or PolicySpec.parse(row.spec).name == LAC.method:
            continue
        others += 1
        if not any(_no_worse(own, point) for own in ours):
            ahead.append((row.label, point))
    if not ours or not others:
        return "LAC and another method are needed to say who leads the curve."
    compared = f"{len(ours)} points of LAC against {others} of others"
    compared += ", which were not all run at further settings" if done.config.curve_policies else ""
    if not ahead:
        claim = "for every other point it has one that solves and leaves out no less"
        return f"LAC leads the trade-off curve, {compared}: {claim}."
    named = [f"{label} ({p.successes}/{p.trials} at {write.percent(p.ratio_effective, 0)})" for label, p in ahead]
    said = f"LAC does not lead all of the trade-off curve, {compared}. Ahead of all of LAC's: "
    label, best = max(ahead, key=lambda point: point[1].rate)
    nearest = max(ours, key=lambda own: own.rate)
    return f"{said}{', '.join(named)}. {label} against LAC ({nearest.method}):{_why(best, nearest, done.points)}"


def _no_worse(own: MethodRow, other: MethodRow) -> bool:
    """Whether a point solves no less than another and leaves out no less."""
    return own.rate >= other.rate and (own.ratio_effective or 0.0) >= (other.ratio_effective or 0.0)


def stress_verdict(done: Reproduction) -> str:
    """How much was solved under the stresses, one at a time, and of the same initial states undisturbed."""
    calm, stressed = summarize(done.calm), summarize(done.stressed)
    told = []
    for row in done.stress_rows:
        if (under := stressed.row(row.method)) and (before := calm.row(row.method)):
            undisturbed = f"{before.successes}/{before.trials} undisturbed"
            told.append(f"{row.label} {under.successes}/{under.trials} ({undisturbed})")
    return f"Solved under stress, {len(done.config.stresses)} kinds, one at a time: {', '.join(told)}."


def verdict(done: Reproduction) -> list[str]:
    """Whether LAC leads among the rows of Table 1, in success and in latency; by the numbers, chance or not."""
    summary = summarize(done.episodes)
    lac = summary.row(LAC.method)
    others = [(row.label, found) for row in done.table_1 if (found := summary.row(row.method)) and found is not lac]
    if lac is None or not others:
        return ["LAC and another method are needed to say who leads."]
    label, best = max(others, key=lambda other: other[1].rate)
    own = f"LAC {lac.successes}/{lac.trials}"
    if best.rate >= lac.rate:
        count = "as many" if best.rate == lac.rate else f"{best.successes}/{best.trials}, {own}"
        said = [f"LAC does not lead in success: {label} solved {count}.{_why(best, lac, done.episodes)}"]
    else:
        said = [f"LAC leads in success: {own}, next {label} {best.successes}/{best.trials}."]
    timed = [(label, row, row.latency[WHOLE].p50) for label, row in others if WHOLE in row.latency]
    if done.workers > 1 or not timed or WHOLE not in lac.latency:
        return [*said, "Who leads in latency is not said: several processes shared the machine, or nothing was timed."]
    label, row, best_ms = min(timed, key=lambda other: other[2])
    own_ms = lac.latency[WHOLE].p50
    names = f"{label} takes {write.milliseconds(best_ms)} ms (solving {row.successes}/{row.trials})"
    lead = "leads" if own_ms < best_ms else "does not lead"
    return [
        *said,
        f"LAC {lead} in latency from observation to action: {write.milliseconds(own_ms)} ms at the median; {names}.",
    ]
