"""Collect the scripted expert's demonstrations: a staging file per episode, resumable, in several processes.

A staging file is an ``.npz`` without pickles, written to a temporary name and renamed, so that a file which
exists is complete. Rows are time steps; what is observed at step t was observed before action t.

=====================  ==============  =======================================================================
key                    shape           content
=====================  ==============  =======================================================================
``images.agentview``   (T, H, W, 3)    uint8; absent where images are stored encoded
``images.wrist``       (T, H, W, 3)    uint8; likewise
``encoded.<camera>``   (bytes,)        uint8, the T encoded images one after another
``lengths.<camera>``   (T,)            int64, bytes of each encoded image
``state``              (T, 8)          float32, proprioception
``action``             (T, 7)          float32, the expert's clean action: the label
``executed``           (T, 7)          float32, what the robot did: the clean action plus noise
``success``            (T,)            bool, whether the goal held after the action
``phase``              (T,)            int8, :class:`~lac_vla.sims.phase.Phase`
``object_position``    (T, 3)          float32, m, world: the object to take
``target_position``    (T, 3)          float32, m, world: what it is put on or into
``meta``               ()              str, JSON: suite, task, instruction, init_state, seed, sigma, rendering
=====================  ==============  =======================================================================

:func:`load_episode` reads one and decodes the images.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from lac_vla.errors import DatasetError, InputError, LacError
from lac_vla.files import cut_unfinished, locked, parse_json, read_lines, reading, write_whole, writing
from lac_vla.sims.libero.benchmark import Libero
from lac_vla.sims.libero.demonstration import Demonstration, demonstrate
from lac_vla.sims.libero.env import LiberoEnv
from lac_vla.sims.libero.expert import UNSOLVED
from lac_vla.sims.libero.renderer import Rendering
from lac_vla.sims.libero.suites import HORIZONS, TRIALS

FORMAT = 1
DTYPES = {"success": np.bool_, "phase": np.int8}
"""Key → dtype, where it is not float32."""
AGAIN = "delete it or collect it again"
FAILURES = "failures.jsonl"


@dataclass(frozen=True)
class CollectConfig:
    """The demonstrations to collect.

    Attributes:
        out: Folder of the staging files; it is created.
        suite: A LIBERO suite.
        suites: Several suites, or ``all``, instead of one: each gets a folder of its own below ``out``.
        tasks: Task ids, of every suite; none means all that the expert can solve.
        init_states: First and one-past-last initial state. The default leaves 40..49 for evaluation.
        seed: Seed of the fixtures and of the noise.
        noise: Range of the noise's standard deviation, drawn per episode (see ``demonstrate``).
        resolution: Side of the images, pixels.
        rendering: ``"fast"`` or ``"official"``.
        image_codec: ``"png"`` (lossless), ``"jpeg"`` (quality 95) or ``"raw"``.
        workers: Processes. Each keeps the environments of its tasks open: ≈ 1 GB a task.
        retry_failures: Try again what failed in an earlier run.
    """

    out: Path
    suite: str = "libero_spatial"
    suites: tuple[str, ...] = ()
    tasks: tuple[int, ...] = ()
    init_states: tuple[int, int] = (0, 40)
    seed: int = 0
    noise: tuple[float, float] = (0.05, 0.25)
    resolution: int = 256
    rendering: Rendering = "fast"
    image_codec: Literal["png", "jpeg", "raw"] = "jpeg"
    workers: int = 2
    retry_failures: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be collected."""
        for part in self.parts:
            Libero(part.suite).task_ids(self.tasks)
            if beyond := {task: UNSOLVED[part.suite, task] for task in self.tasks if (part.suite, task) in UNSOLVED}:
                why = "; ".join(f"{task} ({reason})" for task, reason in beyond.items())
                raise InputError(f"the scripted expert does not solve {part.suite} task {why}: leave it out")
        first, end = self.init_states
        if not 0 <= first < end <= TRIALS:
            raise InputError(f"init_states must be a range within 0..{TRIALS}, not {self.init_states}")
        if not 0.0 <= self.noise[0] <= self.noise[1] <= 1.0:
            raise InputError(f"noise must be a range within 0..1, not {self.noise}")
        if self.workers < 1:
            raise InputError(f"workers must be at least 1, not {self.workers}")

    @property
    def parts(self) -> tuple[CollectConfig, ...]:
        """One configuration per suite."""
        if not self.suites:
            return (self,)
        suites = tuple(HORIZONS) if self.suites == ("all",) else tuple(dict.fromkeys(self.suites))
        if unknown := [suite for suite in suites if suite not in HORIZONS]:
            raise InputError(f"unknown suite {unknown[0]!r}; all, or some of {', '.join(HORIZONS)}")
        return tuple(replace(self, suite=suite, suites=(), out=self.out / suite) for suite in suites)

    @property
    def task_ids(self) -> tuple[int, ...]:
        """The tasks of the one suite."""
        return tuple(task for task in Libero(self.suite).task_ids(self.tasks) if (self.suite, task) not in UNSOLVED)


