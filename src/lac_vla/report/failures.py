"""Episodes that dense solves and a method loses are shown with what was reused in them, and how old it was."""

from __future__ import annotations

import base64
from io import BytesIO
from typing import Any

from PIL import Image

from lac_vla.report.runs import Run
from lac_vla.results.records import EpisodeRecord, Trial
from lac_vla.results.summary import DENSE

MAX_BYTES, MAX_PIXELS = 2**23, 2**25
"""Larger pictures are not shown."""
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
        pictures = {e.trial: data for _, e in pairs if e.method == method and (data := _picture(run, e))}
        pictured = [(d, e) for d, e in pairs if e.method == method and e.trial in pictures]
        tasks = {e.task: (d, e) for d, e in reversed(pictured)}  # one of each task first
        rest = [pair for pair in pictured if pair not in tasks.values()]
        for dense, episode in [*(tasks[task] for task in sorted(tasks)), *rest][:PER_METHOD]:
            picture = base64.b64encode(pictures[episode.trial]).decode()
            shown.append({"dense": dense, "episode": episode, "colour": colours[method], "picture": picture})
    return {"lost": len(pairs), "shown": shown}


def _picture(run: Run, episode: EpisodeRecord) -> bytes | None:
    """Read an episode's picture, if it is one: a page must not carry away whatever a record names."""
    if (path := run.file(episode.failure)) is None or path.stat().st_size > MAX_BYTES:
        return None
    try:
        data = path.read_bytes()
        with Image.open(BytesIO(data), formats=("JPEG",)) as image:
            if image.width * image.height <= MAX_PIXELS:
                image.load()
                return data
    except Exception:  # Pillow's own errors are of many kinds
        pass
    return None
