"""A batch: whose requests are answered next, what each of them may cost, and one run of the engine for all of them.

Turns are fair by robot: whoever has gone longest without an answer comes first. A robot that asks far more often than
the others waits behind all of them, and where the engine can be interrupted, it is for whoever asks meanwhile. With a
deadline, a batch is as large as its members can afford, and its time is shared out equally among them and the robots
that wait, or will ask, before it ends.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from lac_vla.engine.deciding import decide_together
from lac_vla.engine.engine import Engine
from lac_vla.engine.layers import Between
from lac_vla.engine.work import work_together
from lac_vla.errors import InputError
from lac_vla.realtime.deadline import DeadlineController
from lac_vla.serving.kv_memory import KVMemory
from lac_vla.serving.sessions import Answer, IdleJob, PlannedFrame, PreparedRequest, Request, RobotSession

__all__ = ["Batcher", "Outcome", "Request"]

Outcome: TypeAlias = Answer | Exception

OFTEN = 0.1
"""A robot asks often whose pause from an answer to its next request is below this share of the robots' median."""
SHORTEST_S = 0.01
"""The robots' median pause, from which on they leave the model time: where all ask again at once, none asks often."""
PATIENCE_S = 0.5
"""Seconds after which the run of a robot that asks often is begun although others wait: ten frames at 20 Hz."""


