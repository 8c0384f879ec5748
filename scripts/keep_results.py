"""Write what a claim rests on, small enough for the repository.

``python scripts/keep_results.py RUN… docs/results/NAME.jsonl``: the first line of a run says how it was made; every
further line is an episode, with one number per metric, and the median and 95th percentile of each latency window, in
place of a number per frame.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lac_vla.files import read_object, write_whole
from lac_vla.results.metrics import METRICS
from lac_vla.results.realtime import RealTime
from lac_vla.results.records import EpisodeRecord, read_episodes
from lac_vla.timing import WINDOWS

HOW = ("command", "created", "commit", "versions", "hardware", "model", "simulator", "methods", "notes", "load")
FRAME_BY_FRAME = ("metrics", "latency_ms", "reuse", "adaptive", "video", "failure", "instruction")


def lines(run: Path) -> Iterator[dict[str, Any]]:
    """Give the compact lines of a run's folder."""
    about = read_object(run / "summary.json", "it is written by lac eval")
    yield {key: about[key] for key in HOW if key in about}
    yield from map(episode_line, read_episodes(run / "episodes.jsonl"))


def episode_line(episode: EpisodeRecord) -> dict[str, Any]:
    """Sum an episode up."""
    line = {
        key: value for key, value in vars(episode).items() if key not in FRAME_BY_FRAME and value not in ("", {}, None)
    }
    if episode.realtime is not None:
        line["realtime"] = _summed_up(episode.realtime)
    for name, values in episode.metrics.items():
        known = [value for value in values if value is not None]
        if known and (summed := METRICS[name].aggregate(known)) is not None:
            line[name] = float(f"{summed:.5g}")
    if episode.reuse:
        line["reuse"] = {camera: round(float(np.mean(values)), 4) for camera, values in episode.reuse.items()}
    for window in WINDOWS:
        if spent := episode.latency_ms.get(window):
            line[window] = [round(float(value), 2) for value in np.percentile(spent, (50, 95))]
    return line


def _summed_up(real: RealTime) -> dict[str, Any]:
    """Describe the world's clock with a count in place of ticks, and p50 and p95 in place of every answer's time."""
    left_out = ("observed", "acted", "answer_ms", "predicted_ms")
    line = {key: value for key, value in vars(real).items() if key not in left_out and value not in ("", None)}
    line |= {"calls": len(real.observed), "answers": real.answers}
    for name in ("answer_ms", "predicted_ms"):
        if times := getattr(real, name):
            line[name] = [round(float(value), 2) for value in np.percentile(times, (50, 95))]
    return line


def main(*words: str) -> None:
    """Write the lines of all runs to the file that is named last."""
    *runs, out = map(Path, words)
    kept = [line for run in runs for line in lines(run)]
    write_whole(out, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept).encode())


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
