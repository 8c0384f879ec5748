"""Timing by turns: every round runs every variant, so that a noisy machine is noisy to all of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import cv2
import numpy as np
import torch
from tqdm import tqdm

from lac_vla.errors import InputError
from lac_vla.results.stats import Percentiles, percentiles

T = TypeVar("T")


@dataclass(frozen=True)
class Ratio:
    """A comparison of two quantities measured in the same rounds.

    Attributes:
        value: Median of the one over the median of the other.
        low: Lower quartile of the ratios within the rounds.
        high: Upper quartile of them.
    """

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
        """Compare measurements, one each per round, in the order of the rounds."""
        above, below = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
        low, high = np.percentile(above / below, [25, 75])
        return cls(float(np.median(above) / np.median(below)), float(low), float(high))


@dataclass(frozen=True)
class Target:
    """A number that the library must reach.

    Attributes:
        what: What is measured.
        unit: Of ``value`` and ``limit``; ``"×"`` for a ratio.
        value: What was measured.
        low: Lower quartile of it over the rounds; ``None`` for a single measurement.
        high: Upper quartile.
        limit: What is asked for.
        bound: ``"at most"`` or ``"at least"`` the limit.
        reached: Whether the value keeps to it.
    """

    what: str
    unit: str
    value: float
    low: float | None
    high: float | None
    limit: float
    bound: str
    reached: bool

    @classmethod
    def at_most(cls, what: str, measured: Ratio | float, limit: float, unit: str = "×") -> Target:
        """Make a target that lies above."""
        return cls._of(what, unit, measured, limit, "at most")

    @classmethod
    def at_least(cls, what: str, measured: Ratio | float, limit: float, unit: str = "×") -> Target:
        """Make a target that lies below."""
        return cls._of(what, unit, measured, limit, "at least")

    @classmethod
    def _of(cls, what: str, unit: str, measured: Ratio | float, limit: float, bound: str) -> Target:
        value, low, high = (
            (measured.value, measured.low, measured.high) if isinstance(measured, Ratio) else (measured, None, None)
        )
        reached = value <= limit if bound == "at most" else value >= limit
        return cls(what, unit, value, low, high, limit, bound, bool(reached))


def take_turns(
    names: Sequence[T], rounds: int, seed: int, what: str, *, least: int = 0, seconds: float = math.inf
) -> Iterator[tuple[int, list[T]]]:
    """Go through the rounds with a progress bar.

    ``least`` rounds are run however long they take; behind them none begins after ``seconds``.

    Yields:
        The number of the round, and the variants in a new random order.
    """
    rng, start = np.random.default_rng(seed), time.monotonic()
    for index in tqdm(range(rounds), desc=what, unit="round", leave=False):
        if index >= least and time.monotonic() - start > seconds:
            return
        yield index, [names[i] for i in rng.permutation(len(names))]


def milliseconds(work: Callable[[], Any], device: torch.device) -> float:
    """Time one call, up to the end of what it left to the accelerator."""
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return (time.perf_counter() - start) * 1e3


def measured(values: Sequence[float]) -> Percentiles:
    """Compute median and 95th percentile of at least one measurement."""
    found = percentiles(values)
    if found is None:
        raise InputError("nothing was measured: give at least one round")
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Run the block with so many CPU threads; 0 changes nothing."""
    before = torch.get_num_threads(), cv2.getNumThreads()
    if count:
        torch.set_num_threads(count)
        cv2.setNumThreads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        cv2.setNumThreads(before[1])
