"""Episode records: the lines of a run's ``episodes.jsonl``, one per (method, episode)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from lac_vla.errors import InputError
from lac_vla.files import cut_unfinished, read_lines
from lac_vla.results.metrics import METRICS
from lac_vla.results.realtime import RealTime

Trial: TypeAlias = tuple[str, int, int, int, str, str]
"""Suite, task, initial state, seed, stress and clock: episodes of two methods with the same trial are a pair."""

WHOLE = "observation_to_action"
"""The latency window of a whole call of the model."""

LARGEST = 1e18
"""The largest number that a record may hold."""

RENAMED = {"passes": "decode_passes"}
"""Keys of earlier logs → their metrics."""


@dataclass(frozen=True)
class EpisodeRecord:
    """One episode of one method.

    Attributes:
        method: Name of the method, e.g. ``dense`` or ``motion-0.5``.
        suite: Task suite.
        task: Number of the task in the suite.
        instruction: The task, in words.
        init_state: Number of the initial state.
        seed: Seed of the session's generator.
        success: Whether the task was solved within the horizon.
        steps: World steps taken.
        horizon: World steps allowed.
        stress: Name of the stress that disturbed the episode; empty for none.
        actions_per_call: Actions of the model's chunk that are executed per call, at least 1.
        ensemble: Chunks of the model that every action is an average of, at least 1; 1 where it was not recorded.
        metrics: Name of a metric, see :mod:`lac_vla.results.metrics` → one value per call, or ``None``.
        latency_ms: Window or stage → milliseconds, one value per call.
        reuse: Camera → share of its tokens, over all layers, that was not computed, one value per call.
        adaptive: Whether the policy chose its ratio for every frame.
        peak_memory_mb: Largest memory of the process, or of the accelerator, in MB.
        video: Path within the run's folder, or ``None``.
        outcome: Whatever else the benchmark records of an episode; JSON-serialisable.
        failure: Path of the picture of an episode that was not solved, within the run's folder, or ``None``.
        realtime: What it tells of a world that did not wait; ``None`` of one that stood still while the policy thought.
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
    actions_per_call: int = 1
    ensemble: int = 1
    metrics: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    latency_ms: Mapping[str, Sequence[float]] = field(default_factory=dict)
    reuse: Mapping[str, Sequence[float]] = field(default_factory=dict)
    adaptive: bool = False
    peak_memory_mb: float | None = None
    video: str | None = None
    failure: str | None = None
    outcome: Mapping[str, Any] = field(default_factory=dict)
    realtime: RealTime | None = None

    @property
    def trial(self) -> Trial:
        """Identify what this episode shares with the same episode of another method."""
        return (self.suite, self.task, self.init_state, self.seed, self.stress, self.clock)

    @property
    def clock(self) -> str:
        """Name the world's clock, its mode and deadline, see :class:`RealTime`; empty for a world that waited."""
        return "" if self.realtime is None else self.realtime.label

    @property
    def world_s(self) -> float | None:
        """Compute how long the episode lasted in the world, in seconds; ``None`` for a world that waited."""
        return None if self.realtime is None else self.steps / self.realtime.control_hz

    @property
    def total_ms(self) -> float | None:
        """Sum the window :data:`WHOLE` over all calls of the model, in milliseconds.

        This is all the computation that the episode waited for. An episode that reuse makes longer has more calls,
        and so counts for more; the time of the world's own steps, and of a network, is not in it. ``None`` if the
        window was not recorded.
        """
        spent = self.latency_ms.get(WHOLE)
        return sum(spent) if spent else None

    @property
    def duration_ms(self) -> float | None:
        """Give what net speed-up compares: the world's time if it did not wait, else :attr:`total_ms`."""
        return self.total_ms if self.world_s is None else 1e3 * self.world_s

    def to_json(self) -> dict[str, Any]:
        """Give the line of ``episodes.jsonl``: metrics stand beside the other keys."""
        line = dataclasses.asdict(self)
        metrics: dict[str, Any] = line.pop("metrics")
        return line | metrics

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> EpisodeRecord:
        """Read a line; keys that are neither fields nor metrics are left aside.

        Raises:
            InputError: If a key is missing, or holds what it cannot.
        """
        if not isinstance(line, Mapping):
            raise InputError("an episode record is a JSON object")
        line = {RENAMED.get(key, key): value for key, value in line.items()}
        known = {name: line[name] for name in cls.__dataclass_fields__ if name in line}
        known["metrics"] = {name: line[name] for name in METRICS if line.get(name)}
        missing = [
            f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is MISSING and f.name not in known
        ]
        wrong = [name for name, value in known.items() if not _KINDS[name](value)]
        if missing or wrong:
            raise InputError(
                f"an episode record lacks {', '.join(missing)}"
                if missing
                else f"an episode record cannot hold that {wrong}"
            )
        if known.get("realtime") is not None:
            known["realtime"] = RealTime.from_json(known["realtime"])
        return cls(**known)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and not any("\ud800" <= sign <= "\udfff" for sign in value)


