"""Guided fuzzing for a while; and what is in the corpus, which needs nothing."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.guided import CORPUS, TARGETS, accepts, prepare

SECONDS = int(os.environ.get("FUZZ_SECONDS", "60"))
"""Of every target."""


@pytest.mark.parametrize("target", TARGETS)
def test_the_corpus_is_read_or_refused(target: str, tmp_path: Path) -> None:
    whole, _, read = prepare(target, tmp_path)
    assert accepts(read, whole)
    for file in sorted((CORPUS / target).iterdir()):
        assert accepts(read, file.read_bytes()) == file.name.startswith("good"), file


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="needs atheris: pip install atheris")
@pytest.mark.parametrize("target", TARGETS)
def test_nothing_but_the_projects_errors_is_found(target: str, tmp_path: Path) -> None:
    found = tmp_path / "found"
    found.mkdir()
    (found / "whole").write_bytes(prepare(target, tmp_path / "made")[0])
    command = [sys.executable, "-m", "tests.fuzz.guided", target, str(found), str(CORPUS / target)]
    limits = ["-timeout=20", "-rss_limit_mb=4096", "-max_len=65536", f"-artifact_prefix={tmp_path}/"]
    run = subprocess.run(
        [*command, *limits, f"-max_total_time={SECONDS}"], capture_output=True, text=True, timeout=20 * SECONDS + 600
    )
    print(run.stderr[-300:])
    assert run.returncode == 0, run.stderr[-3000:]
