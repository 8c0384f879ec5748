"""The package: its version is one, and its page on an index refers to nothing that is not there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import lac_vla

ROOT = Path(__file__).parents[1]


def test_the_version_is_the_same_everywhere() -> None:
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    cited = re.search(r"^version: (\S+)", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    assert first is not None
    assert cited is not None
    assert first[1] == cited[1] == lac_vla.__version__


def test_the_index_page_has_no_links_into_the_repository() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https:)", page)
    for change in settings["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        page = re.sub(change["pattern"], change["replacement"], page)
    assert links
    assert re.findall(r"\]\((?!https:).*", page) == []
    assert re.search(r"\]\(https:", page)


def test_the_lower_bounds_are_those_that_are_tested() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    script = (ROOT / "scripts" / "test_compat.sh").read_text(encoding="utf-8")
    extras = re.search(r'-e "\.\[([\w,]+)\]"', script)
    oldest = re.search(r"oldest\) torch=(\S+) others=\"([^\"]+)\"", script)
    assert extras is not None
    assert oldest is not None
    pinned = dict(re.findall(r"([\w-]+)==(\S+)", oldest[2])) | {"torch": oldest[1]}
    asked = [
        *project["dependencies"],
        *(line for e in extras[1].split(",") for line in project["optional-dependencies"][e]),
    ]
    bounds = {name: bound for line in asked for name, bound in re.findall(r"^([\w-]+)>=([\d.]+)", line)}
    assert bounds.keys() == pinned.keys()
    for name, bound in bounds.items():
        assert f"{pinned[name]}.0.0".startswith(f"{bound}."), (name, bound, pinned[name])


def test_workflows_run_what_a_developer_runs() -> None:
    """Their commands are targets of the Makefile with variables that it has, scripts that are there, and pip."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets, variables = re.findall(r"^([a-z-]+):", makefile, re.MULTILINE), re.findall(r"\$\((\w+)\)", makefile)
    jobs: dict[str, Any] = {}
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        jobs |= yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
    asked = {name: [step["run"] for step in job["steps"] if "run" in step] for name, job in jobs.items()}
    lines = [line.strip() for runs in asked.values() for run in runs for line in run.splitlines()]
    assert {"make check", "make test", "make users", "make docs"} <= set(lines)
    for line in lines:
        command, *words = line.split()
        if command == "make":
            assert words[0] in targets, line
            assert {word.partition("=")[0] for word in re.sub(r"\$\{\{.*?\}\}", "X", line).split()[2:]} <= set(
                variables
            ), line
        else:
            assert line.startswith("sudo sh scripts/"), line
            assert (ROOT / words[-1]).is_file(), line
    matrix = jobs["versions"]["strategy"]["matrix"]
    script = (ROOT / "scripts" / "test_compat.sh").read_text(encoding="utf-8")
    assert set(matrix["versions"]) == set(re.findall(r"^ +(\w+)\) torch=", script, re.MULTILINE))
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = [line.rpartition(" :: ")[2] for line in project["classifiers"] if "Python :: 3." in line]
    assert matrix["python"] == named


def test_what_is_kept_is_small() -> None:
    large = [path for path in (ROOT / "docs").rglob("*") if path.is_file() and path.stat().st_size > 1_000_000]
    assert large == [], "generated pages and raw data do not belong into the repository: scripts/keep_results.py"
    pages = [path.name for path in (ROOT / "docs").rglob("*.html")]
    assert pages == ["showcase.html"]
