"""One closed-loop episode: a session drives a simulated robot, and everything that it did is written down."""

from __future__ import annotations

import resource
import sys
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch

from lac_vla.cost import CostModel
from lac_vla.engine.step_info import PolicySession, StepInfo, StepObserver
from lac_vla.evaluation.ensemble import AdaptiveEnsemble
from lac_vla.evaluation.records import EpisodeRecord
from lac_vla.session import Session
from lac_vla.sims.base import Env


def rollout(
    env: Env,
    session: PolicySession,
    method: str,
    init_state: int,
    *,
    seed: int = 0,
    cost: CostModel | None = None,
    observers: Sequence[StepObserver] = (),
    ensemble: AdaptiveEnsemble | None = None,
    actions_per_call: int = 1,
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
        ensemble: Makes the frame's action out of the last frames' chunks; by default, the newest chunk's first.
        actions_per_call: Number of actions of an answer that are executed before the session is asked again.
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
    steps, success, instruction = 0, False, frame.instruction
    while steps < env.horizon and not success:
        chunk = np.atleast_2d(session.act(frame))
        if ensemble is not None and frame.instruction != instruction:
            ensemble.reset()  # the last chunks were about something else
        instruction = frame.instruction
        actions = chunk[:actions_per_call] if ensemble is None else ensemble(chunk)[None]
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
        for action in actions:
            frame, success = env.step(action)
            steps += 1
            if success or steps == env.horizon:
                break
    return EpisodeRecord(
        method=method,
        suite=env.suite,
        task=env.task,
        instruction=env.instruction,
        init_state=init_state,
        seed=seed,
        stress=stress,
        success=success,
        steps=steps,
        horizon=env.horizon,
        ratio_effective=effective,
        ratio_nominal=nominal,
        oldest_age=oldest,
        macs=macs,
        passes=passes,
        accepted=accepted,
        latency_ms=dict(latency),
        peak_memory_mb=peak_memory_mb(session.model.device) if isinstance(session, Session) else None,
    )


def peak_memory_mb(device: torch.device) -> float:
    """Largest memory so far: of the accelerator's allocator, or of this process, in MB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3
