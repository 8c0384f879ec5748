"""``lac train``, ``lac pretrain`` and ``lac collect``. Without postponed annotations: tyro reads them."""

import os
from pathlib import Path
from typing import Annotated

from lac_vla.cli.marks import FLAT
from lac_vla.cli.output import console
from lac_vla.errors import MissingExtraError
from lac_vla.sims.libero.collect import CollectConfig
from lac_vla.training.config import PretrainConfig, TrainConfig


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
