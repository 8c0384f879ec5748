"""One closed-loop episode: a session drives a simulated robot, and everything that it did is written down."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from lac_vla.cost import CostModel, peak_memory_mb
from lac_vla.engine.step_info import PolicySession, StepInfo, StepObserver
from lac_vla.errors import InputError
from lac_vla.evaluation.ensemble import AdaptiveEnsemble
from lac_vla.results.metrics import METRICS
from lac_vla.results.records import EpisodeRecord
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
    """Run one episode until the task is solved or its horizon, in world steps, is reached.

    Args:
        env: The task.
        session: Drives the robot; it is reset with ``seed``.
        method: Name of the method, for the record.
        init_state: Initial state.
        seed: Seed of the session's generator, and of the scene.
        cost: Counts multiply-accumulates of a session in this process.
        observers: Are shown every call of a session in this process.
        ensemble: Makes the frame's action out of the last frames' chunks; by default, the newest chunk's first.
        actions_per_call: Actions of a chunk, (horizon, A), that are executed before the model is asked again.
        stress: Name of the stress that ``env`` puts on its observations, for the record.

    Raises:
        InputError: If ``actions_per_call`` is below 1, above 1 with an ensemble, or above the length of a chunk.
    """
    if actions_per_call < 1 or (actions_per_call > 1 and ensemble is not None):
        raise InputError(
            f"actions_per_call is {actions_per_call}: give at least 1; an ensemble makes one action per call, "
            "so give 1 with it, or leave the ensemble out"
        )
    frame = env.reset(init_state, seed)
    session.reset(seed)
    if isinstance(session, Session):
        session.steps_per_frame = actions_per_call  # a maximum age means the same time however often it looks
    if ensemble is not None:
        ensemble.reset()
    metrics: dict[str, list[float | None]] = {name: [] for name in METRICS}
    latency: defaultdict[str, list[float]] = defaultdict(list)
    steps, success, instruction = 0, False, frame.instruction
    while steps < env.horizon and not success:
        chunk = np.atleast_2d(session.act(frame))
        if len(chunk) < actions_per_call:
            raise InputError(
                f"actions_per_call is {actions_per_call}, but a chunk has {len(chunk)} actions: give at most that"
            )
        if ensemble is not None and frame.instruction != instruction:
            ensemble.reset()  # the last chunks belong to another instruction
        instruction = frame.instruction
        info = session.last_info
        if info is None:  # pragma: no cover - act always leaves a step info
            raise RuntimeError("the session did not report its step")
        for name, metric in METRICS.items():
            metrics[name].append(metric.measure(info, cost))
        for name, value in {**info.timings, **info.stages}.items():
            latency[name].append(round(value, 4))
        if isinstance(info, StepInfo):
            for observer in observers:
                observer.add(frame, info)
        for action in chunk[:actions_per_call] if ensemble is None else [ensemble(chunk)]:
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
        actions_per_call=actions_per_call,
        metrics={name: values for name, values in metrics.items() if any(value is not None for value in values)},
        latency_ms=dict(latency),
        peak_memory_mb=peak_memory_mb(session.model.device) if isinstance(session, Session) else None,
    )
