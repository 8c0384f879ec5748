"""LIBERO as an evaluation plays it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

from lac_vla.errors import LacError
from lac_vla.sims.base import Benchmark
from lac_vla.sims.libero.env import LiberoEnv
from lac_vla.sims.libero.modules import load_libero, quiet
from lac_vla.sims.libero.renderer import Convention, Rendering
from lac_vla.sims.libero.suites import FIRST_HELD_OUT, HORIZONS, N_TASKS, SETTLE_STEPS, TRIALS


@dataclass(frozen=True)
class Libero(Benchmark):
    """LIBERO: a Panda arm at a table, ten tasks a suite.

    Attributes:
        suite: ``libero_spatial``, ``libero_object``, ``libero_goal`` or ``libero_10``.
        rendering: ``fast`` (altered pixels, for models trained on them) or ``official``.
        convention: ``upright`` for our own models; ``openvla`` for OpenVLA's checkpoints, whose images are rotated by
            180° and whose gripper runs from 0, closed, to 1, open.
    """

    suite: str = "libero_spatial"
    rendering: Rendering = "fast"
    convention: Convention = "upright"
    suites: ClassVar[tuple[str, ...]] = tuple(HORIZONS)
    targets_slide: ClassVar[bool] = True

    @property
    def trials(self) -> tuple[int, ...]:
        """See :meth:`Benchmark.trials`."""
        return (TRIALS,) * N_TASKS

    def make_env(self, task: int) -> LiberoEnv:
        """See :meth:`Benchmark.make_env`."""
        return LiberoEnv(self.suite, task, rendering=self.rendering, convention=self.convention)

    @property
    def init_states(self) -> tuple[int, int]:
        """Initial states that no demonstration used."""
        return FIRST_HELD_OUT, TRIALS

    def instructions(self) -> tuple[str, ...]:
        """See :meth:`Benchmark.instructions`."""
        libero = load_libero()
        with quiet():
            bench = libero.benchmark.get_benchmark(self.suite)()
        return tuple(str(bench.get_task(task).language) for task in range(N_TASKS))

    def metadata(self, tasks: Collection[int]) -> dict[str, Any]:
        """See :meth:`Benchmark.metadata`."""
        return self.settings() | {"horizon": HORIZONS[self.suite], "settle_steps": SETTLE_STEPS}

    @property
    def notes(self) -> tuple[str, ...]:
        """See :meth:`Benchmark.notes`."""
        altered = "Altered rendering: reflections and multisampling are off. These are not the benchmark's pixels."
        return (altered,) if self.rendering == "fast" else ()

    def missing(self, tasks: Collection[int]) -> list[str]:
        """See :meth:`Benchmark.missing`."""
        try:
            load_libero()
        except LacError as error:
            return [str(error)]
        return []
