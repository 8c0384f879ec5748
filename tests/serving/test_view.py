"""The operator's live page: who may see it, what its numbers and pictures are, and that a browser shows them."""

from __future__ import annotations

import base64
import http.client
import io
import json
import time
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from lac_vla import VLA, CachedVLA, InputError, Motion, random_vla
from lac_vla.client.connection import Client, ServerError
from lac_vla.drawing.overlay import overlay
from lac_vla.engine.step_info import StepInfo
from lac_vla.models import FAMILIES
from lac_vla.realtime.deadline import DeadlineController, LatencyTable
from lac_vla.serving.auth import browser_allowed, names_this_machine
from lac_vla.serving.browse import open_page, page_address
from lac_vla.serving.server import Limits
from lac_vla.serving.sessions import SessionOptions
from lac_vla.serving.snapshot import EVENTS, HEIGHT, KEPT
from tests.report.pages import Page, needs_browser
from tests.serving.chromium import Tab
from tests.serving.conftest import KEYS, Running, observation

Start = Callable[..., Running]
KEY = "a-key-of-some-length"
METADATA = {"server": "lac-vla", "model": "tiny", "method": "motion-0.5"}


def basic(password: str, user: str = "lac") -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def get(server: Running, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server.port, timeout=20)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, dict(answer.headers), body


def state(server: Running, draw: str = "") -> dict[str, Any]:
    code, _, body = get(server, f"/view/state?draw={draw}")
    assert code == 200
    found: dict[str, Any] = json.loads(body)
    return found


def settled(server: Running, session: str, frames: int) -> dict[str, Any]:
    """The page's numbers for a session once they count an answer that its client has in hand already."""
    end = time.monotonic() + 10
    while True:
        shown = next(s for s in state(server)["sessions"] if s["session"] == session)
        if shown["frames"] >= frames:
            return shown
        assert time.monotonic() < end
        time.sleep(0.01)


def expected(backbone: VLA, seeds: list[int]) -> StepInfo:
    """The last step of a session of the library with the same observations."""
    session = CachedVLA(backbone, Motion(0.5)).session()
    for seed in seeds:
        session.act(KEYS.frame(observation(seed)))
    assert session.last_info is not None
    return session.last_info


def test_off_by_default(start: Start) -> None:
    server = start()
    for path in ("/view", "/view/state", "/view/elsewhere"):
        code, _, body = get(server, path)
        assert code == 404
        assert b"--view" in body
    assert server.server._view is None


@pytest.mark.parametrize(
    ("header", "allowed"),
    [
        (None, False),
        ("", False),
        (f"Api-Key {KEY}", True),
        (f"Api-Key {KEY}x", False),
        (basic(KEY), True),
        (basic(KEY, user=""), True),
        (basic(KEY).replace("Basic", "bAsIc"), True),
        (basic(KEY + ":"), False),
        (basic(KEY[:-1]), False),
        ("Basic " + base64.b64encode(KEY.encode()).decode(), False),  # no user name: no password either
        ("Basic !!", False),
        ("Basic ÿ", False),
        (f"Bearer {KEY}", False),
    ],
)
def test_a_browser_logs_in_with_the_key_as_password(header: str | None, allowed: bool) -> None:
    assert browser_allowed(header, KEY) is allowed
    assert browser_allowed(header, None)


def test_the_page_needs_the_key(start: Start) -> None:
    server = start(view=True, key=KEY)
    with Client(server.url, KEY) as client:
        client.infer(observation())
        pictures = f"/view/state?draw={client.metadata['session']}"
        for path in ("/view", "/view/state", pictures, "/view/nothing"):
            for header in ({}, {"Authorization": basic("wrong")}, {"Authorization": "Api-Key wrong"}):
                code, headers, body = get(server, path, **header)
                assert code == 401
                assert headers["WWW-Authenticate"].startswith("Basic ")
                assert b"API key" in body
        for header in (basic(KEY), f"Api-Key {KEY}"):
            assert get(server, "/view", Authorization=header)[0] == 200
            assert get(server, pictures, Authorization=header)[0] == 200
            assert get(server, "/view", Authorization=header, Host="robot.example")[0] == 200
    # The password is for pages alone.
    assert get(server, "/metrics", Authorization=basic(KEY))[0] == 401
    with pytest.raises(InvalidStatus, match="401"):
        connect(server.url, additional_headers={"Authorization": basic(KEY)})
    metrics = get(server, "/metrics", Authorization=f"Api-Key {KEY}")[2].decode()
    assert 'lac_rejected_connections_total{reason="wrong key"} 10.0' in metrics
    assert 'lac_rejected_connections_total{reason="no key"} 4.0' in metrics


