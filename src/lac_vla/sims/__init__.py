"""Simulators: adapters that turn a benchmark into frames and actions. They know no model and no policy."""

from __future__ import annotations

from lac_vla import plugins
from lac_vla.errors import InputError, did_you_mean
from lac_vla.sims.base import Benchmark
from lac_vla.sims.libero.benchmark import Libero
from lac_vla.sims.simpler.benchmark import Simpler

BENCHMARKS: dict[str, type[Benchmark]] = {"libero": Libero, "simpler": Simpler}
"""Name → benchmark. The first one is played by default."""


def benchmark_of(suite: str | None) -> type[Benchmark]:
    """Find the benchmark that a suite belongs to: one of ours or a plug-in's; ``None`` for the default one.

    Args:
        suite: Its name, or ``module:Class`` of a benchmark.

    Raises:
        InputError: If no benchmark has such a suite.
    """
    if suite is not None and plugins.OBJECT.fullmatch(suite):
        return _checked(suite, plugins.find_plugin(plugins.BENCHMARKS, suite))
    for benchmark in BENCHMARKS.values():
        if suite is None or suite in benchmark.suites:
            return benchmark
    names = plugins.announced(plugins.BENCHMARKS)
    others = [_checked(name, plugins.find_plugin(plugins.BENCHMARKS, name)) for name in names]
    for benchmark in others:
        if suite in benchmark.suites:
            return benchmark
    known = [name for benchmark in (*BENCHMARKS.values(), *others) for name in benchmark.suites]
    raise InputError(f"unknown suite {suite!r}{did_you_mean(str(suite), known)}; choose one of {', '.join(known)}")


def _checked(name: str, found: object) -> type[Benchmark]:
    if not (isinstance(found, type) and issubclass(found, Benchmark)):
        raise InputError(f"the plug-in {name!r} is no Benchmark: it must be a class that inherits it")
    return found
