"""The record of an episode tells of a world that did not wait for the policy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lac_vla.checks import is_text
from lac_vla.errors import InputError


@dataclass(frozen=True)
class RealTime:
    """The world's clock in one episode; its ticks are control steps, counted from 0.

    Attributes:
        clock: What said how long an answer takes: a device, the name of a table's file, ``100 ms``, or ``wall``.
        mode: What the robot did meanwhile: ``hold``, ``chunk``, ``async`` or ``rtc``.
        control_hz: Ticks per second.
        observed: Per call of the model: tick of its observation, rising.
        acted: Per call: first tick at which its answer could act; ``None`` if the episode ended before.
        answer_ms: Per call: time from observation to answer, in the world's milliseconds.
        predicted_ms: Per call on the wall clock: what this machine's table says of it; empty without one.
        held: Ticks with a null action: no answer was there to act.
        stale: Ticks driven by an answer to an observation that was older than one tick.
        deadline_ms: What the policy was held to; ``None`` for no deadline.
        table: The latency table that the answers' times come from; empty if they come from none.
    """

    clock: str
    mode: str
    control_hz: float
    observed: Sequence[int]
    acted: Sequence[int | None]
    answer_ms: Sequence[float]
    predicted_ms: Sequence[float] = ()
    held: int = 0
    stale: int = 0
    deadline_ms: float | None = None
    table: str = ""

    @property
    def label(self) -> str:
        """Name clock, mode and deadline in one text: what episodes must have in common to be a pair."""
        return clock_label(self.clock, self.mode, self.deadline_ms)

    @property
    def answers(self) -> int:
        """Count the answers that acted."""
        return sum(tick is not None for tick in self.acted)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> RealTime:
        """Read what ``dataclasses.asdict`` wrote.

        Raises:
            InputError: If a key is missing, or holds what it cannot.
        """
        known = {name: found[name] for name in cls.__dataclass_fields__ if name in found}
        wrong = [name for name, fits in _KINDS.items() if name in known and not fits(known[name])]
        lacking = [name for name in list(cls.__dataclass_fields__)[:6] if name not in known]
        if wrong or lacking:
            raise InputError(f"the real time of an episode record lacks {lacking}, or cannot hold its {wrong}")
        if not len(known["observed"]) == len(known["acted"]) == len(known["answer_ms"]):
            raise InputError("the real time of an episode record does not tell the same number of calls everywhere")
        return cls(**known)


def clock_label(clock: str, mode: str, deadline_ms: float | None = None) -> str:
    """Name a clock with its mode and deadline, e.g. ``rtx4090, hold`` or ``100 ms, async, 80 ms deadline``."""
    return ", ".join([clock, mode, *([] if deadline_ms is None else [f"{deadline_ms:g} ms deadline"])])


def delay(milliseconds: float, control_hz: float) -> int:
    """Count the ticks from an observation to the first one at or after its answer: d = ceil(latency / dt)."""
    return max(0, math.ceil(milliseconds * control_hz / 1e3 - 1e-9))


def _amount(value: object) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and 0 <= value <= 1e18


def _tick(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _each(fits: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list | tuple) and all(map(fits, value))


_KINDS: Mapping[str, Callable[[object], bool]] = {
    "clock": is_text,
    "table": is_text,
    "mode": lambda value: value in ("hold", "chunk", "async", "rtc"),
    "control_hz": lambda value: _amount(value) and value != 0,
    "observed": _each(_tick),
    "acted": _each(lambda value: value is None or _tick(value)),
    "answer_ms": _each(_amount),
    "predicted_ms": _each(_amount),
    "held": _tick,
    "stale": _tick,
    "deadline_ms": lambda value: value is None or _amount(value),
}
"""Field → whether a record may hold a value there."""
