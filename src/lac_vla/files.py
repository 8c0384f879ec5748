"""Files are written whole or not at all, and a folder by one process at a time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from lac_vla.errors import InputError

LOCK = ".lock"


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file, its folder included: whoever reads it, whenever, reads the old content or the new, never half.

    What is equal already is left alone.

    Raises:
        OSError: If the disk fails; the file is as it was.
    """
    data = content.encode("utf-8", "replace") if isinstance(content, str) else content
    with contextlib.suppress(OSError):
        if path.read_bytes() == data:
            return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
        publish(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def publish(partial: Path, path: Path) -> None:
    """Give a finished file its name, once it is on the disk."""
    sync(partial)
    os.replace(partial, path)


def sync(path: Path) -> None:
    """Wait until a file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def append_line(path: Path, line: str) -> None:
    """Append a line to a log, and wait until it is on the disk; one that is cut off has no end, and does not count."""
    with path.open("ab") as file:
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def locked(folder: Path, option: str) -> Iterator[None]:
    """Keep other processes from writing to a folder, by whatever name they know it; it is made if it is not there.

    A folder in which nothing was written is taken away again.

    Args:
        folder: The folder.
        option: The command's option that chooses it, for messages.

    Raises:
        InputError: If another process has it, or it cannot be written.
    """
    from filelock import FileLock, Timeout  # which torch needs, too

    path = folder.resolve() / LOCK
    made = not path.parent.exists()
    lock = FileLock(path, thread_local=False)  # another thread may leave
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout:
        raise InputError(f"another process writes to {folder}: let it end, or give another {option}") from None
    except (OSError, RuntimeError) as error:
        raise InputError(f"cannot write to {folder} ({error}); give another {option}") from error
    try:
        yield
    finally:
        try:
            with contextlib.suppress(OSError):
                if [*path.parent.iterdir()] == [path]:
                    path.unlink()
                    if made:
                        path.parent.rmdir()
        finally:
            lock.release()


def shortened(text: str, most: int = 300) -> str:
    """Cut a text that came from elsewhere, for a log, a page or a message."""
    return text if len(text) <= most else f"{text[: most - 20]}… ({len(text)} characters)"
