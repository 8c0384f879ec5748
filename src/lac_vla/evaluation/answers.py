"""An answer is there at a time: in virtual time, by what a frame computed, or on the wall clock, by when it came."""

from __future__ import annotations

import math
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from lac_vla.engine.step_info import StepInfo, StepReport
from lac_vla.errors import InputError
from lac_vla.realtime.deadline import DeadlineController
from lac_vla.realtime.device import DeviceTable, quantities
from lac_vla.results.realtime import delay
from lac_vla.session import Session
from lac_vla.sims.base import Env
from lac_vla.types import FloatArray

Think = Callable[[], tuple[FloatArray, StepReport]]
"""Has the policy look at an observation: its answer, (n, A), and the session's report."""


class Latency(Protocol):
    """The latency of a call: a number, or what a device's table says."""

    def __call__(self, report: StepReport, chance: float) -> float:
        """Return milliseconds from observation to answer; ``chance``, in [0, 1), decides about the jitter."""
        ...


@dataclass(frozen=True)
class Constant:
    """Every answer takes as long.

    Attributes:
        milliseconds: How long; finite, at least 0.
    """

    milliseconds: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.milliseconds) and self.milliseconds >= 0):
            raise InputError(f"a latency of {self.milliseconds} ms cannot be: give a finite number, at least 0")

    def __call__(self, report: StepReport, chance: float) -> float:
        """See :class:`Latency`."""
        return self.milliseconds


@dataclass(frozen=True)
class OnDevice:
    """An answer takes what its frame would on a device.

    Attributes:
        table: The device's.
        policy: Key of :data:`lac_vla.policies.POLICIES`.
        flow: Whether the session estimates optical flow.
    """

    table: DeviceTable
    policy: str
    flow: bool

    def __call__(self, report: StepReport, chance: float) -> float:
        """See :class:`Latency`."""
        return self.table.factor(chance) * self.typical(report)

    def typical(self, report: StepReport) -> float:
        """Return the milliseconds without jitter."""
        if not isinstance(report, StepInfo):
            raise InputError("a latency table needs to see what was computed: it cannot be used with a server")
        return self.table.milliseconds(quantities(report, self.policy, flow=self.flow))


@dataclass(frozen=True)
class Answer:
    """The outcome of an observation.

    Attributes:
        chunk: Actions, (n, A).
        report: The session's report.
        milliseconds: From observation to answer.
    """

    chunk: FloatArray
    report: StepReport
    milliseconds: float


class Answers(ABC):
    """The clock of one episode, ticking at the control rate: when an answer to an observation is there.

    One observation is thought about at a time.
    """

    @abstractmethod
    def think(self, tick: int, think: Think) -> None:
        """Have the policy think about the observation of a tick."""

    @abstractmethod
    def take(self, tick: int) -> Answer | None:
        """Return the answer, once, at the first tick at or after it is there; ``None`` before."""

    def rendered(self, seconds: float) -> None:  # noqa: B027 - virtual time does not pass meanwhile
        """Leave out the time that a simulator needs for a picture: a camera takes none."""

    def await_tick(self, tick: int) -> None:  # noqa: B027 - as above
        """Wait until a tick has come."""

    def end(self) -> Answer | None:
        """End the episode; return the answer that came too late, if there is one."""
        return None


@dataclass
class Virtual(Answers):
    """Time is what the latency says: deterministic, whatever machine plays.

    Attributes:
        latency: Of every call.
        control_hz: Ticks per second.
        rng: Chance of the jitter, drawn once per call.
        session: Held to the deadline, if there is one.
        controller: Keeps the deadline.
    """

    latency: Latency
    control_hz: float
    rng: np.random.Generator
    session: Session | None = None
    controller: DeadlineController | None = None
    _answer: Answer | None = field(default=None, init=False)
    _ready: int = field(default=0, init=False)

    def think(self, tick: int, think: Think) -> None:
        """See :meth:`Answers.think`."""
        if self.controller is not None and self.session is not None:
            self.session.token_budget = self.controller.token_budget(self.controller.left(0.0))
        chunk, report = think()
        took = self.latency(report, float(self.rng.random()))
        if self.controller is not None:
            self.controller.observe(self.controller.table(_computed(report)), took)
        self._answer, self._ready = Answer(chunk, report, took), tick + delay(took, self.control_hz)

    def take(self, tick: int) -> Answer | None:
        """See :meth:`Answers.take`."""
        if self._answer is None or tick < self._ready:
            return None
        answer, self._answer = self._answer, None
        return answer

    def end(self) -> Answer | None:
        """See :meth:`Answers.end`."""
        if self.session is not None:
            self.session.token_budget = None
        return self._answer


class Wall(Answers):
    """Time is this machine's: the policy thinks in a thread of its own, while the simulator keeps to the world's time.

    Args:
        control_hz: Ticks per second.
    """

    def __init__(self, control_hz: float) -> None:
        self._tick_s = 1.0 / control_hz
        self._thread = ThreadPoolExecutor(1, "policy")
        self._future: Future[Answer] | None = None
        self._begin = time.perf_counter()

    def think(self, tick: int, think: Think) -> None:
        """See :meth:`Answers.think`."""

        def timed() -> Answer:
            begin = time.perf_counter()
            chunk, report = think()
            return Answer(chunk, report, 1e3 * (time.perf_counter() - begin))

        self._future = self._thread.submit(timed)

    def take(self, tick: int) -> Answer | None:
        """See :meth:`Answers.take`."""
        if self._future is None or not self._future.done():
            return None
        future, self._future = self._future, None
        return future.result()

    def rendered(self, seconds: float) -> None:
        """See :meth:`Answers.rendered`."""
        self._begin += seconds

    def await_tick(self, tick: int) -> None:
        """See :meth:`Answers.await_tick`. A tick that is late stays late: the world's time goes on from there."""
        left = self._begin + tick * self._tick_s - time.perf_counter()
        if left > 0:
            time.sleep(left)
        else:
            self._begin -= left

    def end(self) -> Answer | None:
        """See :meth:`Answers.end`."""
        self._thread.shutdown()
        return None if self._future is None else self._future.result()


def episode_chance(env: Env, init_state: int, seed: int) -> np.random.Generator:
    """Make the chance of an episode's jitter: the same for all methods, however the work is shared out."""
    return np.random.default_rng([seed, zlib.crc32(env.suite.encode()), env.task, init_state])


def _computed(report: StepReport) -> float:
    """Count the visual tokens that a frame computed; one that left in mid-depth counts in part."""
    if not isinstance(report, StepInfo):  # pragma: no cover - a deadline is refused before
        raise InputError("a deadline in virtual time needs the session in this process")
    return float(report.decision.exit_layer.sum() / report.decision.n_layers)
