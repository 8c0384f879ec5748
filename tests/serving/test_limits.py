"""What comes from outside costs little, says what is wrong in few words, and keeps no robot out."""

from __future__ import annotations

import json
import logging
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosedError
from websockets.sync.client import connect

from lac_vla.client.connection import Client, ServerError
from lac_vla.client.remote import RemoteSession
from lac_vla.client.wire import MAX_ITEMS, REFUSED, pack, unpack
from lac_vla.datasets import LeRobotDataset
from lac_vla.errors import InputError
from lac_vla.serving.metrics import JsonLines
from lac_vla.serving.server import Limits
from tests.evaluation.worlds import save_tiny
from tests.serving.conftest import KEYS, Running, observation

Start = Callable[..., Running]
KEY = "a-key-of-some-length"


def raw(server: Running, *lines: str, path: str = "/metrics") -> str:
    """The server's answer to a request that no client would send."""
    with socket.create_connection((server.server.host, server.server.port), 10) as line:
        line.sendall("\r\n".join([f"GET {path} HTTP/1.1", *lines, "", ""]).encode())
        parts = []
        while part := line.recv(4096):
            parts.append(part)
    return b"".join(parts).decode()


def reply(server: Running, request: bytes) -> dict[str, Any] | str:
    """The answer to a message, in a connection of its own."""
    with connect(server.url, compression=None, max_size=None) as ws:
        ws.recv()
        ws.send(request)
        answer = ws.recv(timeout=20)
    return answer if isinstance(answer, str) else unpack(answer)


@pytest.mark.parametrize("key", [None, KEY])
def test_repeated_headers(start: Start, caplog: pytest.LogCaptureFixture, key: str | None) -> None:
    server = start(key=key, view=True)
    for path in ("/metrics", "/view", "/", "/healthz"):
        for name in ("Authorization", "host", "User-Agent", "Sec-WebSocket-Key", "origin"):
            answer = raw(server, f"{name}: a", "Connection: close", f"{name.upper()}: a", path=path)
            assert answer.startswith("HTTP/1.1 400 ")
            assert f"send one header {name}".lower() in answer.lower()
    assert not [record for record in caplog.records if record.exc_info]


def test_lists_may_be_repeated(start: Start) -> None:
    lists = ("Via", "Forwarded", "X-Forwarded-For", "X-Forwarded-Proto", "Cookie", "Accept", "Cache-Control", "Upgrade")
    hops = [f"{name}: a" for name in (*lists, "Connection") for _ in range(2)]
    assert raw(start(), *hops, "Host: localhost", "Connection: close", path="/healthz").startswith("HTTP/1.1 200 ")


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"reset": np.array([1, 0])}, "reset must be true or false"),
        ({"reset": "yes"}, "reset must be true or false"),
        ({"reset": {}}, "reset must be true or false"),
        ({"observation/image": [[1]]}, "observation/image is a list; send an array"),
        ({"observation/image": 3}, "observation/image is a int; send an array"),
        ({"observation/image": np.zeros((0, 64, 3), np.uint8)}, "image|camera|pixels|shape"),
        ({"observation/state": np.zeros((0, 3))}, "state|proprio"),
        ({"observation/state": "text"}, "must be an array of numbers"),
        ({"seed": np.array([1, 2])}, "seed must be"),
        ({"prompt": ["go"]}, "prompt must be a text"),
    ],
    ids=str,
)
def test_hostile_values_get_a_clear_answer(start: Start, wrong: dict[str, Any], complaint: str) -> None:
    answer = reply(start(), pack(observation() | wrong))
    assert isinstance(answer, str)
    assert re.search(complaint, answer)
    assert "internal error" not in answer


def test_a_shape_that_no_array_can_have(start: Start) -> None:
    for shape in ([0, 2**63 - 1], [2**63 - 1, 0], [0, 2**62, 2**62]):
        state = {b"__ndarray__": True, b"data": b"", b"dtype": "<f4", b"shape": shape}
        request = msgpack.unpackb(pack(observation()), strict_map_key=False) | {"observation/state": state}
        answer = reply(start(), msgpack.packb(request))
        assert isinstance(answer, str)
        assert "an array of shape" in answer


