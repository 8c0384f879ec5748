"""Imports go downwards only, no rooms import each other in a circle, and docstrings begin with sentences."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "lac_vla"
FILES = sorted(ROOT.rglob("*.py"))
FLOORS = [
    {"errors", "files", "checks", "checkpoint_files", "types", "timing", "transfer", "running_chunk"},
    {"flow", "client", "bundled", "dataset_keys", "provenance", "hub", "plugins"},
    {"policies", "models"},
    {"engine"},
    {"session"},
    {"factory"},
    {"cost", "datasets"},
    {"results", "realtime"},
    {"drawing", "training"},
    {"sims"},
    {"evaluation", "serving", "lerobot"},
    {"bench", "report"},
    {"cli", "__main__"},
]
FLOOR = {name: height for height, names in enumerate(FLOORS) for name in names}
FORBIDDEN = {
    "policies": {"models"},
    "models": {"policies"},
    "sims": {"policies", "models", "session", "engine"},
    "serving": {"evaluation"},
    "evaluation": {"serving"},
}
FAMILIES = re.compile(
    rf"lac_vla\.models\.({'|'.join({path.parent.name for path in (ROOT / 'models').glob('*/*.py')} - {'heads'})})\b"
)
FRAGMENT = re.compile(r"(Of|As|What|Why|Where|Whether|How|Which|Whose|Those|With|Without|Than)\b")


def imports(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        yield from (name for name in names if name.startswith("lac_vla."))


def rooms(within: Path) -> Mapping[str, set[str]]:
    """What the files and folders of a folder import of each other; its ``__init__`` stands above them all."""
    prefix = ["lac_vla", *within.relative_to(ROOT).parts]
    names = {path.stem for path in within.iterdir() if path.suffix == ".py" or path.is_dir()} - {"__init__"}
    arrows = defaultdict(set)
    for path in sorted(within.rglob("*.py")):
        own = path.relative_to(within).parts[0].removesuffix(".py")
        for module in imports(path):
            parts = module.split(".")
            if parts[: len(prefix)] == prefix and len(parts) > len(prefix) and parts[len(prefix)] in names - {own}:
                arrows[own].add(parts[len(prefix)])
    return {name: targets for name, targets in arrows.items() if name != "__init__"}


def circle(arrows: Mapping[str, set[str]]) -> set[str]:
    """The rooms from which a way leads back to themselves."""

    def reached(room: str, seen: set[str]) -> set[str]:
        for other in arrows.get(room, set()) - seen:
            seen.add(other)
            reached(other, seen)
        return seen

    return {room for room in arrows if room in reached(room, set())}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downwards(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if room == "__init__":
        return
    for other in {module.split(".")[1] for module in imports(path)} - {room, "__version__"}:
        assert FLOOR[other] <= FLOOR[room], f"{room} must not import {other}"
        assert other not in FORBIDDEN.get(room, set()), f"{room} must not know {other}"


@pytest.mark.parametrize(
    "folder",
    [ROOT, *(path for path in sorted(ROOT.rglob("*")) if path.is_dir() and any(path.glob("*.py")))],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_no_rooms_import_each_other_in_a_circle(folder: Path) -> None:
    assert not circle(rooms(folder))


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == {"b", "c"}
    assert not circle({"a": {"b", "c"}, "b": {"c"}})


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_outside_models_names_a_family(path: Path) -> None:
    if path.relative_to(ROOT).parts[0] != "models":
        assert not [module for module in imports(path) if FAMILIES.match(module)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_begin_with_sentences(path: Path) -> None:
    nodes = [
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    for node in nodes:
        first = (ast.get_docstring(node) or "").split("\n")[0]
        assert not FRAGMENT.match(first), f"{path.name}:{getattr(node, 'lineno', 1)}: {first!r} is no sentence"
        assert not first or first.rstrip("`").endswith((".", "?", ":")), f"{path.name}: {first!r} has no end"
