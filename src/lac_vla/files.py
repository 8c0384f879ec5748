"""The one place where files are read and written: read within bounds and with one kind of error, written whole."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout  # which torch needs, too
from safetensors import SafetensorError

from lac_vla.errors import InputError, LacError

T = TypeVar("T")

MAX_BYTES = 2**28
"""The longest log that is read."""
MAX_OBJECT = 2**26
"""The longest JSON file: what a text of so many bytes becomes takes some ten times as many."""
POINTER = b"version https://git-lfs"
PAGE = (b"<!doctype", b"<html", b"<?xml")


def write_whole(path: Path, content: str | bytes | Callable[[Path], object]) -> None:
    """Write a file so that nobody, after whatever kill, finds anything but the whole old content or the whole new one.

    What is equal already is not written again. The folder is made if need be.

    Args:
        path: The file.
        content: Text or bytes; or a function that writes the file at the path that it is given.

    Raises:
        OSError: If the disk fails; the old content is still there.
    """
    if isinstance(content, str):
        content = content.encode()
    if isinstance(content, bytes) and path.is_file() and path.read_bytes() == content:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    try:
        if isinstance(content, bytes):
            partial.write_bytes(content)
        else:
            content(partial)
        sync(partial)
    except (RuntimeError, SafetensorError) as error:  # torch's and safetensors' ways to say that the disk is full
        partial.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written: {error}") from error
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    os.replace(partial, path)
    sync(path.parent)


def write_object(path: Path, content: Any) -> None:
    """Write plain data as JSON, see :func:`write_whole`."""
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def sync(path: Path) -> None:
    """Have the disk hold a file's content, or a folder's names."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def reading(path: Path, advice: str, kind: type[LacError] = InputError) -> Iterator[None]:
    """Turn whatever a damaged file makes a library raise into one error that names the file and says what to do.

    Args:
        path: The file that is read.
        advice: What to do about it, as a command: "copy it again".
        kind: Class of the error.
    """
    try:
        yield
    except LacError:
        raise
    except Exception as error:
        raise kind(fault(path, error, advice)) from error


def fault(path: Path, error: object, advice: str) -> str:
    """Say what is wrong with a file that could not be read; what it is, where that can be told."""
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    try:
        with path.open("rb") as file:
            begin = _begin(file.read(256))
    except OSError as missing:
        reason = "it is a folder" if os.path.isdir(path) else (missing.strerror or str(missing)).lower()
    else:
        if begin.startswith(POINTER):
            return (
                f"{path} is a Git LFS pointer, not the file itself: run 'git lfs install' and 'git lfs pull' in the "
                "folder that was cloned, or fetch it with 'hf download'"
            )
        if begin.startswith(PAGE):
            return (
                f"{path} is an HTML page, not the file itself: the server answered with an error or a login; fetch it "
                "with 'hf download', logged in if need be"
            )
        reason = reason if begin else "it is empty"
    return f"{path} cannot be read ({reason}): {advice}"


def parse_json(text: str | bytes) -> Any:
    """Parse JSON.

    Raises:
        ValueError: If it is none, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_object(path: Path, advice: str, kind: type[LacError] = InputError) -> dict[str, Any]:
    """Read a file that holds one JSON object; ``advice`` and ``kind`` are those of :func:`reading`.

    Raises:
        LacError: Of that kind, if it cannot be read, or holds something else.
    """
    with reading(path, advice, kind):
        found = parse_json(_text(path, MAX_OBJECT))
        if not isinstance(found, dict):
            raise ValueError(f"it holds no JSON object but a {type(found).__name__}")
        return found


def read_lines(path: Path, command: str, parse: Callable[[Any], T]) -> Iterator[tuple[int, T]]:
    """Read a log: number of the line, from 1 on, and what ``parse`` makes of it, whose errors say that it is damaged.

    A last line without its end, left by a killed run, is not counted. Messages name the command that writes the log.

    Raises:
        InputError: If the file cannot be read, or a line is damaged.
    """
    with reading(path, f"give the folder of a run of '{command}'"):
        text = _text(path)
        if _begin(text[:256].encode()).startswith((POINTER, *PAGE)):
            raise ValueError("it is no log")
        whole, _, _ = text.rpartition("\n")
    for number, line in enumerate(whole.split("\n"), start=1):
        if line.strip():
            try:
                value = parse(parse_json(line))
            except (ValueError, AttributeError, KeyError, TypeError) as error:
                raise InputError(f"{path}, line {number}: {error}; take the line away and resume the run") from error
            yield number, value


def cut_unfinished(path: Path) -> None:
    """Take away the last line of a log if it lacks its end, as a killed run leaves it, before anything is appended."""
    content = path.read_bytes() if path.exists() else b""
    if (whole := content.rfind(b"\n") + 1) < len(content):
        os.truncate(path, whole)


def _begin(content: bytes) -> bytes:
    """Leave out what may stand before the words that tell a pointer or a page."""
    return content.lstrip(b"\xef\xbb\xbf \t\r\n").lower()


def _text(path: Path, limit: int = MAX_BYTES) -> str:
    if path.stat().st_size > limit:
        raise ValueError(f"it is longer than {limit >> 20} MB")
    return path.read_text(encoding="utf-8")


@contextmanager
def writing(folder: Path, option: str) -> Iterator[None]:
    """Turn errors of the operating system into one that a user can act on.

    Args:
        folder: Folder that is written to.
        option: The option that names another one.

    Raises:
        InputError: If the operating system refuses something.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write to {folder} ({error}): make room, or give another {option}") from error


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """Make a folder and those above it; what nothing was put into is taken away again.

    Raises:
        OSError: If it cannot be made.
    """
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with suppress(OSError):  # one of them was taken away, or filled, meanwhile
            for path in absent:
                if [*path.iterdir()]:
                    break
                path.rmdir()


@contextmanager
def locked(file: Path, message: str, inner: Sequence[str] = (), *, seconds: float = 0.0) -> Iterator[None]:
    """Hold a lock file, which is left where it is; links to its folder lead to the same lock.

    The folder is made if need be, and taken away again if nothing was put there.

    Args:
        file: The lock.
        message: What to say if another process holds it.
        inner: Names of locks beside it that are held within this one: they count as nothing, too.
        seconds: How long to wait for that process; infinity for as long as it lives.

    Raises:
        InputError: With this message.
    """
    new, ours = not file.parent.exists(), {file, *(file.with_name(name) for name in inner)}
    with made(file.parent):
        lock = FileLock(file.parent.resolve() / file.name, thread_local=False)  # another thread may let go of it
        try:
            lock.acquire(timeout=-1 if math.isinf(seconds) else max(0.0, seconds), poll_interval=0.2)
        except Timeout:
            raise InputError(message) from None
        try:
            yield
        finally:
            lock.release()
            with suppress(OSError):  # it was taken away meanwhile
                if new and {*file.parent.iterdir()} <= ours:
                    for path in ours:
                        path.unlink(missing_ok=True)
