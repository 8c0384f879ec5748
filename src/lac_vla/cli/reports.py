"""``lac report``, and the reports that other verbs end with. Without postponed annotations: tyro reads them."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from lac_vla.cli.marks import FLAT
from lac_vla.cli.output import console, show
from lac_vla.errors import InputError
from lac_vla.evaluation.film import FilmConfig

if TYPE_CHECKING:
    from lac_vla.evaluation.reproduce import Reproduction


def report(runs: tyro.conf.Positional[tuple[Path, ...]], out: Path | None = None) -> None:
    """Show a run's table, and write its report: one self-contained HTML page.

    Args:
        runs: Folder of a run of `lac train`; or of one or several runs of `lac eval` or `lac demo`, whose methods
            then stand in one table, unless they have episodes in common or other stresses. Runs of several clocks
            (`lac eval --clock`) are compared with each other, and with one of a world that waits.
        out: The page; by default `report.html` in the first run's folder.
    """
    if not runs:
        raise InputError("give the folder of a run")
    page = out or runs[0] / "report.html"
    if all((run / "episodes.jsonl").exists() for run in runs):
        report_evaluation(runs, page)
    elif len(runs) == 1 and (runs[0] / "metrics.jsonl").exists():
        report_training(runs[0], page)
    else:
        raise InputError(
            f"{', '.join(map(str, runs))}: neither episodes.jsonl (of 'lac eval' or 'lac demo') in each nor "
            "metrics.jsonl (of 'lac train') in one: give folders of runs"
        )
    console.print(f"report: {page}")


def film(run: tyro.conf.Positional[Path], config: Annotated[FilmConfig, FLAT]) -> None:
    """The film of a run of `lac eval --clock`: methods side by side in the same world time, as mp4 and as GIF.

    Args:
        run: Folder of the run.
        config: What to show.
    """
    from lac_vla.evaluation.film import make_film

    for episode in make_film(run, config):
        result = "solved" if episode.success else "not solved"
        console.print(f"{episode.method}: {result}, {episode.steps} control steps, {episode.clock}")
    console.print(f"film: {config.out}" + ("" if config.gif is None else f", {config.gif}"))


def report_evaluation(runs: tuple[Path, ...], out: Path) -> Path:
    """Show the tables of runs of `lac eval`, and write their page."""
    from lac_vla.report import build_report
    from lac_vla.report.clocks import clock_charts
    from lac_vla.report.runs import Run
    from lac_vla.results.clocks import clock_rows, clock_table
    from lac_vla.results.summary import summarize
    from lac_vla.results.table import method_tables

    read = [Run.read(run) for run in runs]
    episodes = [episode for run in read for episode in run.episodes]
    if len({episode.clock for episode in episodes}) > 1:
        rows = clock_rows(episodes)
        clocks, over = clock_table(rows, _once(note for run in read for note in run.notes)), clock_charts(rows)
        show(clocks.to_terminal())
        return build_report(runs, out, tables=[clocks], clocks=over)
    apart = len({(episode.method, episode.trial) for episode in episodes}) == len(episodes)
    together = apart and len({episode.stress for episode in episodes}) == 1
    for group in [read] if together else [[run] for run in read]:  # else they differ in more than their methods
        if not together:
            console.print(str(group[0].folder), style="bold")
        summary = summarize(episode for run in group for episode in run.episodes)
        notes, busy = _once(note for run in group for note in run.notes), _once(run.busy for run in group if run.busy)
        for table in method_tables(summary, notes, busy):
            show(table.to_terminal())
    return build_report(runs, out)


def _once(texts: Iterable[str]) -> list[str]:
    """List texts without those that came before."""
    return [*dict.fromkeys(texts)]


def report_reproduction(done: "Reproduction") -> None:
    """Show the tables of `lac reproduce`, and write their page."""
    from lac_vla.evaluation.paper_tables import paper_tables
    from lac_vla.policies import paths_by_name
    from lac_vla.report import build_report, tradeoff
    from lac_vla.report.clocks import clock_charts
    from lac_vla.results.clocks import clock_rows
    from lac_vla.results.summary import summarize

    tables = paper_tables(done)
    for table in tables:
        show(table.to_terminal())
    specs = {row.method: paths_by_name(row.spec) for row in (*done.rows, *done.curve)}
    curve_episodes = [e for e in done.curve_episodes if e.method in specs]
    curve = tradeoff(summarize(curve_episodes), curve_episodes, specs) if done.curve else None
    config = done.config
    runs = [config.folder(suite, seed=seed) for suite in config.suites for seed in (None, *config.more_seeds)]
    title = "The paper's LIBERO tables, of another model"
    clocks = clock_charts(clock_rows(done.all_clocks)) if done.clock_rows else None
    page = build_report(runs, config.out / "report.html", title=title, tables=tables, curve=curve, clocks=clocks)
    console.print(f"report: {page}")


def report_training(run: Path, out: Path) -> Path:
    """Show the table of a run of `lac train`, and write its page."""
    from lac_vla.report import build_training_report
    from lac_vla.report.training import training_table
    from lac_vla.report.training_run import TrainingRun

    found = TrainingRun.read(run)
    show(training_table(found).to_terminal())
    if found.regret is not None:
        show(found.regret.table().to_terminal())
    return build_training_report(run, out)
