"""Connections to a policy server, synchronous and asyncio; openpi's own client works as well."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from lac_vla.client.wire import pack, unpack
from lac_vla.errors import LacError, MissingExtraError

try:
    from websockets.asyncio.client import connect as connect_async
    from websockets.exceptions import ConnectionClosed, InvalidHandshake
    from websockets.sync.client import connect
except ModuleNotFoundError as error:
    raise MissingExtraError("serve", "Talking to a server") from error

_LARGEST = 2**26


class ServerError(LacError):
    """The server refused, failed or hung up; the message says which."""


class Client:
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
        self._timeout, self._fresh = timeout, False
        try:
            self._ws = connect(url, **_options(api_key)).__enter__()
            self.metadata = _read(self._ws.recv(timeout))
        except (OSError, InvalidHandshake, ConnectionClosed) as error:
            raise ServerError(f"no session at {url}: {error}") from error

    def infer(self, observation: dict[str, Any]) -> dict[str, Any]:
        """Send an observation, and return ``actions`` with the server's report of them.

        Raises:
            ServerError: If the server cannot answer. The connection is closed then.
        """
        request = pack(observation | {"reset": True} if self._fresh else observation)
        try:
            self._ws.send(request)
            answer = _read(self._ws.recv(self._timeout))
        except (OSError, ConnectionClosed) as error:
            raise ServerError(f"the server hung up: {error}") from error
        self._fresh = False
        return answer

    def reset(self) -> None:
        """Begin a new episode with the next observation."""
        self._fresh = True

    def close(self) -> None:
        """End the session."""
        self._ws.close()

    def __enter__(self) -> Client:
        """Return the client itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the session."""
        self.close()


class AsyncClient:
    """A connection for asyncio, otherwise a :class:`Client`: ``client = await AsyncClient.connect(url)``."""

    def __init__(self, ws: Any, metadata: dict[str, Any]) -> None:
        self._ws, self.metadata, self._fresh = ws, metadata, False

    @classmethod
    async def connect(cls, url: str, api_key: str | None = None) -> AsyncClient:
        """Connect, see :class:`Client`."""
        try:
            ws = await connect_async(url, **_options(api_key))
            return cls(ws, _read(await ws.recv()))
        except (OSError, InvalidHandshake, ConnectionClosed) as error:
            raise ServerError(f"no session at {url}: {error}") from error

    async def infer(self, observation: dict[str, Any]) -> dict[str, Any]:
        """Send an observation, see :meth:`Client.infer`."""
        request = pack(observation | {"reset": True} if self._fresh else observation)
        try:
            await self._ws.send(request)
            answer = _read(await self._ws.recv())
        except (OSError, ConnectionClosed) as error:
            raise ServerError(f"the server hung up: {error}") from error
        self._fresh = False
        return answer

    def reset(self) -> None:
        """Begin a new episode with the next observation."""
        self._fresh = True

    async def close(self) -> None:
        """End the session."""
        await self._ws.close()


def _options(api_key: str | None) -> dict[str, Any]:
    headers = None if api_key is None else {"Authorization": f"Api-Key {api_key}"}
    return {"additional_headers": headers, "compression": None, "max_size": _LARGEST}


def _read(message: str | bytes) -> dict[str, Any]:
    if isinstance(message, str):
        raise ServerError(f"the server answered: {message}")
    return unpack(message, _LARGEST)
