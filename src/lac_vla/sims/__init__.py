"""Simulators: adapters that turn a benchmark into frames and actions. They know no model and no policy."""

from __future__ import annotations

from lac_vla.errors import InputError
from lac_vla.sims.base import Benchmark
from lac_vla.sims.libero.benchmark import Libero
from lac_vla.sims.simpler.benchmark import Simpler

BENCHMARKS: dict[str, type[Benchmark]] = {"libero": Libero, "simpler": Simpler}
"""Name → benchmark. The first one is played by default."""


def benchmark_of(suite: str | None) -> type[Benchmark]:
    """Find the benchmark that a suite belongs to; ``None`` for the default one.

    Raises:
        InputError: If no benchmark has such a suite.
    """
    for benchmark in BENCHMARKS.values():
        if suite is None or suite in benchmark.suites:
            return benchmark
    known = ", ".join(name for benchmark in BENCHMARKS.values() for name in benchmark.suites)
    raise InputError(f"unknown suite {suite!r}; choose one of {known}")
