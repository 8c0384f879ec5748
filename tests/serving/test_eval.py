"""A LIBERO rollout through the wire is the rollout of the library; ``lac serve`` and ``lac eval --server`` fit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lac_vla import InputError
from lac_vla.cli import main
from lac_vla.client.remote import RemoteSession
from lac_vla.errors import LacError
from lac_vla.evaluation.runner import EvalConfig, evaluate
from lac_vla.factory import ModelOptions
from lac_vla.results.records import read_episodes
from lac_vla.serving.config import ServeConfig, make_server
from lac_vla.serving.sessions import SessionOptions
from lac_vla.sims.libero.benchmark import Libero
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
    monkeypatch.setattr(Libero, "make_env", lambda self, task: FakeEnv(self.suite, task))
    run, options = tmp_path / "run", ModelOptions(seed=3)
    return EvalConfig(
        str(model), run, ("random:ratio=0.5",), tasks=(0, 3), init_states=(4, 7), videos=0, model_options=options
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


def test_a_chunk_through_the_server_is_executed_as_it_says(config: EvalConfig, tmp_path: Path) -> None:
    """The server says how many actions of its answers are meant; the same episode as with that number here."""
    chunked = replace(
        config, model=str(save_tiny(tmp_path / "chunks", "cogact-tiny")), policies=("dense",), init_states=(4, 5)
    )
    here = evaluate(replace(chunked, actions_per_call=3, ensemble=1, out=tmp_path / "here"))
    running = Running(
        make_server(ServeConfig(chunked.model, "dense", port=0, session_options=SessionOptions(actions_per_call=3)))
    )
    try:
        there = evaluate(replace(chunked, model="chunks", server=running.url, ensemble=1, out=tmp_path / "there"))
    finally:
        running.stop()
    pairs = zip(read_episodes(here / "episodes.jsonl"), read_episodes(there / "episodes.jsonl"), strict=True)
    for local, remote in pairs:
        assert remote.actions_per_call == local.actions_per_call == 3
        assert (remote.steps, remote.success) == (local.steps, local.success)
        assert len(remote.latency_ms["round_trip"]) == -(-remote.steps // 3)


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
    metadata = server.server.metadata
    assert (metadata["model"], metadata["method"]) == ("model", "random-0.5")
    assert metadata["actions_per_call"] is None
    assert metadata["cameras"] == {"agentview": "observation/image", "wrist": "observation/wrist_image"}
    assert "/" not in json.dumps([metadata["model"], metadata["method"], metadata["server"]])


def test_clients_are_told_how_many_actions_to_execute(model: Path) -> None:
    one = SessionOptions(actions_per_call=1)
    metadata = make_server(ServeConfig(str(model), "dense", session_options=one)).metadata
    assert metadata["actions_per_call"] == 1
    for told, actions in ((1, 1), (8, 8), (None, 1)):
        session = RemoteSession(SimpleNamespace(metadata=metadata | {"actions_per_call": told}))
        assert session.actions_per_call == actions
    with pytest.raises(InputError, match="actions_per_call"):
        RemoteSession(SimpleNamespace(metadata={key: metadata[key] for key in ("cameras", "state", "prompt")}))


def test_nested_options_are_options_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    configs: list[ServeConfig] = []
    monkeypatch.setattr("lac_vla.serving.config.serve", configs.append)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    words = "serve --model m --device cuda --dtype float16 --max-age 8 --options exact --seed 3 --threads 1 --flow none"
    main([*words.split(), "--actions-per-call", "4", "--slack"])
    session = SessionOptions(slack=True, actions_per_call=4)
    options = ModelOptions("cuda", "float16", max_age=8, options="exact", seed=3, threads=1, flow="none")
    assert configs == [ServeConfig("m", session_options=session, model_options=options)]


def test_sessions_have_the_seed_of_the_command(model: Path) -> None:
    server = make_server(ServeConfig(str(model), "random:ratio=0.5", model_options=ModelOptions(seed=3, max_age=9)))
    assert (server.seed, server.vla.max_age) == (3, 9)


def test_a_deadline_and_slack_measure_the_machine(model: Path) -> None:
    config = ServeConfig(str(model), "random:ratio=0.5", deadline_ms=1e5, session_options=SessionOptions(slack=True))
    made = make_server(config)
    assert made.table is not None
    assert made.controller is not None
    assert made.controller.floor == 4  # 52 tokens, none older than 16 frames
    assert made.table.batches == (1, 2, 8)
    assert made.metadata["max_batch"] == 8
    assert make_server(replace(config, max_batch=1)).metadata["max_batch"] == 1
    with pytest.raises(InputError, match="batch_window_ms is 99999"):
        make_server(replace(config, batch_window_ms=99999.9))
    with pytest.raises(InputError, match="cannot be kept"):
        make_server(replace(config, deadline_ms=1e-3))


@pytest.mark.parametrize(
    "wrong", [{"port": -1}, {"max_sessions": 0}, {"max_rate": 0}, {"max_message_mb": 0}, {"deadline_ms": -1}]
)
def test_settings_that_make_no_sense(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError):
        ServeConfig("model", **wrong)
