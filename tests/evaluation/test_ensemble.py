"""Models that answer in chunks, in an evaluation: which actions the robot executes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.engine.scenes import frame
from tests.evaluation.worlds import FakeEnv

from lac_vla import CachedVLA, Frame, InputError, load_vla, random_vla, save_vla
from lac_vla.evaluation.config import EvalConfig
from lac_vla.evaluation.ensemble import AdaptiveEnsemble
from lac_vla.evaluation.runner import evaluate
from lac_vla.models.cogact.config import TINY_COGACT
from lac_vla.models.tokenizer import FileTokenizer, train_tokenizer
from lac_vla.results.records import read_episodes
from lac_vla.sims.libero.benchmark import Libero

EXECUTED: list[list[np.ndarray]] = []


class Recording(FakeEnv):
    """What it shows does not depend on the robot."""

    def reset(self, init_state: int, seed: int = 0) -> Frame:
        EXECUTED.append([])
        return super().reset(init_state, seed)

    def step(self, action: np.ndarray) -> tuple[Frame, bool]:
        EXECUTED[-1].append(np.asarray(action))
        return super().step(action)

    def _frame(self) -> Frame:
        return frame(self.steps)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EvalConfig:
    """Of a model whose configuration asks for an ensemble of 3 chunks."""
    monkeypatch.setattr(Libero, "make_env", lambda self, task: Recording(self.suite, task))
    backbone = random_vla(replace(TINY_COGACT, ensemble=3))
    backbone = replace(backbone, encode=FileTokenizer(train_tokenizer(["pick up the bowl"], 259)))
    save_vla(backbone, tmp_path / "model")
    return EvalConfig(str(tmp_path / "model"), tmp_path / "run", ("dense",), tasks=(0,), init_states=(4, 6), videos=0)


@pytest.mark.parametrize(("option", "chunks"), [(None, 3), (1, 1), (2, 2)])
def test_the_last_chunks_are_averaged_as_asked(config: EvalConfig, option: int | None, chunks: int) -> None:
    EXECUTED.clear()
    evaluate(replace(config, ensemble=option))
    session, ensemble = CachedVLA(load_vla(config.model)).session(), AdaptiveEnsemble(chunks)
    answers = [session.act(frame(step)) for step in range(5)]
    expected = [ensemble(chunk) for chunk in answers]
    episodes = [episode for episode in EXECUTED if episode]
    assert [len(episode) for episode in episodes] == [4, 5]
    for episode in episodes:  # the second episode knows nothing of the first
        np.testing.assert_allclose(episode, expected[: len(episode)], rtol=1e-5, atol=1e-6)
    first = [chunk[0] for chunk in answers]
    assert np.allclose(episodes[1], first, atol=1e-4) == (chunks == 1)


@pytest.mark.parametrize(("demanded", "chunks"), [(16, 16), (2, 2), (1, 1), (17, 3)])
def test_a_benchmark_demands_an_ensemble_of_models_whose_chunks_are_long_enough(
    config: EvalConfig, monkeypatch: pytest.MonkeyPatch, demanded: int, chunks: int
) -> None:
    """Of 16 actions here; a shorter chunk is averaged as its model says."""
    monkeypatch.setattr(Libero, "ensemble", demanded)
    EXECUTED.clear()
    evaluate(config)
    session, ensemble = CachedVLA(load_vla(config.model)).session(), AdaptiveEnsemble(chunks)
    expected = [ensemble(session.act(frame(step))) for step in range(5)]
    assert {record.ensemble for record in read_episodes(config.out / "episodes.jsonl")} == {chunks}
    episodes = [episode for episode in EXECUTED if episode]
    assert [len(episode) for episode in episodes] == [4, 5]
    for episode in episodes:
        np.testing.assert_allclose(episode, expected[: len(episode)], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("change", "message"), [(0, "at least the newest"), (17, "needs that many actions")])
def test_ensembles_that_cannot_be(config: EvalConfig, change: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(replace(config, ensemble=change))


@pytest.mark.parametrize("number", [None, 1, 2, 16])
def test_so_many_actions_of_a_chunk_are_executed(config: EvalConfig, number: int | None) -> None:
    EXECUTED.clear()
    run = evaluate(replace(config, ensemble=1, actions_per_call=number))
    session, executed = CachedVLA(load_vla(config.model)).session(), number or 1
    expected = [action for step in range(0, 5, executed) for action in session.act(frame(step))[:executed]]
    episodes = [episode for episode in EXECUTED if episode]
    assert [len(episode) for episode in episodes] == [4, 5]
    for episode in episodes:
        np.testing.assert_allclose(episode, expected[: len(episode)], rtol=1e-5, atol=1e-6)
    settings, summary = (json.loads((run / name).read_text()) for name in ("config.json", "summary.json"))
    assert settings["actions_per_call"] == summary["actions_per_call"] == number
    with pytest.raises(InputError, match=r"other \['actions_per_call'\]"):
        evaluate(replace(config, ensemble=1, actions_per_call=3))


@pytest.mark.parametrize(
    ("ensemble", "number", "message"),
    [(None, 2, "an ensemble of 3 chunks needs a new one"), (2, 2, "an ensemble of 2"), (1, 17, "answers with 16")],
)
def test_actions_per_call_that_cannot_be(config: EvalConfig, ensemble: int | None, number: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(replace(config, ensemble=ensemble, actions_per_call=number))
    assert not config.out.exists()
