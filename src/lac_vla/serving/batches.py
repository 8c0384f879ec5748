"""A batch: whose requests are answered next, what each of them may cost, and one run of the engine for all of them.

Turns are fair by robot: whoever has gone longest without an answer comes first, so that a robot which asks often stands
behind the others. With a deadline, a batch is as large as its members can afford, and its time is shared out equally
among them and the robots that wait, or will ask, before it ends.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from lac_vla.engine.engine import Engine
from lac_vla.errors import InputError
from lac_vla.realtime.deadline import DeadlineController
from lac_vla.serving.sessions import Answer, PlannedFrame, RobotSession

Outcome: TypeAlias = Answer | Exception


@dataclass(eq=False)
class Request:
    """A robot's request that waits for its answer.

    Attributes:
        robot: The robot.
        message: The message that it sent.
        arrived: When, by ``time.perf_counter()``.
        planned: Its plan, once there is one.
        postponed: Whether it has been planned for a batch that it would have made late; that happens only once.
    """

    robot: RobotSession
    message: Mapping[str, Any]
    arrived: float
    planned: PlannedFrame | None = None
    postponed: bool = False


@dataclass
class Batcher:
    """Answers requests of several robots together.

    Attributes:
        engine: The engine of all the robots' sessions.
        controller: Keeps the deadline; ``None`` if there is none.
        max_batch: Requests that are answered together, at most; 1 for one at a time.

    Raises:
        InputError: If ``max_batch`` is below 1.
    """

    engine: Engine
    controller: DeadlineController | None = None
    max_batch: int = 8

    def __post_init__(self) -> None:
        if self.max_batch < 1:
            raise InputError(f"max_batch is {self.max_batch}; give at least 1, which answers one request at a time")

    def choose(self, waiting: Collection[Request]) -> list[Request]:
        """Choose the requests that are answered next; as many as let those before them keep their deadline.

        Args:
            waiting: All that wait.

        Returns:
            At most one of every robot; empty if none waits.
        """
        now, controller = time.perf_counter(), self.controller
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
        self, batch: Sequence[Request], waiting: Collection[Request] = (), robots: Collection[RobotSession] = ()
    ) -> dict[Request, Outcome]:
        """Plan every request, run the plans together, and answer.

        Args:
            batch: Requests of different robots.
            waiting: Requests that are not of this batch.
            robots: All robots, of which some may ask while the batch runs.

        Returns:
            Answers, and what went wrong with requests that have none. One that would have made the others late is not
            among them: it waits on, and is the first of the next batch.
        """
        begun, controller = time.perf_counter(), self.controller
        outcomes: dict[Request, Outcome] = {}
        share = None if controller is None else self._share(controller, batch, waiting, robots, begun)
        ready: list[tuple[Request, PlannedFrame]] = []
        unused = 0.0  # what one robot leaves of its share, those behind it may use; what it takes beyond is not theirs
        for request in batch:
            try:
                if request.planned is None:
                    own = None if share is None else share + unused
                    budget = None if controller is None or own is None else controller.token_budget(own)
                    request.planned = request.robot.plan(request.message, request.arrived, budget)
                    if controller is not None and own is not None:
                        unused = max(0.0, own - _cost(request, controller))
                ready.append((request, request.planned))
            except Exception as error:  # of this robot alone
                outcomes[request] = error
        if controller is not None:
            late = self._postpone(controller, [request for request, _ in ready], begun)
            ready = [(request, planned) for request, planned in ready if request not in late]
        results = self.engine.run([planned.plan for _, planned in ready]) if ready else []
        computed = []
        for (request, planned), result in zip(ready, results, strict=True):
            try:
                answer = request.robot.commit(planned, result, begun, len(ready))
                outcomes[request] = answer
                computed.append((answer.step.dense_reason, answer.step.decision))
            except Exception as error:  # of this robot alone
                outcomes[request] = error
        if controller is not None and any(reason is None for reason, _ in computed):
            costs = [controller.table(decision.exit_layer.sum() / decision.n_layers) for _, decision in computed]
            controller.observe(controller.batch_ms(costs), 1e3 * (time.perf_counter() - begun))
        return outcomes

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
        reach, busy = controller.deadline_ms / 1e3, {request.robot for request in (*batch, *waiting)}
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


def _cost(request: Request, controller: DeadlineController) -> float:
    """Milliseconds of the table that a planned request takes; 0 for one without a plan."""
    return 0.0 if request.planned is None else controller.table(request.planned.tokens)


def _tightest(requests: Iterable[Request], controller: DeadlineController, now: float) -> float:
    """Milliseconds of the table until the first deadline that can still be kept; infinite if there is none."""
    left = [controller.left(1e3 * (now - request.arrived)) for request in requests]
    return min((each for each in left if each >= controller.least_ms), default=math.inf)
