"""Reads a report's page: as text, and as a browser shows it."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from lac_vla.drawing.video import VideoFile

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--window-size=1280,900",
    "--virtual-time-budget=8000",
]


class Page(HTMLParser):
    """Rows of the tables as lists of cells' texts, all text, and every address that the page refers to."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.paragraphs: list[str] = []
        self._open: str | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._open = tag if tag in ("script", "style") else None
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "poster", "srcset")]
        if tag == "tr":
            self.rows.append([])
        if "notes" in dict(attrs).values():
            assert tag == "figcaption", "what holds for a table stands in its figure"
        if tag == "p":
            self.paragraphs.append("")
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self._open is None:
            self.text += data
            if self.paragraphs:
                self.paragraphs[-1] += data
            if self.rows and self.rows[-1]:
                self.rows[-1][-1] += data

    def handle_endtag(self, tag: str) -> None:
        self._open = None
        if tag == "table":
            self.rows.append([])

    def paragraph(self, begin: str) -> str:
        """The first paragraph that begins so; spaces made single."""
        return next(text for text in (" ".join(each.split()) for each in self.paragraphs) if text.startswith(begin))

    def row(self, first: str) -> list[str]:
        """The first row whose first cell is ``first``; spaces within cells made single."""
        rows = [[" ".join(cell.split()) for cell in row] for row in self.rows]
        return next(row for row in rows if row and row[0] == first)


def check_self_contained(html: Path) -> None:
    """Nothing on the page is loaded from anywhere else."""
    source = html.read_text(encoding="utf-8")
    page = Page(source)
    assert [address[:60] for address in page.addresses if not address.startswith(("data:", "#"))] == []
    assert "link" not in page.tags or page.addresses[0] == "data:,"
    bare = re.sub(r'"data:[^"]*"', '""', source)
    for loader in ("http://", "https://", "@import", "url(", "fetch(", "XMLHttpRequest", "import("):
        assert loader not in bare


def dump_dom(html: Path, tmp_path: Path) -> str:
    """The page's document after its scripts ran in Chromium."""
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", html.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=True).stdout


def write_video(path: Path, frames: Iterable[np.ndarray], fps: int = 20) -> Path:
    """A video of these frames."""
    video = VideoFile(path, fps)
    for frame in frames:
        video.add(frame)
    video.close()
    return path
