"""One episode in a world that does not wait: it ticks at the control rate, whether an answer is there or not.

The observation of tick k is taken when the policy begins to think. Its answer acts at the first tick at or after it is
there, d ticks later. What happens meanwhile is the mode:

========  ====================================================  ===================================================
mode      while the policy thinks                               the next observation
========  ====================================================  ===================================================
hold      a null action, the gripper as it was                  when ``actions_per_call`` actions of the answer are
                                                                done
chunk     the running chunk goes on; a null action behind it    as hold
async     as chunk                                              when the last answer is there, and at least
                                                                ``actions_per_call`` ticks after the last one
rtc       as async; the policy is told which actions of the     as async
          running chunk will be executed before it answers
========  ====================================================  ===================================================

An answer takes over at the action that is its present one: as many of its first actions are skipped as the robot has
executed since the observation, but the last one never. With no latency every mode is the episode of a waiting world.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from lac_vla.evaluation.answers import Answer, Answers, OnDevice
from lac_vla.evaluation.rollout import EpisodeLog, ask, check_length
from lac_vla.results.realtime import RealTime
from lac_vla.results.records import EpisodeRecord
from lac_vla.running_chunk import RealTimeChunk
from lac_vla.types import FloatArray, Frame

Mode: TypeAlias = Literal["hold", "chunk", "async", "rtc"]


@dataclass
class _Running:
    """The chunk that drives the robot: its next action, and the tick of its observation."""

    chunk: FloatArray
    index: int
    observed: int
    done: int = 0

    @property
    def over(self) -> bool:
        return self.index >= len(self.chunk)


class TickObserver(Protocol):
    """Watches the world tick by tick, e.g. to make a film of it."""

    def tick(self, frame: Frame, *, thinking: bool) -> None:
        """See the world at a tick, and whether the robot waits for an answer then."""
        ...


class RealTimeEpisode:
    """Plays the episode of a log in a world that does not wait.

    Args:
        log: Of the episode, which it begins.
        answers: When an answer is there; of this episode alone.
        mode: What the robot does meanwhile; with an ensemble ``hold``.
        predict: This machine's table, where the answers are those of the wall clock.
        watch: Is shown every tick; it renders them all, so not on the wall clock.
    """

    def __init__(
        self,
        log: EpisodeLog,
        answers: Answers,
        mode: Mode,
        predict: OnDevice | None = None,
        watch: TickObserver | None = None,
    ) -> None:
        self.log, self.answers, self.mode, self.predict, self.watch = log, answers, mode, predict, watch
        self._running: _Running | None = None
        self._seen: Frame | None = None  # what the policy thinks about
        self._observed: list[int] = []
        self._acted: list[int | None] = []
        self._answer_ms: list[float] = []
        self._predicted_ms: list[float] = []
        self._executed = 0  # actions of answers, over the whole episode
        self._executed_then = 0  # at the last observation
        self._held = self._stale = 0
        self._gripper: float | None = None

    def play(self, clock: str, table: str = "", deadline_ms: float | None = None) -> EpisodeRecord:
        """Play the episode until the task is solved or the horizon, in ticks, is reached.

        Args:
            clock: Name of what says how long an answer takes, for the record.
            table: Name of the latency table, for the record.
            deadline_ms: What the policy is held to, for the record.
        """
        frame, env = self.log.begin(), self.log.env
        tick, success = 0, False

        def see() -> Frame:
            return frame

        try:
            while tick < env.horizon and not success:
                self.answers.await_tick(tick)
                self._take(tick)
                if self._looks(tick):
                    begin = time.perf_counter()
                    self._seen = see()
                    self.answers.rendered(time.perf_counter() - begin)
                    self._think(tick, self._seen)
                    self._take(tick)
                held, action = self._held, self._action(tick)
                if self.watch is not None:
                    self.watch.tick(see(), thinking=self._held > held)
                see, success = env.tick(action)
                tick += 1
        finally:
            late = self.answers.end()
        if late is not None:
            self._note(late, None)
        real = RealTime(
            clock=clock,
            mode=self.mode,
            control_hz=env.control_hz,
            observed=self._observed,
            acted=self._acted,
            answer_ms=self._answer_ms,
            predicted_ms=self._predicted_ms,
            held=self._held,
            stale=self._stale,
            deadline_ms=deadline_ms,
            table=table,
        )
        return self.log.record(success=success, steps=tick, realtime=real)

    def _looks(self, tick: int) -> bool:
        """Tell whether the policy looks at the world at this tick."""
        if self._seen is not None:
            return False
        running = self._running
        if running is None or running.over:
            return not self._observed or tick > self._observed[-1]
        if self.mode in ("hold", "chunk"):
            return running.done >= self.log.actions_per_call
        return tick >= self._observed[-1] + self.log.actions_per_call

    def _think(self, tick: int, frame: Frame) -> None:
        """Give the policy an observation to think about."""
        session = self.log.session
        self.log.begin_anew(frame)
        rtc = self._left() if self.mode == "rtc" else None
        self._observed.append(tick)
        self._executed_then = self._executed
        self.answers.think(tick, lambda: ask(session, frame, rtc))

    def _left(self) -> RealTimeChunk | None:
        """Tell what the running chunk still holds, and how much of it will be executed if this call takes as the last.

        ``None`` where nothing will be: there is no chunk, or answers take no time.
        """
        running, last = self._running, self._acted[-1] if self._acted else None
        if running is None or running.over or last is None or (ticks := last - self._observed[-1]) < 1:
            return None
        actions = running.chunk[running.index :]
        return RealTimeChunk(actions, min(ticks, len(actions)))

    def _take(self, tick: int) -> None:
        """Let an answer take over, if there is one."""
        answer = self.answers.take(tick) if self._seen is not None else None
        if answer is None:
            return
        self._note(answer, tick)
        chunk = answer.chunk if self.log.ensemble is None else self.log.ensemble(answer.chunk)[None]
        check_length(chunk, self.log.actions_per_call)
        index = min(self._executed - self._executed_then, len(chunk) - 1)
        self._running = _Running(chunk, index, self._observed[-1])

    def _note(self, answer: Answer, tick: int | None) -> None:
        """Write an answer down, which acts from a tick on; ``None`` if it came too late."""
        if self._seen is not None:
            self.log.add(self._seen, answer.report)
        self._seen = None
        self._acted.append(tick)
        self._answer_ms.append(round(answer.milliseconds, 4))
        if self.predict is not None:
            self._predicted_ms.append(round(self.predict.typical(answer.report), 4))

    def _action(self, tick: int) -> npt.NDArray[np.float64]:
        """Choose the action of a tick: the running chunk's next, or none."""
        running = self._running
        if running is None or running.over or (self._seen is not None and self.mode == "hold"):
            action = np.array(self.log.env.no_op, dtype=np.float64)
            action[-1] = action[-1] if self._gripper is None else self._gripper
            self._held += 1
            return action
        action = np.asarray(running.chunk[running.index], dtype=np.float64)
        running.index, running.done, self._executed = running.index + 1, running.done + 1, self._executed + 1
        self._stale += tick - running.observed > 1
        self._gripper = float(action[-1])
        return action
