"""A process is killed at the n-th thing that it does to the disk for good; from then on it does nothing more."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

LOCKS = ("lock", ".lock")
CHANGES = ("fsync", "replace", "unlink", "rmdir")


class Killed(BaseException):
    """The process ends here."""


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
                raise Killed
            self.done += 1
            return change(*args, **options)

        return counted


@contextlib.contextmanager
def killed_at(at: int | None, *more: tuple[Any, str]) -> Iterator[Kill]:
    """Count ``os``'s changes, and ``more`` functions: (owner, name)."""
    kill = Kill(at)
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (*((os, name) for name in CHANGES), *more):
            patch.setattr(owner, name, kill(getattr(owner, name)))
        with contextlib.suppress(Killed):
            yield kill


def files(folder: Path) -> dict[str, bytes]:
    """All files that count."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in LOCKS and not path.name.endswith(".partial")
    }
