"""Episodes are played by workers: one, or several, here or on a cluster, each with its own model and simulator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from tqdm import tqdm

from lac_vla.client.remote import RemoteSession
from lac_vla.cost import CostModel
from lac_vla.dataset_keys import DatasetKeys
from lac_vla.drawing.film import WorldVideo
from lac_vla.drawing.observers import EpisodeVideo, FailurePicture
from lac_vla.engine.step_info import PolicySession, StepInfo
from lac_vla.errors import InputError
from lac_vla.evaluation.cameras import RenamedCameras
from lac_vla.evaluation.clock import WALL, sample_of
from lac_vla.evaluation.config import EvalConfig
from lac_vla.evaluation.ensemble import AdaptiveEnsemble
from lac_vla.evaluation.rollout import EpisodeLog, rollout
from lac_vla.evaluation.stress import Stressed, make_stress
from lac_vla.factory import CachedVLA, load_methods, method_name
from lac_vla.models.vla import VLA
from lac_vla.policies import PolicySpec
from lac_vla.results.records import EpisodeRecord
from lac_vla.session import Session
from lac_vla.sims.base import Env, SimulatorError


class EpisodeWorker:
    """The model, the sessions (by method) and the simulator of one process.

    Args:
        config: The evaluation.
        vlas: The model with every method's policy; by default it is loaded, unless a server runs it.

    Raises:
        InputError: If a setting does not fit the model, or the server serves something else.
        CheckpointError: If the model cannot be loaded.
    """

    sessions: dict[str, PolicySession]

    def __init__(self, config: EvalConfig, vlas: Mapping[str, CachedVLA] | None = None) -> None:
        self._env: Env | None = None
        self._cameras: dict[str, str] = {}
        self._cost: CostModel | None = None
        self._samples: dict[str, StepInfo | None] = {}
        if config.server is not None:
            method = method_name(config.policies[0])
            self.sessions = {method: RemoteSession.connect(config.server, Path(config.model).name, method)}
            self._ensemble = _make_ensemble(config, None)
            self._policies = {method: ("dense", False)}
            return
        vlas = vlas or load_vlas(config)
        model = next(iter(vlas.values())).model
        self._cameras = DatasetKeys(config.camera).cameras(model.grids) if config.camera else {}
        self._ensemble = _make_ensemble(config, model)
        self.sessions = {name: self._session(vla, config.seed) for name, vla in vlas.items()}
        kinds = {method_name(spec): PolicySpec.parse(spec).name for spec in config.policies}
        self._policies = {name: (kinds[name], vla.flow_used != "none") for name, vla in vlas.items()}

    def check(self, config: EvalConfig) -> None:
        """Refuse a clock that the model cannot be played by.

        Raises:
            InputError: If it is one.
        """
        session = next(iter(self.sessions.values()))
        if (world := config.world) is not None:
            model = session.model if isinstance(session, Session) else None
            world.check(model, config.actions_per_call or 1, ensemble=self._ensemble is not None)

    def run(self, config: EvalConfig, method: str, task: int, init_state: int) -> EpisodeRecord:
        """Run one episode of an evaluation that may differ from the worker's own in ``out``, ``stress`` and clock.

        Raises:
            InputError: If the clock cannot play the model.
            SimulatorError: If the simulator died, and again as often as the benchmark allows to begin anew.
        """
        self.check(config)
        for _ in range(config.benchmark.retries):
            try:
                return self._play(config, method, task, init_state)
            except SimulatorError as error:
                tqdm.write(f"task {task}, initial state {init_state}: {error}; it is begun again")
        return self._play(config, method, task, init_state)

    def open(self, config: EvalConfig, task: int) -> None:
        """Make the simulator of a task before anything is played, so that what it lacks is told at once."""
        with suppress(SimulatorError):  # :meth:`run` begins anew
            self._simulator(config, task)

    def close(self) -> None:
        """Free the simulator."""
        if self._env is not None:
            self._env.close()
            self._env = None

    def _play(self, config: EvalConfig, method: str, task: int, init_state: int) -> EpisodeRecord:
        session, simulator = self.sessions[method], self._simulator(config, task)
        env = simulator
        if self._cost is None and isinstance(session, Session):
            frame, options = env.reset(init_state, config.seed), session.engine.options
            self._cost = CostModel.of(session.model, frame, vision_kv_reuse=options.vision_kv_reuse)
        if config.stress is not None:
            env = Stressed(env, make_stress(config.stress), config.seed, config.benchmark.instructions())
        name = f"{method}_task{task:02d}_init{init_state:02d}"
        served = session.actions_per_call if isinstance(session, RemoteSession) else 1
        per_call = config.actions_per_call or served
        picture = config.out / "failures" / f"{name}.jpg"
        drawn: dict[str, EpisodeVideo | FailurePicture | WorldVideo] = {}
        video, watch = config.out / "videos" / f"{name}.mp4", None
        filmed = init_state - config.states[0] < config.videos and isinstance(session, Session)
        if config.clock is None:
            drawn["failure"] = FailurePicture(picture, env.horizon, config.model_options.max_age, per_call)
            if filmed:
                drawn["video"] = EpisodeVideo(video, method, 20, per_call)
        elif filmed and config.clock != WALL:
            drawn["video"] = watch = WorldVideo(video, method, env.control_hz)
        log = EpisodeLog(
            env,
            session,
            method,
            init_state,
            seed=config.seed,
            cost=self._cost,
            observers=list(drawn.values()),
            ensemble=self._ensemble,
            actions_per_call=per_call,
            stress=config.stress or "",
        )
        if (world := config.world) is None:
            record = rollout(log)
        else:
            policy, flow = self._policies[method]
            if world.deadline_ms is not None and method not in self._samples:
                self._samples[method] = sample_of(session, env.reset(init_state, config.seed))
            record = world.episode(log, policy, flow=flow, sample=self._samples.get(method), watch=watch)
        paths = {field: observer.close(success=record.success) for field, observer in drawn.items()}
        files: dict[str, Any] = {field: str(path.relative_to(config.out)) for field, path in paths.items() if path}
        return replace(record, outcome=simulator.outcome(), **files)

    def _session(self, vla: CachedVLA, seed: int) -> Session:
        """Make the session of a method."""
        return vla.session(seed)

    def _simulator(self, config: EvalConfig, task: int) -> Env:
        """Make the simulator of a task; the last one is kept open."""
        if self._env is None or self._env.task != task:
            self.close()
            env = config.benchmark.make_env(task)
            self._env = RenamedCameras(env, self._cameras) if self._cameras else env
        return self._env


def load_vlas(config: EvalConfig) -> dict[str, CachedVLA]:
    """Load the model, and put every method's policy beside it."""
    benchmark, options = config.benchmark, config.model_options
    options = replace(options, unnorm_key=options.unnorm_key or benchmark.unnorm_key)
    vlas = load_methods(config.model, config.policies, options, cameras=benchmark.cameras)
    for vla in vlas.values():
        vla.engine.stage_events = True
    return vlas


