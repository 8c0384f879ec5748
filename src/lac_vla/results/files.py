"""Logs of one JSON object per line, and single JSON objects, are read from the folder of a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from lac_vla.errors import InputError
from lac_vla.files import shortened

T = TypeVar("T")
UNREADABLE = (ArithmeticError, AttributeError, LookupError, OSError, RecursionError, TypeError, ValueError)
"""All that reading a damaged or foreign file may raise, :class:`InputError` among it."""


def read_lines(path: Path, command: str, parse: Callable[[Any], T]) -> Iterator[tuple[int, T]]:
    """Read a log: number of the line, from 1 on, and what ``parse`` makes of it, whose errors say that it is damaged.

    A last line without its end, left by a killed run, is not counted. Messages name the command that writes the log.

    Raises:
        InputError: If the file cannot be read, or a line is damaged.
    """
    whole, _, _ = _text(path, command).rpartition("\n")
    for number, line in enumerate(whole.split("\n"), start=1):
        if line.strip():
            try:
                value = parse(json.loads(line))
            except UNREADABLE as error:
                said = shortened(str(error))
                raise InputError(f"{path}, line {number}: {said}; take the line away and resume the run") from error
            yield number, value


def read_object(path: Path, command: str) -> dict[str, Any]:
    """Read a file that holds one JSON object; the message of an error names the command that writes it.

    Raises:
        InputError: If it cannot be read, or holds something else.
    """
    text = _text(path, command)
    try:
        return parse_json(text)
    except UNREADABLE as error:
        said = shortened(str(error))
        raise InputError(f"{path} cannot be read ({said}): resume the run, it writes it again") from error


def parse_json(text: str) -> dict[str, Any]:
    """Parse one JSON object, or raise one of :data:`UNREADABLE`."""
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("it holds no JSON object")
    return found


def _text(path: Path, command: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}): give the folder of a run of '{command}'") from error
