"""Robots that are answered together, over real sockets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from threading import Event
from typing import Any

import numpy as np
import pytest
from websockets.asyncio.client import connect

from lac_vla import CachedVLA, InputError, Motion, Random, random_vla
from lac_vla.client.connection import AsyncClient, ServerError
from lac_vla.client.wire import pack
from lac_vla.models import VLA
from lac_vla.models.cogact.config import TINY_COGACT
from lac_vla.serving.batches import Batcher
from lac_vla.serving.config import ServeConfig
from lac_vla.serving.server import Limits
from lac_vla.serving.sessions import RobotSession
from tests.serving.conftest import KEYS, Running, observation
from tests.serving.test_batches import CrashError, Moody

Start = Callable[..., Running]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def chunks() -> VLA:
    return random_vla(TINY_COGACT, seed=1)  # its actions are continuous: every difference shows


class Gate:
    """Holds the model up, in the middle of a run, until it is opened."""

    def __init__(self, model: VLA, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.opened = Event(), Event()
        project = type(model.vision).project

        def held(vision: Any, features: Any) -> Any:
            self.reached.set()
            assert self.opened.wait(20)
            return project(vision, features)

        monkeypatch.setattr(type(model.vision), "project", held)


async def clients(stack: AsyncExitStack, url: str, count: int) -> list[AsyncClient]:
    made = [await AsyncClient.connect(url) for _ in range(count)]
    for client in made:
        stack.push_async_callback(client.close)
    return made


async def behind_the_gate(gate: Gate, server: Running, asking: Sequence[Any]) -> list[Any]:
    """Ask while the model is held up by the first of them; the answers, or what went wrong."""
    tasks = [asyncio.ensure_future(asking[0])]
    await asyncio.to_thread(gate.reached.wait, 20)
    tasks += [asyncio.ensure_future(each) for each in asking[1:]]
    while server.server._executor.waiting < len(asking):
        await asyncio.sleep(0.01)
    gate.opened.set()
    return await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize(("limit", "sizes"), [(1, [1] * 6), (2, [1, 2, 2, 2, 2, 1]), (8, [1] + [5] * 5)])
def test_what_waits_is_answered_together(
    start: Start, chunks: VLA, monkeypatch: pytest.MonkeyPatch, limit: int, sizes: list[int]
) -> None:
    vla = CachedVLA(chunks, Motion(0.5))
    gate, server = Gate(chunks, monkeypatch), start(vla, max_batch=limit)

    async def everything() -> list[Any]:
        async with AsyncExitStack() as stack:
            robots = await clients(stack, server.url, 6)
            asking = [robot.infer(observation(10 * i)) for i, robot in enumerate(robots)]
            return await behind_the_gate(gate, server, asking)

    answers = asyncio.run(everything())
    assert sorted(answer["lac"]["batch"] for answer in answers) == sorted(sizes)
    for i, answer in enumerate(answers):
        np.testing.assert_allclose(answer["actions"], vla.session().act(KEYS.frame(observation(10 * i))), **CLOSE)
    alone = f'lac_batch_robots_bucket{{le="1.0"}} {sizes.count(1):.1f}'
    assert alone in server.server.metrics.text().decode()


def test_faults_in_a_batch_are_their_own_robots(start: Start, chunks: VLA, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad request, a policy that fails before the run and one in the middle of it, all in one batch."""
    vla = CachedVLA(chunks, Moody())
    server = start(vla)
    texts = ("first", "good", " ", "crash early", "crash late", "good too")

    async def everything() -> tuple[list[Any], list[Any]]:
        async with AsyncExitStack() as stack:
            robots = await clients(stack, server.url, 6)
            for i, robot in enumerate(robots):
                await robot.infer(observation(10 * i, texts[i].strip() or "good"))
            gate = Gate(chunks, monkeypatch)
            asking = [robot.infer(observation(10 * i + 1, texts[i])) for i, robot in enumerate(robots)]
            answers = await behind_the_gate(gate, server, asking)
            again = [await robots[i].infer(observation(10 * i + 2, texts[i])) for i in (0, 1, 5)]
            return answers, again

    answers, again = asyncio.run(everything())
    for i, text in enumerate(texts):
        if text in ("first", "good", "good too"):
            session = vla.session()
            expected = [session.act(KEYS.frame(observation(10 * i + j, text))) for j in range(3)]
            np.testing.assert_allclose(answers[i]["actions"], expected[1], **CLOSE)
            np.testing.assert_allclose(again[[0, 1, 5].index(i)]["actions"], expected[2], **CLOSE)
        else:
            assert isinstance(answers[i], ServerError)
    assert "instruction is empty" in str(answers[2])
    assert all("internal error" in str(answers[i]) for i in (3, 4))
    assert answers[1]["lac"]["batch"] == 3  # with "good too" and "crash late", which failed in the run


