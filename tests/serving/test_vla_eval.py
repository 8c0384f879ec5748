"""The adapter for vla-eval, with its own server and client."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vla_eval", reason="vla-eval is not installed: pip install 'lac-vla[vla-eval]'")

import anyio
from vla_eval.connection import Connection
from vla_eval.model_servers.serve import serve_async

from lac_vla import CachedVLA, ModelOptions, Random
from lac_vla.serving.vla_eval import LacModelServer
from lac_vla.types import Frame
from tests.evaluation.worlds import save_tiny
from tests.serving.conftest import observation

STEPS = 4


def seen(robot: int, step: int) -> dict[str, Any]:
    """What a benchmark of other camera names sends."""
    message = observation(100 * robot + step)
    images = {"front": message["observation/image"], "hand": message["observation/wrist_image"]}
    return {"images": images, "task_description": message["prompt"], "states": message["observation/state"]}


def expected(model: Path, robot: int, *, rotate: bool = False) -> list[Any]:
    session = CachedVLA.from_pretrained(str(model), "random:ratio=0.5", ModelOptions(threads=1)).session()
    assert isinstance(session.policy, Random)
    actions, turn = [], slice(None, None, -1 if rotate else None)
    for step in range(STEPS):
        obs = seen(robot, step)
        pictures = [np.ascontiguousarray(image[turn, turn]) for image in obs["images"].values()]
        images = dict(zip(("agentview", "wrist"), pictures, strict=True))
        actions.append(session.act(Frame(images, obs["task_description"], obs["states"])))
    return actions


@pytest.mark.parametrize("rotate", [False, True])
def test_episodes_of_several_clients_are_those_of_the_library(tmp_path: Path, rotate: bool) -> None:
    model = save_tiny(tmp_path / "model")
    server = LacModelServer(str(model), "random:ratio=0.5", threads=1, rotate=rotate, max_batch_size=4)
    answers: dict[int, list[Any]] = {}

    async def drive(url: str, robot: int) -> None:
        async with Connection(url) as connection:
            assert connection.server_info["observation_params"] == {"send_wrist_image": True, "send_state": False}
            for _ in range(2):
                await connection.start_episode({"name": "pick up the bowl"})
                got = [(await connection.act(seen(robot, step)))["actions"] for step in range(STEPS)]
                assert answers.setdefault(robot, got)[-1] is not None
                for mine, first in zip(got, answers[robot], strict=True):
                    np.testing.assert_allclose(mine, first, atol=1e-5)
                await connection.end_episode({"success": True})

    async def spoil(url: str) -> None:
        async with Connection(url) as connection:
            await connection.start_episode({"name": "pick up the bowl"})
            with pytest.raises(Exception, match="the observation needs images of"):
                await connection.act({"images": {}, "task_description": "go"})
            assert len((await connection.act(seen(9, 0)))["actions"]) == 7  # it may go on

    async def everything() -> None:
        async with anyio.create_task_group() as serving:
            port = await serving.start(serve_async, server, "127.0.0.1", 0)
            async with anyio.create_task_group() as clients:
                for robot in range(3):
                    clients.start_soon(drive, f"ws://127.0.0.1:{port}", robot)
                clients.start_soon(spoil, f"ws://127.0.0.1:{port}")
            with anyio.fail_after(10):
                while server._sessions:  # nothing is left of an episode
                    await anyio.sleep(0.01)
            serving.cancel_scope.cancel()

    anyio.run(everything)
    for robot in range(3):
        np.testing.assert_allclose(answers[robot], expected(model, robot, rotate=rotate), rtol=1e-5, atol=1e-5)
