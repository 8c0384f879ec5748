"""``lac train``, ``lac pretrain`` and ``lac collect``. Without postponed annotations: tyro reads them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from lac_vla.cli.marks import FLAT
from lac_vla.cli.output import console
from lac_vla.errors import InputError, MissingExtraError
from lac_vla.sims.base import Benchmark
from lac_vla.sims.libero.benchmark import Libero
from lac_vla.sims.libero.collect import CollectConfig
from lac_vla.sims.simpler.benchmark import Simpler
from lac_vla.sims.simpler.collect import CollectConfig as SimplerCollectConfig
from lac_vla.training.config import PretrainConfig, TrainConfig


def make_collect(benchmark: type[Benchmark]) -> Callable[..., None]:
    """Find the function of `lac collect` for a benchmark.

    Raises:
        InputError: If no scripted expert plays it.
    """
    collectors: dict[type[Benchmark], Callable[..., None]] = {Libero: collect, Simpler: collect_simpler}
    if benchmark not in collectors:
        raise InputError(f"no scripted expert plays {benchmark.suites[0]}: choose a suite of LIBERO, or simpler-widowx")
    return collectors[benchmark]


def collect_simpler(config: Annotated[SimplerCollectConfig, FLAT]) -> None:
    """Demonstrations of SIMPLER's WidowX tasks by a scripted expert with privileged state, as a LeRobot v3 dataset.

    In ManiSkill3's port, with objects moved and turned: never in a layout of the benchmark's. The dataset is whole at
    any time; the same command goes on.

    Args:
        config: What to collect.
    """
    from lac_vla.datasets import LeRobotDataset
    from lac_vla.sims.simpler.collect import collect as run

    run(config)
    dataset = LeRobotDataset(config.out)
    console.print(f"{len(dataset)} episodes, {dataset.total_frames} frames: {dataset.root}")


def collect(config: Annotated[CollectConfig, FLAT], dataset: Path | None = None) -> None:
    """Demonstrations by a scripted expert with privileged state, packed as a LeRobot v3 dataset.

    `--suites all` makes one dataset of LIBERO's four suites; the same command goes on where it was stopped.
    `lac collect --suite simpler-widowx --help` shows the options of SIMPLER's WidowX tasks.

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
    """Train a small VLA on demonstrations. Run it again to go on.

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
    from lac_vla.cli.reports import report_training
    from lac_vla.training.train import train as run

    policy = run(config, max_seconds=60 * minutes if minutes else float("inf"))
    if os.environ.get("RANK", "0") != "0":  # of the processes of torchrun, one speaks
        return
    console.print(f"policy: {policy}")
    try:
        console.print(f"report: {report_training(config.out, config.out / 'report.html')}")
    except MissingExtraError as error:  # the policy is there all the same
        console.print(f"no report: {error}", soft_wrap=True)
