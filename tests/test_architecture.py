"""Imports go downwards only, and no folders import each other in a circle."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "lac_vla"
FLOORS = [
    {"errors", "types", "timing"},
    {"flow"},
    {"policies", "models"},
    {"engine"},
    {"session", "bundled"},
    {"factory"},
    {"cost", "provenance"},
    {"results"},
    {"drawing"},
    {"datasets", "training", "sims", "evaluation", "bench", "serving", "report", "lerobot"},
    {"cli"},
]
FLOOR = {name: height for height, names in enumerate(FLOORS) for name in names}
FORBIDDEN = {"policies": {"models"}, "models": {"policies"}, "sims": {"policies", "models", "session", "engine"}}


def imports(path: Path) -> set[str]:
    """Rooms of the package that a file imports from."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("lac_vla.")}
    return found


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downwards(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if room == "__init__":
        return
    for other in imports(path) - {room}:
        assert FLOOR[other] <= FLOOR[room], f"{room} must not import {other}"
        assert other not in FORBIDDEN.get(room, set()), f"{room} must not know {other}"
