"""The pace of a method in a world that does not wait, and the table of all clocks beside the world that waits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lac_vla.results.realtime import delay
from lac_vla.results.records import EpisodeRecord
from lac_vla.results.stats import Percentiles, percentiles


@dataclass(frozen=True)
class Pace:
    """One method over its episodes in a world that does not wait.

    Attributes:
        clocks: Clock, mode and deadline, see :class:`lac_vla.results.realtime.RealTime`; several if episodes differ.
        effective_hz: Answers that acted, per second of the world.
        stale: Share of the world's steps that were driven by an answer to an observation older than one step.
        held: Share of the world's steps without an answer to act on.
        answer_ms: From observation to answer, in the world's time, over all calls.
        task_s: Mean time of the solved episodes, in the world; ``None`` if none was solved.
        predicted_hz: On the wall clock: what ``effective_hz`` would be by this machine's table; ``None`` elsewhere.
    """

    clocks: tuple[str, ...]
    effective_hz: float
    stale: float
    held: float
    answer_ms: Percentiles | None
    task_s: float | None
    predicted_hz: float | None

    @classmethod
    def of(cls, episodes: Sequence[EpisodeRecord]) -> Pace | None:
        """Aggregate a method's episodes; ``None`` if the world waited in all of them."""
        known = [(e, e.realtime) for e in episodes if e.realtime is not None]
        if not known:
            return None
        steps, seconds = sum(e.steps for e, _ in known), sum(e.world_s or 0.0 for e, _ in known)
        solved = [e.world_s or 0.0 for e, _ in known if e.success]
        cycles = [cycle for e, _ in known for cycle in _predicted_cycles(e)]
        return cls(
            clocks=tuple(sorted({real.label for _, real in known})),
            effective_hz=sum(real.answers for _, real in known) / seconds if seconds else 0.0,
            stale=sum(real.stale for _, real in known) / max(1, steps),
            held=sum(real.held for _, real in known) / max(1, steps),
            answer_ms=percentiles(ms for _, real in known for ms in real.answer_ms),
            task_s=float(np.mean(solved)) if solved else None,
            predicted_hz=len(cycles) / sum(cycles) if cycles else None,
        )


def _predicted_cycles(episode: EpisodeRecord) -> list[float]:
    """Compute the seconds from an observation to the next, had every answer taken what the table says of it."""
    real = episode.realtime
    if real is None or not real.predicted_ms:
        return []
    cycles = []
    for call in range(len(real.observed) - 1):
        acted = real.acted[call]
        if acted is not None:
            took, predicted = acted - real.observed[call], delay(real.predicted_ms[call], real.control_hz)
            cycles.append(max(1, real.observed[call + 1] - real.observed[call] - took + predicted) / real.control_hz)
    return cycles
