"""A budget for keys and values: who asks has room, and who has not asked for longest makes it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from lac_vla.engine.engine import Engine
from lac_vla.errors import InputError
from lac_vla.factory import CachedVLA
from lac_vla.realtime.deadline import sample_frames
from lac_vla.serving.sessions import PlannedFrame, RefusedRequestError, Request, RobotSession

SPARE_SLOTS = 16
"""Slots by which instructions may be longer than the sample's, on an average."""


@dataclass
class KVMemory:
    """The memory in which the caches of all robots lie. It is taken at once, and never grows.

    Attributes:
        engine: The engine of all sessions.
        nbytes: Memory, bytes.
        robots: Robots that have room in it at a time.
        evictions: How often one gave its slots to another.
    """

    engine: Engine
    nbytes: int
    robots: int
    evictions: int = 0

    @classmethod
    def take(cls, vla: CachedVLA, megabytes: float) -> KVMemory:
        """Take the memory, before any session of ``vla`` has seen a frame. One frame is computed to size a robot.

        Raises:
            InputError: If not one robot has room.
        """
        engine, session = vla.engine, vla.session()
        session.act(sample_frames(vla.model)[0])
        towers = session.nbytes - session.slots * engine.store.bytes_per_slot
        slots = session.slots + SPARE_SLOTS
        each = slots * engine.store.bytes_per_slot + towers
        session.release()
        robots = int(megabytes * 1e6 // each)
        if robots < 1:
            raise InputError(f"kv_memory is {megabytes:g} MB, and one robot of this model takes {each / 1e6:.1f}")
        engine.store.limit(robots * slots)
        return cls(engine, robots * each, robots)

    def settle(
        self,
        ready: Sequence[tuple[Request, PlannedFrame]],
        waiting: Collection[Request],
        robots: Collection[RobotSession],
        running: Collection[RobotSession] = (),
    ) -> tuple[list[tuple[Request, PlannedFrame]], dict[Request, Exception]]:
        """Give the robots of a batch room.

        Those that are neither in it nor planned for the next one make it, the longest silent first. If that is not
        enough, the first of the batch comes before all others, and who has no room waits for the next one.

        Args:
            ready: Requests of the batch, and their plans.
            waiting: Other requests.
            robots: All robots.
            running: Those whose run this batch interrupts, and who had no room beside it; they keep what they have.

        Returns:
            Those that have room, and what is to be said to those for whom all of the memory is too little.
        """
        settled: list[tuple[Request, PlannedFrame]] = []
        refused: dict[Request, Exception] = {}
        for request, plan in ready:
            if (needed := self.engine.slots(plan.plan)) > self.engine.store.n_slots:
                request.robot.release()  # and its plan with it
                text = f"its frame needs {needed} slots, more than all robots may have together"
                refused[request] = RefusedRequestError(
                    f"{text}: shorten the instruction, or serve with more --kv-memory"
                )
        ready = [(request, plan) for request, plan in ready if request not in refused]
        planned = {request.robot: request for request in (*(r for r, _ in ready), *waiting) if request.planned}
        for request, plan in ready:
            if request.planned is None:  # it made room for the first
                continue
            silent = {*robots, *(other.robot for other in waiting)} - {*planned, *running}
            others = [] if settled else [robot for robot in reversed(planned) if robot not in (request.robot, *running)]
            holders = [r for r in (*sorted(silent, key=lambda robot: robot.answered), *others) if r.nbytes]
            while not (fits := self._fits(request.robot, plan, robots)) and holders:
                self._evict(holders.pop(0), planned)
            if fits:
                self.engine.store.reserve(plan.plan.region, self.engine.slots(plan.plan))
                settled.append((request, plan))
            elif not settled and not running:
                self._evict(request.robot, planned)  # what it holds is in its own way
        return settled, refused

    def _fits(self, robot: RobotSession, plan: PlannedFrame, robots: Collection[RobotSession]) -> bool:
        others = sum(other.nbytes > 0 for other in robots if other is not robot)
        return others < self.robots and self.engine.store.fits(plan.plan.region, self.engine.slots(plan.plan))

    def _evict(self, robot: RobotSession, planned: dict[RobotSession, Request]) -> None:
        self.evictions += robot.nbytes > 0
        robot.release()
        if robot in planned:
            planned[robot].planned = None  # it is planned anew, in full
