"""Paired evaluations: every method on the same initial states, resumable, in one or several processes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lac_vla.errors import InputError
from lac_vla.evaluation.config import EvalConfig
from lac_vla.evaluation.jobs import Job
from lac_vla.evaluation.stress import describe_stress
from lac_vla.evaluation.worker import run_jobs
from lac_vla.factory import method_name
from lac_vla.policies import paths_by_name
from lac_vla.provenance import provenance
from lac_vla.results.records import finished
from lac_vla.sims.libero import SUITES

EPISODES, CONFIG, SUMMARY = "episodes.jsonl", "config.json", "summary.json"
CHANGEABLE = ("workers", "threads", "videos", "server")
"""Settings that may differ when a run is resumed: they change no result."""


def evaluate(config: EvalConfig) -> Path:
    """Run what is still missing of an evaluation.

    Every finished episode is on disk before the next one begins; a killed run goes on where it stopped, without
    losing or repeating an episode.

    A run may grow: more policies, and more initial states behind those that it has. What it holds is kept.

    Returns:
        The run's folder: ``config.json``, ``episodes.jsonl``, ``summary.json``, ``videos/``, ``failures/``.

    Raises:
        InputError: If the folder cannot be written or holds a run with other settings.
    """
    evaluate_together([config])
    return config.out


def evaluate_together(configs: Sequence[EvalConfig]) -> None:
    """Run what is still missing of several evaluations, task by task: a simulator takes long to make, and serves all.

    Args:
        configs: They differ in ``out`` and ``stress`` alone, and all in both.

    Raises:
        InputError: As :func:`evaluate` does, or if they differ in more.
    """
    first = configs[0]
    for name in EvalConfig.__dataclass_fields__:
        values = {getattr(config, name) for config in configs}
        if len(values) != (len(configs) if name in ("out", "stress") else 1):
            raise InputError(f"evaluations that run together have an out and a stress each, and all else alike: {name}")
    settings = [_check(config) for config in configs]
    done = [(config, finished(config.out / EPISODES, config.stress or "")) for config in configs]
    for config, agreed in zip(configs, settings, strict=True):
        _open(config, agreed)
    methods = tuple(method_name(spec) for spec in first.policies)
    jobs = [
        Job(config, task, init_state, missing)
        for task in first.task_ids
        for config, there in done
        for init_state in range(*first.init_states)
        if (missing := tuple(m for m in methods if (m, task, init_state) not in there))
    ]
    with ExitStack() as opened:
        logs = {c.stress or "": opened.enter_context((c.out / EPISODES).open("a", encoding="utf-8")) for c in configs}
        bar = opened.enter_context(tqdm(total=sum(len(job.methods) for job in jobs), unit="episode", desc="rollouts"))
        solved: dict[str, list[bool]] = {method: [] for method in methods}
        for record in opened.enter_context(closing(run_jobs(first, jobs))):
            log = logs[record.stress]
            log.write(json.dumps(record.to_json()) + "\n")
            log.flush()
            os.fsync(log.fileno())
            solved[record.method].append(record.success)
            bar.update()
            bar.set_postfix({method: f"{sum(s)}/{len(s)}" for method, s in solved.items() if s})


def _check(config: EvalConfig) -> dict[str, Any]:
    """The run's settings, if its folder can take it; nothing is written yet."""
    path = config.out / CONFIG
    if not path.exists():
        return _settings(config)
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); give another --out") from error
    return _grown(config.out, before, _settings(config))


def _open(config: EvalConfig, settings: Mapping[str, Any]) -> None:
    """Prepare the run's folder."""
    try:
        config.out.mkdir(parents=True, exist_ok=True)
        (config.out / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        (config.out / SUMMARY).write_text(json.dumps(_summary(config, settings), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write to {config.out} ({error}); give another --out") from error


def _grown(out: Path, before: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run that goes on: with all the policies and initial states that it ever had."""
    specs = {method_name(spec): spec for spec in before.get("policies", [])}
    more = {method_name(spec): spec for spec in settings["policies"]}
    (first, stop), (new_first, new_stop) = before.get("init_states", (0, 0)), settings["init_states"]
    grown = {
        "policies": all(specs.get(name, spec) == spec for name, spec in more.items()),
        "init_states": first == new_first,
    }
    different = [
        key for key in settings if key not in CHANGEABLE and not grown.get(key, before.get(key) == settings[key])
    ]
    if different:
        raise InputError(f"{out} holds a run with other {different}; give another --out")
    return {
        **settings,
        "policies": list((specs | more).values()),
        "init_states": [first, max(stop, new_stop)],
        "workers": max(before.get("workers", 1), settings["workers"]),  # of its latencies, the worst
    }


def _settings(config: EvalConfig) -> dict[str, Any]:
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(config).items()}
    if Path(config.model).is_absolute():
        plain["model"] = Path(config.model).name
    plain["policies"] = [paths_by_name(spec) for spec in config.policies]
    plain["flow"] = config.flow and paths_by_name(config.flow)
    settings: dict[str, Any] = json.loads(json.dumps(plain))
    return {key: value for key, value in settings.items() if key not in ("out", "ray")}


def _summary(config: EvalConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    notes = []
    if config.rendering == "fast":
        notes.append("Altered rendering: reflections and multisampling are off. These are not the benchmark's pixels.")
    if config.stress is not None:
        notes.append(describe_stress(config.stress))
    if settings["workers"] > 1:
        notes.append(f"{settings['workers']} processes shared the machine: latencies are not worth comparing.")
    suite = SUITES[config.suite]
    first, stop = settings["init_states"]
    if len(config.task_ids) < suite.n_tasks or stop - first < suite.trials:
        notes.append(
            f"{len(config.task_ids)} of {suite.n_tasks} tasks, initial states {first} to {stop - 1} of {suite.trials}."
        )
    return {
        **provenance(),
        "model": describe_model(config.model),
        "simulator": {
            "suite": config.suite,
            "horizon": suite.horizon,
            "settle_steps": suite.settle_steps,
            "rendering": config.rendering,
            "convention": config.convention,
            "stress": config.stress,
        },
        "methods": {method_name(spec): {"policy": spec, "seed": config.seed} for spec in settings["policies"]},
        "notes": notes,
    }


def describe_model(model: str) -> dict[str, Any]:
    """What the checkpoint says of itself in ``lac.json``, if it does."""
    path = Path(model) / "lac.json"
    described: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {"name": Path(model).name, **described}