def _is_whole(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_amount(value: object) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and 0 <= value <= LARGEST


def _is_series(value: object) -> bool:
    """Tell whether it is name → one amount, or ``None``, per call."""
    return isinstance(value, dict) and all(
        isinstance(values, list | tuple) and all(each is None or _is_amount(each) for each in values)
        for values in value.values()
    )


_KINDS: Mapping[str, Callable[[object], bool]] = {
    **dict.fromkeys(("method", "suite", "instruction", "stress"), _is_text),
    **dict.fromkeys(("task", "init_state", "seed", "steps", "horizon"), _is_whole),
    "metrics": _is_series,
    **dict.fromkeys(
        ("latency_ms", "reuse"),
        lambda value: _is_series(value) and all(None not in values for values in value.values()),  # type: ignore[attr-defined]
    ),
    **dict.fromkeys(("video", "failure"), lambda value: value is None or _is_text(value)),
    "actions_per_call": lambda value: _is_whole(value) and value != 0,
    "ensemble": lambda value: _is_whole(value) and value != 0,
    **dict.fromkeys(("success", "adaptive"), lambda value: isinstance(value, bool)),
    "peak_memory_mb": lambda value: value is None or _is_amount(value),
    "outcome": lambda value: isinstance(value, dict),
    "realtime": lambda value: value is None or isinstance(value, dict),
}
"""Field → whether a line may hold a value there."""


def read_episodes(path: str | Path) -> list[EpisodeRecord]:
    """Read ``episodes.jsonl``, in its order. A last line without its end, left by a killed run, is not counted.

    Raises:
        InputError: If the file is missing, another line is damaged, or an episode stands there twice.
    """
    records: list[EpisodeRecord] = []
    known: set[tuple[str, Trial]] = set()
    for number, record in read_lines(Path(path), "lac eval", EpisodeRecord.from_json):
        if (record.method, record.trial) in known:
            raise InputError(f"{path}, line {number}: this episode stands there twice; take one away")
        known.add((record.method, record.trial))
        records.append(record)
    return records


def latencies(episodes: Iterable[EpisodeRecord], method: str, window: str) -> list[float]:
    """List the milliseconds of a window in all calls of a method."""
    return [ms for e in episodes if e.method == method for ms in e.latency_ms.get(window, ())]


def finished(path: Path, stress: str = "", clock: str = "") -> set[tuple[str, int, int]]:
    """List the (method, task, initial state) of a run's log; half a last line, left by a killed run, is cut off.

    Raises:
        InputError: If the log is damaged, see :func:`read_episodes`, or holds an episode of another stress or clock.
    """
    if not path.exists():
        return set()
    cut_unfinished(path)
    records = read_episodes(path)
    if any(record.stress != stress for record in records):  # older logs have "" for every stress
        raise InputError(f"{path} holds episodes that are not marked {stress!r}, of an older version: another --out")
    if any(record.clock != clock for record in records):
        raise InputError(
            f"{path} holds episodes of another clock than {clock or 'that of a waiting world'!r}: another --out"
        )
    return {(record.method, record.task, record.init_state) for record in records}
