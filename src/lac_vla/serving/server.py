"""The server: every connection is a session; the model runs in a thread of its own, never in the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from lac_vla.client import wire
from lac_vla.client.observation import ObservationKeys
from lac_vla.engine.budget import frames_of_age
from lac_vla.errors import InputError, LacError, MissingExtraError
from lac_vla.factory import CachedVLA
from lac_vla.realtime.deadline import DeadlineController, LatencyTable
from lac_vla.serving.auth import allowed, browser_allowed, check_exposure, names_this_machine, repeated_header
from lac_vla.serving.batches import Batcher
from lac_vla.serving.door import Door, open_doors
from lac_vla.serving.executor import ModelExecutor
from lac_vla.serving.kv_memory import KVMemory
from lac_vla.serving.metrics import Metrics, log
from lac_vla.serving.sessions import RefusedRequestError, RobotSession, SessionOptions, refusing

if TYPE_CHECKING:  # both need extras that serving does not
    from lac_vla.serving.record import Recorder
    from lac_vla.serving.view import View

try:
    from websockets.asyncio.server import Server, ServerConnection, serve
    from websockets.exceptions import ConnectionClosed
    from websockets.http11 import Request, Response
except ModuleNotFoundError as error:
    raise MissingExtraError("serve", "Serving") from error


TOO_BIG = 1009
"""Code with which a connection is closed whose message is larger than is read."""
FOREIGN = "without an API key this is shown to localhost and 127.0.0.1 alone; give the server a key"


@dataclass(frozen=True)
class Limits:
    """Limits on what clients may ask of the server.

    Attributes:
        sessions: Connections at a time, at most.
        rate_hz: Requests per second and session; a faster client is read more slowly.
        message: Bytes of a request, at most.
        open_s: Seconds that a client may take to shake hands.
        send_s: Seconds that a client may take to read an answer.
        idle_s: Seconds without a request after which a session ends.
    """

    sessions: int = 32
    rate_hz: float = 200.0
    message: int = wire.MAX_MESSAGE
    open_s: float = 5.0
    send_s: float = 10.0
    idle_s: float = 1800.0


class _Connection(ServerConnection):
    """A connection that says what to do about a message that is too large: websockets tells numbers alone."""

    def __init__(self, limit: int, protocol: Any, *args: Any, **options: Any) -> None:
        super().__init__(protocol, *args, **options)
        fail = protocol.fail
        advice = f"a message has more than {limit / 2**20:g} MB: send smaller images, or serve with --max-message-mb"
        protocol.fail = lambda code, reason="": fail(code, advice if code == TOO_BIG else reason)


@dataclass
class PolicyServer:
    """Serves one model to many robots. An async context manager, from listening to shut down.

    Attributes:
        vla: Model and policy.
        keys: Where requests hold what the model needs.
        session_options: Options of all sessions.
        controller: Keeps the deadline; ``None`` if there is none.
        table: Latencies, for slack refresh.
        metadata: Metadata that clients get when they connect, beside the session's name.
        host: Address to listen on.
        port: Port to listen on; 0 for any free one, which it then names.
        key: The API key.
        tls: TLS settings, for ``wss://``.
        limits: Limits of every client.
        metrics: Prometheus metrics.
        recorder: Records the sessions; ``None`` if nothing is recorded.
        view: Whether there is a live page for the operator.
        seed: Seed of every session.
        max_batch: Requests that are answered together, at most; 1 for one at a time.
        batch_window_ms: Milliseconds that a request waits for others to join it.
        memory: Budget of keys and values; ``None`` for none.

    Raises:
        InputError: If the address needs a key and there is none, an answer cannot hold that many actions, or no batch
            is possible.
    """

    vla: CachedVLA
    keys: ObservationKeys
    session_options: SessionOptions = field(default_factory=SessionOptions)
    controller: DeadlineController | None = None
    table: LatencyTable | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    host: str = "127.0.0.1"
    port: int = 0
    key: str | None = None
    tls: ssl.SSLContext | None = None
    limits: Limits = field(default_factory=Limits)
    metrics: Metrics = field(default_factory=Metrics)
    recorder: Recorder | None = None
    view: bool = False
    seed: int = 0
    max_batch: int = 8
    batch_window_ms: float = 0.0
    memory: KVMemory | None = None

    def __post_init__(self) -> None:
        check_exposure(self.host, self.key)
        wanted = self.session_options.actions_per_call
        if wanted > (horizon := self.vla.model.horizon):
            raise InputError(f"actions_per_call is {wanted}; the model answers with {horizon} actions at most")
        max_batch = self.max_batch
        if self.memory is not None:
            self.metrics.memory_limit.set(self.memory.nbytes)
            max_batch = min(max_batch, self.memory.robots)
        batcher = Batcher(self.vla.engine, self.controller, max_batch, self.memory)
        self._executor = ModelExecutor(batcher, self.limits.sessions, self.batch_window_ms / 1e3)
        self._robots: dict[ServerConnection, RobotSession] = {}
        self._busy: set[ServerConnection] = set()
        self._draining = self._stopping = False
        self._doors: list[Door] = []
        self._servers: list[Server] = []
        self._view: View | None = None
        if self.view:
            from lac_vla.serving.view import View

            deadline = None if self.controller is None else self.controller.deadline_ms
            max_frames = frames_of_age(self.vla.max_age, self.session_options.actions_per_call or 1)
            self._view = View(self.metadata, max_frames, deadline)

    @property
    def url(self) -> str:
        """The address on which it listens."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'ws' if self.tls is None else 'wss'}://{host}:{self.port}"

    async def __aenter__(self) -> PolicyServer:
        """Start to listen.

        Raises:
            InputError: If the address cannot be listened on.
        """
        try:
            self._doors = open_doors(self.host, self.port)
            for door in self._doors:
                self._servers.append(await serve(
                    self._serve, sock=door, ssl=self.tls, compression=None,
                    origins=[None],  # robots are no browsers: no web page may talk to a server on its reader's machine
                    process_request=self._admit, max_size=self.limits.message, write_limit=2**16, server_header=None,
                    max_queue=1,  # what a client sends ahead waits in its own socket
                    open_timeout=self.limits.open_s, create_connection=partial(_Connection, self.limits.message),  # type: ignore[arg-type]
                    logger=logging.getLogger("lac_vla.serving.websockets"),
                ))  # fmt: skip
        except OSError as error:
            raise InputError(f"cannot listen on {self.host}:{self.port} ({error}); choose another --port") from error
        self.port = self._doors[0].getsockname()[1]
        log("listening", url=self.url, **self.metadata)
        return self

    async def drain(self, seconds: float) -> None:
        """Take no more robots, and go on with those that are there until they have left, or time is up."""
        self._draining, end = True, time.monotonic() + seconds
        log("draining", sessions=len(self._robots), seconds=seconds)
        while self._robots and time.monotonic() < end:
            await asyncio.sleep(min(0.1, seconds))

    async def __aexit__(self, *_: object) -> None:
        """Take nothing more, answer what was taken, and stop."""
        self._stopping = True
        for server in self._servers:
            server.close(close_connections=False)
        for door in self._doors:
            door.shut()
        await asyncio.gather(*(ws.close(1001, "stopping") for ws in self._robots if ws not in self._busy))
        for server in self._servers:
            await server.wait_closed()
        await self._executor.close()
        if self.recorder is not None:
            await asyncio.to_thread(self.recorder.close)
        log("stopped")

    async def _admit(self, ws: ServerConnection, request: Request) -> Response | None:
        """Answer plain requests, and refuse connections that may not be."""
        path = request.path.partition("?")[0]
        if repeated := repeated_header([name for name, _ in request.headers.raw_items()]):
            return self._refuse(ws, HTTPStatus.BAD_REQUEST, "repeated header", f"send one header {repeated}")
        if path == "/healthz":
            return ws.respond(HTTPStatus.OK, "OK\n")
        if path == "/readyz":  # whether another robot is welcome, for whoever shares them out
            full = self._full()
            return ws.respond(HTTPStatus.SERVICE_UNAVAILABLE if full else HTTPStatus.OK, f"{full or 'ready'}\n")
        if path == "/view" or path.startswith("/view/"):
            return await self._show(ws, request)
        if not allowed(request.headers.get("Authorization"), self.key):
            return self._refuse(ws, HTTPStatus.UNAUTHORIZED, "wrong key", "send the header Authorization: Api-Key KEY")
        if path == "/metrics":
            if self._foreign(request):
                return self._refuse(ws, HTTPStatus.FORBIDDEN, "foreign name", FOREIGN)
            self.metrics.sessions.set(len(self._robots))
            self.metrics.hung_up.set(sum(door.dropped for door in self._doors))
            self.metrics.waiting.set(self._executor.waiting)
            self.metrics.memory.set(sum(robot.nbytes for robot in self._robots.values()))
            self.metrics.evicted.set(0 if self.memory is None else self.memory.evictions)
            return ws.respond(HTTPStatus.OK, self.metrics.text().decode())
        if full := self._full():
            return self._refuse(ws, HTTPStatus.SERVICE_UNAVAILABLE, full.partition(":")[0], full)
        return None

    def _full(self) -> str:
        """Tell why another robot cannot be served; empty if it can."""
        if self._draining or self._stopping:
            return "draining: the server stops soon"
        if len(self._robots) >= self.limits.sessions:
            return "full: all sessions are taken, try later"
        now, gap_s = time.perf_counter(), self.session_options.gap_s
        working = sum(ws in self._busy or now - robot.answered <= gap_s for ws, robot in self._robots.items())
        if self.memory is not None and working >= self.memory.robots:
            return f"full: the memory of keys and values is taken by {working} robots at work; try later"
        return ""

    async def _show(self, ws: ServerConnection, request: Request) -> Response:
        """Answer the operator's browser."""
        if self._view is None:
            return ws.respond(HTTPStatus.NOT_FOUND, "the live page is off: start the server with --view\n")
        if self._foreign(request):
            return self._refuse(ws, HTTPStatus.FORBIDDEN, "foreign name", FOREIGN)
        shown = request.headers.get("Authorization")
        if not browser_allowed(shown, self.key):
            text = "log in with any user name, and the server's API key as the password"
            refusal = self._refuse(ws, HTTPStatus.UNAUTHORIZED, "wrong key" if shown else "no key", text)
            refusal.headers["WWW-Authenticate"] = 'Basic realm="lac view", charset="UTF-8"'
            return refusal
        return await self._view.respond(request)

    def _foreign(self, request: Request) -> bool:
        """Tell whether a page elsewhere may have asked, by a name of its own that points here."""
        return self.key is None and not names_this_machine(request.headers.get("Host"))

    def _refuse(self, ws: ServerConnection, status: HTTPStatus, reason: str, text: str) -> Response:
        self.metrics.rejected.labels(reason).inc()
        log("refused", level=logging.WARNING, reason=reason, peer=ws.remote_address)
        return ws.respond(status, text + "\n")

    async def _serve(self, ws: ServerConnection) -> None:
        """Serve one connection, from metadata to the end."""
        if full := self._full():  # several were admitted at the same moment
            await ws.close(1013, full)
            return
        for door in self._doors:
            door.admit(ws.transport.get_extra_info("socket").fileno())
        robot = RobotSession(self.vla, self.keys, self.session_options, self.controller, self.table, self.seed)
        name = uuid.uuid4().hex
        self._robots[ws] = robot
        self._executor.join(robot)
        log("session opened", session=name, peer=ws.remote_address)
        observers = [observer for observer in (self.recorder, self._view) if observer is not None]
        for observer in observers:
            observer.begin(name, ws.remote_address)
        reason = "closed by the client"
        try:
            await self._send(ws, {**self.metadata, "session": name})
            await self._answer_all(ws, robot, name, observers)
        except ConnectionClosed as closed:
            if closed.sent is not None and closed.sent.code == TOO_BIG:
                reason = closed.sent.reason
        except asyncio.TimeoutError:
            reason = "timed out"
            await ws.close(1001, "timed out")
        except LacError as error:
            reason = f"{error!s:.300}"
            self.metrics.requests.labels("refused").inc()
            await self._fail(ws, reason)
        except Exception:
            reason = "internal error"
            self.metrics.requests.labels("failed").inc()
            log(reason, level=logging.ERROR, exc_info=True, session=name)
            await self._fail(ws, f"internal error; the server's log tells more about session {name}")
        finally:
            self._busy.discard(ws)
            self._robots.pop(ws, None)
            self._executor.leave(robot)
            for observer in observers:
                observer.end(name, reason)
            log("session closed", session=name, reason=reason)

    async def _answer_all(
        self, ws: ServerConnection, robot: RobotSession, name: str, observers: Sequence[Recorder | View]
    ) -> None:
        """Answer one request after the other until somebody hangs up; one that cannot be used is refused."""
        total, not_before, complaint = None, 0.0, ""
        while not self._stopping:
            await asyncio.sleep(max(0.0, not_before - time.perf_counter()))
            data = await asyncio.wait_for(ws.recv(), self.limits.idle_s)
            self._busy.add(ws)
            arrived = time.perf_counter()
            not_before = arrived + 1 / self.limits.rate_hz
            try:
                with refusing():
                    if isinstance(data, str):
                        raise InputError("requests are binary messages of openpi's protocol, not text")
                    request = wire.unpack(data, self.limits.message, self.keys.wanted)
                answer = await self._executor.answer(robot, request, arrived)
            except RefusedRequestError as error:
                said, complaint = complaint, f"{error!s:.300}"  # it may quote what the client sent
                self.metrics.requests.labels("refused").inc()
                if complaint != said:
                    log("request refused", level=logging.WARNING, reason=complaint, session=name)
                if self._view is not None:
                    self._view.refuse(name, complaint)
                text = wire.REFUSED + complaint  # at a text, openpi's client raises
                await asyncio.wait_for(ws.send(text), self.limits.send_s)
                self._busy.discard(ws)
                continue
            complaint = ""
            if total is not None:
                answer.message["server_timing"]["prev_total_ms"] = total
            if self.recorder is not None and answer.reset is None and (lost := self.recorder.lost(name)):
                answer.message["lac"]["not_recorded"] = lost
            await self._send(ws, answer.message)
            total = 1e3 * (time.perf_counter() - arrived)
            self.metrics.count(answer, total / 1e3)
            for observer in observers:
                observer.add(name, answer, arrived, total)
            self._busy.discard(ws)
            if (job := robot.spare()) is not None:
                self._executor.offer(job)
        await ws.close(1001, "stopping")

    async def _send(self, ws: ServerConnection, message: dict[str, Any]) -> None:
        await asyncio.wait_for(ws.send(wire.pack(message)), self.limits.send_s)

    async def _fail(self, ws: ServerConnection, text: str) -> None:
        """Say what is wrong as openpi's server does: send a text and close the connection."""
        with contextlib.suppress(ConnectionClosed, asyncio.TimeoutError):
            await asyncio.wait_for(ws.send(text), self.limits.send_s)
            await ws.close(1011, "error")
