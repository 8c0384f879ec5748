"""Graphs: captured once, replayed for every session, and the same numbers as the plain loop."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from lac_vla import VLA, CachedVLA, Decision, Random, random_vla
from lac_vla.engine import cuda_graphs
from lac_vla.engine.cuda_graphs import CUDAGraphRunner
from lac_vla.engine.engine import Engine
from lac_vla.engine.graphs import Replayed
from lac_vla.engine.kv_cache import Region
from lac_vla.engine.options import EngineOptions
from lac_vla.engine.warmup import warm_up
from lac_vla.factory import ModelOptions
from lac_vla.models.oft.config import OFTConfig, with_film
from lac_vla.models.prismatic.presets import TINY as CONVOLUTIONS
from lac_vla.models.prismatic.towers import ViTConfig
from lac_vla.policies import CachePolicy, cache_lowest
from lac_vla.session import Session
from lac_vla.types import PolicyInput
from tests.engine.scenes import frame
from tests.gpu.devices import DEVICES, TINY
from tests.gpu.recording import RecordedGraph

SIZE = 56
DINO = ViTConfig(16, 3, 2, 24, registers=2, class_token=True, layer_scale=True)
SIGLIP = ViTConfig(24, 3, 2, 40)
FIRST, SECOND = CONVOLUTIONS.cameras
TWO_TOWERS = replace(
    CONVOLUTIONS,
    vision_backbone_id="dinosiglip",
    vit_towers=(DINO, SIGLIP),
    cameras=tuple(replace(camera, image_size=SIZE, tower=None) for camera in CONVOLUTIONS.cameras),
)
MODELS: Mapping[str, Any] = {
    **{name: name for name in TINY},
    "two-towers": OFTConfig(TWO_TOWERS, 7, 3),
    "film": OFTConfig(with_film(TWO_TOWERS), 7, 3),
    "own-towers": replace(
        CONVOLUTIONS,
        vision_backbone_id="towers",
        cameras=(replace(FIRST, tower=ViTConfig(16, 3, 2, 40, patch=8, neck=24)), SECOND),
    ),
}
CASES = [
    *((name, "default") for name in (*TINY, "two-towers")),
    *((name, "default+vision_kv_reuse") for name in ("pi05-tiny", "smolvla-tiny", "film", "own-towers")),
]
CLOSE = {"rtol": 1e-3, "atol": 1e-4}
INSTRUCTIONS = ("stop", "put the mug on the plate, then stop")


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
@pytest.mark.parametrize(("name", "options"), [CASES[0], CASES[-1]])
def test_replayed_graphs_equal_the_plain_loop(name: str, options: str, device: str) -> None:
    """Captured when a shape comes for the second time."""
    model = random_vla(MODELS[name], seed=3, device=device)
    plain, replayed = (session(engine_of(model, text), 5) for text in (options, f"{options}+cuda_graphs"))
    for seed in range(10):
        observation = frame(seed, INSTRUCTIONS[seed % 2])
        np.testing.assert_allclose(replayed.act(observation), plain.act(observation), **CLOSE)
    assert graphs(replayed.engine).captured > 0
    assert graphs(replayed.engine).eager_runs == 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "options"), CASES)
def test_after_the_warm_up_nothing_is_captured(name: str, options: str, device: str) -> None:
    """Sessions come and go, each in its own region of the store, alone or together; all replay the same graphs."""
    model = random_vla(MODELS[name], seed=3, device=device)
    engine = engine_of(model, f"{options}+cuda_graphs")
    warm_up(engine, [frame(0, text) for text in INSTRUCTIONS], sessions=3, together=3)
    before, eager, keys = graphs(engine).captured, graphs(engine).eager_runs, engine.store.keys
    robots = [(session(engine, seed), session(engine_of(model, options), seed)) for seed in range(3)]
    for step in range(4):
        for number, (robot, plain) in enumerate(robots):
            observation = frame(step, INSTRUCTIONS[(number + step // 2) % 2])
            np.testing.assert_allclose(robot.act(observation), plain.act(observation), **CLOSE)
    assert graphs(engine).eager_runs == eager
    for step, count in enumerate((3, 2, 3)):  # their prompts alone are left to the ordinary loop
        frames = [frame(10 * number + step, INSTRUCTIONS[number % 2]) for number in range(count)]
        plans = [robot.plan(seen) for (robot, _), seen in zip(robots, frames, strict=False)]
        for (robot, plain), seen, plan, result in zip(robots, frames, plans, engine.run(plans), strict=False):
            info = robot.commit(plan, result)
            np.testing.assert_allclose(result.action, plain.act(seen), **CLOSE)
            assert info.eager_runs == info.prompt_passes
    assert graphs(engine).captured == len(graphs(engine)) == before
    assert engine.store.keys is keys


def test_no_graph_serves_sequences_whose_regions_differ() -> None:
    model = random_vla("tiny", seed=3)
    engine = engine_of(model, "cuda_graphs")
    robots = [(session(engine, seed), session(engine_of(model, "none"), seed)) for seed in range(2)]
    robots[0][0].act(frame(0, "stop"))
    robots[0][1].act(frame(0, "stop"))
    frames = [frame(1, "stop"), frame(1, "go " * 128)]  # the second needs a larger region than the first one has
    plans = [robot.plan(seen) for (robot, _), seen in zip(robots, frames, strict=True)]
    for (robot, alone), seen, plan, result in zip(robots, frames, plans, engine.run(plans), strict=True):
        robot.commit(plan, result)
        np.testing.assert_allclose(result.action, alone.act(seen), **CLOSE)
    assert robots[0][0].slots != robots[1][0].slots
    assert result.eager_runs > 1


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


def test_graphs_of_functions_are_no_more_than_a_limit_and_go_when_the_store_grows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = engine_of(random_vla("tiny", seed=3), "default+cuda_graphs")
    robot, runner = session(engine, 1), graphs(engine)
    robot.act(frame(0))
    with monkeypatch.context() as patch:
        patch.setattr(cuda_graphs, "LIMIT", 5)
        for rows in (1, 2, 1, 3, 4, 5, 6):
            for _ in range(3):
                assert torch.equal(runner.function("negative", torch.neg, torch.ones(rows)), -torch.ones(rows))
        assert len(runner._functions) == 5
    engine.store.reserve(Region(), 4096)
    robot.act(frame(1))
    assert not [name for name, *_ in runner._functions if name == "negative"]


def test_graphs_go_with_their_engine_at_once() -> None:
    """And not when the garbage collector comes, which may be in the middle of another engine's capture."""
    runner = CUDAGraphRunner(torch.device("cuda"))
    gone = weakref.ref(runner)
    del runner
    assert gone() is None


def test_what_is_captured_was_run_in_the_same_thread_before() -> None:
    """Handles and plans of libraries are a thread's own: they are not to be made during a capture."""
    replayed, x = Replayed[torch.Tensor](), torch.ones(2)

    def run() -> bool:
        replayed.run(lambda: x + 1, RecordedGraph)
        return replayed.captured

    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        assert [one.submit(run).result(), other.submit(run).result()] == [False, False]
        assert one.submit(run).result()


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
    shapes, keys, eager = len(graphs(engine)), engine.store.keys, graphs(engine).eager_runs
    robots = [server.vla.session(seed) for seed in range(2)]
    for step in range(2):
        for robot in robots:
            robot.act(frame(step, "stop"))
    assert (len(graphs(engine)), engine.store.keys is keys, graphs(engine).eager_runs) == (shapes, True, eager)
