"""``lac serve --view``: the operator's live page. It reads what sessions did, and can change nothing.

An answered request costs the server a few references; pictures and numbers are made when a browser asks for them, one
at a time, in a thread that is neither the event loop's nor the model's.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from base64 import b64encode
from collections import deque
from collections.abc import Mapping
from email.utils import formatdate
from functools import cache
from hashlib import sha256
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from websockets.datastructures import Headers
from websockets.http11 import Request, Response

from lac_vla.drawing.overlay import RECOMPUTED, RECOVERED
from lac_vla.drawing.picture import css
from lac_vla.serving.sessions import Answer
from lac_vla.serving.snapshot import SessionSnapshot

CLOSED = 5
"""So many closed sessions are shown."""


class View:
    """The page of one server, which shows some of its metadata. Only the drawing is not done in the event loop.

    Args:
        metadata: The server's.
        max_frames: The age from which on no slot is reused, frames.
        deadline_ms: Of every request; ``None`` for none.
    """

    def __init__(self, metadata: Mapping[str, Any], max_frames: int, deadline_ms: float | None) -> None:
        self._metadata = {name: str(metadata[name]) for name in ("server", "model", "method") if name in metadata}
        self._max_frames, self._deadline_ms = max_frames, deadline_ms
        self._snapshots: dict[str, SessionSnapshot] = {}
        self._closed: deque[dict[str, Any]] = deque(maxlen=CLOSED)
        self._drawing = asyncio.Lock()

    def begin(self, session: str, peer: Any = None) -> None:
        """Show a session, from the robot's connection on."""
        address = f"{peer[0]}:{peer[1]}" if isinstance(peer, tuple) else "unknown"
        self._snapshots[session] = SessionSnapshot(session, address, time.monotonic())

    def add(self, session: str, answer: Answer, arrived: float, took_ms: float) -> None:
        """Show a request that was answered."""
        self._snapshots[session] = self._snapshots[session].after(answer, time.monotonic())

    def refuse(self, session: str, reason: str) -> None:
        """Show that a request could not be used."""
        self._snapshots[session] = self._snapshots[session].refusing(reason)

    def end(self, session: str, reason: str) -> None:
        """Move a session to the closed ones: its robot has gone, or was sent away."""
        gone = self._snapshots.pop(session)
        metadata = {"session": session, "peer": gone.peer, "frames": gone.frames}
        self._closed.appendleft({**metadata, "reason": reason, "at": time.time()})

    async def respond(self, request: Request) -> Response:
        """Answer a browser's request: ``/view`` is the page, ``/view/state?draw=SESSION,SESSION`` its content."""
        path, _, query = request.path.partition("?")
        if getattr(request, "method", "GET") != "GET":  # older releases of websockets take nothing else
            return _response(HTTPStatus.METHOD_NOT_ALLOWED, b"this page can only be read: GET\n", Allow="GET")
        if path in ("/view", "/view/"):
            body, policy = page()
            return _response(HTTPStatus.OK, body, "text/html; charset=utf-8", Content_Security_Policy=policy)
        if path == "/view/state":
            snapshots, closed = list(self._snapshots.values()), list(self._closed)
            drawn = frozenset(",".join(parse_qs(query).get("draw", [])).split(","))
            async with self._drawing:
                body = await asyncio.to_thread(self._state, snapshots, closed, drawn)
            return _response(HTTPStatus.OK, body, "application/json")
        return _response(HTTPStatus.NOT_FOUND, b"there is nothing but /view\n")

    def _state(self, snapshots: list[SessionSnapshot], closed: list[dict[str, Any]], drawn: frozenset[str]) -> bytes:
        now = time.monotonic()
        state = {
            **self._metadata,
            "max_age": self._max_frames,
            "deadline_ms": self._deadline_ms,
            "sessions": [
                snapshot.summary(now, self._max_frames, self._deadline_ms, draw=snapshot.session in drawn)
                for snapshot in snapshots
            ],
            "closed": closed,
        }
        return json.dumps(state).encode()


@cache
def page() -> tuple[bytes, str]:
    """Read the page, and make the policy under which nothing but its own style and script can work."""
    html = Path(__file__).with_name("view.html").read_text(encoding="utf-8")
    html = html.replace("RECOMPUTED", css(RECOMPUTED)).replace("RECOVERED", css(RECOVERED))
    hashes = {}
    for tag in ("style", "script"):
        digests = (sha256(text.encode()).digest() for text in re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL))
        hashes[tag] = " ".join(f"'sha256-{b64encode(digest).decode()}'" for digest in digests)
    policy = (
        f"default-src 'none'; style-src {hashes['style']}; script-src {hashes['script']}; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html.encode(), policy


def _response(status: HTTPStatus, body: bytes, content: str = "text/plain; charset=utf-8", **headers: str) -> Response:
    """Make an answer that no cache keeps and no other site's page can use."""
    lines = {
        "Date": formatdate(usegmt=True),
        "Connection": "close",
        "Content-Length": str(len(body)),
        "Content-Type": content,
        "Cache-Control": "no-store",
        "X-Content-Type-Options": "nosniff",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        **{name.replace("_", "-"): value for name, value in headers.items()},
    }
    return Response(status.value, status.phrase, Headers(lines), body)
