"""One robot's session on the server: when an episode begins, what a frame may cost, whether its cache is trusted."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from lac_vla.client.observation import ObservationKeys
from lac_vla.engine.deciding import PreparedFrame
from lac_vla.engine.plan import FramePlan, FrameResult
from lac_vla.engine.step_info import StepInfo
from lac_vla.engine.work import Work
from lac_vla.errors import InputError
from lac_vla.factory import CachedVLA
from lac_vla.realtime.deadline import DeadlineController, LatencyTable
from lac_vla.running_chunk import RealTimeChunk
from lac_vla.types import FloatArray, Frame

SLACK_SHARE = 0.5
"""Share of the expected idle time that slack refresh takes, at most."""
LEARNING = 0.2
"""Weight of the newest idle time in the expected one."""
PAUSES = 128
"""A robot's pace is the upper quartile of so many pauses: where it has to wait, it asks at once, and none shows."""
FEWEST_PAUSES = 8
"""Of fewer, nobody can tell the pace."""
MAX_SEED = 2**63 - 1
MAX_HZ = 10_000


class RefusedRequestError(InputError):
    """A request that cannot be used, and of which nothing was planned: its robot may send another."""


def pace(pauses: Collection[float]) -> float | None:
    """Tell a robot's pace by its last pauses, from answer to request; ``None`` if they are too few."""
    return None if len(pauses) < FEWEST_PAUSES else sorted(pauses)[3 * (len(pauses) - 1) // 4]


@contextmanager
def refusing() -> Iterator[None]:
    """Refuse a request where what it sent is at fault: what follows its plan is no refusal any more."""
    try:
        yield
    except InputError as error:
        raise RefusedRequestError(str(error)) from error


@dataclass(frozen=True)
class SessionOptions:
    """Options that all sessions of a server have in common.

    Attributes:
        gap_s: A robot that was silent for longer, in seconds, begins a new episode: stock clients cannot say it.
        slack: In idle time, compute the stalest slots of the last frame anew.
        shadow_every: In idle time, after every so many frames, compare the action with that of the model without a
            cache; 0 for never.
        shadow_threshold: Mean absolute difference of the two, in the action's units, from which on the cache is
            distrusted.
        cooldown: Frames that are then computed in full.
        actions_per_call: Actions of the model's chunk in every answer, which the robot executes before it asks again;
            0 for the whole chunk, of which the robot executes as many as it likes.

    Raises:
        InputError: If an option makes no sense.
    """

    gap_s: float = 5.0
    slack: bool = False
    shadow_every: int = 0
    shadow_threshold: float = 0.1
    cooldown: int = 10
    actions_per_call: int = 0

    def __post_init__(self) -> None:
        if not self.gap_s > 0 or not self.shadow_threshold > 0:
            raise InputError("gap_s and shadow_threshold must be greater than 0")
        if self.shadow_every < 0 or self.cooldown < 1:
            raise InputError("shadow_every must be at least 0, cooldown at least 1")
        if self.actions_per_call < 0:
            raise InputError(f"actions_per_call is {self.actions_per_call}; give at least 1, or 0 for the whole chunk")


@dataclass(frozen=True, eq=False)
class PreparedRequest:
    """A request that was checked, and may be decided on.

    Attributes:
        prepared: The session's part.
        reset: The reason if a new episode began.
        arrived: When the request came, by ``time.perf_counter()``.
        control_hz: See :class:`PlannedFrame`.
    """

    prepared: PreparedFrame
    reset: str | None
    arrived: float
    control_hz: float | None = None


@dataclass(frozen=True, eq=False)
class PlannedFrame:
    """A request that an engine may run.

    Attributes:
        plan: The plan.
        frame: The robot's observation.
        reset: The reason if a new episode began.
        arrived: When the request came, by ``time.perf_counter()``.
        tokens: Visual tokens that it computes, at most; one that is computed in half of the layers counts half.
        control_hz: The robot's control rate, where it wants to know how many steps its answer took.
    """

    plan: FramePlan
    frame: Frame
    reset: str | None
    arrived: float
    tokens: float
    control_hz: float | None = None


@dataclass(frozen=True, eq=False)
class Answer:
    """The answer to a request, and what it was made of.

    Attributes:
        message: The message for the robot.
        step: The session's report of the frame.
        reset: The reason if a new episode began.
        frame: The robot's observation.
    """

    message: dict[str, Any]
    step: StepInfo
    reset: str | None
    frame: Frame


@dataclass(eq=False)
class RobotSession:
    """The session of one connection. Its methods run in the model's thread, one at a time.

    Its fields are the server's, see :class:`lac_vla.serving.server.PolicyServer`.

    Attributes:
        answered: When it was answered last, or else began, by ``time.perf_counter()``.
        idle: Expected seconds from an answer to its next request; ``None`` if nobody knows.
        pause: The same where nothing keeps it waiting: its pace, though others may make it wait for a while; ``None``
            as long as it is not known.

    Raises:
        InputError: If slack refresh lacks its table.
    """

    vla: CachedVLA
    keys: ObservationKeys
    options: SessionOptions
    controller: DeadlineController | None = None
    table: LatencyTable | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.options.slack and self.table is None:
            raise InputError("slack refresh needs a latency table: LatencyTable.measure(vla)")
        self._session = self.vla.session(self.seed)
        self._session.steps_per_frame = self.options.actions_per_call or 1
        self._instruction: str | None = None
        self._episode: Any = None
        self._shapes: Mapping[str, tuple[int, int]] = {}
        self._action: FloatArray | None = None
        self.answered = time.perf_counter()
        self.idle: float | None = None
        self.pause: float | None = None
        self._pauses = deque[float](maxlen=PAUSES)
        self._begun: str | None = None
        self._frames = self._cooling = self._refreshed = 0
        self._disagreement: float | None = None

    @property
    def nbytes(self) -> int:
        """Memory of the cache, in bytes."""
        return self._session.nbytes

    @property
    def expected(self) -> float:
        """When the robot will probably ask again, by ``time.perf_counter()``; infinite if nobody knows."""
        return math.inf if self.idle is None else self.answered + self.idle

    def release(self) -> None:
        """Give the memory of the cache back; the robot starts dense when it returns."""
        self._session.release()

    @refusing()
    def prepare(self, request: Mapping[str, Any], arrived: float) -> PreparedRequest:
        """Prepare a request that came at ``arrived``, by ``time.perf_counter()``.

        Raises:
            RefusedRequestError: If the request cannot be used; the robot may send another. An episode that it was to
                begin, where only its images, instruction or running chunk are wrong, begins with that one.
        """
        frame, hz = self.keys.frame(request), request.get("control_hz")
        if hz is not None and not (isinstance(hz, int | float | np.number) and 0 < hz <= MAX_HZ):
            raise InputError(f"control_hz must be a number above 0, at most {MAX_HZ}: the robot's control rate")
        rtc = RealTimeChunk.of_request(request)
        self._begun = self._begin(request, frame, arrived) or self._begun
        prepared = self._session.prepare(frame, rtc)
        return PreparedRequest(prepared, self._begun, arrived, None if hz is None else float(hz))

    def plan(self, prepared: PreparedRequest, token_budget: int | None = None) -> PlannedFrame:
        """Plan a request that was prepared, within a number of tokens."""
        self._session.token_budget = token_budget
        plan, frame = self._session.decide(prepared.prepared), prepared.prepared.frame
        tokens = float(plan.prompt.layout.n_visual)
        if plan.dense_reason is None and not isinstance(plan.decided, Future):
            decision, _ = plan.decided
            tokens = float(decision.exit_layer.sum() / decision.n_layers)
        elif plan.dense_reason is None and token_budget is not None:  # still being decided, within the budget
            tokens = min(tokens, token_budget)
        return PlannedFrame(plan, frame, prepared.reset, prepared.arrived, tokens, prepared.control_hz)

    def commit(self, planned: PlannedFrame, result: FrameResult, begun: float, robots: int = 1) -> Answer:
        """Answer a planned request.

        Args:
            planned: From :meth:`plan`.
            result: The engine's, for its plan.
            begun: When its batch was begun, by ``time.perf_counter()``.
            robots: Requests in the batch.

        Raises:
            Exception: If something went wrong in the run.
        """
        session = self._session
        step, action = session.commit(planned.plan, result), result.action
        if action is None:  # pragma: no cover - what was committed has one
            raise RuntimeError("the engine left no action")
        waited, took = 1e3 * (begun - planned.arrived), 1e3 * (time.perf_counter() - begun)
        executed = self.options.actions_per_call if planned.plan.rtc is None else 0  # the rest is the next left-over
        message = {
            "actions": np.atleast_2d(action)[: executed or None],
            "policy_timing": {"infer_ms": step.timings["model_call"]},
            "server_timing": {"infer_ms": took},
            "lac": {**self._report(step, planned.reset, waited, took), "batch": robots},
        }
        if planned.control_hz is not None:
            message["inference_delay"] = math.ceil((waited + took) * planned.control_hz / 1e3)
        self._begun = None  # not before: a request that was refused, or is planned anew, has begun its episode
        self._action, self._refreshed, self._disagreement = action, 0, None
        self._frames += 1
        self._cooling = max(0, self._cooling - 1)
        if not self._cooling:
            session.force_dense = None
        self.answered = time.perf_counter()
        return Answer(message, step, planned.reset, planned.frame)

    def spare(self) -> IdleJob | None:
        """Choose what this session does before its robot asks again, if anything."""
        every = self.options.shadow_every
        if every and self._frames % every == 0:
            return IdleJob(self, shadow=True)
        return IdleJob(self, shadow=False) if self.options.slack and self.idle is not None else None

    def refresh(self, quiet_s: float = math.inf, share: float = 1.0) -> Work[int]:
        """Compute as many of the stalest slots as the expected idle time allows, and return their number.

        Args:
            quiet_s: Seconds until another robot is expected to ask.
            share: Share of the time that is this robot's, in (0, 1].
        """
        if self.table is None or self.idle is None:
            return 0
        correction = 1.0 if self.controller is None else self.controller.correction
        milliseconds = 1e3 * SLACK_SHARE * share * min(self.idle, quiet_s) / correction
        count = yield from self._session.refreshing(self.table.tokens_in(milliseconds))
        self._refreshed += count
        return count

    def shadow(self) -> Work[float | None]:
        """Compare the last action with that of the model without a cache; if they disagree, the next frames are dense.

        Returns:
            Mean absolute difference; ``None`` if there is nothing to compare.
        """
        dense = yield from self._session.shadowing()
        if dense is None or self._action is None:
            return None
        self._disagreement = float(np.abs(dense - self._action).mean())
        if not self._disagreement <= self.options.shadow_threshold:  # NaN is no agreement
            self._session.force_dense = f"shadow pass disagreed by {self._disagreement:.3g}"
            self._cooling = self.options.cooldown
        return self._disagreement

    def _begin(self, request: Mapping[str, Any], frame: Frame, arrived: float) -> str | None:
        """Begin a new episode if this request does, and return the reason; ``None`` at the first request of all."""
        episode, seed, again = (request.get(key) for key in ("episode_id", "seed", "reset"))
        if isinstance(again, np.ndarray) and again.size == 1:
            again = again.item()
        if not isinstance(again, bool | int | float | np.generic | None):
            raise InputError("reset must be true or false")
        if seed is not None and not (isinstance(seed, int | np.integer) and 0 <= seed <= MAX_SEED):
            raise InputError("seed must be a whole number from 0 on")
        if not isinstance(episode, str | int | np.integer | None):
            raise InputError("episode_id must be a text or a whole number")
        idle = arrived - self.answered
        first, reason = self._instruction is None, None
        if again:
            reason = "reset"
        elif episode != self._episode:
            reason = "new episode"
        elif frame.instruction != self._instruction:
            reason = "new instruction"
        elif frame.shapes != self._shapes:
            reason = "other cameras"
        elif idle > self.options.gap_s:
            reason = "time gap"
        if reason is not None:
            self._session.reset(None if seed is None else int(seed))
            self._cooling, self._action, self.idle = 0, None, None
        elif self.idle is None:
            self.idle = idle
        else:
            self.idle += LEARNING * (max(0.0, idle) - self.idle)
        if reason is None:  # what is between two episodes is no pace
            self._pauses.append(max(0.0, idle))
            self.pause = pace(self._pauses)
        self._instruction, self._episode, self._shapes = frame.instruction, episode, frame.shapes
        return None if first else reason

    def _report(self, step: StepInfo, reset: str | None, waited: float, took: float) -> dict[str, Any]:
        deadline = None if self.controller is None else self.controller.deadline_ms
        return {
            "ratio": step.ratio,
            "nominal_ratio": step.nominal_ratio,
            "oldest_age": step.oldest_age,
            "mean_age": float(step.age.mean()),
            "recovered": int(step.recovered.sum()),
            "token_budget": self._session.token_budget,
            "late": None if deadline is None else waited + took > deadline,
            "reset": reset,
            "dense_reason": step.dense_reason,
            "refreshed": self._refreshed,
            "shadow": self._disagreement,
            "waited_ms": waited,
            "stages": dict(step.stages),
        }


@dataclass(frozen=True, eq=False)
class IdleJob:
    """Work of a robot's session is done while nobody asks.

    Attributes:
        robot: The robot.
        shadow: Whether it is a shadow pass; if not, slack refresh.
    """

    robot: RobotSession
    shadow: bool

    def together(self, count: int, quiet_s: float) -> bool:
        """Tell whether so many of its kind at once are done before another robot is expected to ask."""
        table, robot = self.robot.table, self.robot
        if count == 1 or table is None:
            return count == 1
        least, free = (table.milliseconds[-1], 1.0) if self.shadow else (table.milliseconds[0], SLACK_SHARE)
        return count * table.factor(count) * least <= 1e3 * free * min(quiet_s, robot.idle or math.inf)

    def begin(self, count: int, quiet_s: float) -> Work[object]:
        """Begin it, as one of so many."""
        factor = 1.0 if self.robot.table is None else self.robot.table.factor(count)
        return self.robot.shadow() if self.shadow else self.robot.refresh(quiet_s, 1 / (count * factor))


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
