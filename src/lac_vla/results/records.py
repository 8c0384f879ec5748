"""Episode records: the lines of a run's ``episodes.jsonl``, one per (method, episode)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from lac_vla.errors import InputError

Trial: TypeAlias = tuple[str, int, int, int, str]
"""What pairs the episodes of two methods: suite, task, initial state, seed, stress."""


@dataclass(frozen=True)
class EpisodeRecord:
    """One episode of one method.

    Attributes:
        method: Name of the method, e.g. ``dense`` or ``motion-0.5``.
        suite: Task suite.
        task: Number of the task in the suite.
        instruction: The task, in words.
        init_state: Number of the initial state.
        seed: Of the session's generator.
        success: Whether the task was solved within the horizon.
        steps: Control steps taken.
        horizon: Control steps allowed.
        stress: What disturbed it; empty for nothing.
        ratio_effective: Per step, the share of (token, layer) pairs that was not computed.
        ratio_nominal: Per step, the cache ratio the policy aimed at; ``None`` where it aims at none.
        oldest_age: Per step, the age of the oldest slot, in frames; ``None`` where the step pruned.
        macs: Per step, multiply-accumulates.
        passes: Per step, decoding passes behind the prefill.
        accepted: Per step, how many of the drafted tokens stood; ``None`` where there was no draft.
        latency_ms: Window or stage → milliseconds per step.
        peak_memory_mb: Of the process, or of the accelerator.
        video: Path within the run's folder, or ``None``.
        failure: Path of the picture of an episode that was not solved, within the run's folder, or ``None``.
    """

    method: str
    suite: str
    task: int
    instruction: str
    init_state: int
    seed: int
    success: bool
    steps: int
    horizon: int
    stress: str = ""
    ratio_effective: Sequence[float] = ()
    ratio_nominal: Sequence[float | None] = ()
    oldest_age: Sequence[int | None] = ()
    macs: Sequence[float] = ()
    passes: Sequence[int] = ()
    accepted: Sequence[int | None] = ()
    latency_ms: Mapping[str, Sequence[float]] = field(default_factory=dict)
    peak_memory_mb: float | None = None
    video: str | None = None
    failure: str | None = None

    @property
    def trial(self) -> Trial:
        """What this episode shares with the same episode of another method."""
        return (self.suite, self.task, self.init_state, self.seed, self.stress)

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> EpisodeRecord:
        """Read a record; keys it does not know are left aside.

        Raises:
            InputError: If a key is missing.
        """
        known = {name: line[name] for name in cls.__dataclass_fields__ if name in line}
        try:
            return cls(**known)
        except TypeError as error:
            fields = dataclasses.fields(cls)
            needed = [field.name for field in fields if field.default is MISSING is field.default_factory]
            lacking = ", ".join(name for name in needed if name not in known)
            raise InputError(f"an episode record lacks {lacking or error}") from error


def read_episodes(path: str | Path) -> list[EpisodeRecord]:
    """Read ``episodes.jsonl``. A last line without its end is what a killed run leaves: it is not counted.

    Args:
        path: The file.

    Returns:
        The episodes in the order of the file.

    Raises:
        InputError: If the file is missing, another line is damaged, or an episode stands there twice.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}): give the folder of a run of 'lac eval'") from error
    records: list[EpisodeRecord] = []
    seen: set[tuple[str, Trial]] = set()
    for number, line in _lines(text):
        try:
            record = EpisodeRecord.from_json(json.loads(line))
        except (json.JSONDecodeError, AttributeError, TypeError, InputError) as error:
            raise InputError(f"{path}, line {number}: {error}; take the line away and resume the run") from error
        if (record.method, record.trial) in seen:
            raise InputError(f"{path}, line {number}: this episode stands there twice; take one away")
        seen.add((record.method, record.trial))
        records.append(record)
    return records


def finished(path: Path, stress: str = "") -> set[tuple[str, int, int]]:
    """Which (method, task, initial state) a run's log holds; half a last line, left by a killed run, is cut off.

    Raises:
        InputError: As :func:`read_episodes` does, or if one is not of this stress.
    """
    if not path.exists():
        return set()
    text = path.read_bytes()
    whole = text.rfind(b"\n") + 1
    if whole < len(text):
        with path.open("r+b") as file:
            file.truncate(whole)
    records = read_episodes(path)
    if any(record.stress != stress for record in records):  # before records said it, those of a stress had ""
        raise InputError(f"{path} holds episodes that are not marked {stress!r}, of an older version: another --out")
    return {(record.method, record.task, record.init_state) for record in records}


def _lines(text: str) -> Iterator[tuple[int, str]]:
    whole, _, _ = text.rpartition("\n")
    for number, line in enumerate(whole.split("\n"), start=1):
        if line.strip():
            yield number, line
