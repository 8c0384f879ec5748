"""Paired evaluations: every method on the same initial states, resumable, in one or several processes."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from lac_vla.cost import CostModel
from lac_vla.errors import InputError
from lac_vla.evaluation.methods import make_methods, method_name
from lac_vla.evaluation.records import EpisodeRecord, read_episodes
from lac_vla.evaluation.remote import RemoteSession
from lac_vla.evaluation.rollout import Driver, rollout
from lac_vla.flow import make_flow
from lac_vla.levers import Levers
from lac_vla.models import load_vla
from lac_vla.models.prismatic.actions import libero_gripper
from lac_vla.policies import paths_by_name
from lac_vla.provenance import provenance
from lac_vla.report.overlay import EpisodeVideo
from lac_vla.sims.libero import SUITES, LiberoEnv
from lac_vla.vla import CachedVLA, Session

EPISODES, CONFIG, SUMMARY = "episodes.jsonl", "config.json", "summary.json"
FIRST_HELD_OUT = 40
"""First initial state of every task that no demonstration used: demonstrations start from states 0 to 39."""
CHANGEABLE = ("workers", "threads", "videos", "server")
"""Settings that may differ when a run is resumed: they change no result."""


@dataclass(frozen=True)
class EvalConfig:
    """A paired evaluation.

    Attributes:
        model: Checkpoint folder or hub id.
        out: Folder of the run. If it holds a run with the same settings, that run goes on.
        policies: Methods, e.g. ``dense``, ``motion:ratio=0.5``, ``lac`` (the policy that comes with the model),
            ``lac:path=FOLDER,recovery=0``; ``NAME@`` before one names it in tables.
        suite: LIBERO suite.
        tasks: Task ids; empty for all ten.
        init_states: First and one-past-last initial state of every task.
        seed: Of every session.
        flow: Optical flow of all policies that read it: ``dis``, ``raft_small:FILE`` or ``none``; by default each
            has the one that it was made for.
        max_age: No slot is reused once it is this old, frames.
        levers: Levers beside caching, of all methods, dense included: ``default``, ``none``, ``exact``,
            ``draft+overlap``, …
        rendering: ``fast`` (altered pixels, for models trained on them) or ``official``.
        convention: ``upright`` for our own models; ``openvla`` for OpenVLA's checkpoints, whose images are rotated by
            180° and whose gripper runs from 0, closed, to 1, open.
        image_pipeline: The model's image geometry, if not its own: ``libero`` for OpenVLA's LIBERO evaluation.
        videos: Per method and task, how many episodes get an overlay video.
        server: ``ws://…`` of a policy server: it runs the one method of ``policies`` on its ``model``, which are named
            as the server names them. No MACs, no videos then.
        unnorm_key: Statistics key of the checkpoint, if it has several.
        device: ``cpu`` or ``cuda``.
        workers: Processes. Latencies are only worth reporting from one.
        threads: CPU threads of torch per process; 0 leaves it to torch.
    """

    model: str
    out: Path
    policies: tuple[str, ...] = ("dense", "motion:ratio=0.5")
    suite: str = "libero_spatial"
    tasks: tuple[int, ...] = ()
    init_states: tuple[int, int] = (FIRST_HELD_OUT, 50)
    seed: int = 0
    flow: str | None = None
    max_age: int = 16
    levers: str = "default"
    rendering: Literal["fast", "official"] = "fast"
    convention: Literal["upright", "openvla"] = "upright"
    image_pipeline: str | None = None
    videos: int = 1
    server: str | None = None
    unnorm_key: str | None = None
    device: str = "cpu"
    workers: int = 1
    threads: int = 0

    def __post_init__(self) -> None:
        if self.suite not in SUITES:
            raise InputError(f"unknown suite {self.suite!r}; choose one of {sorted(SUITES)}")
        first, stop = self.init_states
        if not 0 <= first < stop <= SUITES[self.suite].trials:
            raise InputError(
                f"init_states {self.init_states}: give first and one-past-last in 0..{SUITES[self.suite].trials}"
            )
        if self.workers < 1:
            raise InputError(f"workers is {self.workers}; give at least 1")
        Levers.parse(self.levers)
        if self.server is None:
            make_methods(self.policies, self.model)
        elif len(self.policies) != 1 or self.workers != 1:
            raise InputError("a server runs one method, for one process: give one of --policies, and --workers 1")
        make_flow(self.flow or "none")

    @property
    def task_ids(self) -> tuple[int, ...]:
        """The tasks to run."""
        return self.tasks or tuple(range(SUITES[self.suite].n_tasks))


@dataclass
class Worker:
    """One process's model, sessions and simulator.

    Attributes:
        config: The evaluation.
        sessions: Method → session.
    """

    config: EvalConfig
    sessions: dict[str, Driver] = field(init=False)
    _env: LiberoEnv | None = field(init=False, default=None)
    _cost: CostModel | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        config = self.config
        if config.server is not None:
            method = method_name(config.policies[0])
            self.sessions = {method: RemoteSession.connect(config.server, Path(config.model).name, method)}
            return
        if config.threads:
            torch.set_num_threads(config.threads)
        backbone = load_vla(
            config.model,
            device=config.device,
            dtype="auto",
            unnorm_key=config.unnorm_key,
            image_pipeline=config.image_pipeline,
        )
        self.sessions = {
            name: CachedVLA(
                backbone, policy, flow=config.flow, max_age=config.max_age, levers=Levers.parse(config.levers)
            ).session(config.seed)
            for name, policy in make_methods(config.policies, config.model).items()
        }

    def environment(self, task: int) -> LiberoEnv:
        """The simulator of a task; the last one is kept open."""
        config = self.config
        if self._env is None or self._env.task != task:
            if self._env is not None:
                self._env.close()
            self._env = LiberoEnv(config.suite, task, rendering=config.rendering, image_convention=config.convention)
        return self._env

    def run(self, method: str, task: int, init_state: int) -> EpisodeRecord:
        """Run one episode."""
        config, session = self.config, self.sessions[method]
        env = self.environment(task)
        if self._cost is None and isinstance(session, Session):
            self._cost = CostModel.of(session.vla.backbone, env.reset(init_state))
        video = None
        if init_state - config.init_states[0] < config.videos and isinstance(session, Session):
            video = EpisodeVideo(config.out / "videos" / f"{method}_task{task:02d}_init{init_state:02d}.mp4", method)
        record = rollout(
            env,
            session,
            method,
            init_state,
            seed=config.seed,
            cost=self._cost,
            recorder=video,
            to_robot=libero_gripper if config.convention == "openvla" else None,
        )
        if video is not None:
            video.close(success=record.success)
            record = EpisodeRecord(**{**asdict(record), "video": str(video.path.relative_to(config.out))})
        return record


Job = tuple[int, int, tuple[str, ...]]
"""Task, initial state, methods still to run on it."""

_WORKER: list[Worker] = []
"""This process's worker, made once by :func:`_start`."""