@dataclass
class Batcher:
    """Answers requests of several robots together.

    Attributes:
        engine: The engine of all the robots' sessions.
        controller: Keeps the deadline; ``None`` if there is none.
        max_batch: Requests that are answered together, at most; 1 for one at a time.
        memory: Budget of keys and values; ``None`` for as much as the robots need.

    Raises:
        InputError: If ``max_batch`` is below 1.
    """

    engine: Engine
    controller: DeadlineController | None = None
    max_batch: int = 8
    memory: KVMemory | None = None
    _interrupted: frozenset[RobotSession] = field(default=frozenset(), init=False)  # and who has no room beside its run
    _answered: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.max_batch < 1:
            raise InputError(f"max_batch is {self.max_batch}; give at least 1, which answers one request at a time")

    def choose(self, waiting: Collection[Request], robots: Collection[RobotSession] = ()) -> list[Request]:
        """Choose the requests that are answered next; as many as let those before them keep their deadline.

        Args:
            waiting: All that wait.
            robots: All robots, to which those among them that ask often give way.

        Returns:
            At most one of every robot; empty if none waits, or, while a run is interrupted, none but robots that ask
            often.
        """
        now, controller = time.perf_counter(), self.controller
        often = _asking_often(robots) | self._interrupted
        calm = [request for request in waiting if request.robot not in often]
        due = [request for request in waiting if request.robot in often and _has_given_way(request, now)]
        if self._interrupted or (calm and not due):
            waiting = calm
        elif self.engine.interruptible:  # by themselves, so that others are answered between the pieces
            waiting = [request for request in waiting if request.robot in often]
        chosen: dict[RobotSession, Request] = {}
        costs: list[float] = []
        for request in sorted(waiting, key=lambda request: (not request.postponed, request.robot.answered)):
            if request.robot in chosen:
                continue
            if controller is not None:
                costs.append(max(controller.least_ms, _cost(request, controller)))
                if controller.batch_ms(costs) > _tightest(chosen.values(), controller, now):
                    break
            chosen[request.robot] = request
            if len(chosen) == self.max_batch:
                break
        return list(chosen.values())

    def answer(
        self,
        batch: Sequence[Request],
        waiting: Collection[Request] = (),
        robots: Collection[RobotSession] = (),
        between: Between | None = None,
    ) -> dict[Request, Outcome]:
        """Plan every request, run the plans together, and answer.

        Args:
            batch: Requests of different robots.
            waiting: Requests that are not of this batch.
            robots: All robots, of which some may ask while the batch runs.
            between: Called between the pieces of the run if all of the batch ask often, and the engine can be
                interrupted: it may choose and answer others, and does not raise.

        Returns:
            Answers, and what went wrong with requests that have none. One that would have made the others late is not
            among them: it waits on, and is the first of the next batch.
        """
        begun, controller = time.perf_counter(), self.controller
        self._answered = number = self._answered + 1
        outcomes: dict[Request, Outcome] = {}
        share = None if controller is None else self._share(controller, batch, waiting, robots, begun)
        prepared: dict[Request, PreparedRequest] = {}
        for request in batch:
            try:
                if request.planned is None:
                    prepared[request] = request.robot.prepare(request.message, request.arrived)
            except Exception as error:  # of this robot alone
                outcomes[request] = error
        decide_together([each.prepared for each in prepared.values()])
        ready: list[tuple[Request, PlannedFrame]] = []
        unused = 0.0  # what one robot leaves of its share, those behind it may use; what it takes beyond is not theirs
        for request in batch:
            if request in outcomes:
                continue
            try:
                if request.planned is None:
                    own = None if share is None else share + unused
                    budget = None if controller is None or own is None else controller.token_budget(own)
                    request.planned = request.robot.plan(prepared[request], budget)
                    if controller is not None and own is not None:
                        unused = max(0.0, own - _cost(request, controller))
                ready.append((request, request.planned))
            except Exception as error:  # of this robot alone
                outcomes[request] = error
        if controller is not None:
            late = self._postpone(controller, [request for request, _ in ready], begun)
            ready = [(request, planned) for request, planned in ready if request not in late]
        tried = {request.robot for request, _ in ready}
        if self.memory is not None:
            ready, refused = self.memory.settle(ready, waiting, robots, self._interrupted)
            outcomes |= refused
        running = {request.robot for request, _ in ready}
        if self._interrupted:
            self._interrupted |= tried - running
        gives_way = bool(running) and running <= _asking_often(robots)
        plans = [planned.plan for _, planned in ready]
        if gives_way and between is not None:
            self._interrupted = frozenset(request.robot for request in batch)
            try:
                results = self.engine.run(plans, between)
            finally:
                self._interrupted = frozenset()
        else:
            results = self.engine.run(plans) if ready else []
        computed = []
        for (request, planned), result in zip(ready, results, strict=True):
            try:
                answer = request.robot.commit(planned, result, begun, len(ready))
                outcomes[request] = answer
                computed.append((answer.step.dense_reason, answer.step.decision))
            except Exception as error:  # of this robot alone
                outcomes[request] = error
        if controller is not None and number == self._answered and any(reason is None for reason, _ in computed):
            costs = [controller.table(decision.exit_layer.sum() / decision.n_layers) for _, decision in computed]
            controller.observe(controller.batch_ms(costs), 1e3 * (time.perf_counter() - begun))
        return outcomes

    def choose_idle(self, jobs: Collection[IdleJob], quiet_s: float) -> list[IdleJob]:
        """Choose what is done while nobody asks: of one kind, as many as are done before a robot is expected to."""
        first = next(iter(jobs), None)
        alike = [] if first is None else [job for job in jobs if job.shadow == first.shadow][: self.max_batch]
        while len(alike) > 1 and not all(job.together(len(alike), quiet_s) for job in alike):
            alike.pop()
        return alike

    def rest(self, jobs: Sequence[IdleJob], quiet_s: float) -> list[Exception]:
        """Do idle work in one run; return what went wrong with any of it."""
        done = work_together(self.engine, [job.begin(len(jobs), quiet_s) for job in jobs])
        return [each for each in done if isinstance(each, Exception)]

    def _share(
        self,
        controller: DeadlineController,
        batch: Sequence[Request],
        waiting: Collection[Request],
        robots: Collection[RobotSession],
        now: float,
    ) -> float:
        """Share the time out: milliseconds of the table that each request of the batch without a plan may take.

        The batch is to end before the first of its deadlines, and what waits has to be answered before its own; so has
        what is expected to come before the batch ends.
        """
        reach = controller.deadline_ms / 1e3
        busy = self._interrupted.union(request.robot for request in (*batch, *waiting))
        expected = sum(abs(robot.expected - now) <= reach for robot in robots if robot not in busy)
        planned = [_cost(request, controller) for request in batch if request.planned is not None]
        share, count = math.inf, len(batch)
        first = _tightest(batch, controller, now)
        for left, more in (
            (0.0 if first == math.inf else first, 0),
            (_tightest(waiting, controller, now), len(waiting)),
            (controller.left(0.0), expected),
        ):
            count += more
            free = left / controller.table.factor(min(count, self.max_batch)) - sum(planned)
            share = min(share, free / max(1, count - len(planned)))
        return max(0.0, share)

    def _postpone(self, controller: DeadlineController, planned: Sequence[Request], now: float) -> set[Request]:
        """Choose the requests that wait for the next batch: computed in full, they would make the others late."""
        postponed: set[Request] = set()
        for request in planned:
            staying = [other for other in planned if other not in postponed]
            others = [other for other in staying if other is not request]
            full = request.planned is not None and request.planned.plan.dense_reason is not None
            total = controller.batch_ms([_cost(other, controller) for other in staying])
            if full and not request.postponed and others and total > _tightest(others, controller, now):
                request.postponed = True
                postponed.add(request)
        return postponed


def _asking_often(robots: Collection[RobotSession]) -> frozenset[RobotSession]:
    """Find the robots that ask far more often than the others."""
    pauses = {robot: robot.pause for robot in robots if robot.pause is not None}
    median = sorted(pauses.values())[len(pauses) // 2] if pauses else 0.0
    return frozenset(robot for robot, pause in pauses.items() if median > SHORTEST_S and pause < OFTEN * median)


def _has_given_way(request: Request, now: float) -> bool:
    """Tell whether a request has waited for others as long as it has to, or has been put off before."""
    return request.planned is not None or request.postponed or now - request.arrived >= PATIENCE_S


def _cost(request: Request, controller: DeadlineController) -> float:
    """Milliseconds of the table that a planned request takes; 0 for one without a plan."""
    return 0.0 if request.planned is None else controller.table(request.planned.tokens)


def _tightest(requests: Iterable[Request], controller: DeadlineController, now: float) -> float:
    """Milliseconds of the table until the first deadline that can still be kept; infinite if there is none."""
    left = [controller.left(1e3 * (now - request.arrived)) for request in requests]
    return min((each for each in left if each >= controller.least_ms), default=math.inf)
