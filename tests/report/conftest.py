"""A hand-made run: two methods on four trials, with numbers that can be added up by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.report.pages import write_video

SOLVED = {"dense": (True, True, True, False), "motion-0.5": (True, False, True, False)}
INSTRUCTIONS = ("pick up the bowl", 'open the <b>drawer</b> & "wait"')

METADATA = {
    "created": "2025-03-01T12:00:00+00:00",
    "command": "lac eval mini --policies dense motion:ratio=0.5",
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "hardware": {"processor": "A Processor", "cores": 2, "threads": 2},
    "model": {"name": "mini", "parameters": 9876543},
    "simulator": {"suite": "libero_spatial", "rendering": "fast"},
    "methods": {"dense": {"policy": "dense"}, "motion-0.5": {"policy": "motion:ratio=0.5"}},
    "notes": ["2 of 10 tasks."],
}

COSTS = {
    "dense": {
        "ratio_effective": [0.0, 0.0, 0.0],
        "ratio_nominal": [0.0, 0.0, 0.0],
        "oldest_age": [0, 0, 0],
        "macs": [2e9, 2e9, 2e9],
        "latency_ms": {
            "decoder_prefill": [4.0, 4.0, 4.0],
            "model_call": [10.0, 20.0, 30.0],
            "observation_to_action": [12.0, 12.0, 12.0],
        },
        "peak_memory_mb": 100.4,
    },
    "motion-0.5": {
        "ratio_effective": [0.0, 0.4, 0.8],
        "ratio_nominal": [None, 0.5, 0.5],
        "oldest_age": [0, 1, 2],
        "macs": [2e9, 1e9, 0.6e9],
        "latency_ms": {
            "decoder_prefill": [1.5, 1.5, 1.5],
            "model_call": [8.0, 8.0, 8.0],
            "observation_to_action": [5.0, 6.0, 7.0],
        },
        "peak_memory_mb": 120.6,
    },
}


def film(path: Path, shade: int) -> None:
    """A second of a grey picture that becomes lighter."""
    write_video(path, (np.full((64, 96, 3), shade + 4 * t, dtype=np.uint8) for t in range(20)), fps=20)


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outputs") / "spatial-run"
    folder.mkdir()
    lines = []
    for shade, (method, outcomes) in enumerate(SOLVED.items()):
        for trial, success in enumerate(outcomes):
            task, init_state = divmod(trial, 2)
            video = None
            if init_state == 0:
                video = f"videos/{method}_{task}.mp4"
                film(folder / video, 40 * shade)
            record = {
                "method": method,
                "suite": "libero_spatial",
                "task": task,
                "instruction": INSTRUCTIONS[task],
                "init_state": init_state,
                "seed": 7,
                "success": success,
                "steps": 3,
                "horizon": 220,
                "video": video,
            }
            lines.append(json.dumps({**record, **COSTS[method]}))
    (folder / "episodes.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "summary.json").write_text(json.dumps(METADATA), encoding="utf-8")
    return folder
