"""The one thread that runs the model: requests that wait are answered together, idle work when none waits."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Condition
from typing import Any

from lac_vla.engine.layers import Between
from lac_vla.errors import InputError, LacError
from lac_vla.serving.batches import Batcher, Outcome, Request
from lac_vla.serving.sessions import Answer, IdleJob, RobotSession


class BusyError(LacError):
    """The request queue is full."""


class ModelExecutor:
    """Answers requests off the event loop: whenever the model is free, as many of those that wait as go together.

    Every connection hands in one request at a time, so a robot waits for at most one request of every other, however
    fast that one asks; ``capacity`` of them may wait or run. A run that gives way to others is interrupted between its
    pieces, by one batch each time, if the engine can be interrupted: it ends whatever the load. Idle work is done in
    short runs, while no request waits.

    Args:
        batcher: Chooses and answers.
        capacity: Requests that may wait or run.
        window_s: Seconds that a request waits for others to join it; nobody waits for robots that are not there.

    Raises:
        InputError: If the window is negative, or as long as the deadline leaves time for.
    """

    def __init__(self, batcher: Batcher, capacity: int, window_s: float = 0.0) -> None:
        if not window_s >= 0:
            raise InputError(f"batch_window_ms is {1e3 * window_s:g}; give at least 0")
        controller = batcher.controller
        if window_s and controller is not None and 1e3 * window_s >= controller.deadline_ms - controller.least_ms:
            raise InputError(
                f"batch_window_ms is {1e3 * window_s:g}, and the fewest tokens take {controller.least_ms:.1f} ms: no "
                f"batch could keep the deadline of {controller.deadline_ms:g} ms; wait less, or give more time"
            )
        self.batcher, self.capacity, self.window_s, self.waiting = batcher, capacity, window_s, 0
        self.robots: set[RobotSession] = set()
        self._thread = ThreadPoolExecutor(1, "model")
        self._changed = Condition()
        self._queue: dict[Request, asyncio.Future[Answer]] = {}
        self._idle: dict[RobotSession, IdleJob] = {}
        self._gone: set[RobotSession] = set()
        self._working = self._closed = False

    def join(self, robot: RobotSession) -> None:
        """Count a robot among those that may ask."""
        with self._changed:
            self.robots.add(robot)

    def leave(self, robot: RobotSession) -> None:
        """Forget a robot and its idle job; its memory is free once nothing of it runs any more."""
        with self._changed:
            self.robots.discard(robot)
            self._idle.pop(robot, None)
            self._gone.add(robot)
            self._wake()

    async def answer(self, robot: RobotSession, message: Mapping[str, Any], arrived: float) -> Answer:
        """Answer a request; if the caller is cancelled, it is still carried out.

        Raises:
            BusyError: If too many wait.
            RefusedRequestError: If the request cannot be used.
        """
        if self.waiting >= self.capacity or self._closed:
            raise BusyError("the server is stopping" if self._closed else f"{self.waiting} requests wait: try later")
        self.waiting += 1
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        with self._changed:
            self._queue[Request(robot, message, arrived)] = future
            self._wake()
        return await asyncio.shield(future)

    def offer(self, job: IdleJob) -> None:
        """Leave a job for when no request waits; it replaces the robot's last one."""
        self._loop = asyncio.get_running_loop()
        with self._changed:
            self._idle.pop(job.robot, None)
            self._idle[job.robot] = job
            self._wake()

    async def close(self) -> None:
        """Finish what was taken, drop idle work, and stop the thread."""
        with self._changed:
            self._closed = True
            self._idle.clear()
            self._changed.notify()
        await asyncio.get_running_loop().run_in_executor(None, self._thread.shutdown)

    def _wake(self) -> None:
        if self._working:
            self._changed.notify()
        elif not self._closed or self._queue:
            self._working = True
            self._thread.submit(self._work)

    def _work(self) -> None:
        """Work until there is nothing to do."""
        while True:
            with self._changed:
                self._release_gone()
                batch = self._take()
                if not batch and not self._idle:
                    self._working = False
                    return
                quiet_s = _quiet_s(self.robots, time.perf_counter())
                jobs = [] if batch else self.batcher.choose_idle(list(self._idle.values()), quiet_s)
                for job in jobs:
                    del self._idle[job.robot]
            if batch:
                self._answer(batch, self._interrupt)
            else:
                self._rest(jobs, quiet_s)

    def _interrupt(self) -> None:
        """Answer one batch between the pieces of a run that gives way, if somebody waits to whom it does."""
        if self._queue:
            with self._changed:
                batch = self._choose()
            if batch:
                self._answer(batch)

    def _answer(self, batch: Mapping[Request, asyncio.Future[Answer]], between: Between | None = None) -> None:
        with self._changed:
            others, robots = list(self._queue), set(self.robots)
        try:
            outcomes = self.batcher.answer(list(batch), others, robots, between)
        except Exception as error:  # a fault of the batcher itself
            outcomes = dict.fromkeys(batch, error)
        with self._changed:  # those that were put off wait on
            self._queue |= {request: future for request, future in batch.items() if request not in outcomes}
        loop = next(iter(batch.values())).get_loop()
        loop.call_soon_threadsafe(self._deliver, [(batch[request], outcome) for request, outcome in outcomes.items()])

    def _release_gone(self) -> None:
        """Free the memory of robots that have left, but for those whose last request is still to be carried out."""
        waiting = {request.robot for request in self._queue}
        for robot in self._gone - waiting:
            robot.release()
        self._gone &= waiting

    def _take(self) -> dict[Request, asyncio.Future[Answer]]:
        """Take those that are answered next out of the queue, after the window."""
        while self._queue and not self._closed and len(self._queue) < min(self.batcher.max_batch, len(self.robots)):
            rest = min(request.arrived for request in self._queue) + self.window_s - time.perf_counter()
            if rest <= 0:
                break
            self._changed.wait(rest)
        return self._choose()

    def _choose(self) -> dict[Request, asyncio.Future[Answer]]:
        chosen = self.batcher.choose(list(self._queue), () if self._closed else self.robots)
        return {request: self._queue.pop(request) for request in chosen}

    def _rest(self, jobs: Sequence[IdleJob], quiet_s: float) -> None:
        try:
            errors = self.batcher.rest(jobs, quiet_s)
        except Exception as error:  # a fault of the batcher itself
            errors = [error]
        for fault in errors:
            context = {"message": "idle work failed", "exception": fault}
            self._loop.call_soon_threadsafe(self._loop.call_exception_handler, context)

    def _deliver(self, outcomes: list[tuple[asyncio.Future[Answer], Outcome]]) -> None:
        self.waiting -= len(outcomes)
        for future, outcome in outcomes:
            if isinstance(outcome, Answer):
                future.set_result(outcome)
            else:
                future.set_exception(outcome)
                future.exception()  # seen, even if the caller has gone


def _quiet_s(robots: Collection[RobotSession], now: float) -> float:
    """Seconds for which no robot is expected to ask; those that are overdue are not waited for."""
    return min((robot.expected - now for robot in robots if robot.expected > now), default=math.inf)
