"""One robot's session on the server: when an episode begins, what a frame may cost, whether its cache is trusted."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lac_vla.client.observation import ObservationKeys
from lac_vla.engine.step_info import StepInfo
from lac_vla.errors import InputError
from lac_vla.factory import CachedVLA
from lac_vla.serving.controller import DeadlineController, LatencyTable
from lac_vla.types import FloatArray, Frame

SLACK_SHARE = 0.5
"""Share of the expected idle time that slack refresh takes, at most."""
LEARNING = 0.2
"""Weight of the newest idle time in the expected one."""
MAX_SEED = 2**63 - 1


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
        self._instruction: str | None = None
        self._episode: Any = None
        self._shapes: Mapping[str, tuple[int, int]] = {}
        self._action: FloatArray | None = None
        self._answered = 0.0
        self._idle: float | None = None  # expected seconds from an answer to the next request
        self._frames = self._cooling = self._refreshed = 0
        self._disagreement: float | None = None

    @property
    def nbytes(self) -> int:
        """Memory of the cache, in bytes."""
        return self._session.nbytes

    def answer(self, request: Mapping[str, Any], arrived: float) -> Answer:
        """Answer a request that came at ``arrived``, by ``time.perf_counter()``.

        Raises:
            InputError: If the request cannot be used.
        """
        start = time.perf_counter()
        frame = self.keys.frame(request)
        reset = self._begin(request, frame, arrived)
        session, waited = self._session, 1e3 * (start - arrived)
        if self.controller is not None:
            session.token_budget = self.controller.token_budget(waited)
        action = session.act(frame)
        step = session.last_info
        if step is None:  # pragma: no cover - act always leaves a step
            raise RuntimeError("the session did not report its step")
        took = 1e3 * (time.perf_counter() - start)
        if self.controller is not None and step.dense_reason is None:
            self.controller.observe(step.decision.exit_layer.sum() / step.decision.n_layers, took)
        message = {
            "actions": np.atleast_2d(action)[: self.options.actions_per_call or None],
            "policy_timing": {"infer_ms": step.timings["model_call"]},
            "server_timing": {"infer_ms": took},
            "lac": self._report(step, reset, waited, took),
        }
        self._action, self._refreshed, self._disagreement = action, 0, None
        self._frames += 1
        self._cooling = max(0, self._cooling - 1)
        if not self._cooling:
            session.force_dense = None
        self._answered = time.perf_counter()
        return Answer(message, step, reset, frame)

    def spare(self) -> Callable[[], object] | None:
        """Choose what this session does before its robot asks again, if anything."""
        every = self.options.shadow_every
        if every and self._frames % every == 0:
            return self.shadow
        return self.refresh if self.options.slack and self._idle is not None else None

    def refresh(self) -> int:
        """Compute as many of the stalest slots as the expected idle time allows, and return their number."""
        if self.table is None or self._idle is None:
            return 0
        correction = 1.0 if self.controller is None else self.controller.correction
        count = self._session.refresh(self.table.tokens_in(1e3 * SLACK_SHARE * self._idle / correction))
        self._refreshed += count
        return count

    def shadow(self) -> float | None:
        """Compare the last action with that of the model without a cache; if they disagree, the next frames are dense.

        Returns:
            Mean absolute difference; ``None`` if there is nothing to compare.
        """
        dense = self._session.shadow()
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
        idle = arrived - self._answered
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
            self._cooling, self._action, self._idle = 0, None, None
        elif self._idle is None:
            self._idle = idle
        else:
            self._idle += LEARNING * (max(0.0, idle) - self._idle)
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
