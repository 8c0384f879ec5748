"""The section ``memory``: does one long session grow?"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from lac_vla.bench.config import BenchConfig
from lac_vla.bench.measure import Target
from lac_vla.bench.methods import cached_vla
from lac_vla.bench.scene import Scene
from lac_vla.cost import peak_memory_mb
from lac_vla.models import VLA
from lac_vla.policies import paths_by_name

CHECKPOINTS = 10
FLAT_MB = 2.0
"""Most that the process may grow from the first checkpoint to the last."""


@dataclass(frozen=True)
class MemoryPoint:
    """Memory after some frames.

    Attributes:
        frame: Number of frames so far.
        process_mb: Resident memory of the process.
        cache_mb: The session's keys and values.
        accelerator_mb: Allocated on the accelerator; ``None`` on a CPU.
    """

    frame: int
    process_mb: float
    cache_mb: float
    accelerator_mb: float | None


@dataclass(frozen=True)
class MemoryResult:
    """The section ``memory``.

    Attributes:
        model: Its name.
        policy: Of the session.
        source: Where the frames come from; they are repeated as often as it takes.
        points: In order.
        growth_mb: Of the process, from the first point to the last.
        cache_growth_mb: Of the session's keys and values, likewise.
        targets: Flat.
    """

    model: str
    policy: str
    source: str
    points: tuple[MemoryPoint, ...]
    growth_mb: float
    cache_growth_mb: float
    targets: tuple[Target, ...]


def measure_memory(model: VLA, scene: Scene, config: BenchConfig) -> MemoryResult:
    """Run the section: one session that is never reset goes round in the scene."""
    session = cached_vla(model, config.memory_policy, "default", config).session(config.seed)
    steps = np.linspace(0, config.memory_frames, CHECKPOINTS + 1)[1:]
    checkpoints = set(np.ceil(steps).astype(int).tolist())
    points = []
    for index in tqdm(range(config.memory_frames), desc="memory", unit="frame", leave=False):
        session.act(scene.frames[index % len(scene.frames)])
        if index + 1 in checkpoints:
            allocated = torch.cuda.memory_allocated(model.device) / 1e6 if model.device.type == "cuda" else None
            points.append(MemoryPoint(index + 1, resident_mb(), session.nbytes / 1e6, allocated))
    growth = points[-1].process_mb - points[0].process_mb
    return MemoryResult(
        model=model.name,
        policy=paths_by_name(config.memory_policy),
        source=scene.source,
        points=tuple(points),
        growth_mb=growth,
        cache_growth_mb=points[-1].cache_mb - points[0].cache_mb,
        targets=_targets(points),
    )


def _targets(points: list[MemoryPoint]) -> tuple[Target, ...]:
    first, last = points[0], points[-1]
    frames = f"from frame {first.frame} to {last.frame}"
    growth = last.process_mb - first.process_mb
    targets = [Target.at_most(f"growth of the process {frames}", growth, FLAT_MB, "MB")]
    if first.accelerator_mb is not None and last.accelerator_mb is not None:
        growth = last.accelerator_mb - first.accelerator_mb
        targets.append(Target.at_most(f"growth on the accelerator {frames}", growth, FLAT_MB, "MB"))
    return tuple(targets)


def resident_mb() -> float:
    """Read the resident memory of this process, MB; where Linux's ``/proc`` is missing, its peak so far."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return peak_memory_mb(torch.device("cpu"))
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6