@pytest.mark.parametrize(
    ("host", "here"),
    [
        ("localhost:8000", True),
        ("127.0.0.1", True),
        ("127.8.0.1:80", True),
        ("[::1]:8000", True),
        ("evil.example:8000", False),
        ("localhost.evil.example", False),
        ("127.0.0.1@evil.example", False),
        ("10.0.0.1:8000", False),
        ("[::1", False),
        ("", False),
        (None, False),
    ],
)
def test_names_of_this_machine(host: str | None, here: bool) -> None:
    assert names_this_machine(host) is here


def test_without_a_key_another_name_gets_nothing(start: Start) -> None:
    server = start(view=True)
    for path in ("/view", "/view/state", "/metrics"):
        assert get(server, path)[0] == 200
        code, _, body = get(server, path, Host=f"evil.example:{server.server.port}")
        assert code == 403
        assert b"key" in body


def test_read_only_and_in_no_other_page(start: Start) -> None:
    server = start(view=True)
    for method in ("POST", "PUT", "DELETE", "HEAD", "OPTIONS"):
        code, headers, _ = get(server, "/view/state", method)
        assert code == 405
        assert headers["Allow"] == "GET"
    for path in ("/view", "/view/state", "/view/nothing"):
        headers = get(server, path)[1]
        assert headers["Cache-Control"] == "no-store"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "Access-Control-Allow-Origin" not in headers
    with pytest.raises(InvalidStatus, match="403"):  # the page itself has no business with the robots' protocol
        connect(server.url, origin=server.http)  # type: ignore[arg-type]


def test_the_page_loads_nothing(start: Start) -> None:
    _, headers, body = get(start(view=True), "/view?whatever")
    page = Page(body.decode())
    assert page.addresses == ["data:,"]
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    for word in (
        "http://",
        "https://",
        "@import",
        "url(",
        "innerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
    ):
        assert word not in body.decode()
    assert get(start(view=True), "/view/")[0] == 200


def test_numbers_are_those_of_the_step(start: Start, backbone: VLA) -> None:
    server, step = start(view=True, metadata=METADATA | {"secret": "x"}), expected(backbone, [0, 1, 2])
    with Client(server.url) as client:
        answers = [client.infer(observation(seed)) for seed in (0, 1, 2)]
        shown = settled(server, client.metadata["session"], 3)
        whole = state(server)
    assert {name: whole[name] for name in METADATA} == METADATA
    assert "secret" not in whole
    assert (whole["max_age"], whole["deadline_ms"], whole["closed"]) == (16, None, [])
    assert shown["instruction"] == "pick up the bowl"
    assert shown["peer"].startswith("127.0.0.1:")
    assert (shown["ratio"], shown["nominal_ratio"], shown["oldest_age"]) == (
        step.ratio,
        step.nominal_ratio,
        step.oldest_age,
    )
    assert (shown["tokens"], shown["computed"]) == (step.layout.n_visual, step.active.sum())
    assert shown["recovered"] == step.recovered.sum()
    assert shown["ages"] == np.bincount(step.age, minlength=17).tolist()
    assert shown["ratios"] == [0, 0.5, 0.5]
    took = [a["lac"]["waited_ms"] + a["server_timing"]["infer_ms"] for a in answers]
    np.testing.assert_allclose(shown["latencies_ms"], took, atol=0.006)
    np.testing.assert_allclose([shown["p50_ms"], shown["p95_ms"]], np.quantile(took, [0.5, 0.95]))
    assert shown["stages"] == {name: round(value, 3) for name, value in answers[-1]["lac"]["stages"].items()}
    assert shown["events"] == [{"kind": "fallback", "reason": "first frame", "first": 1, "last": 1}]
    assert [camera["name"] for camera in shown["cameras"]] == ["agentview", "wrist"]
    for camera, grid in zip(shown["cameras"], step.layout.cameras, strict=True):
        assert (camera["tokens"], camera["computed"]) == (grid.size, step.active[grid.tokens].sum())


def test_pictures_are_the_overlay_of_the_same_step(start: Start, backbone: VLA) -> None:
    server, step = start(view=True), expected(backbone, [0, 1])
    with Client(server.url) as client, Client(server.url) as other:
        session = client.metadata["session"]
        assert state(server, session)["sessions"][0]["frames"] == 0  # nothing to draw yet
        for seed in (0, 1):
            client.infer(observation(seed))
            other.infer(observation(seed))
        for each in (client, other):
            settled(server, each.metadata["session"], 2)
        mine, others = (shown["cameras"] for shown in state(server, f"{session},{32 * 'f'},../x,")["sessions"])
    assert [camera["jpeg"] for camera in others] == [None, None]
    drawn = [np.asarray(Image.open(io.BytesIO(base64.b64decode(camera["jpeg"]))), dtype=int) for camera in mine]
    for picture, camera in zip(drawn, step.layout.cameras, strict=True):
        grid, active = (camera.rows, camera.cols), step.active[camera.tokens]
        exact = overlay(step.pixels[camera.name], grid, active, height=HEIGHT)
        assert picture.shape == exact.shape
        assert np.abs(picture - exact).mean() < 8  # of JPEG
    assert drawn[0].shape != drawn[1].shape  # the grids differ: no camera shows another's picture


