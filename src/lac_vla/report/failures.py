"""Episodes that dense solves and a method loses: what was reused in them, and how old it was at the end."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from lac_vla.engine.step_info import StepInfo
from lac_vla.errors import InputError
from lac_vla.evaluation.records import EpisodeRecord, Trial
from lac_vla.evaluation.summary import DENSE
from lac_vla.report.overlay import caption, heat, overlay, side_by_side, stacked
from lac_vla.report.runs import Run
from lac_vla.types import Frame, UInt8Image

MOMENTS = 4
"""Steps that a picture shows, evenly spread, the last one among them."""
HEIGHT = 128
"""Least height of a camera's picture, pixels."""
PER_METHOD = 3
"""At most so many lost episodes of a method are shown on a page."""


class FailurePicture:
    """Watches an episode; if it fails, leaves a picture of some of its moments. Solved ones cost nothing.

    Each column is a moment: above, what was recomputed; below, the age of every token, dark for fresh.

    Args:
        path: Of the ``.jpg`` file; its folder is created.
        horizon: Steps of an episode that fails.
        max_age: Age that is brightest, frames.
    """

    def __init__(self, path: str | Path, horizon: int, max_age: int) -> None:
        self.path = Path(path)
        self._max_age = max_age
        self._wanted = set(np.linspace(0, horizon - 1, MOMENTS + 1).round().astype(int).tolist()[1:])
        self._count = 0
        self._steps: list[tuple[int, StepInfo]] = []

    def add(self, frame: Frame, step: StepInfo) -> None:
        """See one observation and what the session did with it."""
        if self._count in self._wanted:
            self._steps.append((self._count, step))
        self._count += 1

    def close(self, *, success: bool) -> Path | None:
        """Write the picture of a failure.

        Returns:
            Its path; ``None`` after a success.

        Raises:
            InputError: If the file cannot be written.
        """
        if success or not self._steps:
            return None
        picture = side_by_side([self._moment(number, step) for number, step in self._steps])
        _, data = cv2.imencode(".jpg", np.ascontiguousarray(picture[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, 80])
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_bytes(data.tobytes())
        except OSError as error:
            raise InputError(f"cannot write {self.path} ({error}): choose another folder") from error
        return self.path

    def _moment(self, number: int, step: StepInfo) -> UInt8Image:
        computed, ages = [], []
        for camera in step.layout.cameras:
            image, grid, own = step.pixels[camera.name], (camera.rows, camera.cols), camera.tokens
            computed.append(overlay(image, grid, step.active[own], step.recovered[own], height=HEIGHT))
            age = step.age[own].reshape(grid).astype(np.float32)
            ages.append(heat(image, age, (0, self._max_age), height=HEIGHT))
        both = stacked([side_by_side(computed), side_by_side(ages)])
        what = "pruned" if step.oldest_age is None else f"reused, oldest {step.oldest_age}"
        return caption(both, f"step {number}", f"{100 * step.ratio:.0f} % {what}")


def lost(run: Run) -> list[tuple[EpisodeRecord, EpisodeRecord]]:
    """Pairs of dense's episode, solved, and a method's, not solved, in the order of methods, tasks and states."""
    solved: dict[Trial, EpisodeRecord] = {e.trial: e for e in run.episodes if e.method == DENSE and e.success}
    order = {row.method: index for index, row in enumerate(run.summary.methods)}
    failed = [e for e in run.episodes if e.method != DENSE and not e.success and e.trial in solved]
    return [(solved[e.trial], e) for e in sorted(failed, key=lambda e: (order[e.method], e.trial))]


def gallery(run: Run, colours: dict[str, str]) -> dict[str, Any] | None:
    """What the page shows of lost episodes; ``None`` if none was lost.

    Args:
        run: The run.
        colours: Method → CSS colour.
    """
    pairs = lost(run)
    if not pairs:
        return None
    shown: list[dict[str, Any]] = []
    for method in colours:
        pictured = [(d, e) for d, e in pairs if e.method == method and e.failure and (run.folder / e.failure).is_file()]
        tasks = {e.task: (d, e) for d, e in reversed(pictured)}  # one of each task first
        rest = [pair for pair in pictured if pair not in tasks.values()]
        for dense, episode in [*(tasks[task] for task in sorted(tasks)), *rest][:PER_METHOD]:
            shown.append(
                {
                    "method": method,
                    "colour": colours[method],
                    "task": episode.task,
                    "init_state": episode.init_state,
                    "instruction": episode.instruction,
                    "dense_steps": dense.steps,
                    "steps": episode.steps,
                    "picture": base64.b64encode((run.folder / str(episode.failure)).read_bytes()).decode(),
                }
            )
    return {"lost": len(pairs), "shown": shown}
