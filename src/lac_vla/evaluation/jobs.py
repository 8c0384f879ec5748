"""What several processes, here or on a cluster, divide between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, TypeAlias

from lac_vla.evaluation.config import EvalConfig
from lac_vla.evaluation.records import EpisodeRecord

Job: TypeAlias = tuple[int, int, tuple[str, ...]]
"""Task, initial state, methods still to run on it."""


class Runner(Protocol):
    """What runs one episode."""

    def run(self, method: str, task: int, init_state: int) -> EpisodeRecord:
        """Run it."""
        ...


MakeRunner: TypeAlias = Callable[[EvalConfig], Runner]
"""Loads the model and all else that a process needs."""


def play(runner: Runner, job: Job) -> Iterator[EpisodeRecord]:
    """Run the episodes of a job, one after the other."""
    task, init_state, methods = job
    return (runner.run(method, task, init_state) for method in methods)
