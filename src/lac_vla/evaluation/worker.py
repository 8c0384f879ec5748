"""Who runs the episodes: one process, or several, here or on a cluster, each with its own model and simulator."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lac_vla.cost import CostModel
from lac_vla.drawing.observers import EpisodeVideo, FailurePicture
from lac_vla.engine.step_info import PolicySession
from lac_vla.evaluation.cluster import run_on_ray
from lac_vla.evaluation.config import EvalConfig
from lac_vla.evaluation.jobs import Job, play
from lac_vla.evaluation.processes import run_on_processes
from lac_vla.evaluation.remote import RemoteSession
from lac_vla.evaluation.rollout import Simulator, rollout
from lac_vla.evaluation.stress import Stressed, make_stress
from lac_vla.factory import ModelOptions, load_methods, method_name
from lac_vla.models import AdaptiveEnsemble, CogACTBackbone
from lac_vla.models.prismatic.actions import libero_gripper
from lac_vla.results.records import EpisodeRecord
from lac_vla.session import Session
from lac_vla.sims.libero import LiberoEnv, instructions


@dataclass
class Worker:
    """One process's model, sessions and simulator.

    Attributes:
        config: The evaluation.
        sessions: Method → session.
    """

    config: EvalConfig
    sessions: dict[str, PolicySession] = field(init=False)
    _env: LiberoEnv | None = field(init=False, default=None)
    _cost: CostModel | None = field(init=False, default=None)
    _ensemble: AdaptiveEnsemble | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        config = self.config
        if config.ensemble is not None:
            self._ensemble = _ensemble_of(config.ensemble)
        if config.server is not None:
            method = method_name(config.policies[0])
            self.sessions = {method: RemoteSession.connect(config.server, Path(config.model).name, method)}
            return
        options = ModelOptions(
            device=config.device,
            unnorm_key=config.unnorm_key,
            image_pipeline=config.image_pipeline,
            flow=config.flow,
            max_age=config.max_age,
            options=config.options,
            seed=config.seed,
            threads=config.threads,
        )
        vlas = load_methods(config.model, config.policies, options)
        backbone = next(iter(vlas.values())).model
        if config.ensemble is None and isinstance(backbone, CogACTBackbone):
            self._ensemble = _ensemble_of(backbone.config.ensemble)
        self.sessions = {name: vla.session(config.seed) for name, vla in vlas.items()}

    def environment(self, task: int) -> LiberoEnv:
        """The simulator of a task; the last one is kept open."""
        config = self.config
        if self._env is None or self._env.task != task:
            if self._env is not None:
                self._env.close()
            self._env = LiberoEnv(config.suite, task, rendering=config.rendering, image_convention=config.convention)
        return self._env

    def run(self, config: EvalConfig, method: str, task: int, init_state: int) -> EpisodeRecord:
        """Run one episode of an evaluation that may differ from the worker's own in ``out`` and ``stress``."""
        session = self.sessions[method]
        env: Simulator = self.environment(task)
        here = isinstance(session, Session)
        if self._cost is None and isinstance(session, Session):
            self._cost = CostModel.of(
                session.vla.model,
                env.reset(init_state, config.seed),
                vision_kv_reuse=session.vla.options.vision_kv_reuse,
            )
        if config.stress is not None:
            env = Stressed(env, make_stress(config.stress), config.seed, instructions(config.suite))
        name = f"{method}_task{task:02d}_init{init_state:02d}"
        failure = FailurePicture(config.out / "failures" / f"{name}.jpg", env.horizon, config.max_age)
        video = None
        if init_state - config.init_states[0] < config.videos and here:
            video = EpisodeVideo(config.out / "videos" / f"{name}.mp4", method)
        record = rollout(
            env,
            session,
            method,
            init_state,
            seed=config.seed,
            cost=self._cost,
            observers=[failure] if video is None else [failure, video],
            to_robot=libero_gripper if config.convention == "openvla" else None,
            ensemble=self._ensemble,
            stress=config.stress or "",
        )
        if video is not None:
            video.close(success=record.success)
            record = replace(record, video=str(video.path.relative_to(config.out)))
        picture = failure.close(success=record.success) if here else None
        return record if picture is None else replace(record, failure=str(picture.relative_to(config.out)))


def _ensemble_of(chunks: int) -> AdaptiveEnsemble | None:
    """Of one chunk it is that chunk's first action, and nothing is needed."""
    return AdaptiveEnsemble(chunks) if chunks > 1 else None


def run_jobs(config: EvalConfig, jobs: Sequence[Job]) -> Generator[EpisodeRecord, None, None]:
    """Run the episodes of all jobs; several processes finish them in any order.

    Args:
        config: The evaluation.
        jobs: What to run, of this evaluation and of others that differ in ``out`` and ``stress`` alone.
    """
    if not jobs:
        return
    if config.ray is not None:
        yield from run_on_ray(config.ray, Worker, config, jobs)
        return
    if config.workers == 1:
        worker = Worker(config)
        for job in jobs:
            yield from play(worker, job)
        return
    yield from run_on_processes(Worker, config, jobs)
