"""The server over real sockets: the protocol, isolation, refusals, shutdown."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import socket
import ssl
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, ConnectionClosedError, InvalidStatus
from websockets.sync.client import connect

from lac_vla import VLA, CachedVLA, Decision, Dense, InputError, Motion, PolicyInput, random_vla
from lac_vla.client.connection import AsyncClient, Client, RefusedError, ServerError
from lac_vla.client.wire import pack, unpack
from lac_vla.models.cogact.config import TINY_COGACT
from lac_vla.policies import FastV
from lac_vla.serving.batches import Batcher, Request
from lac_vla.serving.metrics import JsonLines
from lac_vla.serving.server import Limits, PolicyServer
from lac_vla.serving.sessions import SessionOptions
from tests.serving.conftest import KEYS, Running, observation

Start = Callable[..., Running]
KEY = "a-key-of-some-length"


def get(url: str, **headers: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def expected(backbone: VLA, seeds: list[int], prompt: str = "pick up the bowl") -> list[Any]:
    """What a session of the library answers to the same observations."""
    session = CachedVLA(backbone, Motion(0.5)).session()
    return [session.act(KEYS.frame(observation(seed, prompt))) for seed in seeds]


def test_answers_are_those_of_the_library(start: Start, backbone: VLA) -> None:
    with Client(start(metadata={"model": "tiny"}).url) as client:
        assert client.metadata["model"] == "tiny"
        for i, action in enumerate(expected(backbone, [0, 1, 2])):
            answer = client.infer(observation(i))
            assert answer["actions"].shape == (1, 7)
            np.testing.assert_array_equal(answer["actions"][0], action)
            assert answer["server_timing"]["infer_ms"] > 0
            assert ("prev_total_ms" in answer["server_timing"]) == (i > 0)
            report = answer["lac"]
            assert report["ratio"] == (0 if i == 0 else 0.5)
            assert report["dense_reason"] == ("first frame" if i == 0 else None)
            assert report["oldest_age"] <= i
            assert set(report["stages"]) >= {"prefill", "flow", "policy"}


@pytest.mark.parametrize(("asked", "answered"), [(0, 16), (3, 3), (16, 16)])
def test_an_answer_holds_the_first_actions_of_the_chunk(start: Start, asked: int, answered: int) -> None:
    vla = CachedVLA(random_vla(TINY_COGACT, seed=1), Motion(0.5))
    session = vla.session(5)
    with Client(start(vla, session_options=SessionOptions(actions_per_call=asked), seed=5).url) as client:
        for i in range(2):
            actions = client.infer(observation(i))["actions"]
            assert actions.shape == (answered, 7)
            np.testing.assert_array_equal(actions, session.act(KEYS.frame(observation(i)))[:answered])


def test_an_answer_cannot_hold_more_than_the_chunk(backbone: VLA, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(backbone), "horizon", 1, raising=False)
    PolicyServer(CachedVLA(backbone), KEYS, SessionOptions(actions_per_call=1))
    with pytest.raises(InputError, match="actions_per_call is 2; the model answers with 1 "):
        PolicyServer(CachedVLA(backbone), KEYS, SessionOptions(actions_per_call=2))


def test_the_asynchronous_client_is_the_same(start: Start, backbone: VLA) -> None:
    async def drive(url: str) -> list[Any]:
        client = await AsyncClient.connect(url)
        answers = [(await client.infer(observation(i)))["actions"][0] for i in range(2)]
        client.reset()
        again = await client.infer(observation(0))
        assert again["lac"]["reset"] == "reset"
        await client.close()
        return answers

    np.testing.assert_array_equal(asyncio.run(drive(start().url)), expected(backbone, [0, 1]))


def test_sessions_do_not_mix(start: Start, backbone: VLA) -> None:
    server = start()
    with Client(server.url) as one, Client(server.url) as other:
        assert one.metadata["session"] != other.metadata["session"]
        mine = [[], []]
        for i in range(4):
            mine[0].append(one.infer(observation(i))["actions"][0])
            mine[1].append(other.infer(observation(50 + i, "open the drawer"))["actions"][0])
    assert not np.array_equal(mine[0], mine[1])
    np.testing.assert_array_equal(mine[0], expected(backbone, [0, 1, 2, 3]))
    np.testing.assert_array_equal(mine[1], expected(backbone, [50, 51, 52, 53], "open the drawer"))


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        (b"garbage", "protocol"),
        (b"", "protocol"),
        (pack({"prompt": "go"}), "no .*observation/image"),
        (pack(observation() | {"prompt": "  "}), "instruction is empty"),
        (pack(observation() | {"prompt": "x" * 2000}), "at most 1000 characters"),
        (pack(observation() | {"observation/image": np.zeros((4, 4, 3))}), "uint8"),
        (pack(observation() | {"observation/image": np.zeros((4, 4000, 3), np.uint8)}), "2048 pixels"),
        (pack(observation() | {"observation/state": np.array([np.nan])}), "NaN"),
        (pack(observation() | {"seed": -1}), "seed"),
        (pack(observation() | {"episode_id": [1]}), "episode_id"),
        ("text", "binary"),
    ],
)
def test_a_bad_request_is_refused_and_changes_nothing(
    start: Start, backbone: VLA, wrong: str | bytes, complaint: str
) -> None:
    server = start()
    with Client(server.url) as other, connect(server.url, compression=None) as ws:
        other.infer(observation(0))
        ws.recv()
        answers = []
        for number in range(3):
            ws.send(pack(observation(number)))
            answers.append(unpack(ws.recv(timeout=10)))
            ws.send(wrong)
            answer = ws.recv(timeout=10)
            assert isinstance(answer, str)
            assert re.search(complaint, answer)
            assert "Traceback" not in answer
        assert [answer["lac"]["ratio"] for answer in answers] == [0, 0.5, 0.5]
        assert [answer["lac"]["reset"] for answer in answers] == [None] * 3
        np.testing.assert_array_equal([answer["actions"][0] for answer in answers], expected(backbone, [0, 1, 2]))
        assert other.infer(observation(1))["lac"]["ratio"] == 0.5


def test_an_episode_that_a_refused_request_began_is_the_next_ones(start: Start) -> None:
    server = start()
    with connect(server.url, compression=None) as ws:
        ws.recv()
        begins = observation() | {"reset": True}
        for request in (
            observation(),
            begins | {"prev_chunk_left_over": np.zeros((1, 7), np.float32)},
            observation(),
            observation(),
        ):
            ws.send(pack(request))
        answers = [ws.recv(timeout=10) for _ in range(4)]
    assert isinstance(answers[1], str)
    assert [unpack(answers[number])["lac"]["reset"] for number in (0, 2, 3)] == [None, "reset", None]


def test_our_client_says_what_the_server_says_and_goes_on(start: Start) -> None:
    with Client(start().url) as client:
        client.infer(observation(0))
        with pytest.raises(RefusedError, match=r"no .*observation/image"):
            client.infer({"prompt": "go"})
        assert client.infer(observation(1))["lac"]["ratio"] == 0.5


def test_what_fails_behind_the_plan_is_no_refusal(start: Start, backbone: VLA) -> None:
    @dataclass(frozen=True)
    class Wrong(Dense):
        def decide(self, inputs: PolicyInput) -> Decision:
            return Decision.dense(3, inputs.n_layers)

    with Client(start(CachedVLA(backbone, Wrong())).url) as client:
        client.infer(observation(0))
        with pytest.raises(ServerError, match="decided about 3 tokens") as error:
            client.infer(observation(1) | {"reset": False})
        assert not isinstance(error.value, RefusedError)
        with pytest.raises(ConnectionClosed):
            client._ws.recv(timeout=10)


def test_an_internal_error_tells_no_internals(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start()

    def broken(*_: object) -> None:
        raise RuntimeError("secret")

    with Client(server.url) as one, Client(server.url) as other:
        other.infer(observation(0))
        with monkeypatch.context() as patch:
            patch.setattr("lac_vla.serving.sessions.RobotSession.plan", broken)
            with pytest.raises(ServerError, match="internal error") as error:
                one.infer(observation())
            assert not isinstance(error.value, RefusedError)  # it is over: what drives the robot has to stop
            with pytest.raises(ConnectionClosed):
                one._ws.recv(timeout=10)
        assert "secret" not in str(error.value)
        assert other.infer(observation(1))["lac"]["ratio"] == 0.5


def test_an_oversized_message_is_not_read(start: Start) -> None:
    server = start(limits=Limits(message=2**15))
    with connect(server.url, compression=None) as ws:
        ws.recv()
        ws.send(bytes(2**17))
        with pytest.raises(ConnectionClosedError) as closed:
            ws.recv(timeout=10)
        assert closed.value.rcvd.code == 1009
    with Client(server.url) as client:
        client.infer(observation(0))


def test_only_the_key_opens(start: Start) -> None:
    server = start(key=KEY)
    for wrong in (None, "x", KEY + "x", KEY[:-1]):
        with pytest.raises(ServerError, match="401"):
            Client(server.url, wrong)
    with Client(server.url, KEY) as client:
        client.infer(observation())
    assert get(server.http + "/healthz") == (200, "OK\n")
    assert get(server.http + "/metrics")[0] == 401
    code, metrics = get(server.http + "/metrics", Authorization=f"Api-Key {KEY}")
    assert code == 200
    assert 'lac_rejected_connections_total{reason="wrong key"} 5.0' in metrics


def test_web_pages_are_refused(start: Start) -> None:
    with pytest.raises(InvalidStatus, match="403"):
        connect(start().url, origin="https://example.org")  # type: ignore[arg-type]


def test_no_more_sessions_than_allowed(start: Start) -> None:
    server = start(limits=Limits(sessions=2))
    with Client(server.url) as one, Client(server.url) as two:
        with pytest.raises(ServerError, match="503"):
            Client(server.url)
        one.infer(observation())
        two.infer(observation())
        two.close()
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and len(server.server._robots) > 1:
            time.sleep(0.02)
        with Client(server.url) as three:
            three.infer(observation())


def test_a_fast_client_is_slowed_down(start: Start) -> None:
    with Client(start(limits=Limits(rate_hz=20)).url) as client:
        client.infer(observation())
        begin = time.perf_counter()
        for i in range(4):
            client.infer(observation(i))
        assert time.perf_counter() - begin > 3 / 20


def test_a_greedy_client_does_not_starve_others(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    server, batches = start(max_batch=1), []
    answer = Batcher.answer

    def watched(batcher: Batcher, batch: Sequence[Request], waiting: Collection[Request] = (), *rest: Any) -> Any:
        end = time.monotonic() + 20
        while not batches and server.server._executor.waiting < 2 and time.monotonic() < end:
            time.sleep(0.005)  # the first answer takes until the other asks, too
        batches.append(({request.robot for request in batch}, {request.robot for request in waiting}))
        return answer(batcher, batch, waiting, *rest)

    monkeypatch.setattr(Batcher, "answer", watched)
    with connect(server.url, compression=None) as greedy:
        greedy.recv()
        [often] = server.server._robots.values()
        with Client(server.url) as modest:
            data = pack(observation())
            flood = threading.Thread(target=lambda: [greedy.send(data) for _ in range(60)])
            flood.start()
            for i in range(5):
                modest.infer(observation(i))
            for _ in range(60):
                greedy.recv(timeout=30)
            flood.join()
    assert len(batches) == 60 + 5
    assert often not in batches[1][0]
    for (_, waited), (answered, _) in pairwise(batches):
        assert waited - {often} <= answered  # turn by turn


def test_a_client_that_dies_in_mid_request(start: Start) -> None:
    server = start()
    with Client(server.url) as other:
        for _ in range(3):
            ws = connect(server.url, compression=None).__enter__()
            ws.recv()
            ws.send(pack(observation()))
            ws.socket.shutdown(socket.SHUT_RDWR)
            ws.close()
        for i in range(3):
            other.infer(observation(i))
        deadline = time.monotonic() + 10
        while len(server.server._robots) > 1 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(server.server._robots) == 1


def test_shutdown_answers_what_was_taken(start: Start, backbone: VLA, monkeypatch: pytest.MonkeyPatch) -> None:
    started = threading.Event()
    slow = backbone.vision.project

    def project(features: Any) -> Any:
        started.set()
        time.sleep(0.5)
        return slow(features)

    server = start(CachedVLA(backbone, Dense()))
    with Client(server.url) as busy, Client(server.url) as idle:
        answers: list[dict[str, Any]] = []
        with monkeypatch.context() as patch:
            patch.setattr(backbone.vision, "project", project)
            asking = threading.Thread(target=lambda: answers.append(busy.infer(observation())))
            asking.start()
            assert started.wait(10)
            server.stop()
            asking.join(10)
        assert len(answers) == 1
        for client in (busy, idle):
            with pytest.raises(ServerError, match="1001"):
                client.infer(observation())
    with pytest.raises(ServerError, match="no session"):
        Client(server.url)


def test_the_event_loop_stays_free(start: Start, backbone: VLA, monkeypatch: pytest.MonkeyPatch) -> None:
    server, started, go = start(), threading.Event(), threading.Event()
    slow = backbone.vision.project

    def project(features: Any) -> Any:
        started.set()
        assert go.wait(60)
        return slow(features)

    with Client(server.url) as client, monkeypatch.context() as patch:
        patch.setattr(backbone.vision, "project", project)
        asking = threading.Thread(target=client.infer, args=(observation(),))
        asking.start()
        assert started.wait(10)
        assert get(server.http + "/healthz") == (200, "OK\n")
        go.set()
        asking.join()


def test_metrics_count_what_happened(start: Start) -> None:
    server = start()
    with Client(server.url) as client:
        for i in range(3):
            client.infer(observation(i))
        client.infer(observation(0, "open the drawer"))
        text = get(server.http + "/metrics")[1]
    assert 'lac_requests_total{outcome="answered"} 4.0' in text
    assert 'lac_dense_frames_total{reason="first frame"} 2.0' in text
    assert 'lac_resets_total{reason="new instruction"} 1.0' in text
    assert "lac_sessions 1.0" in text
    assert "lac_request_seconds_count 4.0" in text
    assert 'lac_stage_seconds_total{stage="prefill"}' in text


def test_what_a_policy_prunes_has_no_age(start: Start, backbone: VLA) -> None:
    server = start(CachedVLA(backbone, FastV()))
    with Client(server.url) as client:
        ages = [client.infer(observation(i))["lac"]["oldest_age"] for i in range(3)]
        text = get(server.http + "/metrics")[1]
    assert ages == [0, None, None]
    assert "lac_oldest_age_frames_count 1.0" in text


def test_logs_are_json_lines(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "lac_vla.serving"), Client(start().url) as client:
        name = client.metadata["session"]
        with pytest.raises(ServerError):
            client.infer({})
        client.close()
        end = time.monotonic() + 10
        while time.monotonic() < end and not any("session closed" in record.getMessage() for record in caplog.records):
            time.sleep(0.01)
    lines = [json.loads(JsonLines().format(r)) for r in caplog.records if r.name == "lac_vla.serving"]
    events = {line["event"]: line for line in lines if line.get("session") == name}
    assert set(events) >= {"session opened", "request refused", "session closed"}
    assert "observation/image" in events["request refused"]["reason"]


def test_tls(start: Start, tmp_path: Path) -> None:
    from lac_vla.serving.auth import tls_context

    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    )
    try:
        subprocess.run([*command.split(), "-keyout", key, "-out", cert], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no openssl here to make a certificate")
    server = start(tls=tls_context(cert, key))
    assert server.url.startswith("wss://")
    with connect(server.url, ssl=ssl.create_default_context(cafile=str(cert)), compression=None) as ws:
        ws.recv()
        ws.send(pack(observation()))
        assert "actions" in unpack(ws.recv())
    with pytest.raises(ServerError, match="certificate"):
        Client(server.url)


def test_the_world_needs_a_key(backbone: VLA) -> None:
    with pytest.raises(ValueError, match="reachable from other machines"):
        PolicyServer(CachedVLA(backbone), KEYS, host="0.0.0.0")
