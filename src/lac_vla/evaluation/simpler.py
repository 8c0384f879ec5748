"""Paired evaluations on SIMPLER: its whole sweep, resumable, over simulators that may die."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from lac_vla.cost import CostModel
from lac_vla.engine.options import EngineOptions
from lac_vla.errors import InputError
from lac_vla.evaluation.rollout import rollout
from lac_vla.evaluation.simpler_table import EPISODES, TABLE, tables
from lac_vla.factory import ModelOptions, load_methods, make_policies, method_name
from lac_vla.flow import make_flow
from lac_vla.models import AdaptiveEnsemble
from lac_vla.policies import paths_by_name
from lac_vla.provenance import provenance
from lac_vla.results.records import finished
from lac_vla.session import Session
from lac_vla.sims.simpler.actions import Convention, conversion
from lac_vla.sims.simpler.assets import Missing, missing_for_original, missing_for_port
from lac_vla.sims.simpler.backend import Backend, SimulatorError
from lac_vla.sims.simpler.env import SimplerEnv
from lac_vla.sims.simpler.episode import Episode, Setup
from lac_vla.sims.simpler.ms2 import SERVER, Ms2Backend
from lac_vla.sims.simpler.ms3 import Ms3Backend
from lac_vla.sims.simpler.protocol import episodes, tasks

CONFIG, SUMMARY = "config.json", "summary.json"
CHANGEABLE = ("python", "assets", "timeout_s", "retries", "threads", "check", "limit", "tasks")
"""Settings that may differ when a run is resumed: they change no episode."""
ENSEMBLES = {"google": 2, "widowx": 7}
"""Robot → chunks that CogACT's evaluation averages."""


@dataclass(frozen=True)
class SimplerConfig:
    """A paired evaluation on SIMPLER.

    Attributes:
        model: Checkpoint folder or hub id.
        out: Folder of the run. If it holds a run with the same settings, that run goes on.
        setup: ``vm`` (864 episodes of the Google robot, visual matching), ``va`` (1722, variant aggregation) or
            ``widowx`` (96).
        policies: Methods, as of ``lac eval``.
        backend: ``ms2``, the original, in an interpreter of its own; ``ms3``, ManiSkill3's port: WidowX alone.
        python: The original's interpreter; by default ``LAC_SIMPLER_PYTHON`` of the environment.
        assets: The original's data, ``ManiSkill2_real2sim/data``; by default ``MS2_ASSET_DIR`` of the environment.
        convention: Whose evaluation to follow in gripper and chunks: ``cogact`` or ``openvla``.
        ray_tracing: Trace rays in the drawer and apple tasks, as the protocol demands.
        tasks: Numbers of tasks of the setup; empty for all.
        limit: Play only the first so many episodes of each task; 0 for all.
        seed: Of every session.
        flow: As of ``lac eval``.
        max_age: As of ``lac eval``.
        options: As of ``lac eval``.
        image_pipeline: The model's image geometry, if not its own.
        unnorm_key: Statistics key of the checkpoint; by default that of the setup's robot.
        device: ``cpu`` or ``cuda``.
        threads: CPU threads of torch; 0 leaves it to torch.
        timeout_s: Seconds after which a step that does not end means a simulator that hangs.
        retries: How often an episode whose simulator died is begun again.
        check: Say what is missing, and play nothing.
    """

    model: str = ""
    out: Path = Path("outputs/simpler")
    setup: Setup = "vm"
    policies: tuple[str, ...] = ("dense", "motion:ratio=0.5")
    backend: Literal["ms2", "ms3"] = "ms2"
    python: str | None = None
    assets: Path | None = None
    convention: Convention = "cogact"
    ray_tracing: bool = True
    tasks: tuple[int, ...] = ()
    limit: int = 0
    seed: int = 0
    flow: str | None = None
    max_age: int = 16
    options: str = "default"
    image_pipeline: str | None = None
    unnorm_key: str | None = None
    device: str = "cpu"
    threads: int = 0
    timeout_s: float = 60.0
    retries: int = 2
    check: bool = False

    def __post_init__(self) -> None:
        names = [task.name for task in tasks(self.setup)]
        if not set(self.tasks) <= set(range(len(names))):
            listed = ", ".join(f"{k} {name}" for k, name in enumerate(names))
            raise InputError(f"tasks {self.tasks}: {self.setup} has {listed}")
        if self.limit < 0 or self.retries < 0 or self.timeout_s <= 0:
            raise InputError("limit and retries must not be negative, and timeout_s must be positive")
        if not self.model and not self.check:
            raise InputError("give a checkpoint with --model, or --check to see what is missing here")
        EngineOptions.parse(self.options)
        make_flow(self.flow or "none")
        if not self.check:
            make_policies(self.policies, self.model)

    @property
    def interpreter(self) -> str | None:
        """Of the original."""
        return self.python or os.environ.get("LAC_SIMPLER_PYTHON")

    @property
    def data(self) -> Path | None:
        """Of the original."""
        found = self.assets or os.environ.get("MS2_ASSET_DIR")
        return None if not found else Path(found).resolve()

    @property
    def wanted(self) -> list[Episode]:
        """The episodes to play."""
        return [
            episode
            for episode in episodes(self.setup)
            if (not self.tasks or episode.task in self.tasks) and (not self.limit or episode.number < self.limit)
        ]


def missing(config: SimplerConfig) -> list[Missing]:
    """What the run needs and does not find on this machine."""
    if config.backend == "ms3":
        return missing_for_port(config.wanted)
    return missing_for_original(config.wanted, config.data, config.interpreter, ray_tracing=config.ray_tracing)


