"""The listening socket when the process has no file descriptor left."""

from __future__ import annotations

import os
import resource
import socket

import pytest

from lac_vla.serving.door import open_doors


def test_a_connection_for_which_there_is_no_descriptor_is_dropped_and_the_next_one_taken() -> None:
    [door, *_] = open_doors("127.0.0.1", 0)
    door.listen()
    lines = [socket.create_connection(door.getsockname(), 10) for _ in range(3)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    probe = os.open(os.devnull, os.O_RDONLY)
    os.close(probe)  # the next free number: there is none below it
    resource.setrlimit(resource.RLIMIT_NOFILE, (probe, hard))
    try:
        for _ in range(2):
            with pytest.raises(ConnectionAbortedError, match="too many open files"):
                door.accept()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert door.dropped == 2
    for line in lines[:2]:
        assert line.recv(1) == b"", "it was told, and does not wait"
    taken, _ = door.accept()
    taken.sendall(b"x")
    assert lines[2].recv(1) == b"x"
    for each in (*lines, taken, door):
        each.close()