def test_a_fault_of_the_batch_itself_does_not_stop_the_server(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start()

    def broken(*_: object) -> None:
        raise CrashError("broken")

    async def everything() -> dict[str, Any]:
        async with AsyncExitStack() as stack:
            one, other = await clients(stack, server.url, 2)
            with monkeypatch.context() as patch:
                patch.setattr(Batcher, "answer", broken)
                with pytest.raises(ServerError, match="internal error"):
                    await one.infer(observation(0))
            return await other.infer(observation(0))

    assert asyncio.run(everything())["lac"]["dense_reason"] == "first frame"
    assert server.server._executor.waiting == 0


def test_a_window_waits_for_those_that_are_there(start: Start) -> None:
    server = start(batch_window_ms=3000)

    async def everything() -> tuple[float, list[Any]]:
        async with AsyncExitStack() as stack:
            [one] = await clients(stack, server.url, 1)
            begin = time.perf_counter()
            await one.infer(observation(0))  # there is nobody to wait for
            alone = time.perf_counter() - begin
            [other] = await clients(stack, server.url, 1)
            begin = time.perf_counter()

            async def later() -> Any:
                await asyncio.sleep(0.2)
                return await other.infer(observation(1))

            both = await asyncio.gather(one.infer(observation(1)), later())
            return max(alone, time.perf_counter() - begin), list(both)

    longest, both = asyncio.run(everything())
    assert [answer["lac"]["batch"] for answer in both] == [2, 2]
    assert longest < 2.5  # all that can come have come: the window is over


def test_a_slow_reader_delays_nobody(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start()
    report = RobotSession._report

    def padded(robot: RobotSession, *rest: Any) -> dict[str, Any]:  # more than the sockets hold
        return report(robot, *rest) | ({"padding": bytes(2**24)} if robot._instruction == "slow" else {})

    monkeypatch.setattr(RobotSession, "_report", padded)

    async def everything() -> tuple[int, int]:
        async with AsyncExitStack() as stack:
            [one] = await clients(stack, server.url, 1)
            slow = await connect(server.url, compression=None, max_size=None)
            slow.transport.pause_reading()
            await slow.send(pack(observation(0, "slow")))
            while not any(robot._frames for robot in list(server.server._robots.values())):
                await asyncio.sleep(0.01)
            begin, served = time.perf_counter(), 0
            while time.perf_counter() - begin < 1.5:
                await asyncio.wait_for(one.infer(observation(served % 5)), 1)
                served += 1
            there = len(server.server._robots)
            slow.transport.abort()
            return served, there

    served, there = asyncio.run(everything())
    assert there == 2  # its answer lay there all the time
    assert served > 10


def test_a_noisy_neighbour_changes_no_answer(start: Start, chunks: VLA) -> None:
    """It asks as fast as it can, and every frame is a scene cut; the others' answers stay what they are."""
    vla = CachedVLA(chunks, Random(0.5))
    server = start(vla, limits=Limits(rate_hz=1e6))

    async def everything() -> tuple[list[list[Any]], int]:
        async with AsyncExitStack() as stack:
            noisy, *robots = await clients(stack, server.url, 5)
            done = asyncio.Event()

            async def disturb() -> int:
                count = 0
                while not done.is_set():
                    white = {"observation/image": np.full((64, 64, 3), 255 * (count % 2), np.uint8)}
                    answer = await noisy.infer(observation(0) | white)
                    assert answer["lac"]["dense_reason"] == ("scene cut" if count else "first frame")
                    count += 1
                return count

            async def drive(robot: AsyncClient, number: int) -> list[Any]:
                actions = []
                for i in range(12):
                    actions.append((await robot.infer(observation(100 * number + i)))["actions"])
                    await asyncio.sleep(0.02)
                return actions

            noise = asyncio.ensure_future(disturb())
            answers = await asyncio.gather(*(drive(robot, number) for number, robot in enumerate(robots)))
            done.set()
            return list(answers), await noise

    answers, disturbances = asyncio.run(everything())
    assert disturbances > 3
    for number, mine in enumerate(answers):
        session = vla.session()
        expected = [session.act(KEYS.frame(observation(100 * number + i))) for i in range(12)]
        np.testing.assert_allclose(mine, expected, **CLOSE)


@pytest.mark.parametrize("wrong", [{"max_batch": 0}, {"batch_window_ms": -1}, {"batch_window_ms": float("nan")}])
def test_batches_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="max_batch must be at least 1"):
        ServeConfig("mini", **wrong)