def make_backend(config: SimplerConfig) -> Backend:
    """The simulator.

    Raises:
        InputError: If something is missing; the message lists all of it, and where it comes from.
        SimulatorError: If the original cannot be imported by its interpreter.
    """
    if lacking := missing(config):
        raise InputError("SIMPLER cannot run here yet.\n" + "\n".join(f"- {item}" for item in lacking))
    if config.backend == "ms3":
        return Ms3Backend("gpu" if config.device == "cuda" else "cpu")
    command = (str(config.interpreter), str(SERVER))
    original = Ms2Backend(command, config.data or Path(), timeout_s=config.timeout_s, ray_tracing=config.ray_tracing)
    version = str(original.metadata().get("numpy"))
    if version.partition(".")[0] not in ("0", "1"):
        original.close()
        raise InputError(
            f"{config.interpreter} has numpy {version}, with which SimplerEnv's kinematics fail: 'numpy<2'"
            if version[:1].isdecimal()
            else f"{config.interpreter} does not say which numpy it has ({version}): SimplerEnv needs 'numpy<2'"
        )
    return original


def evaluate_simpler(config: SimplerConfig, backend: Callable[[SimplerConfig], Backend] = make_backend) -> Path:
    """Play what is still missing of an evaluation.

    Every finished episode is on disk before the next begins. An episode whose simulator dies or hangs is begun again
    with a new one; if that does not help, the run ends, and the same command goes on from there.

    Args:
        config: The evaluation.
        backend: Makes the simulator.

    Returns:
        The run's folder: ``config.json``, ``episodes.jsonl``, ``summary.json``, and the tables as ``simpler.json``.

    Raises:
        InputError: If something is missing on this machine, or the folder holds a run with other settings.
        SimulatorError: If an episode's simulators died, too often.
    """
    with closing(backend(config)) as simulator:
        done = _open(config, simulator)
        names = [method_name(spec) for spec in config.policies]
        jobs = [(e, m) for e in config.wanted for m in names if (m, e.task, e.number) not in done]
        log = config.out / EPISODES
        with log.open("a", encoding="utf-8") as file, tqdm(total=len(jobs), unit="episode", desc="rollouts") as bar:
            for line in _play(config, simulator, jobs):
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
                bar.update()
    written = json.dumps(tables(config.out), indent=2) + "\n"
    (config.out / TABLE).write_text(written, encoding="utf-8")
    return config.out


# ---- machinery


def _play(config: SimplerConfig, simulator: Backend, jobs: Sequence[tuple[Episode, str]]) -> Iterator[dict[str, Any]]:
    """Play episodes; give the line of each for the log."""
    if not jobs:
        return
    sessions = _sessions(config)
    robot = jobs[0][0].robot
    ensemble = AdaptiveEnsemble(ENSEMBLES[robot.name]) if config.convention == "cogact" else None
    cost: CostModel | None = None
    for episode, method in jobs:
        env = SimplerEnv(config.setup, episode.task, simulator, conversion(robot, config.convention))
        for attempt in range(config.retries + 1):
            try:
                if cost is None:
                    vla = sessions[method].vla
                    cost = CostModel.of(
                        vla.model, env.reset(episode.number), vision_kv_reuse=vla.options.vision_kv_reuse
                    )
                record = rollout(
                    env, sessions[method], method, episode.number, seed=config.seed, cost=cost, ensemble=ensemble
                )
                break
            except SimulatorError as error:
                if attempt == config.retries:
                    raise
                tqdm.write(f"{episode.name}, episode {episode.number}: {error}; it is begun again")
        yield {**record.to_json(), "simpler": env.outcome()}


def _sessions(config: SimplerConfig) -> dict[str, Session]:
    robot = tasks(config.setup)[0].robot
    options = ModelOptions(
        device=config.device,
        unnorm_key=config.unnorm_key or robot.dataset,
        image_pipeline=config.image_pipeline,
        flow=config.flow,
        max_age=config.max_age,
        options=config.options,
        seed=config.seed,
        threads=config.threads,
    )
    vlas = load_methods(config.model, config.policies, options, cameras=(robot.camera,))
    return {name: vla.session(config.seed) for name, vla in vlas.items()}


def _open(config: SimplerConfig, simulator: Backend) -> set[tuple[str, int, int]]:
    """Prepare the run's folder; which (method, task, episode) it already holds."""
    settings, path = _settings(config), config.out / CONFIG
    try:
        config.out.mkdir(parents=True, exist_ok=True)
        if path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            if different := [key for key in settings if before.get(key) != settings[key]]:
                raise InputError(f"{config.out} holds a run with other {different}; give another --out")
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        written = json.dumps(_summary(config, simulator), indent=2) + "\n"
        (config.out / SUMMARY).write_text(written, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write to {config.out} ({error}); give another --out") from error
    return finished(config.out / EPISODES)


def _settings(config: SimplerConfig) -> dict[str, Any]:
    """What makes an episode what it is, without folders of this machine."""
    plain = {key: value for key, value in asdict(config).items() if key not in (*CHANGEABLE, "out")}
    plain["model"] = Path(config.model).name if Path(config.model).is_absolute() else config.model
    plain["policies"] = [paths_by_name(spec) for spec in config.policies]
    plain["flow"] = config.flow and paths_by_name(config.flow)
    settings: dict[str, Any] = json.loads(json.dumps(plain))
    return settings


def _summary(config: SimplerConfig, simulator: Backend) -> dict[str, Any]:
    return {
        **provenance(),
        "model": {"name": Path(config.model).name},
        "simulator": {"suite": f"simpler-{config.setup}", **simulator.metadata()},
        "methods": {
            method_name(spec): {"policy": paths_by_name(spec), "seed": config.seed} for spec in config.policies
        },
        "notes": [f"Only {TABLE} says whether this may be called SIMPLER's table."],
    }
