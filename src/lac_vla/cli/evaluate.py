"""Verbs that play episodes: ``lac eval``, ``check``, ``reproduce``, ``demo``.

Without postponed annotations: tyro reads them.
"""

from collections.abc import Callable
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from lac_vla.cli.marks import FLAT
from lac_vla.cli.output import console, show
from lac_vla.cli.reports import report, report_reproduction
from lac_vla.evaluation.config import EvalConfig
from lac_vla.evaluation.reproduce import ReproduceConfig
from lac_vla.sims.base import Benchmark


def make_evaluate(benchmark: type[Benchmark]) -> Callable[..., None]:
    """Make the function of `lac eval` for a benchmark, whose options it has."""
    chosen: Any = benchmark
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
            show(published)

    return evaluate


def make_check(benchmark: type[Benchmark]) -> Callable[..., None]:
    """Make the function of `lac check` for a benchmark, whose options it has."""
    chosen: Any = benchmark

    def check(benchmark: Annotated[chosen, FLAT], tasks: tuple[int, ...] = ()) -> None:
        """List what a benchmark needs and this machine does not have; if nothing is missing, try it.

        What is tried of SIMPLER's tasks: that the objects lie on the table and the gripper closes, and that a scripted
        expert solves the WidowX's.

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
        if lacking:
            raise SystemExit(1)
        for task in wanted:
            if said := benchmark.prove(task):
                console.print(f"+ {said}", soft_wrap=True)

    return check


def reproduce(benchmark: tyro.conf.Positional[Literal["libero"]], config: Annotated[ReproduceConfig, FLAT]) -> None:
    """The tables of the paper on one model: LAC, its peers and its ablations, on the same initial states.

    Resumable: the same command goes on, and one that asks for more adds to what there is. Ends with a report.

    Args:
        benchmark: Whose tables.
        config: What to run.
    """
    from lac_vla.evaluation.reproduce import reproduce as run

    report_reproduction(run(config))


def demo(
    out: Path = Path("outputs/demo"),
    tasks: tuple[int, ...] = (0, 5, 9),
    episodes: int = 2,
    policies: tuple[str, ...] = ("dense", "lac"),
    workers: int = 1,
    threads: int = 0,
) -> None:
    """The bundled VLA on real LIBERO tasks, dense and with learned reuse; a table, and an HTML report with videos.

    Args:
        out: Folder of the run; the same command goes on where it stopped.
        tasks: Tasks of libero_spatial.
        episodes: Initial states per task, from those that no demonstration used.
        policies: Methods to compare.
        workers: Processes.
        threads: CPU threads of torch per process; 0 leaves it to torch.
    """
    from lac_vla.evaluation.runner import evaluate as run
    from lac_vla.factory import ModelOptions
    from lac_vla.sims.libero.suites import FIRST_HELD_OUT

    options = ModelOptions(threads=threads)
    states = (FIRST_HELD_OUT, FIRST_HELD_OUT + episodes)
    config = EvalConfig("mini", out, policies, tasks=tasks, init_states=states, workers=workers, model_options=options)
    number = len(config.task_ids) * episodes * len(policies)
    console.print(f"{number} episodes; the simulator starts, then a bar tells the time left")
    run(config)
    report((out,))
