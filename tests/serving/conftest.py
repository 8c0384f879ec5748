"""A server in a thread, with a tiny model, and what robots send to it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from lac_vla import VLA, CachedVLA, Motion, random_vla
from lac_vla.client.observation import ObservationKeys
from lac_vla.serving.batches import Batcher, Request
from lac_vla.serving.server import PolicyServer
from lac_vla.serving.sessions import Answer, RobotSession


def observation(seed: int = 0, prompt: str = "pick up the bowl", side: int = 64) -> dict[str, Any]:
    """Neighbouring seeds differ a little, not by a scene cut."""
    base, change = np.random.default_rng(7), np.random.default_rng(1000 + seed)
    images = {
        key: (base.integers(60, 190, (side, side, 3)) + change.integers(-25, 26, (side, side, 3))).astype(np.uint8)
        for key in ("observation/image", "observation/wrist_image")
    }
    return {**images, "observation/state": np.zeros(8), "prompt": prompt}


def ask(robot: RobotSession, message: dict[str, Any], arrived: float) -> Answer:
    """Let a robot ask alone."""
    [outcome] = Batcher(robot.vla.engine, robot.controller).answer([Request(robot, message, arrived)]).values()
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


class Running:
    """A server that listens, in a thread of its own."""

    def __init__(self, server: PolicyServer) -> None:
        self.server = server
        self._stop = asyncio.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=asyncio.run, args=(self._run(),))
        self._thread.start()
        assert self._ready.wait(20)

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def http(self) -> str:
        return self.url.replace("ws", "http", 1)

    def stop(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(30)
            assert not self._thread.is_alive()

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        async with self.server:
            self._ready.set()
            await self._stop.wait()


KEYS = ObservationKeys({"agentview": "observation/image", "wrist": "observation/wrist_image"})


@pytest.fixture(scope="session")
def backbone() -> VLA:
    return random_vla("tiny")


@pytest.fixture
def start(backbone: VLA) -> Iterator[Callable[..., Running]]:
    """Start servers; they are stopped at the end."""
    running: list[Running] = []

    def make(vla: CachedVLA | None = None, **options: Any) -> Running:
        running.append(Running(PolicyServer(vla or CachedVLA(backbone, Motion(0.5)), KEYS, **options)))
        return running[-1]

    yield make
    for server in running:
        server.stop()
