"""The settings of ``lac replay``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from lac_vla.checks import LONGEST_AGE, check_device, check_whole
from lac_vla.dataset_keys import DatasetKeys
from lac_vla.errors import InputError
from lac_vla.factory import method_name


@dataclass(frozen=True)
class ReplayConfig:
    """Settings of ``lac replay``, which compares policies over recorded frames.

    Attributes:
        dataset: LeRobot v3 dataset with the recorded episodes, a folder or a hub id.
        model: Name of a bundled model, checkpoint folder, hub id, or plug-in.
        out: Folder of the result: ``replay.json``, ``replay.svg``, and ``frames.jsonl``, what every policy did in every
            frame. The same command goes on where it was stopped.
        policies: Policies to compare, as in ``lac eval``: ``lac`` is the one that comes with the model,
            ``lac:path=FOLDER`` a trained one, ``lac:ratio=0.87`` the first at a fixed ratio,
            ``motion:ratio=0.85,keep=wrist`` a rule. Those that read attention or prune cannot be replayed.
        baseline: Those of them that the others are compared with, written alike; by default the first. Of several,
            fixed ratios, say, the divergence is interpolated at each policy's own mean of active tokens: that is the
            comparison at equal cost.
        store: Stored embeddings of a run of ``lac train``, its folder ``store``; by default the held-out episodes' are
            computed into ``<out>/store``.
        episodes: How many episodes of the dataset there are to hold out of, evenly spread; 0 for all. Give that of the
            training run; a ``--store`` knows its own, and a run is bound to the episodes it began with.
        held_out: Share of them that is gone through. With the ``--seed`` and ``--episodes`` of a training run, the
            episodes that it held out; 1 for all.
        seed: Of that division and of the sessions' chance, which is the same for all policies.
        stride: Frames from one call of the model to the next: give the ``--actions-per-call`` of the evaluation. That
            of the ``--store``, if one is given.
        max_age: No slot is reused once it is this old, control steps.
        contact: Frames before and behind a gripper event that count as contact.
        unnorm_key: Statistics key of the checkpoint, if it has several.
        device: ``cpu`` or ``cuda``.
        keys: Names of what is read of the data set.

    Raises:
        InputError: If a setting makes no sense.
    """

    dataset: Path
    model: str = "mini"
    out: Path = Path("outputs/replay")
    policies: tuple[str, ...] = ("lac:ratio=0.87", "lac")
    baseline: tuple[str, ...] = ()
    store: Path | None = None
    episodes: int = 0
    held_out: float = 0.1
    seed: int = 0
    stride: int = 1
    max_age: int = 16
    contact: int = 5
    unnorm_key: str | None = None
    device: str = "cpu"
    keys: Annotated[DatasetKeys, tyro.conf.arg(name="")] = field(default_factory=DatasetKeys)

    def __post_init__(self) -> None:
        if not self.policies:
            raise InputError("there is no policy to replay: give --policies, e.g. lac lac:ratio=0.87")
        for name in self.baselines:
            if name not in map(method_name, self.policies):
                raise InputError(f"the baseline {name} is none of --policies {' '.join(self.policies)}: add it there")
            if self.baselines.count(name) > 1:
                raise InputError(f"the baseline {name} is given twice: leave one out")
        if not 0 < self.held_out <= 1:
            raise InputError(f"held_out is {self.held_out}; give a share of the episodes, at most 1 for all")
        for name, least in (("episodes", 0), ("seed", 0), ("stride", 1), ("contact", 0)):
            check_whole(name, getattr(self, name), least, 2**31)
        check_whole("max_age", self.max_age, 1, LONGEST_AGE)
        check_device(self.device)

    @property
    def baselines(self) -> list[str]:
        """Names of the baselines."""
        return [method_name(spec) for spec in self.baseline or self.policies[:1]]
