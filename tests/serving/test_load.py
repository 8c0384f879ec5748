"""Many robots at once, some of which misbehave. ``pytest -m slow -s`` prints what was measured."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from lac_vla import CachedVLA, Dense, Random, random_vla
from lac_vla.client.connection import AsyncClient, Client
from lac_vla.client.wire import REFUSED, pack
from lac_vla.engine.budget import smallest_budget
from lac_vla.models.cogact.config import TINY_COGACT
from lac_vla.realtime.deadline import DeadlineController, LatencyTable
from lac_vla.serving.server import Limits
from lac_vla.serving.sessions import SessionOptions
from tests.serving.conftest import KEYS, Running, observation

pytestmark = pytest.mark.slow
Start = Callable[..., Running]

ROBOTS = 32
FRAMES = 8
REQUESTS = int(os.environ.get("LAC_LOAD_REQUESTS", "10000"))
KEY = "a-key-of-some-length"


def resident_mb() -> float:
    """Memory of this process now, MB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 1e6


def story(robot: int) -> Iterator[dict[str, Any]]:
    """What one robot sees; no two see the same."""
    for i in range(FRAMES):
        yield observation(1000 * robot + i, "pick up the bowl" if robot % 2 else "open the drawer")


async def drive(url: str, robot: int) -> list[Any]:
    client = await AsyncClient.connect(url, KEY)
    answers = [(await client.infer(request))["actions"] for request in story(robot)]
    await client.close()
    return answers


async def misbehave(url: str, host: str, port: int) -> dict[str, int]:
    """Everything a bad client may do, while the others work; how often it was done."""
    headers = {"Authorization": f"Api-Key {KEY}"}
    done = dict.fromkeys(("garbage", "oversized", "wrong key", "killed", "slow reader", "no protocol"), 0)
    slow = []
    for round_ in range(4):
        async with connect(url, additional_headers=headers, compression=None) as ws:
            await ws.recv()
            await ws.send(os.urandom(3000))
            done["garbage"] += str(await ws.recv()).startswith(REFUSED)
            with contextlib.suppress(ConnectionClosed):
                await ws.send(bytes(2**20))
                await ws.recv()
                raise AssertionError("a message over the limit was answered")
            done["oversized"] += 1
        try:
            await connect(url, additional_headers={"Authorization": "Api-Key wrong"})
        except InvalidStatus:
            done["wrong key"] += 1
        ws = await connect(url, additional_headers=headers, compression=None)
        await ws.recv()
        await ws.send(pack(observation(round_)))
        ws.transport.abort()
        done["killed"] += 1
        reader = await connect(url, additional_headers=headers, compression=None)
        reader.transport.pause_reading()
        await reader.send(pack(observation(round_)))
        slow.append(reader)
        done["slow reader"] += 1
        with socket.create_connection((host, port)) as raw:
            raw.sendall(os.urandom(500))
        done["no protocol"] += 1
    for reader in slow:
        reader.transport.abort()
    return done


@pytest.mark.parametrize("max_batch", [1, 8])
def test_robots_do_not_notice_each_other(start: Start, max_batch: int) -> None:
    """Bit for bit where they are answered one at a time; kernels over more rows round otherwise."""
    backbone = random_vla(TINY_COGACT, seed=1)  # its actions are continuous: every difference shows
    limits = Limits(sessions=ROBOTS + 16, message=2**19, send_s=5)
    server = start(CachedVLA(backbone, Random(0.5)), key=KEY, limits=limits, max_batch=max_batch).server

    async def everything() -> tuple[list[list[Any]], dict[str, int]]:
        *answers, done = await asyncio.gather(
            *(drive(server.url, robot) for robot in range(ROBOTS)), misbehave(server.url, server.host, server.port)
        )
        return answers, done

    begin = time.perf_counter()
    answers, done = asyncio.run(everything())
    took = time.perf_counter() - begin
    assert min(done.values()) == 4
    seen = set()
    for robot, mine in enumerate(answers):
        session = CachedVLA(backbone, Random(0.5)).session()
        close = 0.0 if max_batch == 1 else 1e-5
        expected = [session.act(KEYS.frame(request)) for request in story(robot)]
        np.testing.assert_allclose(mine, expected, rtol=close, atol=close)
        seen.add(np.asarray(mine).tobytes())
    assert len(seen) == ROBOTS  # mixed state could not have passed unseen
    print(f"\n{ROBOTS} robots, {ROBOTS * FRAMES} requests in {took:.1f} s beside {sum(done.values())} misbehaviours")


