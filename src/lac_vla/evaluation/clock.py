"""The clock of a world that does not wait: what says how long an answer takes, and what the robot does meanwhile."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from lac_vla.engine.budget import smallest_budget
from lac_vla.engine.step_info import PolicySession, StepInfo
from lac_vla.errors import InputError
from lac_vla.evaluation.answers import Answers, Constant, Latency, OnDevice, Virtual, Wall, episode_chance
from lac_vla.evaluation.realtime import Mode, RealTimeEpisode, TickObserver
from lac_vla.evaluation.rollout import EpisodeLog
from lac_vla.models.vla import VLA
from lac_vla.realtime.deadline import SHARES, DeadlineController, LatencyTable
from lac_vla.realtime.device import DeviceTable, Stages, find_tables, fitting, quantities
from lac_vla.results.realtime import clock_label, delay
from lac_vla.results.records import EpisodeRecord
from lac_vla.session import Session
from lac_vla.types import Frame

WALL = "wall"
"""The clock of the machine itself."""
HERE = "cpu"
"""The device whose table predicts the wall clock."""


@dataclass(frozen=True)
class WorldClock:
    """A clock as a command line gives it.

    Attributes:
        clock: Name of a device or table, a table's file, milliseconds, or ``wall``.
        mode: What the robot does while the policy thinks, see :mod:`lac_vla.evaluation.realtime`.
        deadline_ms: What the server's deadline controller holds the policy to, in virtual time.

    Raises:
        InputError: If there is no such device, a time is negative or no number, or a deadline has no table.
    """

    clock: str
    mode: Mode = "hold"
    deadline_ms: float | None = None

    def __post_init__(self) -> None:
        if self.constant is None and self.clock != WALL:
            _ = self.tables
        if self.deadline_ms is None:
            return
        if not (math.isfinite(self.deadline_ms) and self.deadline_ms > 0):
            raise InputError(f"deadline_ms is {self.deadline_ms}: give a finite time above 0")
        if not self.tables:
            raise InputError(
                f"a deadline in virtual time needs a latency table, and {self.clock!r} has none: give --clock DEVICE; "
                "on the wall clock, `lac serve --deadline-ms` keeps it"
            )

    @cached_property
    def constant(self) -> Constant | None:
        """The latency in milliseconds that was given; ``None`` if none was."""
        try:
            milliseconds = float(self.clock)
        except ValueError:
            return None
        return Constant(milliseconds)

    @cached_property
    def tables(self) -> tuple[DeviceTable, ...]:
        """The device's latency tables; none for a constant and for the wall clock."""
        return () if self.constant is not None or self.clock == WALL else tuple(find_tables(self.clock))

    @property
    def name(self) -> str:
        """Name it for records, without folders."""
        if self.constant is not None:
            return f"{self.constant.milliseconds:g} ms"
        return Path(self.clock).stem if self.clock.endswith(".json") else self.clock

    @property
    def label(self) -> str:
        """Name it with its mode and deadline, as records do."""
        return clock_label(self.name, self.mode, self.deadline_ms)

    @property
    def digest(self) -> str:
        """Condense the content of its tables: a run goes on with the same numbers only."""
        content = json.dumps([table.to_json() for table in self.tables], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:12] if self.tables else ""

    @property
    def note(self) -> str:
        """Say in a sentence or two what a reader of the results must know."""
        what = f"The world did not wait: an answer took what {self.name} says, mode {self.mode}. "
        if self.clock == WALL:
            what = f"The world did not wait: it ran on this machine's own clock, mode {self.mode}. "
        elif self.constant is not None:
            what = f"The world did not wait: every answer took {self.name}, mode {self.mode}, virtual time. "
        if self.deadline_ms is not None:
            what += f"The policy was held to {self.deadline_ms:g} ms. "
        for table in self.tables:
            whose = f" A smaller model plays with the latencies of {table.shape.model}." if table.shape.scaled else ""
            what += (
                f"Table {table.name} ({table.kind}, {table.precision}): {table.source} Dense: {table.baseline}{whose} "
            )
        return what.strip()

    def credit(self, table: str) -> str:
        """Say in a line whose latencies an episode played, for its film; ``table`` is the one that its record names."""
        if self.clock == WALL:
            return "this machine's own clock"
        if self.constant is not None:
            return f"virtual time: every answer takes {self.name}"
        found = next(each for each in self.tables if each.name == table)
        return f"virtual time: latencies of {found.shape.model} on {found.hardware} ({found.kind}, {found.precision})"

    def check(self, model: VLA | None, actions_per_call: int, *, ensemble: bool) -> None:
        """Refuse a model, or a server's (``None``), that cannot be played by this clock.

        Raises:
            InputError: If the table is another model's, or the mode does not fit.
        """
        if ensemble and self.mode != "hold":
            raise InputError(
                f"mode {self.mode!r} executes what is left of a chunk, and an ensemble makes one action per call: "
                "give --ensemble 1, or --mode hold"
            )
        if model is None:
            if self.tables:
                raise InputError("a server does not tell what it computed: give --clock MS or --clock wall with it")
            if self.mode == "rtc":
                raise InputError("mode 'rtc' guides the action head, which a server keeps: leave --server out")
            return
        if self.tables:
            fitting(self.tables, model)
        if self.mode == "rtc" and model.horizon < 2:
            raise InputError(
                f"mode 'rtc' goes on with a running chunk, and {model.name}'s {type(model.head).__name__} answers with "
                "single actions: give --mode async"
            )

    def episode(
        self,
        log: EpisodeLog,
        policy: str,
        *,
        flow: bool,
        sample: StepInfo | None = None,
        watch: TickObserver | None = None,
    ) -> EpisodeRecord:
        """Play the episode of a log by this clock.

        Args:
            log: Of the episode.
            policy: Key of :data:`lac_vla.policies.POLICIES`.
            flow: Whether the session estimates optical flow.
            sample: Report of a dense frame; needed for a deadline.
            watch: Is shown every tick.

        Raises:
            InputError: If an answer takes longer than a chunk, or the deadline cannot be kept with the fewest tokens.
        """
        session, env = log.session, log.env
        model = session.model if isinstance(session, Session) else None
        if model is not None:
            self._check_delay(model, env.control_hz)
        device = OnDevice(fitting(self.tables, model), policy, flow) if self.tables and model is not None else None
        predict = None
        answers: Answers
        if self.clock == WALL:
            predict = _predicting(model, policy, flow=flow)
            answers = Wall(env.control_hz)
        else:
            latency: Latency | None = device if device is not None else self.constant
            if latency is None:  # pragma: no cover - checked before
                raise InputError("a server does not tell what it computed: give --clock MS or --clock wall with it")
            chance = episode_chance(env, log.init_state, log.seed)
            answers = Virtual(latency, env.control_hz, chance)
            if self.deadline_ms is not None and device is not None and isinstance(session, Session):
                session.steps_per_frame = log.actions_per_call
                answers.session, answers.controller = session, self._controller(session, device, sample)
        table = "" if device is None else device.table.name
        return RealTimeEpisode(log, answers, self.mode, predict, watch).play(self.name, table, self.deadline_ms)

    def _controller(self, session: Session, device: OnDevice, sample: StepInfo | None) -> DeadlineController:
        if sample is None or self.deadline_ms is None:  # pragma: no cover - the worker makes one
            raise InputError("a deadline needs the report of a dense frame")
        return deadline_controller(session, device, sample, self.deadline_ms)

    def _check_delay(self, model: VLA, control_hz: float) -> None:
        """Refuse chunks of which every action would be in the past when they are there, by a bound from below."""
        if self.mode == "hold" or model.horizon == 1 or self.clock == WALL:
            return
        once = {stage: {"fixed": 1.0, "per_share": 0.0} for stage in ("host", "vision", "projector", "prefill", "head")}
        least = self.constant.milliseconds if self.constant else fitting(self.tables, model).milliseconds(once)
        if (ticks := delay(least, control_hz)) >= model.horizon:
            raise InputError(
                f"an answer takes at least {least:.0f} ms, {ticks} control steps, and a chunk has {model.horizon} "
                "actions: every one would be too late; give --mode hold or a faster device"
            )