def _make_ensemble(config: EvalConfig, model: VLA | None) -> AdaptiveEnsemble | None:
    """Make the ensemble that settings, benchmark or model ask for; ``None`` for one chunk. A server keeps its model."""
    demanded = config.benchmark.ensemble
    if demanded is not None and model is not None and demanded > model.horizon:
        demanded = None  # a protocol made for long chunks does not mean a model whose chunks are shorter
    chunks = config.ensemble or demanded or (model.ensemble if model is not None else 1)
    executed = config.actions_per_call or 1
    if executed > 1 and chunks > 1:
        raise InputError(
            f"actions_per_call is {executed}, but an ensemble of {chunks} chunks needs a new one for every action: "
            "give --ensemble 1, too, or leave --actions-per-call away"
        )
    if model is not None and executed > (horizon := model.horizon):
        raise InputError(f"actions_per_call is {executed}, but the model answers with {horizon}: give 1 to {horizon}")
    return AdaptiveEnsemble(chunks) if chunks > 1 else None


class Job(NamedTuple):
    """Episodes that run one after the other.

    Attributes:
        config: Their evaluation; those that share their processes differ in ``out``, ``stress`` and clock alone.
        task: Task id.
        init_state: Initial state.
        methods: Methods that are still to run on it.
    """

    config: EvalConfig
    task: int
    init_state: int
    methods: tuple[str, ...]

    def play(self, worker: EpisodeWorker) -> Iterator[EpisodeRecord]:
        """Run the episodes."""
        return (worker.run(self.config, method, self.task, self.init_state) for method in self.methods)


MakeWorker: TypeAlias = Callable[[EvalConfig], EpisodeWorker]
"""Loads the model and all else that a process needs."""
