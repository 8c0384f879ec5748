"""One closed-loop episode: a session drives a simulated robot, and everything that it did is written down."""

from __future__ import annotations

import resource
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from lac_vla.cost import CostModel
from lac_vla.engine.step_info import PolicySession, StepInfo, StepObserver
from lac_vla.models.cogact.ensemble import AdaptiveEnsemble
from lac_vla.results.records import EpisodeRecord
from lac_vla.session import Session
from lac_vla.types import FloatArray, Frame


class Simulator(Protocol):
    """What an evaluation needs of a simulated task."""

    suite: str
    task: int

    @property
    def instruction(self) -> str: ...  # noqa: D102
    @property
    def horizon(self) -> int: ...  # noqa: D102

    def reset(self, init_state: int, seed: int = 0) -> Frame:
        """Start an episode from one of the task's initial states."""
        ...

    def step(self, action: npt.ArrayLike) -> tuple[Frame, bool]:
        """Execute an action: the next observation, and whether the task is solved."""
        ...


def rollout(
    env: Simulator,
    session: PolicySession,
    method: str,
    init_state: int,
    *,
    seed: int = 0,
    cost: CostModel | None = None,
    observers: Sequence[StepObserver] = (),
    to_robot: Callable[[FloatArray], FloatArray] | None = None,
    ensemble: AdaptiveEnsemble | None = None,
    stress: str = "",
) -> EpisodeRecord:
    """Run one episode until the task is solved or its horizon reached.

    Args:
        env: The task.
        session: Drives the robot; it is reset with ``seed``.
        method: Name of the method, for the record.
        init_state: Initial state.
        seed: Of the session's generator, and of the scene.
        cost: Counts multiply-accumulates of a session that is here.
        observers: Watch one.
        to_robot: Turns the model's action into the simulator's units, if they differ.
        ensemble: Makes the frame's action out of the last frames' chunks; by default, the newest chunk's first.
        stress: What ``env`` disturbs its observations by, for the record.
    """
    frame = env.reset(init_state, seed)
    session.reset(seed)
    if ensemble is not None:
        ensemble.reset()
    effective: list[float] = []
    nominal: list[float | None] = []
    oldest: list[int | None] = []
    macs: list[float] = []
    passes: list[int] = []
    accepted: list[int | None] = []
    latency: defaultdict[str, list[float]] = defaultdict(list)
    success, instruction = False, frame.instruction
    while len(effective) < env.horizon and not success:
        chunk = np.atleast_2d(session.act(frame))
        if ensemble is not None and frame.instruction != instruction:
            ensemble.reset()  # the last chunks were about something else
        instruction = frame.instruction
        action = chunk[0] if ensemble is None else ensemble(chunk)
        step = session.last_info
        if step is None:  # pragma: no cover - act always leaves a step
            raise RuntimeError("the session did not report its step")
        effective.append(step.ratio)
        nominal.append(step.nominal_ratio)
        oldest.append(step.oldest_age)
        if isinstance(step, StepInfo):
            passes.append(len(step.decode_passes))
            accepted.append(step.accepted)
            if cost is not None:
                macs.append(float(sum(cost.step(step).values())))
            for observer in observers:
                observer.add(frame, step)
        for name, value in {**step.timings, **step.stages}.items():
            latency[name].append(round(value, 4))
        frame, success = env.step(action if to_robot is None else to_robot(action))
    return EpisodeRecord(
        method=method,
        suite=env.suite,
        task=env.task,
        instruction=env.instruction,
        init_state=init_state,
        seed=seed,
        stress=stress,
        success=success,
        steps=len(effective),
        horizon=env.horizon,
        ratio_effective=effective,
        ratio_nominal=nominal,
        oldest_age=oldest,
        macs=macs,
        passes=passes,
        accepted=accepted,
        latency_ms=dict(latency),
        peak_memory_mb=peak_memory_mb(session.vla.model.device) if isinstance(session, Session) else None,
    )


def peak_memory_mb(device: torch.device) -> float:
    """Largest memory so far: of the accelerator's allocator, or of this process, in MB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3
