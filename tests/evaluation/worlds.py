"""A fake simulator, and what an evaluation on it decides."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from tests.engine.scenes import frame

from lac_vla import Frame, random_vla, save_vla
from lac_vla.evaluation.config import EvalConfig
from lac_vla.evaluation.worker import EpisodeWorker
from lac_vla.models.tokenizer import FileTokenizer, train_tokenizer
from lac_vla.results.records import read_episodes
from lac_vla.sims.base import Env
from lac_vla.sims.libero.benchmark import Libero


class FakeEnv(Env):
    """A task that is solved after as many steps as its initial state's number; the pictures follow the actions."""

    horizon = 6
    instruction = "pick up the bowl"
    no_op = (0.0,) * 7
    made = 0
    seeds: ClassVar[list[int]] = []

    def __init__(self, suite: str, task: int) -> None:
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


def save_tiny(folder: Path, name: str = "tiny") -> Path:
    """A checkpoint of random weights with a tokenizer."""
    backbone = random_vla(name)
    words = backbone.module.config.vocab_size - backbone.module.config.n_action_bins
    backbone = replace(backbone, encode=FileTokenizer(train_tokenizer(["pick up the bowl"], max(words, 259))))
    save_vla(backbone, folder)
    return folder


def fake_worker(config: EvalConfig) -> EpisodeWorker:
    """In another process: a worker on the fake simulator."""
    Libero.make_env = lambda self, task: FakeEnv(self.suite, task)  # type: ignore[assignment, return-value, method-assign]
    return EpisodeWorker(config)


def outcomes(run: Path) -> list[Any]:
    """What an evaluation decides; not how long it took."""
    return [
        (e.method, e.trial, e.success, e.steps, {name: list(values) for name, values in e.metrics.items()})
        for e in sorted(read_episodes(run / "episodes.jsonl"), key=lambda e: (e.method, e.trial))
    ]