def _start(config: EvalConfig) -> None:
    _WORKER.append(Worker(config))


def _work(job: Job) -> list[EpisodeRecord]:
    task, init_state, methods = job
    return [_WORKER[0].run(method, task, init_state) for method in methods]


def evaluate(config: EvalConfig) -> Path:
    """Run what is still missing of an evaluation.

    Every finished episode is on disk before the next one begins; a killed run goes on where it stopped, without
    losing or repeating an episode.

    Returns:
        The run's folder: ``config.json``, ``episodes.jsonl``, ``summary.json``, ``videos/``.

    Raises:
        InputError: If the folder cannot be written or holds a run with other settings.
    """
    done = _open(config)
    methods = tuple(method_name(spec) for spec in config.policies)
    jobs = [
        (task, init_state, missing)
        for task in config.task_ids
        for init_state in range(*config.init_states)
        if (missing := tuple(m for m in methods if (m, task, init_state) not in done))
    ]
    total = sum(len(job[2]) for job in jobs)
    with (
        (config.out / EPISODES).open("a", encoding="utf-8") as log,
        tqdm(total=total, unit="episode", desc="rollouts") as bar,
    ):
        solved: dict[str, list[bool]] = {method: [] for method in methods}
        for record in _records(config, jobs):
            log.write(json.dumps(asdict(record)) + "\n")
            log.flush()
            os.fsync(log.fileno())
            solved[record.method].append(record.success)
            bar.update()
            bar.set_postfix({method: f"{sum(s)}/{len(s)}" for method, s in solved.items() if s})
    return config.out


