"""Collecting and packing are killed anywhere: the same command then ends with the dataset of the unbroken run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lac_vla import Frame
from lac_vla.datasets import LeRobotDataset
from lac_vla.sims.libero import collect as module
from lac_vla.sims.libero.collect import CollectConfig, collect, load_episode
from lac_vla.sims.libero.demonstration import Demonstration
from lac_vla.sims.libero.packing import pack
from tests.crash.kills import counted, files, run_killed

POINTS = 22
"""Changes to the disk of this run."""
UNSOLVED = {(0, 1), (1, 0)}
"""(Task, initial state) that the expert does not solve."""


def play(config: CollectConfig, jobs: list[tuple[int, int]]) -> Iterator[tuple[tuple[int, int], int, bool]]:
    """In place of the simulator's processes: demonstrations of four steps."""
    for task, init_state in jobs:
        rng = np.random.default_rng([task, init_state])
        demo = Demonstration(0.1, solved=(task, init_state) not in UNSOLVED)
        image = np.full((32, 32, 3), 40 * task + 20 * init_state, np.uint8)
        for _ in range(4):
            demo.frames.append(Frame({"agentview": image, "wrist": image}, f"task {task}", np.zeros(8, np.float32)))
            demo.rows["state"].append(rng.normal(size=8))
            demo.rows["action"].append(rng.normal(size=7))
        if demo.solved:
            meta = {"suite": config.suite, "task": task, "instruction": f"task {task}"}
            env: Any = SimpleNamespace(task=task, metadata=lambda meta=meta: dict(meta))
            module._stage(config, env, init_state, demo)
        yield (task, init_state), 4, demo.solved


def note_in_two(config: CollectConfig, task: int, init_state: int, steps: int) -> None:
    """Half a line is on the disk at the moment of a change."""
    line = json.dumps({"task": task, "init_state": init_state, "seed": config.seed, "steps": steps}) + "\n"
    module.cut_unfinished(config.out / module.FAILURES)
    with (config.out / module.FAILURES).open("a", encoding="utf-8") as file:
        for part in (line[:12], line[12:]):
            file.write(part)
            file.flush()
            os.fsync(file.fileno())


@pytest.fixture(autouse=True)
def world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_run", play)
    monkeypatch.setattr(module, "_record_failure", note_in_two)


@pytest.fixture
def config(tmp_path: Path) -> CollectConfig:
    return CollectConfig(tmp_path / "whole" / "staged", tasks=(0, 1), init_states=(0, 2), image_codec="png")


def run(config: CollectConfig) -> None:
    collect(config)
    pack(config.out, config.out.with_name("data"))


def everything(config: CollectConfig) -> dict[str, bytes]:
    return {name: data for name, data in files(config.out.parent).items() if name != "data.lock"}


def test_killed_anywhere(config: CollectConfig, tmp_path: Path) -> None:
    with counted() as count:
        run(config)
    assert count.done == POINTS
    dataset = LeRobotDataset(config.out.with_name("data"))
    assert [episode.instruction for episode in dataset] == ["task 0", "task 1"]
    for at in range(POINTS):
        broken = replace(config, out=tmp_path / str(at) / "staged")
        assert run_killed(at, lambda broken=broken: run(broken))  # type: ignore[misc]
        for staged in broken.out.glob("*.npz"):
            load_episode(staged)  # what has its name is whole
        run(broken)
        assert everything(broken) == everything(config), at
