"""The errors a user can act on. Every message says what is wrong and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


class LacError(Exception):
    """Base class of every error that this package raises on purpose. They can be sent between processes."""

    def __reduce__(self) -> tuple[Any, ...]:
        # By default an error is made again of its message, which not every constructor takes.
        return _rebuild, (type(self), self.args), self.__dict__


def _rebuild(kind: type[LacError], arguments: tuple[Any, ...]) -> LacError:
    error = kind.__new__(kind)
    error.args = arguments
    return error


class InputError(LacError, ValueError):
    """An observation, action or argument that cannot be used; where it is raised says what has changed, if anything."""


class CheckpointError(LacError, ValueError):
    """A checkpoint or policy folder that is missing, truncated, or of another model."""


class DatasetError(LacError, ValueError):
    """A dataset that is missing, incomplete, damaged or of another version, or data that fits none."""


class NonFiniteError(LacError, ArithmeticError):
    """The model computed NaN or infinity, and gives no action: stop the robot. The next frame is computed in full."""


class DeviceMemoryError(LacError, MemoryError):
    """The GPU's memory is full, and there is no action. Sessions go on: their next frame is computed in full."""


class MissingExtraError(LacError, ImportError):
    """An optional dependency is needed for what was asked.

    Args:
        extra: Name of the extra in ``pyproject.toml``.
        what: What needs it, as the subject of a sentence.
    """

    def __init__(self, extra: str, what: str) -> None:
        super().__init__(f'{what} needs the optional dependencies "{extra}": pip install "lac-vla[{extra}]"')


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """Ask for the known name that a wrong one comes closest to, e.g. `` (did you mean 'motion'?)``; or say nothing."""
    names = list(known)
    turned = [name for name in names if sorted(name) == sorted(given)]  # letters in the wrong order
    close = turned or get_close_matches(given, names, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
