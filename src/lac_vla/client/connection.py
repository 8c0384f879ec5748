"""Connections to a policy server, synchronous and asyncio; openpi's own client works as well."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

from lac_vla.client.wire import REFUSED, pack, unpack
from lac_vla.errors import InputError, LacError, MissingExtraError

try:
    from websockets.asyncio.client import connect as connect_async
    from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus
    from websockets.sync.client import connect
except ModuleNotFoundError as error:
    raise MissingExtraError("serve", "Talking to a server") from error

_LARGEST = 2**26
_GOING = (1001, 1006, 1012, 1013)
"""Codes of a server that goes away or is full."""
_PAUSE_S = 0.05
"""Seconds between two tries to connect again."""
_LOG = logging.getLogger("lac_vla.client")


class ServerError(LacError):
    """The server refused, failed or hung up; the message says which."""


class LostError(ServerError):
    """The connection was lost, or the server has no room: another one, or this one later, may serve."""


class RefusedError(ServerError):
    """`lac serve` cannot use what it was sent, and takes the next observation of the same session."""


class _Connection:
    """A session's side of the protocol, however its messages travel.

    Attributes:
        metadata: The server's description of itself.
        reconnects: How often a lost connection was replaced. The new session began dense, with its first observation.
    """

    metadata: dict[str, Any]
    _ws: Any
    _fresh = False

    def __init__(self, url: str, api_key: str | None, timeout: float, reconnect_s: float) -> None:
        if not (timeout > 0 and reconnect_s >= 0):
            raise InputError(f"timeout is {timeout}, reconnect_s {reconnect_s}: give seconds above 0, and at least 0")
        self.url, self.reconnects = url, 0
        self._key, self._timeout, self._reconnect_s = api_key, timeout, reconnect_s

    def reset(self) -> None:
        """Begin a new episode with the next observation."""
        self._fresh = True

    def _request(self, observation: dict[str, Any]) -> bytes:
        return pack(observation | {"reset": True} if self._fresh else observation)

    def _passes(self, error: ServerError, end: float) -> bool:
        """Tell that the connection is to be replaced; raise the error if it is not."""
        if not isinstance(error, LostError) or time.monotonic() + _PAUSE_S > end:
            raise error
        return True

    def _replaced(self, before: dict[str, Any]) -> None:
        """Take note of a new connection.

        Raises:
            ServerError: If its server is another one than the last, but for its name.
        """
        changed = sorted(
            key for key in {*before, *self.metadata} - {"session"} if before.get(key) != self.metadata.get(key)
        )
        if changed:
            raise ServerError(f"the connection was lost, and the server there now has another {', '.join(changed)}")
        self.reconnects += 1
        _LOG.warning("connected to %s again; the new session begins dense", self.url)


class Client(_Connection, AbstractContextManager["Client"]):
    """A connection to a policy server, which is one session. A context manager.

    Args:
        url: ``ws://host:port``, or ``wss://…``.
        api_key: The server's key, if it has one.
        timeout: Seconds to wait for every answer.
        reconnect_s: Seconds for which a lost connection is replaced by a new one within :meth:`infer`: the observation
            is sent again, and begins a new session. 0 for not at all.

    Raises:
        ServerError: If there is no such server, or it refuses.
    """

    def __init__(self, url: str, api_key: str | None = None, timeout: float = 60.0, reconnect_s: float = 0.0) -> None:
        super().__init__(url, api_key, timeout, reconnect_s)
        self._open()

    def infer(self, observation: dict[str, Any]) -> dict[str, Any]:
        """Send an observation, and return ``actions`` with the server's report of them.

        Raises:
            RefusedError: If the server cannot use the observation.
            ServerError: If the server cannot answer for another reason. The connection is closed then.
        """
        request, end, lost = self._request(observation), time.monotonic() + self._reconnect_s, False
        while True:
            try:
                if lost:
                    before = self.metadata
                    self._open()
                    self._replaced(before)
                    lost, request = False, pack(observation)
                with _faults("the server hung up"):
                    self._ws.send(request)
                    answer = _read(self._ws.recv(self._timeout))
            except RefusedError:
                raise
            except ServerError as error:
                with suppress(Exception):
                    self._ws.close()
                lost = self._passes(error, end)
                time.sleep(_PAUSE_S)
                continue
            self._fresh = False
            return answer

    def close(self) -> None:
        """End the session."""
        self._ws.close()

    def __exit__(self, *_: object) -> None:
        """End the session."""
        self.close()

    def _open(self) -> None:
        with _faults(f"no session at {self.url}"):
            self._ws = connect(self.url, **_options(self._key)).__enter__()
            self.metadata = _read(self._ws.recv(self._timeout))


class AsyncClient(_Connection):
    """A connection for asyncio, otherwise a :class:`Client`: ``client = await AsyncClient.connect(url)``."""

    @classmethod
    async def connect(
        cls, url: str, api_key: str | None = None, timeout: float = 60.0, reconnect_s: float = 0.0
    ) -> AsyncClient:
        """Connect, see :class:`Client`."""
        client = cls(url, api_key, timeout, reconnect_s)
        await client._open()
        return client

    async def infer(self, observation: dict[str, Any]) -> dict[str, Any]:
        """Send an observation, see :meth:`Client.infer`."""
        request, end, lost = self._request(observation), time.monotonic() + self._reconnect_s, False
        while True:
            try:
                if lost:
                    before = self.metadata
                    await self._open()
                    self._replaced(before)
                    lost, request = False, pack(observation)
                with _faults("the server hung up"):
                    await self._ws.send(request)
                    answer = _read(await asyncio.wait_for(self._ws.recv(), self._timeout))
            except RefusedError:
                raise
            except ServerError as error:
                with suppress(Exception):
                    await self._ws.close()
                lost = self._passes(error, end)
                await asyncio.sleep(_PAUSE_S)
                continue
            self._fresh = False
            return answer

    async def close(self) -> None:
        """End the session."""
        await self._ws.close()

    async def _open(self) -> None:
        with _faults(f"no session at {self.url}"):
            self._ws = await connect_async(self.url, **_options(self._key))
            self.metadata = _read(await asyncio.wait_for(self._ws.recv(), self._timeout))


def _options(api_key: str | None) -> dict[str, Any]:
    headers = None if api_key is None else {"Authorization": f"Api-Key {api_key}"}
    return {"additional_headers": headers, "compression": None, "max_size": _LARGEST}


@contextmanager
def _faults(what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, asyncio.TimeoutError, InvalidHandshake, ConnectionClosed) as error:
        raise (LostError if _passing(error) else ServerError)(f"{what}: {_why(error):.500}") from error


def _why(error: Exception) -> str:
    """Say what went wrong, in the server's words if it sent any."""
    body = (error.response.body or b"").decode(errors="replace").strip() if isinstance(error, InvalidStatus) else ""
    return f"{error}: {body}" if body else str(error)


def _passing(error: Exception) -> bool:
    """Tell whether it may be better elsewhere, or in a moment: what was sent is not at fault."""
    if isinstance(error, InvalidStatus):
        return error.response.status_code in (502, 503, 504)
    if isinstance(error, ConnectionClosed):
        return error.rcvd is None or error.rcvd.code in _GOING
    return True


def _read(message: str | bytes) -> dict[str, Any]:
    if isinstance(message, str):
        raise (RefusedError if message.startswith(REFUSED) else ServerError)(f"the server answered: {message:.500}")
    try:
        return unpack(message, _LARGEST)
    except InputError as error:
        raise ServerError(f"the server's answer cannot be read: {error}") from error
