"""A simulator that is light to start, and whose pictures follow all that the robot did."""

from __future__ import annotations

import os
import signal
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from lac_vla.errors import InputError
from lac_vla.sims.base import Benchmark, Env
from lac_vla.types import Frame

CAMERAS = ("agentview", "wrist")


class ChainEnv(Env):
    """What is seen next depends on every action so far; so does when the task is solved."""

    suite, instruction, no_op = "chain", "pick up the bowl", (0.0,) * 7

    def __init__(self, benchmark: Chain, task: int) -> None:
        self.benchmark, self.task, self.horizon = benchmark, task, 9 + task

    def reset(self, init_state: int, seed: int = 0) -> Frame:
        self.state, self.init_state, self.trace = 100 * self.task + init_state, init_state, list[int]()
        return _frame(self.state)

    def step(self, action: npt.ArrayLike) -> tuple[Frame, bool]:
        if self.benchmark.trouble and (self.task, self.init_state, len(self.trace)) == (1, 1, 2):
            self._trouble(Path(self.benchmark.trouble))
        self.state = zlib.crc32(np.asarray(action, np.float32).tobytes(), self.state) % 5000
        self.trace.append(self.state)
        return _frame(self.state), self.state % 6 == 0

    def _trouble(self, once: Path) -> None:
        if once.exists():
            return
        if once.name == "raise":
            raise InputError("the chain broke")
        once.touch()
        if once.name == "hang":
            time.sleep(3600)
        os.kill(os.getpid(), signal.SIGKILL)

    def outcome(self) -> dict[str, Any]:
        return {"trace": self.trace}


@dataclass(frozen=True)
class Chain(Benchmark):
    """Two tasks of chains; ``trouble`` is a file whose name says what goes wrong once."""

    suite: str = "chain"
    trouble: str = ""
    suites: ClassVar[tuple[str, ...]] = ("chain",)
    trials = (3, 2)

    def make_env(self, task: int) -> ChainEnv:
        return ChainEnv(self, task)


@dataclass(frozen=True)
class Retried(Chain):
    """Chains that may be begun again once."""

    retries = 1


def _frame(seed: int) -> Frame:
    base, change = np.random.default_rng(7), np.random.default_rng(1000 + seed)
    pictures = {c: base.integers(60, 190, (64, 64, 3)) + change.integers(-25, 26, (64, 64, 3)) for c in CAMERAS}
    images = {camera: picture.astype(np.uint8) for camera, picture in pictures.items()}
    return Frame(images, "pick up the bowl", change.normal(size=8).astype(np.float32))