def collect(config: CollectConfig) -> None:
    """Run the expert over initial states (outer) and tasks (inner), and stage what it solves.

    May be interrupted and started again: episodes staged, or recorded in ``failures.jsonl``, are skipped.

    Raises:
        InputError: If the folder cannot be written, or another process collects into it.
        LacError: If a worker fails for any other reason than an unsolved episode.
    """
    for part in config.parts:
        busy = f"another process collects into {part.out}: give another --out"
        with writing(part.out, "--out"), locked(part.out / ".lock", busy):
            _collect(part)


def _collect(config: CollectConfig) -> None:
    known = set() if config.retry_failures else _known_failures(config)
    jobs = [
        (task, init_state)
        for init_state in range(*config.init_states)
        for task in config.task_ids
        if not episode_path(config, task, init_state).exists() and (task, init_state) not in known
    ]
    solved = 0
    with tqdm(total=len(jobs), desc=config.suite, unit="episode", smoothing=0.05) as bar:
        for (task, init_state), demo_steps, staged in _run(config, jobs):
            solved += staged
            if not staged:
                _record_failure(config, task, init_state, demo_steps)
            bar.update()
            bar.set_postfix(solved=solved, failed=bar.n - solved)


def episode_path(config: CollectConfig, task: int, init_state: int) -> Path:
    """Name the staging file of an episode."""
    return config.out / f"task{task:02d}_init{init_state:02d}_seed{config.seed}.npz"


def load_metadata(path: Path) -> dict[str, Any]:
    """Read the metadata of a staging file; its arrays, which are large, are not read.

    Raises:
        DatasetError: If the file is not of this format.
    """
    with reading(path, AGAIN, DatasetError):
        with np.load(path, allow_pickle=False) as file:
            meta = parse_json(str(file["meta"])) if "meta" in file.files else None
        if not isinstance(meta, dict) or "format" not in meta:
            raise DatasetError(f"{path} is not a staged episode: {AGAIN}")
        if meta["format"] != FORMAT:
            raise DatasetError(f"{path} has staging format {meta['format']!r}; this version reads {FORMAT}")
        for kind, names in {str: ("suite", "instruction"), int: ("task", "init_state", "seed")}.items():
            if wrong := [name for name in names if not isinstance(meta.get(name), kind)]:
                raise DatasetError(f"{path}: the metadata's {wrong[0]} is {meta.get(wrong[0])!r}: {AGAIN}")
        return meta


def load_episode(path: Path) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """Read a staging file: arrays by key (images decoded, as ``images.<camera>``), and the metadata.

    Raises:
        DatasetError: If the file is not of this format, or an image is damaged.
    """
    meta = load_metadata(path)
    with reading(path, AGAIN, DatasetError):
        with np.load(path, allow_pickle=False) as file:
            arrays: dict[str, npt.NDArray[Any]] = {key: file[key] for key in file.files if key != "meta"}
        for camera in [key.split(".", 1)[1] for key in arrays if key.startswith("encoded.")]:
            parts = np.split(arrays.pop(f"encoded.{camera}"), np.cumsum(arrays.pop(f"lengths.{camera}"))[:-1])
            images = [cv2.imdecode(part, cv2.IMREAD_COLOR) if part.size else None for part in parts]
            if any(image is None for image in images):
                raise DatasetError(f"{path} holds an image of {camera} that cannot be decoded: {AGAIN}")
            arrays[f"images.{camera}"] = np.stack([image[..., ::-1] for image in images if image is not None])
        if missing := [key for key in ("state", "action") if key not in arrays]:
            raise DatasetError(f"{path} holds no {missing[0]}: {AGAIN}")
        return arrays, meta


