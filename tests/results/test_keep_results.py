"""What the repository keeps of a run: every episode, no number per frame."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

from tests.report.conftest import run_dir

__all__ = ["run_dir"]
SCRIPT = Path(__file__).parents[2] / "scripts" / "keep_results.py"


def test_a_run_is_kept_without_its_frames(run_dir: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept.jsonl"
    runpy.run_path(str(SCRIPT))["main"](str(run_dir), str(kept))
    about, *episodes = map(json.loads, kept.read_text(encoding="utf-8").splitlines())
    assert about["command"].startswith("lac eval mini")
    assert about["versions"]["torch"] == "2.13.0"
    assert sum(episode["success"] for episode in episodes if episode["method"] == "dense") == 3
    assert len(episodes) == 8
    last = episodes[-1]
    assert last["ratio_effective"] == 0.4  # the mean of 0, 0.4 and 0.8
    assert last["observation_to_action"] == [6.0, 6.9]
    assert "latency_ms" not in last
    assert max(len(line) for line in kept.read_text(encoding="utf-8").splitlines()) < 600


def test_the_worlds_clock_is_kept(run_dir: Path, tmp_path: Path) -> None:
    log, kept = run_dir / "episodes.jsonl", tmp_path / "kept.jsonl"
    first = json.loads(log.read_text(encoding="utf-8").splitlines()[0])
    calls = len(first["ratio_effective"])
    ticks = list(range(0, 2 * calls, 2))
    clock = {"clock": "rtx4090", "mode": "hold", "control_hz": 20, "observed": ticks, "acted": [*ticks[:-1], None]}
    clock["answer_ms"] = [80.0] * (calls - 1) + [100.0]
    log.write_text(json.dumps(first | {"realtime": clock}) + "\n", encoding="utf-8")
    runpy.run_path(str(SCRIPT))["main"](str(run_dir), str(kept))
    [_, episode] = map(json.loads, kept.read_text(encoding="utf-8").splitlines())
    kept_of = {"clock": "rtx4090", "mode": "hold", "control_hz": 20, "held": 0, "stale": 0, "calls": calls}
    assert episode["realtime"] == kept_of | {"answers": calls - 1, "answer_ms": [80.0, 98.0]}
