"""The verbs: what each is for, an example, and where its function is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

GROUPS = ("try it", "measure", "train", "run on a robot", "look up")
ON_BENCHMARKS = ("eval", "check", "collect")
"""Verbs that have the options of a benchmark, which the suite decides on."""


@dataclass(frozen=True)
class Verb:
    """A verb of the command line.

    Attributes:
        group: One of :data:`GROUPS`.
        summary: What it does.
        example: A command to begin with.
        home: Module and name of its function; for :data:`ON_BENCHMARKS`, of what makes it for a benchmark.
        basic: Fields of its options that most need, beside those that must be given.
    """

    group: str
    summary: str
    example: str
    home: str
    basic: tuple[str, ...] = ()


VERBS = {
    "demo": Verb(
        "try it",
        "the bundled VLA solves real LIBERO tasks on a CPU, dense and with learned reuse",
        "lac demo --tasks 0 --episodes 1",
        "evaluate:demo",
        ("out", "tasks", "episodes"),
    ),
    "eval": Verb(
        "measure",
        "closed-loop episodes on a benchmark, every policy on the same initial states",
        "lac eval --model mini --policies dense lac --tasks 0 --out outputs/eval",
        "evaluate:make_evaluate",
        ("policies", "suite", "tasks", "init_states", "clock", "mode", "workers", "camera", "device"),
    ),
    "bench": Verb(
        "measure",
        "milliseconds, operations and memory of a frame, beside the stock model",
        "lac bench --quick",
        "bench:bench",
        ("quick", "model", "random_weights", "policies", "options", "sections", "device", "dtype", "threads", "out"),
    ),
    "replay": Verb(
        "measure",
        "whole sessions of several policies over recorded episodes, against dense; no simulator",
        "lac replay --dataset datasets/kitchen --policies lac:ratio=0.8 lac",
        "replay:replay",
        (
            "model",
            "policies",
            "baseline",
            "out",
            "store",
            "episodes",
            "held_out",
            "seed",
            "camera",
            "state_key",
            "device",
        ),
    ),
    "reproduce": Verb(
        "measure",
        "the tables of the paper on one model: LAC, its peers and its ablations",
        "lac reproduce libero --policies dense lac --trials 5",
        "evaluate:reproduce",
        ("model", "out", "suites", "tasks", "trials", "policies", "workers", "device"),
    ),
    "report": Verb(
        "measure",
        "the table and the HTML page of a run",
        "lac report outputs/eval",
        "reports:report",
        ("out",),
    ),
    "film": Verb(
        "measure",
        "the film of a run of `lac eval --clock`: methods side by side in the same world time",
        "lac film outputs/eval-clock --out film.mp4 --gif film.gif",
        "reports:film",
    ),
    "check": Verb(
        "measure",
        "what a benchmark needs and this machine does not have; or the proof that it can be played",
        "lac check --suite simpler-vm",
        "evaluate:make_check",
        ("suite", "tasks"),
    ),
    "train": Verb(
        "train",
        "a LAC policy beside a frozen VLA, on demonstrations or plain logs",
        "lac train --model mini --dataset datasets/kitchen --out outputs/my-lac",
        "train:train",
        ("camera", "state_key", "loss", "target_ratio", "episodes", "minutes", "device"),
    ),
    "pretrain": Verb(
        "train",
        "a bundled VLA itself, on demonstrations",
        "lac pretrain --dataset datasets/libero_spatial --out outputs/mini",
        "train:pretrain",
        ("model", "minutes", "camera", "state_key"),
    ),
    "collect": Verb(
        "train",
        "demonstrations by a scripted expert in LIBERO or with SIMPLER's WidowX, as a LeRobot dataset",
        "lac collect --tasks 0 1 --init-states 0 5 --out outputs/collect",
        "train:make_collect",
        ("suite", "suites", "tasks", "init_states", "dataset", "workers"),
    ),
    "serve": Verb(
        "run on a robot",
        "a policy server that speaks openpi's websocket protocol",
        "lac serve --model mini --policy lac --port 8000 --view",
        "serve:serve",
        ("policy", "host", "port", "camera", "state_key", "deadline_ms", "record", "view", "device"),
    ),
    "view": Verb(
        "run on a robot",
        "the live page of a server that runs with --view",
        "lac view ws://127.0.0.1:8000",
        "serve:view",
    ),
    "policies": Verb(
        "look up",
        "the caching policies that there are, with their options",
        "lac policies motion",
        "listing:policies",
    ),
    "models": Verb(
        "look up",
        "the models that there are: bundled, with random weights, of known families, plug-ins",
        "lac models",
        "listing:models",
    ),
}


def function_of(verb: str, words: Sequence[str]) -> tuple[Callable[..., Any], list[str]]:
    """Import a verb's function; that of a benchmark is made for the one that ``--suite`` names.

    Args:
        verb: One of :data:`VERBS`.
        words: Of the user, behind the verb.

    Returns:
        The function; and the words, in which a benchmark's class is replaced by its suite.

    Raises:
        InputError: If no benchmark has the suite.
    """
    module, _, name = VERBS[verb].home.partition(":")
    function: Callable[..., Any] = getattr(import_module(f"lac_vla.cli.{module}"), name)
    if verb not in ON_BENCHMARKS:
        return function, list(words)
    from lac_vla.sims import benchmark_of

    suite = _suite(words)
    benchmark = benchmark_of(suite)
    named = suite is None or suite in benchmark.suites
    replaced = [word if named else word.replace(suite or "", benchmark.suites[0]) for word in words]
    return function(benchmark), replaced


def _suite(words: Sequence[str]) -> str | None:
    """Find the suite among the words of a verb of :data:`ON_BENCHMARKS`: it decides which options there are."""
    for word, following in zip(words, [*words[1:], None], strict=False):
        name, _, value = word.partition("=")
        if name == "--suite":
            return value or following
    return None
