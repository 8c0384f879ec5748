"""Paired evaluations: every method on the same initial states, resumable, in one or several processes."""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lac_vla.bundled import find_model
from lac_vla.errors import CheckpointError, InputError, LacError
from lac_vla.evaluation.clock import settings as clock_settings
from lac_vla.evaluation.cluster import run_on_ray
from lac_vla.evaluation.config import EvalConfig
from lac_vla.evaluation.processes import run_on_processes
from lac_vla.evaluation.stress import describe_stress
from lac_vla.evaluation.together import run_together
from lac_vla.evaluation.worker import EpisodeWorker, Job
from lac_vla.factory import ModelOptions, method_name
from lac_vla.files import locked, read_object, reading, write_object, writing
from lac_vla.provenance import load as load_now
from lac_vla.provenance import provenance
from lac_vla.results.records import EpisodeRecord, finished

EPISODES, CONFIG, SUMMARY, LOCK = "episodes.jsonl", "config.json", "summary.json", ".lock"
CHANGEABLE = ("workers", "envs", "threads", "videos", "server")
"""Settings that may differ when a run is resumed: they change no result."""
APART = ("stress", "clock", "mode", "deadline_ms")
"""Settings in which evaluations that run together may differ: a model and a simulator serve all of them."""


def evaluate(config: EvalConfig) -> Path:
    """Run what is still missing of an evaluation.

    Every finished episode is on disk before the next one begins; a killed run goes on where it stopped, without
    losing or repeating an episode. One process at a time writes to the folder, and its settings bind whoever goes on
    once it holds an episode. An episode whose simulator dies is begun again, as often as the benchmark allows.

    A run may grow: more policies, more tasks, and more initial states behind those that it has. What it holds is kept.

    Returns:
        The run's folder: ``config.json``, ``episodes.jsonl``, ``summary.json``, ``videos/``, ``failures/``.

    Raises:
        InputError: If the folder cannot be written, another process has it, or it holds a run with other settings.
        SimulatorError: If an episode's simulators died, too often.
    """
    evaluate_together([config])
    return config.out


def evaluate_together(configs: Sequence[EvalConfig], load: float | None = None) -> None:
    """Run what is still missing of several evaluations, task by task: a simulator takes long to make, and serves all.

    Args:
        configs: The evaluations.
        load: Of the machine before any work of ours; by default as it is now.

    Raises:
        InputError: As :func:`evaluate` does, or unless they differ in ``out`` and in stress or clock, and in nothing
            else.
        SimulatorError: As :func:`evaluate` does.
    """
    first, load = configs[0], load_now() if load is None else load
    for field in fields(EvalConfig):
        if field.name not in ("out", *APART) and len({getattr(config, field.name) for config in configs}) > 1:
            raise InputError(
                f"evaluations that run together differ in out, {', '.join(APART)}, all else alike: {field.name}"
            )
    if min(len({config.out for config in configs}), len({_world(config) for config in configs})) < len(configs):
        raise InputError("evaluations that run together have an out and a stress or clock each, and all else alike")
    simulator = first.benchmark.metadata(first.task_ids)
    methods = tuple(method_name(spec) for spec in first.policies)
    begin, stop = first.states
    with ExitStack() as opened:
        for config in configs:
            opened.enter_context(_held(config.out))
        settings = [_settings(config) for config in configs]
        done = [finished(config.out / EPISODES, *_world(config)) for config in configs]
        jobs = [
            Job(config, task, init_state, missing)
            for task in first.task_ids
            for config, there in zip(configs, done, strict=True)
            for init_state in range(begin, min(stop, first.benchmark.trials[task]))
            if (missing := tuple(m for m in methods if (m, task, init_state) not in there))
        ]
        records = opened.enter_context(closing(_run(first, jobs))) if jobs else ()
        logs = {_world(config): config.out / EPISODES for config in configs}
        total = sum(len(job.methods) for job in jobs)
        bar = opened.enter_context(tqdm(total=total, unit="episode", desc="rollouts", leave=False))
        solved: dict[str, list[bool]] = {method: [] for method in methods}
        for number, record in enumerate(records):
            if not number:  # a start that failed has bound nobody, and leaves no bar
                _describe(configs, settings, simulator, load)
                bar.leave = True
            _log(record, logs[record.stress, record.clock])
            solved[record.method].append(record.success)
            bar.update()
            bar.set_postfix({method: f"{sum(s)}/{len(s)}" for method, s in solved.items() if s})
        if not jobs:
            _describe(configs, settings, simulator)
        for config in configs:
            config.benchmark.publish(config.out)


def _world(config: EvalConfig) -> tuple[str, str]:
    """Name stress and clock as records do."""
    return config.stress or "", config.clock_label


@contextmanager
def _held(out: Path) -> Iterator[None]:
    """Keep other processes out of a run's folder; one that was made for nothing is taken away again."""
    lock = out / LOCK
    with ExitStack() as held:
        with writing(out, "--out"):
            held.enter_context(locked(lock, f"another process writes to {out}: let it end, or give another --out"))
        try:
            yield
        finally:
            with suppress(OSError):
                if [*out.iterdir()] == [lock]:
                    lock.unlink()


def _log(record: EpisodeRecord, path: Path) -> None:
    with writing(path, "--out"), path.open("a", encoding="utf-8") as log:
        log.write(json.dumps(record.to_json()) + "\n")
        log.flush()
        os.fsync(log.fileno())