def _records(config: EvalConfig, jobs: Sequence[Job]) -> Iterator[EpisodeRecord]:
    if not jobs:
        return
    if config.workers == 1:
        worker = Worker(config)
        for task, init_state, methods in jobs:
            for method in methods:
                yield worker.run(method, task, init_state)
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(config.workers, initializer=_start, initargs=(config,)) as pool:
        for records in pool.imap_unordered(_work, jobs):
            yield from records


def _open(config: EvalConfig) -> set[tuple[str, int, int]]:
    """Prepare the run's folder; which (method, task, initial state) it already holds."""
    settings = _settings(config)
    path = config.out / CONFIG
    try:
        config.out.mkdir(parents=True, exist_ok=True)
        if path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            different = [key for key in settings if key not in CHANGEABLE and before.get(key) != settings[key]]
            if different:
                raise InputError(f"{config.out} holds a run with other {different}; give another --out")
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        (config.out / SUMMARY).write_text(json.dumps(_summary(config), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write to {config.out} ({error}); give another --out") from error
    log = config.out / EPISODES
    if not log.exists():
        return set()
    text = log.read_bytes()
    whole = text.rfind(b"\n") + 1
    if whole < len(text):  # the last line of a killed run
        with log.open("r+b") as file:
            file.truncate(whole)
    return {(record.method, record.task, record.init_state) for record in read_episodes(log)}


def _settings(config: EvalConfig) -> dict[str, Any]:
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(config).items()}
    if Path(config.model).is_absolute():
        plain["model"] = Path(config.model).name
    plain["policies"] = [paths_by_name(spec) for spec in config.policies]
    plain["flow"] = config.flow and paths_by_name(config.flow)
    settings: dict[str, Any] = json.loads(json.dumps(plain))
    return {key: value for key, value in settings.items() if key != "out"}


def _summary(config: EvalConfig) -> dict[str, Any]:
    notes = []
    if config.rendering == "fast":
        notes.append("Altered rendering: reflections and multisampling are off. These are not the benchmark's pixels.")
    if config.workers > 1:
        notes.append(f"{config.workers} processes shared the machine: latencies are not worth comparing.")
    suite = SUITES[config.suite]
    first, stop = config.init_states
    if len(config.task_ids) < suite.n_tasks or stop - first < suite.trials:
        notes.append(
            f"{len(config.task_ids)} of {suite.n_tasks} tasks, initial states {first} to {stop - 1} of {suite.trials}."
        )
    return {
        **provenance(),
        "model": _describe(config.model),
        "simulator": {
            "suite": config.suite,
            "horizon": suite.horizon,
            "settle_steps": suite.settle_steps,
            "rendering": config.rendering,
            "convention": config.convention,
        },
        "methods": {
            method_name(spec): {"policy": paths_by_name(spec), "seed": config.seed} for spec in config.policies
        },
        "notes": notes,
    }


def _describe(model: str) -> dict[str, Any]:
    """What the checkpoint says of itself in ``lac.json``, if it does."""
    path = Path(model) / "lac.json"
    described: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {"name": Path(model).name, **described}
