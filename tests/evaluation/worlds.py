"""A fake simulator, and what an evaluation on it decides."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from tests.engine.scenes import frame

from lac_vla import Frame, random_vla, save_vla
from lac_vla.evaluation import worker
from lac_vla.evaluation.config import EvalConfig
from lac_vla.models.prismatic.prompt import FileTokenizer, train_tokenizer
from lac_vla.results.records import read_episodes


class FakeEnv:
    """A task that is solved after as many steps as its initial state's number; the pictures follow the actions."""

    horizon = 6
    instruction = "pick up the bowl"
    made = 0
    seeds: ClassVar[list[int]] = []

    def __init__(self, suite: str, task: int, **_: Any) -> None:
        self.suite, self.task = suite, task
        FakeEnv.made += 1

    def reset(self, init_state: int, seed: int = 0) -> Frame:
        self.state, self.steps = init_state, 0
        FakeEnv.seeds.append(seed)
        return self._frame()

    def step(self, action: np.ndarray) -> tuple[Frame, bool]:
        assert np.shape(action) == (7,)
        self.steps += 1
        return self._frame(), self.steps == self.state

    def _frame(self) -> Frame:
        return frame(100 * self.task + 10 * self.state + self.steps)

    def close(self) -> None:
        pass


def save_tiny(folder: Path, name: str = "tiny") -> Path:
    """A checkpoint of random weights with a tokenizer."""
    backbone = random_vla(name)
    words = backbone.model.config.vocab_size - backbone.model.config.n_action_bins
    backbone.encode = FileTokenizer(train_tokenizer(["pick up the bowl"], max(words, 259)))
    save_vla(backbone, folder)
    return folder


def fake_worker(config: EvalConfig) -> worker.Worker:
    """In another process: a worker on the fake simulator."""
    worker.LiberoEnv = FakeEnv  # type: ignore[assignment, misc]
    return worker.Worker(config)


def outcomes(run: Path) -> list[Any]:
    """What an evaluation decides; not how long it took."""
    return [
        (e.method, e.trial, e.success, e.steps, {name: list(values) for name, values in e.metrics.items()})
        for e in sorted(read_episodes(run / "episodes.jsonl"), key=lambda e: (e.method, e.trial))
    ]
