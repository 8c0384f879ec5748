"""A process is killed, by SIGKILL, at the n-th thing that it does to the disk for good."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch

LOCKS = ("lock", ".lock")
CHANGES = ("fsync", "replace", "unlink", "rmdir", "truncate")
PATIENCE = 300.0
"""Seconds that a process may take, on a busy machine."""
DIED = 77
"""How a process ends that failed, in place of being killed."""


class Kill:
    """Counts changes; ``at`` is the number of the one before which the process dies, ``None`` for never."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.done = at, 0

    def __call__(self, change: Callable[..., Any]) -> Callable[..., Any]:
        """Make a change one that is counted."""

        def counted(*args: Any, **options: Any) -> Any:
            if args and Path(str(args[0])).name in LOCKS:
                return change(*args, **options)  # which the system lets go of with the process
            if self.done == self.at:
                os.kill(os.getpid(), signal.SIGKILL)
            self.done += 1
            return change(*args, **options)

        return counted


@contextlib.contextmanager
def counted(*more: tuple[Any, str], at: int | None = None) -> Iterator[Kill]:
    """Count ``os``'s changes, and ``more`` functions: (owner, name); the process dies before number ``at``."""
    kill = Kill(at)
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (*((os, name) for name in CHANGES), *more):
            patch.setattr(owner, name, kill(getattr(owner, name)))
        yield kill


def run_killed(at: int, run: Callable[[], object], *more: tuple[Any, str]) -> bool:
    """Run something in a process of its own that is killed at a change, and tell whether it was.

    Nothing of Python runs any more then: no ``finally`` and no buffer that is written at the end.

    Args:
        at: Number of the change before which it dies.
        run: What it does.
        more: Further changes, see :func:`counted`.

    Raises:
        AssertionError: If it failed in another way.
    """
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # the parent's threads are not the child's
        cv2.setNumThreads(0)
        try:
            with counted(*more, at=at):
                run()
        except BaseException:
            os._exit(DIED)
        os._exit(0)
    until = time.monotonic() + PATIENCE
    while (found := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise AssertionError(f"the process that was to be killed at change {at} hangs")
        time.sleep(0.005)
    if os.WIFSIGNALED(found[1]):
        assert os.WTERMSIG(found[1]) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(found[1]) == 0, f"it failed before change {at}"
    return False


def files(folder: Path) -> dict[str, bytes]:
    """All files that count."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in LOCKS and not path.name.endswith(".partial")
    }
