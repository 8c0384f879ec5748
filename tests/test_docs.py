"""The documents: every option that they give to a verb is one that the verb explains."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

import pytest

from lac_vla.cli import main

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(text: str) -> list[str]:
    """Find the commands in a document's code: what stands behind ``lac``, up to the command's end."""
    found = []
    for block, span in re.findall(r"```(.*?)```|`([^`]+)`", text, re.DOTALL):
        for line in re.sub(r"\\\n", " ", block).splitlines() or [" ".join(span.split())]:
            found += re.findall(r"(?:^|[;&] )\s*lac ([a-z]+\b[^#|;&]*)", line)
    return found


@cache
def explained(*words: str) -> frozenset[str]:
    """List the options in the help of a verb."""
    text = io.StringIO()
    with redirect_stdout(text), pytest.raises(SystemExit) as stop:
        main([*words, "--help"])
    assert stop.value.code in (0, None)
    return frozenset(re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", text.getvalue()))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_options_of_commands_in_documents_exist(document: Path) -> None:
    for command in commands(document.read_text(encoding="utf-8")):
        verb, suite = command.split()[0], re.findall(r"(--suite) (simpler-[a-z]+)", command)
        used = set(re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", command))
        assert used <= explained(verb, *(suite[0] if suite else ())), command


def test_commands_are_found_in_blocks_and_in_prose() -> None:
    block = "lac train --b 2 \\\n  lac fast --c  # --d\nlac demo && lac view --e\n"
    text = f"Run `lac eval --a\n1`.\n```bash\n{block}```\nlac eval --f"
    assert commands(text) == ["eval --a 1", "train --b 2    lac fast --c  ", "demo ", "view --e"]
    assert len(commands((ROOT / "README.md").read_text(encoding="utf-8"))) > 15