def deadline_controller(session: Session, device: OnDevice, sample: StepInfo, deadline_ms: float) -> DeadlineController:
    """Make the server's deadline controller for a device, from its table.

    Args:
        session: Its model, maximum age and actions per call say how few tokens are possible.
        device: The latency.
        sample: Report of a dense frame.
        deadline_ms: From observation to answer.

    Raises:
        InputError: If it cannot be kept with the fewest tokens.
    """
    n_visual = sample.layout.n_visual
    floor = smallest_budget(n_visual, session.max_frames)
    points = sorted({floor, *(round(n_visual * share) for share in SHARES)} - {0})
    high = device.table.factor(0.9)
    times = [high * device.table.milliseconds(_units(sample, device, tokens / n_visual)) for tokens in points]
    return DeadlineController(
        deadline_ms, LatencyTable(tuple(points), tuple(np.maximum.accumulate(times).tolist())), floor
    )


def _units(sample: StepInfo, device: OnDevice, share: float) -> Stages:
    """Count what a frame would take that computes a share of its visual tokens, by the report of a dense one."""
    dense = quantities(sample, device.policy, flow=device.flow)
    dense["policy"], dense["flow"] = {device.policy: 1.0}, {"fixed": float(device.flow)}
    return {
        stage: {name: n * share if name == "per_share" else n for name, n in u.items()} for stage, u in dense.items()
    }


def _predicting(model: VLA | None, policy: str, *, flow: bool) -> OnDevice | None:
    """Find what predicts the wall clock: this machine's table of the model; ``None`` if there is none."""
    tables = [] if model is None else find_tables(HERE)
    fit = [table for table in tables if model is not None and table.shape.refuses(model) is None]
    return OnDevice(fit[0], policy, flow) if fit else None


def sample_of(session: PolicySession, frame: Frame) -> StepInfo | None:
    """Compute one dense frame for its report; the session is reset by the next episode."""
    session.reset(0)
    session.act(frame)
    return session.last_info if isinstance(session.last_info, StepInfo) else None


def settings(world: WorldClock | None) -> Mapping[str, str | float | None]:
    """Give what binds a run that goes on."""
    if world is None:
        return {"clock": None, "mode": None, "deadline_ms": None}
    return {"clock": world.name, "mode": world.mode, "deadline_ms": world.deadline_ms, "clock_digest": world.digest}