def test_memory_is_flat(start: Start) -> None:
    url, marks = start(limits=Limits(rate_hz=1e6)).url, []

    async def everything() -> None:
        clients = [await AsyncClient.connect(url) for _ in range(ROBOTS)]
        requests = [observation(i) for i in range(4)]
        for turn in range(REQUESTS // ROBOTS):
            await asyncio.gather(*(client.infer(requests[turn % 4]) for client in clients))
            if turn in (REQUESTS // ROBOTS // 4, REQUESTS // ROBOTS - 1):
                marks.append(resident_mb())
        for client in clients:
            await client.close()

    asyncio.run(everything())
    print(f"\n{REQUESTS} requests of {ROBOTS} robots: {marks[0]:.0f} MB after a quarter, {marks[1]:.0f} MB at the end")
    assert marks[1] - marks[0] < 20


def test_the_wire_costs_little(start: Start) -> None:
    url = start(limits=Limits(rate_hz=1e6)).url
    command = [sys.executable, "-W", "ignore", "-m", "tests.serving.timing_robot", url, "110", "224"]
    medians = []
    for _ in range(3):
        run = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
        beyond = json.loads(run.stdout)[10:]
        medians.append(float(np.median(beyond)))
    print(f"\nround trip beyond observation_to_action, 2 images of 224 px: p50 {min(medians):.2f} ms "
          f"(of {', '.join(f'{m:.2f}' for m in medians)}), p95 {np.quantile(beyond, 0.95):.2f} ms")  # fmt: skip
    assert min(medians) <= 2.0


def test_deadlines_are_kept(start: Start) -> None:
    vla = CachedVLA(random_vla("mini", seed=1), Dense())
    table = LatencyTable.measure(vla)
    floor = smallest_budget(212, vla.max_age)
    deadline = table(floor) * 1.3 + 10
    controller = DeadlineController(deadline, table, floor)
    with Client(start(vla, controller=controller, limits=Limits(rate_hz=1e6)).url) as client:
        answers = [client.infer(observation(i % 7, side=224))["lac"] for i in range(1000)]
    took = np.array([sum(a["stages"].values()) + a["waited_ms"] for a in answers[1:]])
    late = float(np.mean([a["late"] for a in answers[1:]]))
    limits = [a["token_budget"] for a in answers[1:]]
    print(f"\ndeadline {deadline:.1f} ms; {floor} tokens, the fewest, {table(floor):.1f} ms; all {table(212):.1f} ms:"
          f" p50 {np.median(took):.1f}, p99 {np.quantile(took, 0.99):.1f} ms, late {late:.1%},"
          f" tokens {min(limits)} to {max(limits)}")  # fmt: skip
    assert max(a["oldest_age"] for a in answers) <= vla.max_age
    assert np.quantile(took, 0.5) < deadline


def test_slack_makes_slots_younger_at_the_same_latency(start: Start) -> None:
    """The same frames, at the same pace, to two servers in turn, of which one uses the time in between."""
    pace, told = 0.06, {}
    vlas = {slack: CachedVLA(random_vla("mini", seed=1), Random(0.8)) for slack in (False, True)}
    table = LatencyTable.measure(vlas[True])
    urls = {
        slack: start(vla, table=table, session_options=SessionOptions(slack=slack)).url for slack, vla in vlas.items()
    }
    clients = {slack: Client(url) for slack, url in urls.items()}
    for i in range(150):
        for slack, client in clients.items():
            begin = time.perf_counter()
            answer = client.infer(observation(i % 7, side=224))
            took = answer["server_timing"]["infer_ms"] + answer["lac"]["waited_ms"]
            told.setdefault(slack, []).append((took, answer["lac"]["mean_age"]))
            time.sleep(max(0.0, begin + pace - time.perf_counter()))
    for client in clients.values():
        client.close()
    (off_ms, off_age), (on_ms, on_age) = (np.median(told[slack][10:], axis=0) for slack in (False, True))
    print(f"\nslack off and on: waiting and inference p50 {off_ms:.1f} and {on_ms:.1f} ms,"
          f" mean age {off_age:.2f} and {on_age:.2f}")  # fmt: skip
    assert on_age < off_age
    assert on_ms < 1.1 * off_ms