@pytest.mark.parametrize("path", ["/view/elsewhere", "/view/../metrics", "/view/state/", "/view/" + "x" * 5000])
def test_there_is_nothing_else(start: Start, path: str) -> None:
    assert get(start(view=True), path)[0] == 404


def test_resets_and_fallbacks_with_their_reasons(start: Start, backbone: VLA) -> None:
    server = start(CachedVLA(backbone, Motion(0.5), scene_cut=0.01), view=True)  # every frame is a cut
    with Client(server.url) as client:
        for seed in range(4):
            client.infer(observation(seed))
        client.infer(observation(4, "open the drawer"))
        client.reset()
        client.infer(observation(4, "open the drawer"))
        shown = settled(server, client.metadata["session"], 6)
    assert shown["events"] == [
        {"kind": "reset", "reason": "reset", "first": 6, "last": 6},
        {"kind": "reset", "reason": "new instruction", "first": 5, "last": 5},
        {"kind": "fallback", "reason": "scene cut", "first": 2, "last": 4},
        {"kind": "fallback", "reason": "first frame", "first": 1, "last": 1},
    ]


def test_a_long_session_is_cut_to_its_end(start: Start) -> None:
    server = start(view=True, limits=Limits(rate_hz=1e6))
    with Client(server.url) as client:
        for i in range(KEPT + 3):
            client.infer(observation(i % 3, f"task {i // 4}"))
        shown = settled(server, client.metadata["session"], KEPT + 3)
    assert len(shown["ratios"]) == len(shown["latencies_ms"]) == KEPT
    assert shown["ratios"][-3:] == [0.0, 0.5, 0.5]
    assert [event["first"] for event in shown["events"]] == [1 + 4 * i for i in range(30, 30 - EVENTS, -1)]


def test_late_answers_are_those_behind_the_deadline(start: Start) -> None:
    controller = DeadlineController(1e-3, LatencyTable((8, 64), (1e-4, 2e-4)), 8)
    server = start(view=True, controller=controller)
    with Client(server.url) as client:
        late = [client.infer(observation(seed))["lac"]["late"] for seed in (0, 1, 2)]
        shown = settled(server, client.metadata["session"], 3)
    assert late == [True] * 3
    assert (state(server)["deadline_ms"], shown["late"], shown["token_budget"]) == (1e-3, 3, 8)


def test_who_has_gone_and_why(start: Start) -> None:
    server = start(view=True)
    with Client(server.url) as good, Client(server.url) as bad:
        assert [s["frames"] for s in state(server)["sessions"]] == [0, 0]
        good.infer(observation())
        for _ in range(3):
            with pytest.raises(ServerError):
                bad.infer({"prompt": "go"})
        ((event,),) = [shown["events"] for shown in state(server)["sessions"] if not shown["frames"]]
        assert (event["kind"], event["first"], event["last"]) == ("refused", 1, 3)
        assert "observation/image" in event["reason"]
        bad.close()
        end = time.monotonic() + 10
        while len((shown := state(server))["sessions"]) > 1 and time.monotonic() < end:
            time.sleep(0.01)
        assert [s["session"] for s in shown["sessions"]] == [good.metadata["session"]]
        assert [c["session"] for c in shown["closed"]] == [bad.metadata["session"]]
        assert shown["closed"][0]["reason"] == "closed by the client"
        assert good.infer(observation(1))["lac"]["ratio"] == 0.5


def test_looking_changes_no_action(start: Start, backbone: VLA) -> None:
    server = start(view=True)
    session = CachedVLA(backbone, Motion(0.5)).session()
    with Client(server.url) as client:
        for seed in range(4):
            action = client.infer(observation(seed))["actions"][0]
            np.testing.assert_array_equal(action, session.act(KEYS.frame(observation(seed))))
            state(server, client.metadata["session"])


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("ws://127.0.0.1:8000", "http://127.0.0.1:8000/view"),
        ("wss://robot.example:8000/", "https://robot.example:8000/view"),
        ("localhost:8000", "http://localhost:8000/view"),
        ("https://[::1]:80/view", "https://[::1]:80/view"),
    ],
)
def test_page_addresses(url: str, address: str) -> None:
    assert page_address(url) == address


