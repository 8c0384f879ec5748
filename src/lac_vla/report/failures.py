"""Episodes that dense solves and a method loses are shown with what was reused in them, and how old it was."""

from __future__ import annotations

import base64
from typing import Any

from lac_vla.report.runs import Run
from lac_vla.results.records import EpisodeRecord, Trial
from lac_vla.results.summary import DENSE

PER_METHOD = 3
"""At most so many lost episodes of a method are shown on a page."""


def lost(run: Run) -> list[tuple[EpisodeRecord, EpisodeRecord]]:
    """Pair dense's episode, solved, with a method's, not solved, in the order of methods, tasks and states."""
    solved: dict[Trial, EpisodeRecord] = {e.trial: e for e in run.episodes if e.method == DENSE and e.success}
    order = {row.method: index for index, row in enumerate(run.summary.methods)}
    failed = [e for e in run.episodes if e.method != DENSE and not e.success and e.trial in solved]
    return [(solved[e.trial], e) for e in sorted(failed, key=lambda e: (order[e.method], e.trial))]


def gallery(run: Run, colours: dict[str, str]) -> dict[str, Any] | None:
    """Collect the lost episodes that the page shows, by method → CSS colour; ``None`` if none was lost."""
    pairs = lost(run)
    if not pairs:
        return None
    shown: list[dict[str, Any]] = []
    for method in colours:
        pictured = [(d, e) for d, e in pairs if e.method == method and e.failure and (run.folder / e.failure).is_file()]
        tasks = {e.task: (d, e) for d, e in reversed(pictured)}  # one of each task first
        rest = [pair for pair in pictured if pair not in tasks.values()]
        for dense, episode in [*(tasks[task] for task in sorted(tasks)), *rest][:PER_METHOD]:
            picture = base64.b64encode((run.folder / str(episode.failure)).read_bytes()).decode()
            shown.append({"dense": dense, "episode": episode, "colour": colours[method], "picture": picture})
    return {"lost": len(pairs), "shown": shown}