def _run(config: EvalConfig, jobs: Sequence[Job]) -> Generator[EpisodeRecord, None, None]:
    """Run the episodes, in any order if there are several processes; if they run here, the model is loaded at once."""
    if config.ray is not None:
        return run_on_ray(EpisodeWorker, config, jobs)
    if config.workers > 1:
        return run_on_processes(EpisodeWorker, config, jobs)
    if config.envs > 1:
        return run_together(config, jobs)
    with ExitStack() as stack:
        worker = stack.enter_context(closing(EpisodeWorker(config)))
        for job in jobs:
            worker.check(job.config)
        worker.open(config, jobs[0].task)
        stack.pop_all()
    return _run_here(worker, jobs)


def _run_here(worker: EpisodeWorker, jobs: Sequence[Job]) -> Generator[EpisodeRecord, None, None]:
    with closing(worker):
        for job in jobs:
            yield from job.play(worker)


def _settings(config: EvalConfig) -> dict[str, Any]:
    """Agree on the run's settings with those of its folder; nothing is written yet.

    A folder without a finished episode may be begun anew with other settings: a model may have refused them.
    """
    settings: dict[str, Any] = json.loads(json.dumps(config.settings(), default=str))
    path, log = config.out / CONFIG, config.out / EPISODES
    if not path.exists() or not log.exists() or b"\n" not in log.read_bytes():
        return settings
    with reading(path, "give another --out"):
        return _grown(config.out, read_object(path, "give another --out"), settings)


def _grown(out: Path, before: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Unite the settings of a run that goes on: all policies, tasks and initial states that it ever had.

    An option of the model that did not exist when the run began counts as not given.
    """
    specs = {method_name(spec): spec for spec in before.get("policies", [])}
    more = {method_name(spec): spec for spec in settings["policies"]}
    (first, stop), (new_first, new_stop) = before.get("init_states", (0, 0)), settings["init_states"]
    tasks = before.get("tasks", []), settings["tasks"]
    before = asdict(ModelOptions()) | before
    fits = {
        "policies": all(specs.get(name, spec) == spec for name, spec in more.items()),
        "init_states": first == new_first,
        "tasks": True,
    }
    different = [
        key for key in settings if key not in CHANGEABLE and not fits.get(key, before.get(key) == settings[key])
    ]
    if different:
        there = ", ".join(f"{key} {before.get(key)}" for key in different)
        raise InputError(f"{out} holds a run with other {different}; give another --out (its own: {there})")
    return {
        **settings,
        "policies": list((specs | more).values()),
        "init_states": [first, max(stop, new_stop)],
        "tasks": sorted({*tasks[0], *tasks[1]}) if all(tasks) else [],  # empty means all
        **{name: max(before.get(name, 1), settings[name]) for name in ("workers", "envs")},  # the worst latencies
    }


def _describe(
    configs: Sequence[EvalConfig],
    settings: Sequence[Mapping[str, Any]],
    simulator: Mapping[str, Any],
    load: float | None = None,
) -> None:
    """Write what describes the runs; files that say the same already are left alone.

    Args:
        configs: The runs.
        settings: What each agreed on with its folder.
        simulator: Its metadata.
        load: Of the machine, before episodes were played, if they were; of a run that goes on, the highest is kept.
    """
    for config, agreed in zip(configs, settings, strict=True):
        path, before = config.out / SUMMARY, dict[str, Any]()
        with suppress(LacError):
            before = read_object(path, "it is written again")
        loads = [value for value in (load, before.get("load")) if isinstance(value, float)]
        known = {"load": round(max(loads), 2)} if loads else {}
        summary = {**_summary(config, agreed, simulator), **known}
        if before | {"created": None} == json.loads(json.dumps(summary)) | {"created": None}:
            summary = before
        with writing(config.out, "--out"):
            write_object(config.out / CONFIG, agreed)
            write_object(path, summary)


def _summary(config: EvalConfig, settings: Mapping[str, Any], simulator: Mapping[str, Any]) -> dict[str, Any]:
    notes = [*config.benchmark.notes]
    if config.stress is not None:
        notes.append(describe_stress(config.stress))
    if (world := config.world) is not None:
        notes.append(world.note)
    if settings["workers"] > 1:
        notes.append(f"{settings['workers']} processes shared the machine: latencies are not worth comparing.")
    if settings["envs"] > 1:
        notes.append(f"{settings['envs']} simulators were answered together: latencies are those of whole batches.")
    if config.actions_per_call is not None:
        notes.append(f"{config.actions_per_call} actions of every answer are executed before the model is asked again.")
    trials = config.benchmark.trials
    n_tasks = len(settings["tasks"]) or len(trials)
    first, stop = settings["init_states"]
    if n_tasks < len(trials) or stop - first < max(trials):
        notes.append(f"{n_tasks} of {len(trials)} tasks, initial states {first} to {stop - 1} of {max(trials)}.")
    return {
        **provenance(),
        "model": describe_model(config.model),
        "simulator": {**simulator, "stress": config.stress},
        "methods": {method_name(spec): {"policy": spec, "seed": config.seed} for spec in settings["policies"]},
        "actions_per_call": config.actions_per_call,
        **clock_settings(world),
        "notes": notes,
    }


def describe_model(model: str) -> dict[str, Any]:
    """Read what the checkpoint says of itself in ``lac.json``, if it does."""
    path = Path(find_model(model)).expanduser() / "lac.json"
    found = read_object(path, "fetch the checkpoint again", CheckpointError) if path.is_file() else {}
    return {"name": Path(model).name, **found}