@pytest.mark.parametrize(
    "url", ["", "ftp://h:1", "ws://h:x", "ws://[::1", "ws://h:1/act", "ws://u:p@h:1", "ws://h:1?k=1"]
)
def test_no_addresses(url: str) -> None:
    with pytest.raises(InputError, match="ws://HOST:PORT"):
        page_address(url)


def test_lac_view_opens_the_page_or_says_what_to_do(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda address: opened.append(address) or len(opened) < 3)
    live, keyed, off = start(view=True), start(view=True, key=KEY), start()
    assert open_page(live.url) == f"live page: {live.http}/view"
    assert open_page(keyed.url).endswith("as the password")
    with pytest.raises(InputError, match=f"no browser here; open {live.http}/view"):
        open_page(live.url)
    with pytest.raises(InputError, match=r"page off.*--view"):
        open_page(off.url)
    off.stop()
    with pytest.raises(InputError, match=r"no server .*lac serve"):
        open_page(off.url)
    assert opened == [f"{live.http}/view", f"{keyed.http}/view", f"{live.http}/view"]


@needs_browser
def test_a_browser_shows_it(start: Start, backbone: VLA, tmp_path: Path) -> None:
    evil = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> & pick up the bowl"
    server = start(view=True, metadata=METADATA)
    with Tab(tmp_path / "profile") as tab:
        tab.open(server.http + "/view")
        tab.wait("document.body.dataset.state === 'empty'")
        assert f"No robot is connected. This page fills as soon as one asks for an action at {server.url}" in tab.text
        assert "Computed now: full colour, blue outline" in tab.text

        with Client(server.url) as one, Client(server.url) as other:
            for seed in range(3):
                one.infer(observation(seed, evil))
            other.infer(observation(9, "open the drawer"))
            card = f"document.querySelector('[data-session=\"{one.metadata['session']}\"]')"

            def text(name: str) -> str:
                return str(tab.evaluate(f"{card}.querySelector('.{name}').textContent"))

            tab.wait("document.querySelectorAll('#sessions article').length === 2")
            tab.wait(f"{card}.querySelector('.who').innerText.includes('3 requests')")
            assert text("ratio").startswith("50 %")
            tab.wait(f"[...{card}.querySelectorAll('img')].every(i => i.complete && i.naturalWidth >= {HEIGHT})")
            assert tab.evaluate(f"{card}.querySelectorAll('img').length") == 2
            assert "2 robots connected" in tab.text
            assert "agentview: reused" in tab.evaluate(f"{card}.querySelector('img').alt")
            assert text("age") == f"{expected(backbone, [0, 1, 2]).oldest_age} frames of at most 16"
            assert "median" in text("latency")
            assert "Latency of the last 3 requests" in tab.evaluate(f"{card}.querySelector('.latencies').ariaLabel")
            assert tab.evaluate(f"{card}.querySelectorAll('.stages rect').length") == 8
            assert "prefill" in text("times")
            assert "ratio, effective: 50.0 %" in text("metrics")
            assert "request 1: computed in full (first frame)" in text("events")
            assert tab.evaluate(f"{card}.querySelector('.instruction').textContent") == evil
            assert tab.evaluate("document.title") == "lac view"
            assert tab.evaluate("document.querySelectorAll('script').length") == 1

            one.infer(observation(5, "open the drawer"))  # the page goes on by itself
            tab.wait(f"{card}.querySelector('.instruction').textContent === 'open the drawer'")
            tab.wait(f"{card}.querySelector('.ratio').innerText.startsWith('0 %')")
        tab.wait("document.querySelectorAll('#sessions article').length === 0")
        assert "closed by the client" in tab.text
        assert tab.errors == []

        server.stop()
        tab.wait("document.body.dataset.state === 'gone'")
        assert "The server does not answer (no connection)" in tab.text


@needs_browser
def test_a_narrow_window_and_a_key(start: Start, tmp_path: Path) -> None:
    server = start(view=True, key=KEY, metadata=METADATA)
    with Client(server.url, KEY) as client, Tab(tmp_path / "profile", width=400) as tab:
        for seed in range(2):
            client.infer(observation(seed, "word" * 100))
        tab.open(f"http://lac:{KEY}@127.0.0.1:{server.server.port}/view")
        tab.wait("document.querySelectorAll('img').length === 2")
        tab.wait("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
        assert tab.evaluate("document.documentElement.scrollWidth") <= 400
        assert tab.errors == []


def test_the_page_gives_ages_in_frames(start: Start) -> None:
    """A robot that executes four actions of a chunk is asked every fourth control step."""
    vla = CachedVLA(random_vla(FAMILIES["cogact"].tiny), Motion(0.5), max_age=16)
    server = start(vla, session_options=SessionOptions(actions_per_call=4), view=True)
    assert state(server)["max_age"] == 4
