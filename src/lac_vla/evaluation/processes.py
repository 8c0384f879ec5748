"""Episodes in several processes of this machine, each with its own model and simulator."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import connection

from lac_vla.errors import LacError
from lac_vla.evaluation.config import EvalConfig
from lac_vla.evaluation.worker import EpisodeWorker, Job, MakeWorker
from lac_vla.results.records import EpisodeRecord


def run_on_processes(make: MakeWorker, config: EvalConfig, jobs: Sequence[Job]) -> Generator[EpisodeRecord, None, None]:
    """Run the episodes of all jobs on ``config.workers`` processes; they finish in any order.

    An error ends the run as it would in one process: what other processes have in hand is given up, and nothing more
    is begun. So does closing the iterator.

    Raises:
        LacError: If a process is lost; the run can be resumed.
    """
    context = multiprocessing.get_context("spawn")  # GL contexts do not survive a fork
    theirs, ours = context.Pipe(duplex=False)
    executor = ProcessPoolExecutor(config.workers, context, initializer=_prepare, initargs=(theirs,))
    todo = iter(jobs)
    try:
        # No more jobs are handed in than there are processes: those that wait inside the pool could not be taken back.
        running = {executor.submit(_work, make, config, job) for job in islice(todo, config.workers)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in sorted(done, key=lambda future: future.exception() is not None):  # keep what has succeeded
                yield from future.result()
            running |= {executor.submit(_work, make, config, job) for job in islice(todo, len(done))}
    except BrokenProcessPool as error:
        raise LacError(
            "a worker process was lost; the system may have killed it for want of memory. Finished episodes are kept, "
            "and the same command goes on from there; fewer --workers need less memory"
        ) from error
    finally:
        ours.close()
        executor.shutdown()
        theirs.close()


def _prepare(parent: connection.Connection) -> None:
    """Let the parent alone decide when this process ends, be it in the middle of an episode."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt reaches every process of a terminal
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: connection.Connection) -> None:
    """End this process once the other end of the pipe is closed: by the parent, or with it."""
    connection.wait([parent])
    os._exit(1)


_WORKER: list[EpisodeWorker] = []
"""The worker of this process, made within its first job: its error then reaches the parent."""


def _work(make: MakeWorker, config: EvalConfig, job: Job) -> list[EpisodeRecord]:
    if not _WORKER:
        _WORKER.append(make(config))
    return list(job.play(_WORKER[0]))
