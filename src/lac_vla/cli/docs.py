"""Reads docstrings in Google style: help is what the code says of itself."""

from __future__ import annotations

import inspect
import re

_SECTION = r"^(?:Attributes|Args):\n((?:[ ]{4}.*\n?|\n(?=[ ]{4}))*)"
_ITEM = r"^ {4}(\w+)(?: \([^)]*\))?: ((?:.*\n?)(?:^ {8}.*\n?)*)"


def summary(doc: str | None) -> str:
    """Return the first paragraph, as plain text in one line."""
    return plain(inspect.cleandoc(doc or "").split("\n\n")[0])


def preamble(doc: str | None) -> list[str]:
    """Return the paragraphs before the first section, as plain text, a line each."""
    text = re.split(r"\n\n(?=(?:Attributes|Args|Returns|Raises|Yields):\n)", inspect.cleandoc(doc or ""))[0]
    return [plain(paragraph) for paragraph in text.split("\n\n")]


def items(doc: str | None) -> dict[str, str]:
    """Return what the sections ``Attributes`` and ``Args`` say: name → plain text in one line."""
    found: dict[str, str] = {}
    for section in re.findall(_SECTION, inspect.cleandoc(doc or ""), re.M):
        for name, text in re.findall(_ITEM, section, re.M):
            found[name] = plain(text)
    return found


def plain(text: str) -> str:
    """Take the marks of reStructuredText away, and all line breaks."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"\1", text)
    return " ".join(text.replace("``", "").split())
