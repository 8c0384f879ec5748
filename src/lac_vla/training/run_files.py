"""The files of a training run: its state, which is written last and says what is done, and its log."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch

from lac_vla.errors import CheckpointError, InputError
from lac_vla.files import read_lines, read_object, reading, write_whole

STATE, METRICS, CONFIG, LOCK = "state.pt", "metrics.jsonl", "config.json", ".lock"


def save_state(out: Path, state: Mapping[str, Any]) -> None:
    """Write the state to resume from. All that belongs to it must be on disk by now."""
    write_whole(out / STATE, lambda partial: torch.save(dict(state), partial))


def load_state(out: Path, device: torch.device | str = "cpu") -> dict[str, Any] | None:
    """Read the state of a run; ``None`` if there is none.

    Raises:
        CheckpointError: If it is damaged.
    """
    path = out / STATE
    if not path.exists():
        return None
    with reading(path, "it is damaged or not a state of this run; give another --out", CheckpointError):
        state = torch.load(path, weights_only=True, map_location=device)
        return dict(state)


def check_settings(
    out: Path, settings: Mapping[str, Any], changeable: tuple[str, ...], advice: str = "give another --out"
) -> None:
    """Refuse to resume a run with other settings, but for those that may change; ``advice`` is what to do then.

    Raises:
        InputError: If they differ.
    """
    before = read_object(out / CONFIG, advice) if (out / CONFIG).is_file() else {}
    now = json.loads(json.dumps(settings))
    different = [key for key in now if key not in changeable and key in before and before[key] != now[key]]
    if different:
        there = ", ".join(f"{key} {before[key]}" for key in different)
        raise InputError(f"{out} holds a run with other {different}; {advice} (its own: {there})")


def open_log(out: Path, progress: str, done: int) -> IO[str]:
    """Open the log to append to it; rows of what comes after the saved state are taken away, for it comes again."""
    path = out / METRICS
    if path.exists():
        rows = [row for _, row in read_lines(path, "lac train", dict) if row.get(progress, 0) <= done]
        write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
    return path.open("a", encoding="utf-8")


def append(log: IO[str], row: Mapping[str, Any]) -> None:
    """Write a row, which is on disk when this returns."""
    log.write(json.dumps(row) + "\n")
    log.flush()
    if log.name != os.devnull:
        os.fsync(log.fileno())