# ---- staging


def _stage(config: CollectConfig, env: LiberoEnv, init_state: int, demo: Demonstration) -> None:
    """Write one episode under its final name, whole or not at all."""
    arrays = {name: np.array(rows, dtype=DTYPES.get(name, np.float32)) for name, rows in demo.rows.items()}
    for camera in demo.frames[0].images:
        images = np.stack([frame.images[camera] for frame in demo.frames])
        if config.image_codec == "raw":
            arrays[f"images.{camera}"] = images
        else:
            encoded = [_encode(image, config.image_codec) for image in images]
            arrays[f"encoded.{camera}"] = np.concatenate(encoded)
            arrays[f"lengths.{camera}"] = np.array([len(data) for data in encoded], dtype=np.int64)
    meta = env.metadata() | {
        "format": FORMAT,
        "init_state": init_state,
        "seed": config.seed,
        "sigma": demo.sigma,
        "noise": list(config.noise),
        "image_codec": config.image_codec,
        "steps": len(demo),
    }

    def write(partial: Path) -> None:
        with partial.open("wb") as file:
            np.savez(file, meta=np.array(json.dumps(meta)), **arrays)

    write_whole(episode_path(config, env.task, init_state), write)


def _encode(image: npt.NDArray[np.uint8], codec: str) -> npt.NDArray[np.uint8]:
    """Encode one RGB image as PNG or JPEG, (bytes,) uint8."""
    options = {"png": [cv2.IMWRITE_PNG_COMPRESSION, 3], "jpeg": [cv2.IMWRITE_JPEG_QUALITY, 95]}[codec]
    done, data = cv2.imencode(f".{codec}", image[..., ::-1], options)
    if not done:
        raise LacError(f"OpenCV could not encode an image as {codec}")
    return np.asarray(data, dtype=np.uint8).reshape(-1)


def _known_failures(config: CollectConfig) -> set[tuple[int, int]]:
    """Read (task, initial state) of the failures that earlier runs with this seed recorded."""
    path = config.out / FAILURES
    if not path.exists():
        return set()
    rows = read_lines(path, "lac collect", lambda row: (int(row["seed"]), int(row["task"]), int(row["init_state"])))
    return {(task, init_state) for _, (seed, task, init_state) in rows if seed == config.seed}


def _record_failure(config: CollectConfig, task: int, init_state: int, steps: int) -> None:
    """Append one line to the list of failures."""
    row = {"task": task, "init_state": init_state, "seed": config.seed, "steps": steps}
    cut_unfinished(config.out / FAILURES)
    with (config.out / FAILURES).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


# ---- processes


def _run(config: CollectConfig, jobs: list[tuple[int, int]]) -> Iterator[tuple[tuple[int, int], int, bool]]:
    """Yield every job's task and initial state, its steps, and whether it was staged, in any order.

    A worker owns every n-th task and all its jobs, so that each environment is made once.
    """
    context = multiprocessing.get_context("spawn")  # GL contexts do not survive a fork
    tasks = sorted({task for task, _ in jobs})
    workers = [ProcessPoolExecutor(1, context) for _ in range(min(config.workers, len(tasks)))]
    try:
        futures = {workers[tasks.index(job[0]) % len(workers)].submit(_play, config, *job): job for job in jobs}
        for future in as_completed(futures):
            if (error := future.exception()) is not None:
                task, init_state = futures[future]
                raise LacError(f"task {task}, initial state {init_state}: {type(error).__name__}: {error}") from error
            yield futures[future], *future.result()
    finally:
        for worker in workers:
            worker.shutdown(cancel_futures=True)


_ENVS: dict[int, LiberoEnv] = {}
"""The environments of a worker's tasks."""


def _play(config: CollectConfig, task: int, init_state: int) -> tuple[int, bool]:
    """Run an episode in a worker, and stage it if the expert solves it."""
    cv2.setNumThreads(1)
    if task not in _ENVS:
        _ENVS[task] = LiberoEnv(config.suite, task, resolution=config.resolution, rendering=config.rendering)
    demo = demonstrate(_ENVS[task], init_state, seed=config.seed, noise=config.noise)
    if demo.solved:
        _stage(config, _ENVS[task], init_state, demo)
    return len(demo), demo.solved
