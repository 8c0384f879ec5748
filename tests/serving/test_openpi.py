"""openpi's client: what it sent once, byte for byte, in every run; the real one, in an environment of its own, if slow.

To record it anew: ``LAC_RECORD=1 pytest -m slow tests/serving/test_openpi.py``.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lac_vla import VLA, CachedVLA, Frame, Motion
from lac_vla.client.wire import unpack
from tests.serving.conftest import Running

Start = Callable[..., Running]
TRANSCRIPT = Path(__file__).parents[1] / "goldens" / "openpi_client.bin"
KEY = "a-key-of-some-length"
PACKAGES = ("openpi-client", "typing_extensions")  # the second is needed, but not declared


def expected(backbone: VLA) -> list[Any]:
    """What the library answers to the robot of ``openpi_robot.py``."""
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    frame = Frame({"agentview": image, "wrist": image[::-1].copy()}, "pick up the bowl")
    session = CachedVLA(backbone, Motion(0.5)).session()
    return [np.atleast_2d(session.act(frame)) for _ in range(2)]


def frames(stream: Any) -> list[tuple[int, bytes]]:
    """The websocket frames that a server sent, unmasked and whole: opcode and payload."""
    found = []
    while head := stream.read(2):
        assert head[0] & 0x80  # not in pieces
        assert head[1] & 0x80 == 0
        size = head[1] & 0x7F
        size = int.from_bytes(stream.read({126: 2, 127: 8}[size]), "big") if size > 125 else size
        found.append((head[0] & 0xF, stream.read(size)))
        if found[-1][0] in (1, 8):  # a text is the answer to its last observation, a wrong one
            break
    return found


def test_what_openpi_sent_is_answered_as_it_expects(start: Start, backbone: VLA) -> None:
    server = start(metadata={"model": "tiny"}, key=KEY).server
    with socket.create_connection((server.host, server.port), timeout=20) as robot:
        robot.sendall(TRANSCRIPT.read_bytes())
        stream = robot.makefile("rb")
        assert stream.readline() == b"HTTP/1.1 101 Switching Protocols\r\n"
        headers = dict(line.decode().strip().lower().split(": ", 1) for line in iter(stream.readline, b"\r\n"))
        assert "sec-websocket-extensions" not in headers
        metadata, *answers, complaint = frames(stream)
    assert [kind for kind, _ in (metadata, *answers)] == [2, 2, 2]
    assert unpack(metadata[1])["model"] == "tiny"
    for (_, data), action in zip(answers, expected(backbone), strict=True):
        answer = unpack(data)
        np.testing.assert_array_equal(answer["actions"], action)
        assert answer["actions"].dtype == np.float32
        assert set(answer) >= {"server_timing", "policy_timing"}
    assert complaint[0] == 1
    assert b"observation/image" in complaint[1]


def tap(host: str, port: int) -> tuple[int, list[bytes]]:
    """A port in front of a server, and what the one client said there."""
    listener, said = socket.create_server(("127.0.0.1", 0)), []

    def pump(source: socket.socket, sink: socket.socket, copy: list[bytes]) -> None:
        with contextlib.suppress(OSError):  # whoever hangs up first
            while data := source.recv(2**16):
                copy.append(data)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def run() -> None:
        with listener, listener.accept()[0] as client, socket.create_connection((host, port)) as server:
            back = threading.Thread(target=pump, args=(server, client, []))
            back.start()
            pump(client, server, said)
            back.join()

    threading.Thread(target=run, daemon=True).start()
    return listener.getsockname()[1], said


@pytest.fixture(scope="session")
def openpi_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python with openpi-client, which pins an old numpy: ``LAC_OPENPI_PYTHON``, or one made for this run."""
    if given := os.environ.get("LAC_OPENPI_PYTHON"):
        return given
    folder = tmp_path_factory.mktemp("openpi")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = str(folder / "bin" / "python")
    made = subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"openpi-client cannot be installed here: {made.stderr[-300:]}")
    return python


@pytest.mark.slow
@pytest.mark.parametrize("key", [None, KEY])
def test_the_real_client(start: Start, backbone: VLA, openpi_python: str, key: str | None) -> None:
    server = start(metadata={"model": "tiny"}, key=key).server
    port, said = tap(server.host, server.port)
    script = Path(__file__).with_name("openpi_robot.py")
    run = subprocess.run(
        [openpi_python, script, f"ws://127.0.0.1:{port}", *([key] if key else [])],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout)
    assert told["metadata"]["model"] == "tiny"
    assert "observation/image" in told["complaint"]
    assert told["after"][1] == len(told["answers"][0]["actions"][0])
    for answer, action in zip(told["answers"], expected(backbone), strict=True):
        np.testing.assert_array_equal(np.float32(answer["actions"]), action)
        assert answer["dtype"] == "<f4"
        assert answer["server_timing"]["infer_ms"] > 0
    if key and os.environ.get("LAC_RECORD"):
        TRANSCRIPT.write_bytes(b"".join(said))
