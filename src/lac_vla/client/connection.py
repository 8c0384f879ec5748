"""Connections to a policy server, synchronous and asyncio; openpi's own client works as well."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from lac_vla.client.wire import pack, unpack
from lac_vla.errors import InputError, LacError, MissingExtraError

try:
    from websockets.asyncio.client import connect as connect_async
    from websockets.exceptions import ConnectionClosed, InvalidHandshake
    from websockets.sync.client import connect
except ModuleNotFoundError as error:
    raise MissingExtraError("serve", "Talking to a server") from error

_LARGEST = 2**26


class ServerError(LacError):
    """The server refused, failed or hung up; the message says which."""


class _Connection:
    """A session's side of the protocol, however its messages travel."""

    metadata: dict[str, Any]
    _fresh = False

    def reset(self) -> None:
        """Begin a new episode with the next observation."""
        self._fresh = True

    def _request(self, observation: dict[str, Any]) -> bytes:
        return pack(observation | {"reset": True} if self._fresh else observation)


class Client(_Connection, AbstractContextManager["Client"]):
    """A connection to a policy server, which is one session. A context manager.

    Args:
        url: ``ws://host:port``, or ``wss://…``.
        api_key: The server's key, if it has one.
        timeout: Seconds to wait for every answer.

    Attributes:
        metadata: The server's description of itself.

    Raises:
        ServerError: If there is no such server, or it refuses.
    """

    def __init__(self, url: str, api_key: str | None = None, timeout: float = 60.0) -> None:
        self._timeout = timeout
        with _faults(f"no session at {url}"):
            self._ws = connect(url, **_options(api_key)).__enter__()
            self.metadata = _read(self._ws.recv(timeout))

    def infer(self, observation: dict[str, Any]) -> dict[str, Any]:
        """Send an observation, and return ``actions`` with the server's report of them.

        Raises:
            ServerError: If the server cannot answer. The connection is closed then.
        """
        request = self._request(observation)
        with _faults("the server hung up"):
            self._ws.send(request)
            answer = _read(self._ws.recv(self._timeout))
        self._fresh = False
        return answer

    def close(self) -> None:
        """End the session."""
        self._ws.close()

    def __exit__(self, *_: object) -> None:
        """End the session."""
        self.close()


class AsyncClient(_Connection):
    """A connection for asyncio, otherwise a :class:`Client`: ``client = await AsyncClient.connect(url)``."""

    def __init__(self, ws: Any, metadata: dict[str, Any]) -> None:
        self._ws, self.metadata = ws, metadata

    @classmethod
    async def connect(cls, url: str, api_key: str | None = None) -> AsyncClient:
        """Connect, see :class:`Client`."""
        with _faults(f"no session at {url}"):
            ws = await connect_async(url, **_options(api_key))
            return cls(ws, _read(await ws.recv()))

    async def infer(self, observation: dict[str, Any]) -> dict[str, Any]:
        """Send an observation, see :meth:`Client.infer`."""
        request = self._request(observation)
        with _faults("the server hung up"):
            await self._ws.send(request)
            answer = _read(await self._ws.recv())
        self._fresh = False
        return answer

    async def close(self) -> None:
        """End the session."""
        await self._ws.close()


def _options(api_key: str | None) -> dict[str, Any]:
    headers = None if api_key is None else {"Authorization": f"Api-Key {api_key}"}
    return {"additional_headers": headers, "compression": None, "max_size": _LARGEST}


@contextmanager
def _faults(what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, InvalidHandshake, ConnectionClosed) as error:
        raise ServerError(f"{what}: {error!s:.500}") from error


def _read(message: str | bytes) -> dict[str, Any]:
    if isinstance(message, str):
        raise ServerError(f"the server answered: {message:.500}")
    try:
        return unpack(message, _LARGEST)
    except InputError as error:
        raise ServerError(f"the server's answer cannot be read: {error}") from error
