"""A budget for keys and values: it is kept, who returns starts dense, and nothing is left of a robot that is gone."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import time
import urllib.request
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from lac_vla import VLA, CachedVLA, EngineOptions, InputError, Random, random_vla
from lac_vla.client.connection import AsyncClient, Client, ServerError
from lac_vla.engine.kv_cache import Region, SlotCache
from lac_vla.models.cogact.config import TINY_COGACT
from lac_vla.serving.batches import Batcher, Request
from lac_vla.serving.config import ServeConfig, make_server
from lac_vla.serving.kv_memory import KVMemory
from lac_vla.serving.server import Limits
from lac_vla.serving.sessions import FEWEST_PAUSES, Answer, RefusedRequestError, RobotSession, SessionOptions
from tests.serving.conftest import KEYS, Running, ask, observation

Start = Callable[..., Running]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
REQUESTS = int(os.environ.get("LAC_LOAD_REQUESTS", "10000"))
LONG = "pick up the bowl and put it on the plate, then " + 30 * "go on and on, "


@pytest.fixture(scope="module")
def chunks() -> VLA:
    return random_vla(TINY_COGACT, seed=1)  # its actions are continuous: every difference shows


def budget(vla: CachedVLA, robots: int) -> KVMemory:
    """The memory of so many robots of typical instructions."""
    each = KVMemory.take(replace(vla), 10.0)  # of another engine
    return KVMemory.take(vla, robots * each.nbytes / each.robots / 1e6 + 1e-6)


def test_a_limited_pool_never_grows_and_a_refused_region_stays_what_it_was() -> None:
    store, one, other = SlotCache(2, 1, 4, torch.float32, torch.device("cpu")), Region(), Region()
    store.limit(10)
    store.reserve(one, 4)
    store.keys[:, :, :4] = 1
    store.reserve(other, 5)
    assert store.fits(one, 4)
    assert not store.fits(one, 5)
    with pytest.raises(InputError, match="no room for 5 slots among the 10"):
        store.reserve(one, 5)
    assert (one.start, one.size, store.keys.shape[2]) == (0, 4, 10)
    assert (store.keys[:, :, :4] == 1).all()
    with pytest.raises(InputError, match="before the first frame"):
        store.limit(20)
    store.release(other)
    store.reserve(one, 6)
    assert (one.size, store.keys.shape[2]) == (6, 10)


@pytest.mark.parametrize(
    ("name", "places", "options"), [("tiny", 1, "default"), ("tiny", 3, "default"), ("pi0-tiny", 3, "vision_kv_reuse")]
)
def test_whoever_returns_starts_dense_and_all_else_is_as_without_a_budget(name: str, places: int, options: str) -> None:
    """Random traffic of six robots, each beside a double alone that is told when its memory was taken."""
    model = random_vla(name, seed=3)
    vla, alone = (CachedVLA(model, Random(0.5), options=EngineOptions.parse(options)) for _ in range(2))
    memory, rng = budget(vla, places), np.random.default_rng(places)
    assert memory.robots == places
    robots, doubles = ([RobotSession(each, KEYS, SessionOptions(gap_s=1e9), seed=n) for n in range(6)]
                       for each in (vla, alone))  # fmt: skip
    batcher, reused, size = Batcher(vla.engine, max_batch=places, memory=memory), 0, vla.engine.store.keys.shape
    for step in range(16):
        asking = rng.permutation(6 if step % 3 else 2)[: rng.integers(1, 5)]
        texts = ["pick up the bowl", "stop", "put the mug on the plate and stop"]
        messages = {n: observation(100 * n + step, texts[(n + step // 6) % 3]) for n in asking}
        waiting = [Request(robots[n], messages[n], time.perf_counter()) for n in asking]
        done: dict[Request, Any] = {}
        while rest := [request for request in waiting if request not in done]:
            batch = batcher.choose(rest)
            holding = {robot for robot in robots if robot.nbytes}
            outcomes = batcher.answer(batch, [r for r in rest if r not in batch], robots)
            done |= outcomes
            for number, robot in enumerate(robots):
                if robot in holding and not robot.nbytes:
                    doubles[number].release()
            for request, mine in outcomes.items():
                number = robots.index(request.robot)
                if mine.step.dense_reason == "first frame":  # it may have gone and come within this very batch
                    doubles[number].release()
                theirs = ask(doubles[number], request.message, request.arrived)
                assert isinstance(mine, Answer)
                np.testing.assert_allclose(mine.message["actions"], theirs.message["actions"], **CLOSE)
                assert (mine.step.decision.exit_layer == theirs.step.decision.exit_layer).all()
                assert mine.step.dense_reason == theirs.step.dense_reason
                reused += mine.step.dense_reason is None
            assert sum(robot.nbytes for robot in robots) <= memory.nbytes
            assert vla.engine.store.keys.shape == size
    assert memory.evictions > 5
    assert reused > 5 * (places > 1)


@pytest.mark.parametrize("places", [1, 2])
def test_who_is_at_work_makes_no_room_for_those_that_interrupt(places: int) -> None:
    """Where nobody else can make it, they wait until the run is over."""
    vla = CachedVLA(random_vla("tiny"), Random(0.5))
    batcher = Batcher(vla.engine, memory=(memory := budget(vla, places)))
    noisy, calm, silent = robots = [RobotSession(vla, KEYS, SessionOptions()) for _ in range(3)]
    for robot, pause in ((noisy, 0.0), (calm, 1.0)):
        robot._pauses.extend([pause] * FEWEST_PAUSES)
    calm.pause = 1.0
    for robot in (silent, noisy)[-places:]:
        ask(robot, observation(0), 0.0)
    asking = {Request(calm, observation(1), 0.0)}
    answers: list[Any] = []
    tried = 0

    def between() -> None:
        nonlocal tried
        tried += 1
        if batch := batcher.choose(asking, robots):
            outcomes = batcher.answer(batch, (), robots)
            asking.difference_update(outcomes)
            answers.extend(outcomes.values())

    [mine] = batcher.answer([Request(noisy, observation(1), 0.0)], asking, robots, between).values()
    assert isinstance(mine, Answer)
    assert mine.step.dense_reason is None
    double = CachedVLA(vla.model, Random(0.5)).session()
    for step in range(2):
        action = double.act(KEYS.frame(observation(step)))
    np.testing.assert_array_equal(mine.message["actions"][0], action)
    assert tried > 5
    assert len(answers) == memory.evictions == places - 1
    assert bool(silent.nbytes) is False
    assert len(calm._pauses) == FEWEST_PAUSES  # prepared once, as the first of an episode; and its plan is kept
    assert all(request.planned for request in asking)
    if asking:
        [answer] = batcher.answer(batcher.choose(asking, robots), (), robots).values()
        assert isinstance(answer, Answer)


def test_who_found_no_room_in_a_batch_keeps_its_slots_while_others_interrupt_it() -> None:
    vla = CachedVLA(random_vla("tiny"), Random(0.5))
    batcher = Batcher(vla.engine, memory=budget(vla, 2))
    robots = [RobotSession(vla, KEYS, SessionOptions()) for _ in range(5)]
    for number, robot in enumerate(robots):
        if number < 2:
            ask(robot, observation(0), 0.0)
        robot.pause = float(number > 1)
        robot._pauses.extend([robot.pause] * FEWEST_PAUSES)
    messages = observation(1), observation(1, "pick up the bowl and put it on the plate"), observation(1)
    waiting = [Request(robot, message, 0.0) for robot, message in zip(robots[:3], messages, strict=True)]
    done: dict[Request, Any] = {}

    def between() -> None:
        if chosen := batcher.choose([request for request in waiting[2:] if request not in done], robots):
            done.update(batcher.answer(chosen, (), robots))

    assert list(batcher.answer(waiting[:2], waiting[2:], robots, between)) == waiting[:1]
    while rest := [request for request in waiting[1:] if request not in done]:
        done |= batcher.answer(rest[:1], rest[1:], robots)
    assert all(isinstance(answer, Answer) for answer in done.values()), done


def test_an_instruction_that_needs_more_than_all_memory(chunks: VLA) -> None:
    vla = CachedVLA(random_vla("tiny"), Random(0.5))
    memory = budget(vla, 2)
    robots = [RobotSession(vla, KEYS, SessionOptions()) for _ in range(2)]
    batcher = Batcher(vla.engine, memory=memory, max_batch=2)
    for robot in robots:
        ask(robot, observation(0), 0.0)
    for _ in range(2):  # it is refused, whoever asks beside it, and as often as it asks
        waiting = [Request(robots[0], observation(0, LONG), 0.0), Request(robots[1], observation(1), 0.0)]
        refused, answer = batcher.answer(waiting, (), robots).values()
        assert isinstance(refused, RefusedRequestError)
        assert "shorten the instruction, or serve with more --kv-memory" in str(refused)
        assert isinstance(answer, Answer)
        assert answer.step.dense_reason is None
        assert (robots[0].nbytes, memory.evictions) == (0, 0)
    [answer] = batcher.answer([Request(robots[0], observation(0), 0.0)], (), robots).values()
    assert isinstance(answer, Answer)
    assert answer.reset == "new instruction"


def test_admission_eviction_and_return_over_sockets(start: Start, chunks: VLA) -> None:
    vla = CachedVLA(chunks, Random(0.5))
    server = start(vla, memory=budget(vla, 2), session_options=SessionOptions(gap_s=60))
    one, two = Client(server.url), Client(server.url)
    for step in range(2):
        for client in (one, two):
            assert client.infer(observation(step))["lac"]["dense_reason"] == (None if step else "first frame")
    with pytest.raises(ServerError, match="503: full: the memory of keys and values is taken by 2 robots at work"):
        Client(server.url)
    for robot in server.server._robots.values():  # they are silent for so long that they begin anew in any case
        robot.answered -= 100
    with Client(server.url) as three:
        assert three.infer(observation(5))["lac"]["dense_reason"] == "first frame"
        text = urllib.request.urlopen(f"{server.http}/metrics").read().decode()
        assert "lac_evicted_sessions 1.0" in text
        used, limit = (
            float(next(line for line in text.splitlines() if line.startswith(f"lac_cache_{name}bytes ")).split()[1])
            for name in ("", "limit_")
        )
        assert 0 < used <= limit
        assert one.infer(observation(2))["lac"]["dense_reason"] == "first frame"
        assert three.infer(observation(6))["lac"]["dense_reason"] is None
        assert 'lac_rejected_connections_total{reason="full"} 1.0' in text
    one.close()
    two.close()


@pytest.mark.parametrize("requests", [300, pytest.param(REQUESTS, marks=pytest.mark.slow)])
def test_nothing_is_left_of_robots_that_come_and_go(start: Start, backbone: VLA, requests: int) -> None:
    vla = CachedVLA(backbone, Random(0.5))
    memory = budget(vla, 4)
    running, gone, marks = start(vla, memory=memory, limits=Limits(rate_hz=1e6)), [], []
    server, lives = running.server, requests // 5

    async def live(number: int) -> None:
        client = await AsyncClient.connect(server.url)
        for step in range(5):
            await client.infer(observation((number + step) % 7))
        gone.extend(weakref.ref(robot) for robot in list(server._robots.values()))
        await client.close()

    async def everything() -> None:
        for number in range(0, lives, 2):
            await asyncio.gather(live(number), live(number + 1))
            while server._robots:
                await asyncio.sleep(0)
            if number in (lives // 4 // 2 * 2, (lives - 1) // 2 * 2):
                with open("/proc/self/statm") as file:
                    marks.append(int(file.read().split()[1]) * resource.getpagesize() / 1e6)

    asyncio.run(everything())
    running.stop()
    gc.collect()
    assert gone
    assert not [robot for robot in gone if robot() is not None]
    vla.engine.store._reclaim()
    assert sum(free.size for free in vla.engine.store._free) == vla.engine.store.keys.shape[2]
    print(f"\n{requests} requests of {lives} robots: {marks[0]:.0f} MB after a quarter, {marks[-1]:.0f} MB at the end")
    assert marks[-1] - marks[0] < 20


@pytest.mark.parametrize("wrong", [-1.0, float("nan"), float("inf")])
def test_budgets_that_cannot_be(wrong: float) -> None:
    with pytest.raises(InputError, match="give megabytes, or 0 for no limit"):
        ServeConfig("mini", kv_memory=wrong)


def test_a_budget_below_one_robot_is_refused() -> None:
    with pytest.raises(InputError, match=r"kv_memory is 0.01 MB, and one robot of this model takes \d"):
        make_server(ServeConfig("mini", "dense", kv_memory=0.01))
    memory = make_server(ServeConfig("mini", "dense", kv_memory=50.0)).memory
    assert memory is not None
    assert memory.robots > 1
    assert memory.nbytes <= 50e6