@pytest.mark.parametrize("kind", [bool, int, float, np.bool_, np.array, lambda flag: np.array([flag])])
def test_ways_to_say_reset(start: Start, kind: Callable[[bool], Any]) -> None:
    with Client(start().url) as client:
        client.infer(observation())
        assert client.infer(observation() | {"reset": kind(True)})["lac"]["reset"] == "reset"
        assert client.infer(observation() | {"reset": kind(False)})["lac"]["reset"] is None


UNNEEDED = {
    "a list": list(range(10 * MAX_ITEMS)),
    "a map": {str(number): number for number in range(2 * MAX_ITEMS)},
    "numbers as keys": {1: 2},
    "texts": {b"__ndarray__": True, b"data": b"abcd", b"dtype": "<U1", b"shape": [1]},
    "an extension": msgpack.ExtType(3, b"x"),
    "a time": msgpack.Timestamp(1, 0),
    "a long text": "x" * 100_000,
    "lists": [[[number] for number in range(300)]],
    "deep": json.loads("[" * 60 + "]" * 60),
}


@pytest.mark.parametrize("name", UNNEEDED)
@pytest.mark.parametrize("nested", [False, True])
def test_what_the_model_does_not_need_may_be_anything(start: Start, name: str, nested: bool) -> None:
    request = msgpack.unpackb(pack(observation(3)), strict_map_key=False)
    more = {"more": UNNEEDED[name]}
    if nested:
        request = {
            "observation": {key.partition("/")[2]: request.pop(key) for key in [*request] if "/" in key} | more
        } | request
    answer = reply(start(), msgpack.packb(more | request))
    plain = reply(start(), pack(observation(3)))
    assert isinstance(answer, dict)
    assert isinstance(plain, dict)
    np.testing.assert_array_equal(answer["actions"], plain["actions"])


MESSAGES = st.dictionaries(
    st.sampled_from([*KEYS.wanted, "observation", "more"]),
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=4)
    | st.binary(max_size=4)
    | st.lists(st.integers(0, 9), max_size=3)
    | st.fixed_dictionaries(
        {
            b"__ndarray__": st.just(True),
            b"data": st.binary(max_size=12),
            b"dtype": st.sampled_from(["|u1", "<f4", "|b1"]),
        }
        | {b"shape": st.lists(st.sampled_from([0, 1, 2, 3, 2**31, 2**63 - 1]), max_size=4)}
    )
    | st.dictionaries(st.sampled_from(["image", "wrist_image", "state"]), st.integers(0, 3), max_size=3),
    max_size=4,
)


@pytest.fixture(scope="module")
def shared(backbone: Any) -> Iterator[Running]:
    from lac_vla import CachedVLA, Motion
    from lac_vla.serving.server import PolicyServer

    server = Running(PolicyServer(CachedVLA(backbone, Motion(0.5)), KEYS))
    yield server
    server.stop()


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(change=MESSAGES)
@example(change={"observation": {"image": 1}, "reset": [1]})
@example(change={"episode_id": 2**64 - 1, "seed": 2**63})
def test_any_message_is_answered_or_refused(shared: Running, change: dict[str, Any]) -> None:
    request = msgpack.unpackb(pack(observation()), strict_map_key=False) | change
    answer = reply(shared, msgpack.packb(request))
    if isinstance(answer, str):
        assert "internal error" not in answer
        assert len(answer) < 500
    else:
        assert np.isfinite(answer["actions"]).all()


