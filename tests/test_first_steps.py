"""What people paste first runs as it stands: README's snippet, the examples, the notebook."""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lac_vla.serving.config import ServeConfig, make_server
from tests.serving.conftest import Running

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def test_the_first_snippet_runs(capsys: pytest.CaptureFixture[str]) -> None:
    snippet = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[0]
    exec(compile(snippet, "README.md", "exec"), {})
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "(7,) 0% reused"
    assert all(int(re.findall(r"(\d+)% reused", line)[0]) > 50 for line in said[1:])


@pytest.mark.parametrize("name", ["quickstart", "own_policy"])
def test_an_example_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 6
    assert re.search(r"(\d+)% reused", said[0])[1] == "0"  # type: ignore[index]
    assert int(re.search(r"(\d+)% reused", said[-1])[1]) >= 70  # type: ignore[index]


@pytest.fixture
def server() -> Iterator[Running]:
    running = Running(make_server(ServeConfig("mini", port=0)))
    yield running
    running.stop()


def test_the_robot_client_runs(
    server: Running, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["robot_client.py", server.url])
    runpy.run_path(str(EXAMPLES / "robot_client.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert said.splitlines()[0] == "mini with lac"
    assert said.count("reused") == 6


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.name)
def test_a_notebook_runs_and_is_kept_without_outputs(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    book = json.loads(path.read_text(encoding="utf-8"))
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    names: dict[str, object] = {"__name__": "__main__"}
    for number, cell in enumerate(cells):
        assert cell["outputs"] == []
        exec(compile("".join(cell["source"]), f"{path.name}, code cell {number}", "exec"), names)
    assert "forced:" in capsys.readouterr().out


def test_every_example_is_listed() -> None:
    listed = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    files = {path.name for path in EXAMPLES.iterdir() if path.is_file()}
    assert files == set(re.findall(r"`([a-z_]+\.(?:py|ipynb))`", listed))
