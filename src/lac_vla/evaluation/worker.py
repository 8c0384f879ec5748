"""Episodes are played by workers: one here, or several, here or on a cluster, each with its own model and simulator."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from lac_vla.client.remote import RemoteSession
from lac_vla.cost import CostModel
from lac_vla.drawing.observers import EpisodeVideo, FailurePicture
from lac_vla.engine.step_info import PolicySession
from lac_vla.errors import InputError
from lac_vla.evaluation.cluster import run_on_ray
from lac_vla.evaluation.config import EvalConfig
from lac_vla.evaluation.ensemble import AdaptiveEnsemble
from lac_vla.evaluation.jobs import Job, play
from lac_vla.evaluation.processes import run_on_processes
from lac_vla.evaluation.rollout import rollout
from lac_vla.evaluation.stress import Stressed, make_stress
from lac_vla.factory import load_methods, method_name
from lac_vla.results.records import EpisodeRecord
from lac_vla.session import Session
from lac_vla.sims.base import Env, SimulatorError


class EpisodeWorker:
    """The model, the sessions and the simulator of one process.

    Args:
        config: The evaluation.

    Attributes:
        sessions: Method → session.

    Raises:
        InputError: If a setting does not fit the model, or the server serves something else.
        CheckpointError: If the model cannot be loaded.
    """

    sessions: dict[str, PolicySession]

    def __init__(self, config: EvalConfig) -> None:
        self._env: Env | None = None
        self._cost: CostModel | None = None
        benchmark, options = config.benchmark, config.model_options
        if config.server is not None:
            method = method_name(config.policies[0])
            self.sessions = {method: RemoteSession.connect(config.server, Path(config.model).name, method)}
            self._ensemble = _make_ensemble(config, None)
            return
        options = replace(options, unnorm_key=options.unnorm_key or benchmark.unnorm_key)
        vlas = load_methods(config.model, config.policies, options, cameras=benchmark.cameras)
        self._ensemble = _make_ensemble(config, next(iter(vlas.values())).model)
        self.sessions = {name: vla.session(config.seed) for name, vla in vlas.items()}

    def run(self, config: EvalConfig, method: str, task: int, init_state: int) -> EpisodeRecord:
        """Run one episode of an evaluation that may differ from the worker's own in ``out`` and ``stress``.

        Raises:
            SimulatorError: If the simulator died, and again as often as the benchmark allows to begin anew.
        """
        for _ in range(config.benchmark.retries):
            try:
                return self._play(config, method, task, init_state)
            except SimulatorError as error:
                tqdm.write(f"task {task}, initial state {init_state}: {error}; it is begun again")
        return self._play(config, method, task, init_state)

    def close(self) -> None:
        """Free the simulator."""
        if self._env is not None:
            self._env.close()
            self._env = None

    def _play(self, config: EvalConfig, method: str, task: int, init_state: int) -> EpisodeRecord:
        session, simulator = self.sessions[method], self._simulator(config, task)
        env = simulator
        here = isinstance(session, Session)
        if self._cost is None and isinstance(session, Session):
            self._cost = CostModel.of(
                session.model,
                env.reset(init_state, config.seed),
                vision_kv_reuse=session.engine.options.vision_kv_reuse,
            )
        if config.stress is not None:
            env = Stressed(env, make_stress(config.stress), config.seed, config.benchmark.instructions())
        name = f"{method}_task{task:02d}_init{init_state:02d}"
        failure = FailurePicture(config.out / "failures" / f"{name}.jpg", env.horizon, config.model_options.max_age)
        video = None
        if init_state - config.states[0] < config.videos and here:
            video = EpisodeVideo(config.out / "videos" / f"{name}.mp4", method)
        record = rollout(
            env,
            session,
            method,
            init_state,
            seed=config.seed,
            cost=self._cost,
            observers=[failure] if video is None else [failure, video],
            ensemble=self._ensemble,
            actions_per_call=config.actions_per_call or 1,
            stress=config.stress or "",
        )
        record = replace(record, outcome=simulator.outcome())
        if video is not None:
            video.close(success=record.success)
            record = replace(record, video=str(video.path.relative_to(config.out)))
        picture = failure.close(success=record.success) if here else None
        return record if picture is None else replace(record, failure=str(picture.relative_to(config.out)))

    def _simulator(self, config: EvalConfig, task: int) -> Env:
        """Make the simulator of a task; the last one is kept open."""
        if self._env is None or self._env.task != task:
            self.close()
            self._env = config.benchmark.make_env(task)
        return self._env


def _make_ensemble(config: EvalConfig, model: object | None) -> AdaptiveEnsemble | None:
    """Make the ensemble of actions that the settings, the benchmark or the model ask for; ``None`` for a single chunk.

    This is the one place that asks a model how it answers: ``ensemble``, the number of chunks that it wants averaged,
    and ``horizon``, the number of actions of its answer; both are 1 unless the model says otherwise.

    Args:
        config: The evaluation.
        model: The loaded model; ``None`` if a server has it.

    Raises:
        InputError: If the chunks are shorter than the number of actions that are to be executed, or are averaged.
    """
    own, horizon = (int(getattr(model, name, 1)) for name in ("ensemble", "horizon"))
    chunks = config.ensemble or config.benchmark.ensemble or own
    executed = config.actions_per_call or 1
    if executed > 1 and chunks > 1:
        raise InputError(
            f"actions_per_call is {executed}, but an ensemble of {chunks} chunks needs a new one for every action: "
            "give --ensemble 1, too, or leave --actions-per-call away"
        )
    if model is not None and executed > horizon:
        raise InputError(f"actions_per_call is {executed}, but the model answers with {horizon}: give 1 to {horizon}")
    return AdaptiveEnsemble(chunks) if chunks > 1 else None


def run_jobs(config: EvalConfig, jobs: Sequence[Job]) -> Generator[EpisodeRecord, None, None]:
    """Run the episodes of all jobs; several processes finish them in any order.

    If they are played here, the model is loaded at once; in other processes, with the first episode.

    Args:
        config: The evaluation.
        jobs: What to run, at least one; of this evaluation and of others that differ in ``out`` and ``stress`` alone.
    """
    if config.ray is not None:
        return run_on_ray(config.ray, EpisodeWorker, config, jobs)
    if config.workers > 1:
        return run_on_processes(EpisodeWorker, config, jobs)
    return _run_here(EpisodeWorker(config), jobs)


def _run_here(worker: EpisodeWorker, jobs: Sequence[Job]) -> Generator[EpisodeRecord, None, None]:
    try:
        for job in jobs:
            yield from play(worker, job)
    finally:
        worker.close()