def test_a_message_that_is_too_large_says_what_to_do(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    server = start(limits=Limits(message=2**20))
    with caplog.at_level(logging.INFO, "lac_vla.serving"):
        with Client(server.url) as client, pytest.raises(ServerError, match=r"more than 1 MB: .*--max-message-mb"):
            client.infer(observation(side=1024))
        with connect(server.url, compression=None) as ws:
            ws.recv()
            ws.send(bytes(2**21))
            with pytest.raises(ConnectionClosedError) as closed:
                ws.recv(timeout=10)
        assert closed.value.rcvd is not None
        assert (closed.value.rcvd.code, "--max-message-mb" in closed.value.rcvd.reason) == (1009, True)
        server.stop()
    rows = [(row.message, getattr(row, "metadata", {})) for row in caplog.records]
    own = {told["session"] for message, told in rows if message == "session opened"}  # an earlier test's may end late
    reasons = [told["reason"] for message, told in rows if message == "session closed" and told["session"] in own]
    assert len(reasons) == 2
    assert all("--max-message-mb" in reason for reason in reasons)


def test_texts_from_outside_are_shortened(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    server = start(view=True)
    request = {f"{number:02}" + "k" * 60_000: 1 for number in range(19)}
    with caplog.at_level(logging.INFO, "lac_vla.serving"):
        answer = reply(server, pack(request))
        server.stop()
    assert isinstance(answer, str)
    assert len(answer) <= len(REFUSED) + 300
    assert max(len(JsonLines().format(record)) for record in caplog.records) < 2000
    assert len(json.dumps([*server.server._view._closed])) < 1000  # type: ignore[union-attr]


@pytest.mark.parametrize("answer", [{}, {"lac": 3}, {"actions": np.zeros((1, 7))}, {"actions": "x", "lac": {}}])
def test_an_evaluation_is_told_what_a_strange_server_answers(answer: dict[str, Any]) -> None:
    class Strange:
        metadata: ClassVar = {
            "cameras": {"front": "image"},
            "state": "state",
            "prompt": "prompt",
            "actions_per_call": None,
        }

        def infer(self, request: Any) -> dict[str, Any]:
            return answer

    from tests.engine.scenes import frame

    with pytest.raises(InputError, match="answer"):
        RemoteSession(Strange()).act(frame(0))


@contextmanager
def serving(model: Path, *words: str, files: int = 256) -> Iterator[tuple[subprocess.Popen[str], str, Path]]:
    """``lac serve`` in a process that may have so many files open, its address, and its log."""
    log = model.with_name("log.txt")
    command = f"serve --model {model} --policy dense --port 0".split()
    with log.open("w") as error:
        process = subprocess.Popen(
            [sys.executable, "-c", "from lac_vla.cli import main; main()", *command, *words],
            stderr=error,
            text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files)),
        )
    try:
        end = time.monotonic() + 300  # it loads torch, on a machine that may be busy
        while '"listening"' not in log.read_text():
            assert time.monotonic() < end
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        yield process, log.read_text().split('"url": "')[1].partition('"')[0], log
    finally:
        process.kill()
        process.wait()


def test_connections_without_a_word_keep_no_robot_out(tmp_path: Path) -> None:
    """120 of them, of a server that may have 80 files open: three robots play, and are recorded."""
    words = ("--record", str(tmp_path / "data"), "--record-fps", "5")
    with serving(save_tiny(tmp_path / "model"), *words, files=80) as (process, url, log):
        host, port = url.removeprefix("ws://").split(":")
        robots = [Client(url) for _ in range(2)]
        for robot in robots:
            robot.infer(observation())
        silent = [socket.create_connection((host, int(port)), 10) for _ in range(120)]
        begin = time.monotonic()
        robots.append(Client(url))
        assert time.monotonic() - begin < 8, "not only once the silent ones have timed out"
        for number in range(3):
            for robot in robots:
                robot.infer(observation(number))
        for robot in robots:
            robot.close()
        for line in silent:
            line.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        written = log.read_text()
    assert [len(episode) for episode in LeRobotDataset(tmp_path / "data")] in ([4, 4, 3], [4, 3, 4], [3, 4, 4])
    assert len(written) < 20_000
    assert "Traceback" not in written


@pytest.mark.parametrize("seconds", [50, pytest.param(2, marks=pytest.mark.slow)])  # 2 s where nothing else runs
def test_a_server_without_connections_stops_at_once(tmp_path: Path, seconds: int) -> None:
    with serving(save_tiny(tmp_path / "model"), "--drain-s", "100") as (process, url, _):
        Client(url).close()
        host, port = url.removeprefix("ws://").split(":")
        silent = socket.create_connection((host, int(port)), 10)
        time.sleep(0.2)
        begin = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(90) == 0
        assert time.monotonic() - begin < seconds
        silent.close()
