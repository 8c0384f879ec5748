"""The ``lac`` command: thin verbs over the library, one function each.

Without postponed annotations: tyro reads the verbs' types, and those are imported where the verbs are made.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import field, make_dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.text import Text

from lac_vla.errors import InputError, LacError, MissingExtraError

if TYPE_CHECKING:
    from lac_vla.evaluation.reproduce import Reproduction

console = Console(markup=False, highlight=False, emoji=False)
"""Prints texts as they are: paths, names and errors come from outside, and may hold square brackets."""
FLAT: Any = tyro.conf.arg(name="")
"""Marks a config dataclass whose fields are options of the command itself."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. Errors that the user can act on are shown without a traceback.

    Args:
        arguments: Words behind ``lac``; by default those of the process.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # what a terminal or log in plain ASCII cannot show becomes "?"
            stream.reconfigure(errors="replace")
    words = [_expanded(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    try:
        _refuse_old_names(words)
        tyro.extras.subcommand_cli_from_dict(_verbs(_suite(words)), prog="lac", description=_DESCRIPTION, args=words)
    except LacError as error:
        console.print(Text.assemble(("error:", "bold red"), f" {error}"), soft_wrap=True)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on from here")
        raise SystemExit(130) from None


_DESCRIPTION = """Visual token caching for Vision-Language-Action policies.

Start with `lac demo`: the bundled VLA solves real LIBERO tasks on a CPU, dense and with reuse.
`lac VERB --help` explains each verb."""


RENAMED = {
    "simpler": "eval --suite simpler-vm (with --check: lac check)",
    "--vla": "--model",
    "--levers": "--options",
    "--tower-reuse": "--vision-kv-reuse",
    "--setup": "--suite",
    "--limit": "--init-states",
}
"""Verbs and options by their names of before → of now."""


def _refuse_old_names(words: list[str]) -> None:
    for word in [*words[:1], *(word for word in words if word.startswith("--"))]:
        name = word.partition("=")[0].replace("_", "-")
        if name in RENAMED:
            raise InputError(f"{name} is called {RENAMED[name]} now")


def _expanded(word: str) -> str:
    """Write out the home folder where the shell did not: behind an equals sign, or in quotes."""
    name, equals, value = word.rpartition("=") if word.startswith("--") else ("", "", word)
    return f"{name}{equals}{os.path.expanduser(value)}"


def _suite(words: list[str]) -> str | None:
    """Find the suite among the words of `lac eval` and `lac check`: it decides which options the benchmark has."""
    for word, following in zip(words, [*words[1:], None], strict=False):
        name, _, value = word.partition("=")
        if words[0] in ("eval", "check") and name == "--suite":
            return value or following
    return None


def _verbs(suite: str | None) -> dict[str, Callable[..., Any]]:
    """Verb → function. What a verb needs is imported here, so that no verb pays for another's dependencies.

    Raises:
        InputError: If no benchmark has the suite.
    """
    from lac_vla.bench import BenchConfig, bench_tables, run_bench
    from lac_vla.evaluation.config import EvalConfig
    from lac_vla.evaluation.film import FilmConfig
    from lac_vla.evaluation.reproduce import ReproduceConfig
    from lac_vla.serving.config import ServeConfig
    from lac_vla.sims import benchmark_of
    from lac_vla.sims.libero.collect import CollectConfig
    from lac_vla.training.config import PretrainConfig, TrainConfig

    # Their options are those of the benchmark that the suite belongs to: tyro reads them off these types.
    chosen: Any = benchmark_of(suite)
    text = {"__doc__": EvalConfig.__doc__}
    benchmark_field = ("benchmark", Annotated[chosen, FLAT], field(default_factory=chosen))
    chosen_config: Any = make_dataclass("Config", [benchmark_field], bases=(EvalConfig,), frozen=True, namespace=text)

    def evaluate(config: Annotated[chosen_config, FLAT]) -> None:
        """Closed-loop episodes on a benchmark, every policy on the same initial states; resumable; ends with a report.

        The suite decides on which benchmark: `lac eval --suite simpler-vm --help` shows the options of SIMPLER.

        Args:
            config: What to run.
        """
        from lac_vla.evaluation.runner import evaluate as run

        own: EvalConfig = EvalConfig(**vars(config))
        run(own)
        report((own.out,))
        if (published := own.benchmark.publish(own.out)) is not None:
            console.print(published)

    def check(benchmark: Annotated[chosen, FLAT], tasks: tuple[int, ...] = ()) -> None:
        """List what a benchmark needs to be played and this machine does not have; nothing is played.

        Args:
            benchmark: The suite, and the simulator that would play it.
            tasks: Task ids; empty for all.
        """
        wanted = benchmark.task_ids(tasks)
        lacking = benchmark.missing(wanted)
        episodes = sum(benchmark.trials[task] for task in wanted)
        console.print(f"{benchmark.suite}: {episodes} episodes; missing: {len(lacking)}")
        for item in lacking:
            console.print(f"- {item}", soft_wrap=True)
        raise SystemExit(1 if lacking else 0)

    def reproduce(benchmark: tyro.conf.Positional[Literal["libero"]], config: Annotated[ReproduceConfig, FLAT]) -> None:
        """The tables of the paper on one model: LAC, its peers and its ablations, on the same initial states.

        Resumable: the same command goes on, and one that asks for more adds to what there is. Ends with a report.

        Args:
            benchmark: Whose tables.
            config: What to run.
        """
        from lac_vla.evaluation.reproduce import reproduce as run

        _report_reproduction(run(config))

    def demo(
        out: Path = Path("outputs/demo"),
        tasks: tuple[int, ...] = (0, 5, 9),
        episodes: int = 2,
        policies: tuple[str, ...] = ("dense", "lac"),
        workers: int = 1,
    ) -> None:
        """The bundled VLA on real LIBERO tasks, dense and with learned reuse; a table, and an HTML report with videos.

        Args:
            out: Folder of the run; the same command goes on where it stopped.
            tasks: Tasks of libero_spatial.
            episodes: Initial states per task, from those that no demonstration used.
            policies: Methods to compare.
            workers: Processes.
        """
        from lac_vla.bundled import MINI
        from lac_vla.evaluation.runner import evaluate as run
        from lac_vla.sims.libero.suites import FIRST_HELD_OUT

        states = (FIRST_HELD_OUT, FIRST_HELD_OUT + episodes)
        config = EvalConfig(str(MINI), out, policies, tasks=tasks, init_states=states, workers=workers)
        run(config)
        report((out,))

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
            _report_evaluation(runs, page)
        elif len(runs) == 1 and (runs[0] / "metrics.jsonl").exists():
            _report_training(runs[0], page)
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

    def bench(config: Annotated[BenchConfig, FLAT]) -> None:
        """Measure the milliseconds of a frame: three windows, every stage, interleaved with the stock model."""
        for table in bench_tables(run_bench(config)):
            console.print(table)

    def collect(config: Annotated[CollectConfig, FLAT], dataset: Path | None = None) -> None:
        """Demonstrations by a scripted expert with privileged state, packed as a LeRobot v3 dataset.

        Args:
            config: What to collect.
            dataset: Folder of the dataset; by default `<out>-lerobot`.
        """
        from lac_vla.sims.libero.collect import collect as run
        from lac_vla.sims.libero.packing import pack

        run(config)
        packed = pack(config.out, dataset or config.out.with_name(config.out.name + "-lerobot"))
        console.print(f"{len(packed)} episodes, {packed.total_frames} frames: {packed.root}")

    def pretrain(config: Annotated[PretrainConfig, FLAT], minutes: float = 0) -> None:
        """Train a bundled VLA on demonstrations. Run it again to go on.

        Args:
            config: The run.
            minutes: Stop, resumably, after this time; 0 for no limit.
        """
        from lac_vla.training.pretrain import pretrain as run

        console.print(f"model: {run(config, max_seconds=60 * minutes if minutes else float('inf'))}")

    def train(config: Annotated[TrainConfig, FLAT], minutes: float = 0) -> None:
        """Train a LAC policy beside a frozen VLA, on demonstrations or plain logs; ends with a report.

        Run it again to go on.

        Args:
            config: The run.
            minutes: Stop, resumably, after this time; 0 for no limit.
        """
        from lac_vla.training.train import train as run

        policy = run(config, max_seconds=60 * minutes if minutes else float("inf"))
        if os.environ.get("RANK", "0") != "0":  # of the processes of torchrun, one speaks
            return
        console.print(f"policy: {policy}")
        try:
            console.print(f"report: {_report_training(config.out, config.out / 'report.html')}")
        except MissingExtraError as error:  # the policy is there all the same
            console.print(f"no report: {error}", soft_wrap=True)

    def serve(config: Annotated[ServeConfig, FLAT]) -> None:
        """Serve a VLA with its policy to robots that speak openpi's websocket protocol."""
        from lac_vla.serving.config import serve as run

        run(config)

    def view(url: tyro.conf.Positional[str] = "ws://127.0.0.1:8000") -> None:
        """Open the live page of a server that runs with `lac serve --view`: what every robot's session reuses, and why.

        Args:
            url: Where the server listens, as robots are told: `ws://HOST:PORT` or `wss://HOST:PORT`.
        """
        from lac_vla.serving.browse import open_page

        console.print(open_page(url), soft_wrap=True)

    verbs: list[Callable[..., Any]] = [reproduce, check, bench, report, film, collect, train, pretrain, serve, view]
    return {"demo": demo, "eval": evaluate, **{verb.__name__: verb for verb in verbs}}


def _report_evaluation(runs: tuple[Path, ...], out: Path) -> Path:
    from lac_vla.report import build_report
    from lac_vla.report.clocks import clock_charts
    from lac_vla.results.clocks import clock_rows, clock_table
    from lac_vla.results.records import read_episodes
    from lac_vla.results.summary import summarize
    from lac_vla.results.table import method_tables

    by_run = {str(run): read_episodes(run / "episodes.jsonl") for run in runs}
    episodes = [episode for found in by_run.values() for episode in found]
    if len({episode.clock for episode in episodes}) > 1:
        rows = clock_rows(episodes)
        clocks, over = clock_table(rows), clock_charts(rows)
        console.print(clocks.to_terminal())
        return build_report(runs, out, tables=[clocks], clocks=over)
    apart = len({(episode.method, episode.trial) for episode in episodes}) == len(episodes)
    if apart and len({episode.stress for episode in episodes}) == 1:
        by_run = {"": episodes}  # else the runs differ in more than their methods
    for name, found in by_run.items():
        if name:
            console.print(name, style="bold")
        for table in method_tables(summarize(found)):
            console.print(table.to_terminal())
    return build_report(runs, out)


def _report_reproduction(done: "Reproduction") -> None:
    from lac_vla.evaluation.paper_tables import paper_tables
    from lac_vla.policies import paths_by_name
    from lac_vla.report import build_report, tradeoff
    from lac_vla.report.clocks import clock_charts
    from lac_vla.results.clocks import clock_rows
    from lac_vla.results.summary import summarize

    tables = paper_tables(done)
    for table in tables:
        console.print(table.to_terminal())
    specs = {row.method: paths_by_name(row.spec) for row in (*done.rows, *done.curve)}
    curve_episodes = [e for e in done.curve_episodes if e.method in specs]
    curve = tradeoff(summarize(curve_episodes), curve_episodes, specs) if done.curve else None
    config = done.config
    runs = [config.folder(suite, seed=seed) for suite in config.suites for seed in (None, *config.more_seeds)]
    title = "The paper's LIBERO tables on one model"
    clocks = clock_charts(clock_rows(done.all_clocks)) if done.clock_rows else None
    page = build_report(runs, config.out / "report.html", title=title, tables=tables, curve=curve, clocks=clocks)
    console.print(f"report: {page}")


def _report_training(run: Path, out: Path) -> Path:
    from lac_vla.report import build_training_report
    from lac_vla.report.training import training_table
    from lac_vla.report.training_run import TrainingRun

    console.print(training_table(TrainingRun.read(run)).to_terminal())
    return build_training_report(run, out)
