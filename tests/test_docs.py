"""The documents: every command in them is one that the command line takes, and their tables say what the code says."""

from __future__ import annotations

import dataclasses
import functools
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from lac_vla import cli
from lac_vla.cli.help import option_names
from lac_vla.errors import CheckpointError
from lac_vla.policies import POLICIES

ROOT = Path(__file__).parents[1]
FOLDERS = ("docs", "src", "tests", "examples", "integrations", ".github")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))])
REQUIRED = {
    "eval": ("--model M", "--out O"),
    "train": ("--model M", "--dataset D", "--out O"),
    "pretrain": ("--dataset D", "--out O"),
    "serve": ("--model M",),
    "collect": ("--out O",),
    "replay": ("--dataset D",),
    "film": ("outputs/eval", "--out film.mp4"),
}
"""What a command in the middle of a sentence may leave out."""
COMMAND = re.compile(r"(?:^|&& |; )\s*lac ([a-z]+\b.*?)(?=$| && |; |\s+#|\s*\|)")
GAPS = re.compile(r"…|\b(VERB|OPTIONS|NAME)\b")
MENTION = re.compile(r"[a-z]+ --[a-z-]+")
"""A verb and an option, of which a sentence speaks."""


def commands(text: str) -> tuple[list[str], list[str]]:
    """Find what stands behind ``lac``, in blocks of code and in sentences; what has gaps (…, VERB) is no command."""
    blocks = re.findall(r"```.*?\n(.*?)```", text, re.DOTALL)
    rest = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    blocks += re.findall(r"(?:^ {4,}.*\n)+", rest, re.MULTILINE)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", rest)]
    return _commands(blocks), _commands(spans)


def _commands(pieces: Sequence[str]) -> list[str]:
    lines = [line for piece in pieces for line in re.sub(r"\\\n", " ", piece).splitlines()]
    found = [" ".join(command.split()) for line in lines for command in COMMAND.findall(line)]
    return [command for command in found if not GAPS.search(command)]


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[str]], None]:
    """Run the real command line up to the verb, which does nothing. Its files and device need not be there."""
    find = cli.function_of

    def without_effect(verb: str, words: Sequence[str]) -> Any:
        function, rest = find(verb, words)
        return functools.wraps(function)(lambda *_, **__: None), rest

    monkeypatch.setattr(cli, "function_of", without_effect)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.syspath_prepend(ROOT / "examples")

    def run(words: Sequence[str]) -> None:
        try:
            cli.main(list(words))
        except SystemExit as stop:
            if stop.code and not isinstance(stop.__cause__, CheckpointError):
                pytest.fail(f"lac {' '.join(words)}: {stop.__cause__ or 'see what it printed'}")

    return run


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_is_taken(document: Path, parse: Callable[[Sequence[str]], None]) -> None:
    blocks, spans = commands(document.read_text(encoding="utf-8"))
    for command in blocks:
        parse(shlex.split(command))
    for command in spans:
        verb, *words = shlex.split(command)
        if MENTION.fullmatch(command):
            assert words[0] in option_names(cli.function_of(verb, [])[0]), command
            continue
        missing = [item for item in REQUIRED.get(verb, ()) if item.split()[0] not in words]
        parse([verb, *words, *(word for item in missing for word in item.split())])


def test_commands_are_found_in_blocks_and_in_prose(parse: Callable[[Sequence[str]], None]) -> None:
    block = "cd x && lac train --b 2 \\\n  lac fast --c  # --d\nlac demo && lac view --e\nlac VERB --help\n"
    text = f"Run `lac eval --a\n1` or `lac eval …`:\n\n    lac bench --f \\\n        2\n\n```sh\n{block}```\nlac x --g"
    assert commands(text) == (["train --b 2 lac fast --c", "demo", "view --e", "bench --f 2"], ["eval --a 1"])
    blocks, _ = commands((ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(blocks) > 5
    with pytest.raises(pytest.fail.Exception, match="no --modle"):
        parse(["eval", "--modle", "mini", "--out", "o"])
    with pytest.raises(pytest.fail.Exception, match="lac eval --model mini"):
        parse(["eval", "--model", "mini"])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_target_of_make_exists(document: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    text = document.read_text(encoding="utf-8")
    asked = re.findall(r"^(?: {4})?make ([a-z-]+)", text, re.MULTILINE) + re.findall(r"`make\s([a-z-]+)", text)
    assert set(asked) <= targets


@pytest.mark.parametrize(
    "document", [*DOCUMENTS, ROOT / "docs" / "llms.txt"], ids=lambda path: str(path.relative_to(ROOT))
)
def test_links_into_the_repository_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", document.read_text(encoding="utf-8"))
    assert [link for link in links if not (document.parent / link).exists()] == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1000


def test_the_table_of_methods_says_what_there_is() -> None:
    table = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8").split("## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines() if line.startswith("| `")
    ]
    assert [row[0].strip("`") for row in rows] == ["lac", *(name for name in POLICIES if name != "lac")]
    for row in rows:
        name, options = row[0].strip("`"), re.findall(r"`([^`]+)`", row[2])
        if name == "lac":
            continue
        policy: Any = POLICIES[name]
        fields = {
            field.name: f"{field.name}={field.default}" if field.default is not None else field.name
            for field in dataclasses.fields(policy)
        }
        assert options == list(fields.values()), name
