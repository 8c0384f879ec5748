"""Jobs are divided between the processes of an evaluation, here or on a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol, TypeAlias

from lac_vla.evaluation.config import EvalConfig
from lac_vla.results.records import EpisodeRecord


class Job(NamedTuple):
    """Episodes that run one after the other.

    Attributes:
        config: The evaluation that they belong to. Those that share their processes differ in ``out`` and ``stress``
            alone.
        task: Task id.
        init_state: Initial state.
        methods: Methods that are still to run on it.
    """

    config: EvalConfig
    task: int
    init_state: int
    methods: tuple[str, ...]


class Runner(Protocol):
    """Runs one episode at a time."""

    def run(self, config: EvalConfig, method: str, task: int, init_state: int) -> EpisodeRecord:
        """Run it."""
        ...


MakeRunner: TypeAlias = Callable[[EvalConfig], Runner]
"""Loads the model and all else that a process needs."""


def play(runner: Runner, job: Job) -> Iterator[EpisodeRecord]:
    """Run the episodes of a job, one after the other."""
    return (runner.run(job.config, method, job.task, job.init_state) for method in job.methods)
