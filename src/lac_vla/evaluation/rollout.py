"""One closed-loop episode: a session drives a simulated robot, and everything that it did is written down."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from lac_vla.cost import CostModel, peak_memory_mb
from lac_vla.engine.step_info import PolicySession, StepInfo, StepObserver, StepReport
from lac_vla.errors import InputError
from lac_vla.evaluation.ensemble import AdaptiveEnsemble
from lac_vla.results.metrics import METRICS
from lac_vla.results.realtime import RealTime
from lac_vla.results.records import EpisodeRecord
from lac_vla.running_chunk import RealTimeChunk
from lac_vla.session import Session
from lac_vla.sims.base import Env
from lac_vla.types import FloatArray, Frame


@dataclass
class EpisodeLog:
    """Begins an episode, and writes down every call of the model.

    Attributes:
        env: The task.
        session: Drives the robot; it is reset with ``seed``.
        method: Name of the method, for the record.
        init_state: Initial state.
        seed: Seed of the session's generator, and of the scene.
        cost: Counts multiply-accumulates of a session in this process.
        observers: Are shown every call of a session in this process.
        actions_per_call: Actions of a chunk, (horizon, A), that are executed before the model is asked again.
        ensemble: Makes the frame's action out of the last frames' chunks; by default, the newest chunk's first.
        stress: Name of the stress that ``env`` puts on its observations, for the record.

    Raises:
        InputError: If ``actions_per_call`` is below 1, or above 1 with an ensemble.
    """

    env: Env
    session: PolicySession
    method: str
    init_state: int
    seed: int = 0
    cost: CostModel | None = None
    observers: Sequence[StepObserver] = ()
    actions_per_call: int = 1
    ensemble: AdaptiveEnsemble | None = None
    stress: str = ""
    _metrics: dict[str, list[float | None]] = field(default_factory=lambda: {name: [] for name in METRICS}, init=False)
    _latency: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list), init=False)
    _reuse: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list), init=False)
    _instruction: str = field(default="", init=False)

    def __post_init__(self) -> None:
        if self.actions_per_call < 1 or (self.actions_per_call > 1 and self.ensemble is not None):
            raise InputError(
                f"actions_per_call is {self.actions_per_call}: give at least 1; an ensemble makes one action per call, "
                "so give 1 with it, or leave the ensemble out"
            )

    def begin(self) -> Frame:
        """Begin the episode; return its first observation."""
        frame = self.env.reset(self.init_state, self.seed)
        self.session.reset(self.seed)
        if isinstance(self.session, Session):
            # a maximum age means as many executed actions however often the session looks
            self.session.steps_per_frame = self.actions_per_call
        if self.ensemble is not None:
            self.ensemble.reset()
        self._instruction = frame.instruction
        return frame

    def begin_anew(self, frame: Frame) -> None:
        """Let the ensemble begin anew where the instruction has changed: the last chunks belong to another one."""
        if self.ensemble is not None and frame.instruction != self._instruction:
            self.ensemble.reset()
        self._instruction = frame.instruction

    def add(self, frame: Frame, info: StepReport) -> None:
        """Write down a call of the model."""
        for name, metric in METRICS.items():
            self._metrics[name].append(metric.measure(info, self.cost))
        for name, value in {**info.timings, **info.stages}.items():
            self._latency[name].append(round(value, 4))
        if isinstance(info, StepInfo):
            for camera, ratio in info.camera_ratios.items():
                self._reuse[camera].append(round(ratio, 4))
            for observer in self.observers:
                observer.add(frame, info)

    def record(self, *, success: bool, steps: int, realtime: RealTime | None = None) -> EpisodeRecord:
        """Make the episode's record."""
        env, session = self.env, self.session
        return EpisodeRecord(
            method=self.method,
            suite=env.suite,
            task=env.task,
            instruction=env.instruction,
            init_state=self.init_state,
            seed=self.seed,
            stress=self.stress,
            success=success,
            steps=steps,
            horizon=env.horizon,
            actions_per_call=self.actions_per_call,
            ensemble=1 if self.ensemble is None else self.ensemble.horizon,
            metrics={name: values for name, values in self._metrics.items() if any(v is not None for v in values)},
            latency_ms=dict(self._latency),
            reuse=dict(self._reuse),
            adaptive=isinstance(session, Session) and session.policy.adaptive,
            peak_memory_mb=peak_memory_mb(session.model.device) if isinstance(session, Session) else None,
            realtime=realtime,
        )


def ask(session: PolicySession, frame: Frame, rtc: RealTimeChunk | None = None) -> tuple[FloatArray, StepReport]:
    """Ask a session, perhaps to go on with a running chunk; return its answer, (n, A), and its report."""
    answer = session.act(frame) if rtc is None else session.act(frame, rtc)
    chunk, info = np.atleast_2d(answer), session.last_info
    if info is None:  # pragma: no cover - act always leaves a step info
        raise RuntimeError("the session did not report its step")
    return chunk, info


def check_length(chunk: FloatArray, actions_per_call: int) -> None:
    """Refuse a chunk of fewer actions than are to be executed of it.

    Raises:
        InputError: If it is one.
    """
    if len(chunk) < actions_per_call:
        raise InputError(
            f"actions_per_call is {actions_per_call}, but a chunk has {len(chunk)} actions: give at most that"
        )


def rollout(log: EpisodeLog) -> EpisodeRecord:
    """Play the episode of a log, where the world waits while the policy thinks.

    It ends when the task is solved or its horizon, in world steps, is reached.

    Raises:
        InputError: If an answer has fewer actions than are to be executed of it.
    """
    env, ensemble, frame = log.env, log.ensemble, log.begin()
    steps, success = 0, False
    while True:
        chunk, info = ask(log.session, frame)
        check_length(chunk, log.actions_per_call)
        log.begin_anew(frame)
        log.add(frame, info)
        for action in chunk[: log.actions_per_call] if ensemble is None else [ensemble(chunk)]:
            look, success = env.tick(action)
            steps += 1
            if success or steps == env.horizon:
                return log.record(success=success, steps=steps)
        frame = look()
