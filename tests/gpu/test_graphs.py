"""Graphs: captured once, replayed for every session, and the same numbers as the plain loop."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from lac_vla import VLA, CachedVLA, Decision, Random, random_vla
from lac_vla.engine.cuda_graphs import CUDAGraphRunner
from lac_vla.engine.engine import Engine
from lac_vla.engine.options import EngineOptions
from lac_vla.engine.warmup import warm_up
from lac_vla.factory import ModelOptions
from lac_vla.policies import CachePolicy, cache_lowest
from lac_vla.session import Session
from lac_vla.types import PolicyInput
from tests.engine.scenes import frame
from tests.gpu.devices import DEVICES, TINY
from tests.gpu.recording import RecordedGraph

CLOSE = {"rtol": 1e-3, "atol": 1e-4}
INSTRUCTIONS = ("pick up the bowl", "stop", "put the mug on the plate, then stop")


@dataclass(frozen=True)
class Restless(CachePolicy):
    """Another number of tokens in every frame."""

    def decide(self, inputs: PolicyInput) -> Decision:
        ratio = inputs.rng.uniform(0.2, 0.95)
        return Decision.reuse(cache_lowest(inputs.rng.random(inputs.layout.n_visual), ratio), inputs.n_layers)


def engine_of(model: VLA, options: str) -> Engine:
    engine = Engine(model, EngineOptions.parse(options))
    if engine.graphs is not None and model.device.type == "cpu":
        engine.graphs.make_graph = RecordedGraph
    return engine


def session(engine: Engine, seed: int) -> Session:
    return Session(engine, Restless(), "none", 16, 1.0, seed)


def graphs(engine: Engine) -> CUDAGraphRunner:
    assert engine.graphs is not None
    return engine.graphs


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", TINY)
def test_replayed_graphs_equal_the_plain_loop(name: str, device: str) -> None:
    model = random_vla(name, seed=3, device=device)
    plain, replayed = (session(engine_of(model, text), 5) for text in ("default", "default+cuda_graphs"))
    for seed in range(10):
        observation = frame(seed, INSTRUCTIONS[seed % 2])
        np.testing.assert_allclose(replayed.act(observation), plain.act(observation), **CLOSE)
    assert graphs(replayed.engine).captured > 0
    assert graphs(replayed.engine).eager_runs == 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", TINY)
def test_after_the_warm_up_nothing_is_captured(name: str, device: str) -> None:
    """Sessions come and go, each in its own region of the store; all replay the same graphs."""
    model = random_vla(name, seed=3, device=device)
    engine = engine_of(model, "default+cuda_graphs")
    warm_up(engine, [frame(0, text) for text in INSTRUCTIONS], sessions=3)
    before, keys = graphs(engine).captured, engine.store.keys
    assert before == len(graphs(engine))
    robots = [(session(engine, seed), session(engine_of(model, "default"), seed)) for seed in range(3)]
    for step in range(5):
        for number, (robot, plain) in enumerate(robots):
            observation = frame(step, INSTRUCTIONS[(number + step // 2) % len(INSTRUCTIONS)])
            np.testing.assert_allclose(robot.act(observation), plain.act(observation), **CLOSE)
    assert graphs(engine).captured == before
    assert graphs(engine).eager_runs == 0
    assert engine.store.keys is keys


def test_a_shape_that_was_not_warmed_up_is_run_and_not_captured() -> None:
    model = random_vla("tiny", seed=3)
    engine = engine_of(model, "default+cuda_graphs")
    warm_up(engine, [frame(0, "stop")])
    before = len(graphs(engine))
    robot, plain = session(engine, 1), session(engine_of(model, "default"), 1)
    for step in range(3):
        observation = frame(step, "go " * 20)
        np.testing.assert_allclose(robot.act(observation), plain.act(observation), **CLOSE)
    assert graphs(engine).eager_runs > 0
    assert len(graphs(engine)) == before


def test_a_recorded_run_bakes_in_what_it_read() -> None:
    x, graph, factor = torch.ones(2), RecordedGraph(), [2.0]
    out = graph.capture(lambda: (x * factor[0]) + x.abs())
    x.fill_(-3.0)
    factor[0] = 5.0
    graph.replay()
    torch.testing.assert_close(out, torch.full((2,), -3.0))


def test_random_is_served_by_cached_vla() -> None:
    vla = CachedVLA(random_vla("tiny", seed=3), Random(0.5), options=EngineOptions.parse("default+cuda_graphs"))
    warm_up(vla.engine, [frame(0)])
    robot = vla.session()
    for seed in range(3):
        robot.act(frame(seed))
        assert robot.last_info is not None
        assert robot.last_info.eager_runs == 0


def test_a_server_is_warm_before_it_listens() -> None:
    pytest.importorskip("websockets")
    from lac_vla.serving.config import ServeConfig, make_server

    options = ModelOptions(options="default+cuda_graphs")
    server = make_server(ServeConfig("mini", "dense", warmup=("stop",), max_sessions=2, model_options=options))
    engine = server.vla.engine
    shapes, keys = len(graphs(engine)), engine.store.keys
    robots = [server.vla.session(seed) for seed in range(2)]
    for step in range(2):
        for robot in robots:
            robot.act(frame(step, "stop"))
    assert (len(graphs(engine)), engine.store.keys is keys, graphs(engine).eager_runs) == (shapes, True, 0)
