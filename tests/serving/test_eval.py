"""A LIBERO rollout through the wire is the rollout of the library; ``lac serve`` and ``lac eval --server`` fit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lac_vla import InputError
from lac_vla.errors import LacError
from lac_vla.evaluation import worker
from lac_vla.evaluation.runner import EvalConfig, evaluate
from lac_vla.results.records import read_episodes
from lac_vla.serving.config import ServeConfig, make_server
from tests.evaluation.test_runner import outcomes
from tests.evaluation.worlds import FakeEnv, save_tiny
from tests.serving.conftest import Running


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("served") / "model")


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Running]:
    running = Running(make_server(ServeConfig(str(model), "random:ratio=0.5", port=0)))
    yield running
    running.stop()


@pytest.fixture
def config(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EvalConfig:
    monkeypatch.setattr(worker, "LiberoEnv", FakeEnv)
    return EvalConfig(
        str(model), tmp_path / "run", ("random:ratio=0.5",), tasks=(0, 3), init_states=(4, 7), seed=3, videos=0
    )


def test_an_episode_through_the_server_is_the_same_episode(config: EvalConfig, server: Running, tmp_path: Path) -> None:
    here = outcomes(evaluate(config))
    remote = replace(config, model="model", server=server.url, out=tmp_path / "remote", videos=1)
    there = outcomes(evaluate(remote))
    assert [trial[:-1] for trial in there] == [trial[:-1] for trial in here]  # all but the MACs
    for episode in read_episodes(tmp_path / "remote" / "episodes.jsonl"):
        assert len(episode.latency_ms["round_trip"]) == episode.steps
        assert np.median(episode.latency_ms["round_trip"]) > np.median(episode.latency_ms["observation_to_action"])
        assert set(episode.metrics) <= {"ratio_nominal", "ratio_effective", "oldest_age"}, "no server counts operations"
        assert (episode.peak_memory_mb, episode.video) == (None, None)


def test_an_evaluation_is_of_what_is_served(config: EvalConfig, server: Running) -> None:
    remote = replace(config, server=server.url)
    with pytest.raises(InputError, match=r"serves the model 'model' with 'random-0\.5', not 'other'"):
        evaluate(replace(remote, model="other"))
    with pytest.raises(InputError, match="--policies"):
        evaluate(replace(remote, policies=("dense",), out=config.out.with_name("dense")))
    with pytest.raises(InputError, match="one method"):
        replace(remote, policies=("dense", "random"))
    with pytest.raises(LacError, match="no session at"):
        evaluate(replace(remote, server="ws://127.0.0.1:9", out=config.out.with_name("nobody")))


def test_the_server_says_what_it_serves(server: Running) -> None:
    facts = server.server.facts
    assert (facts["model"], facts["method"]) == ("model", "random-0.5")
    assert facts["cameras"] == {"agentview": "observation/image", "wrist": "observation/wrist_image"}
    assert "/" not in json.dumps([facts["model"], facts["method"], facts["server"]])


def test_a_deadline_and_slack_measure_the_machine(model: Path) -> None:
    config = ServeConfig(str(model), "random:ratio=0.5", deadline_ms=1e5, slack=True)
    made = make_server(config)
    assert made.table is not None
    assert made.controller is not None
    assert made.controller.floor == 4  # 52 tokens, none older than 16 frames
    with pytest.raises(InputError, match="cannot be kept"):
        make_server(replace(config, deadline_ms=1e-3))


@pytest.mark.parametrize(
    "wrong", [{"port": -1}, {"max_sessions": 0}, {"max_rate": 0}, {"max_message_mb": 0}, {"deadline_ms": -1}]
)
def test_settings_that_make_no_sense(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError):
        ServeConfig("model", **wrong)
