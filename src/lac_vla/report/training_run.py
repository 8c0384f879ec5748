"""The folder of a training run, read for its report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lac_vla.checks import check_whole, shortened
from lac_vla.errors import InputError
from lac_vla.files import read_lines, read_object, reading
from lac_vla.results.regret import FOLDER, Regret, read_regret
from lac_vla.types import BoolArray, FloatArray, UInt8Image

METRICS, CONFIG, POLICY, SALIENCY = "metrics.jsonl", "config.json", "policy/config.json", "saliency.npz"
STEPS = ("stage1_steps", "stage2_steps", "delta_steps", "predictor_steps")
"""Settings that say how long every stage is."""
COMMAND = "lac train"
ADVICE = "give the folder of a run of 'lac train'; resumed, it writes the file again"

Row = Mapping[str, float]
"""One line of ``metrics.jsonl``: ``step``, ``stage``, ``seconds``, and what was measured there."""


@dataclass(frozen=True, eq=False)
class Saliency:
    """The policy's decisions on n consecutive held-out frames.

    Attributes:
        images: Camera → uint8, (n, H, W, 3).
        scores: Camera → the selector's score of every token, (n, rows, cols).
        active: Camera → recomputed, (n, rows, cols).
    """

    images: Mapping[str, UInt8Image]
    scores: Mapping[str, FloatArray]
    active: Mapping[str, BoolArray]

    @classmethod
    def read(cls, path: Path) -> Saliency:
        """Read ``saliency.npz``; an :class:`InputError` says that it is damaged."""
        with reading(path, "resume the run, it writes it again"):
            with np.load(path, allow_pickle=False) as found:
                cameras = [name.removeprefix("image_") for name in found.files if name.startswith("image_")]
                kinds = ("image", "score", "mask")
                images, scores, active = ({c: found[f"{kind}_{c}"] for c in cameras} for kind in kinds)
            for camera, score in scores.items():
                image, mask = images[camera], active[camera]
                if score.ndim != 3 or mask.shape != score.shape or image.shape != (len(score), *image.shape[1:3], 3):
                    raise ValueError(f"the arrays of camera {camera} do not fit each other")
                if (image.dtype, mask.dtype, score.dtype.kind) != (np.uint8, bool, "f") or not image.size:
                    raise ValueError(f"the arrays of camera {camera} are of other types")
                if not np.isfinite(score).all():
                    raise ValueError(f"the scores of camera {camera} are not finite")
            return cls(images, scores, active)

    @property
    def frames(self) -> int:
        """Count the frames."""
        return max((len(score) for score in self.scores.values()), default=0)

    @property
    def reused(self) -> float | None:
        """Compute the share of all tokens of all frames that is reused; ``None`` without frames."""
        counts = [(mask.size, int(mask.sum())) for mask in self.active.values()]
        total = sum(size for size, _ in counts)
        return 1 - sum(active for _, active in counts) / total if total else None


@dataclass(frozen=True, eq=False)
class TrainingRun:
    """One run of ``lac train`` on disk, finished or not.

    The metadata (frames, episodes, provenance) and the saliency's pictures are saved with the policy: before, there are
    none. The rows are in the order of the steps.
    """

    folder: Path
    config: Mapping[str, Any]
    metadata: Mapping[str, Any]
    rows: list[Row]
    saliency: Saliency | None
    regret: Regret | None = None

    @classmethod
    def read(cls, folder: str | Path) -> TrainingRun:
        """Read a run's folder; an :class:`InputError` says that it is none, or that a file in it is damaged."""
        folder = Path(folder)
        config = read_object(folder / CONFIG, ADVICE)
        if "stage2_steps" not in config:
            raise InputError(f"{folder / CONFIG} holds no settings of 'lac train': give the folder of such a run")
        for name in STEPS:
            check_whole(f"{folder / CONFIG}: {name}", config.get(name, 0), 0, 2**53)
        if not isinstance(config.get("target_ratio"), float | int | None):
            raise InputError(f"{folder / CONFIG}: target_ratio is {shortened(config['target_ratio'])}, no number")
        metadata = read_object(folder / POLICY, ADVICE).get("about", {}) if (folder / POLICY).exists() else {}
        pictures = folder / SALIENCY
        return cls(
            folder,
            config,
            metadata if isinstance(metadata, dict) else {},
            read_metrics(folder / METRICS),
            Saliency.read(pictures) if pictures.exists() else None,
            read_regret(folder / FOLDER),
        )

    @property
    def steps(self) -> int:
        """Count the steps of all stages, as planned."""
        return sum(int(self.config.get(name, 0)) for name in STEPS)

    @property
    def step(self) -> int:
        """Give the last step that was noted."""
        return int(self.rows[-1]["step"]) if self.rows else 0

    @property
    def seconds(self) -> float | None:
        """Give the time of training so far in seconds, all resumes together."""
        return self.last("seconds")

    def curve(self, name: str, stage: int | None = None) -> list[tuple[float, float]]:
        """List (step, value) wherever the metric was noted, in one stage or both."""
        return [
            (row["step"], row[name]) for row in self.rows if name in row and (stage is None or row["stage"] == stage)
        ]

    def last(self, name: str) -> float | None:
        """Give the metric's last value; ``None`` if it was never noted."""
        values = self.curve(name)
        return values[-1][1] if values else None


def read_metrics(path: Path) -> list[Row]:
    """Read ``metrics.jsonl``: at most one training row and one validation row a step.

    A resumed run begins at its last saved step and writes what follows once more: where the steps fall back, the
    rows from there on are superseded. A last line without its end is what a killed run leaves: it is not counted.

    Raises:
        InputError: If the file cannot be read, or another line is damaged.
    """
    rows: dict[tuple[float, bool], Row] = {}
    for _, row in read_lines(path, COMMAND, _row):
        step = row["step"]
        if rows and next(reversed(rows))[0] > step:
            rows = {key: kept for key, kept in rows.items() if key[0] <= step}
        rows[step, any(name.startswith("held_out_") for name in row)] = row
    return list(rows.values())


def _row(line: Any) -> Row:
    """Check the numbers of a line; one that is not finite was not measured: it is left out."""
    if not isinstance(line, dict):
        raise ValueError("no JSON object")
    for name, value in line.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{name} is {value!r}, no number")
    row = {name: value for name, value in line.items() if value is not None and math.isfinite(value)}
    if "step" not in row or row.get("stage") not in range(1, len(STEPS) + 1):
        raise ValueError("no step, or no stage that there is")
    return row
