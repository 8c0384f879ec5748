"""The listening socket: connections that do not say what they want make room for those that do."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
from typing import Any

MOST = 64
"""Connections before their handshake, at most; fewer where the process may have few files open."""


def open_doors(host: str, port: int) -> list[Door]:
    """Listen on every address of ``host``; port 0 is any free one, the same on all of them.

    Raises:
        OSError: If one cannot be listened on.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    doors: list[Door] = []
    try:
        for family, kind, protocol, _, address in dict.fromkeys(found):
            door = Door(family, kind, protocol)
            doors.append(door)
            if os.name == "posix":
                door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                door.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            door.bind((address[0], port, *address[2:]))
            port = door.getsockname()[1]
            door.setblocking(False)
    except OSError:
        for door in doors:
            door.close()
        raise
    return doors


class Door(socket.socket):
    """A listening socket that knows the connections before their handshake.

    When there are too many, the oldest is hung up on: a robot shakes hands within milliseconds, so whoever keeps
    connections open without a word gets in nobody's way. When the process has too many files open, a connection is
    taken and dropped, rather than tried again and again.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.dropped = 0
        self._strangers: list[socket.socket] = []
        self._leaving: list[socket.socket] = []
        self._most = min(MOST, _open_files() // 8)
        self._spare: int | None = os.open(os.devnull, os.O_RDONLY)

    def accept(self) -> tuple[socket.socket, Any]:
        """Take a connection; see :meth:`socket.socket.accept`."""
        self._leaving = [stranger for stranger in self._leaving if stranger.fileno() >= 0]
        self._strangers = [stranger for stranger in self._strangers if stranger.fileno() >= 0]
        if self._leaving:
            raise BlockingIOError(errno.EAGAIN, "connections are being closed")
        if len(self._strangers) >= self._most:
            self._hang_up(self._strangers.pop(0))
            raise BlockingIOError(errno.EAGAIN, "too many connections before their handshake")
        try:
            stranger, address = super().accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._turn_away()
                raise ConnectionAbortedError(errno.ECONNABORTED, "too many open files") from error
            raise
        self._strangers.append(stranger)
        return stranger, address

    def admit(self, descriptor: int) -> None:
        """Let a connection stay: its handshake is done."""
        self._strangers = [stranger for stranger in self._strangers if stranger.fileno() != descriptor]

    def shut(self) -> None:
        """Hang up on all who have not said what they want."""
        for stranger in self._strangers:
            self._hang_up(stranger)

    def close(self) -> None:
        """Stop listening; see :meth:`socket.socket.close`."""
        super().close()
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None

    def _hang_up(self, stranger: socket.socket) -> None:
        self.dropped += 1
        self._leaving.append(stranger)
        with contextlib.suppress(OSError):  # it has gone already
            stranger.shutdown(socket.SHUT_RDWR)  # whose transport sees the end, and closes it

    def _turn_away(self) -> None:
        """Use the spare descriptor to take a connection off the queue, where it would be offered again at once."""
        self.dropped += 1
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None
        with contextlib.suppress(OSError):
            super().accept()[0].close()
        with contextlib.suppress(OSError):
            self._spare = os.open(os.devnull, os.O_RDONLY)


def _open_files() -> int:
    """Return the number of files that this process may have open."""
    if sys.platform == "win32":
        return 512
    import resource

    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 2**20 if limit == resource.RLIM_INFINITY else limit
