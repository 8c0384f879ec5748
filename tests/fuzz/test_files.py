"""Damaged files of every kind: what comes out is the file's content or the project's error, in bounded memory."""

from __future__ import annotations

import resource
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lac_vla import LacError
from tests.fuzz.kinds import KINDS, Kind
from tests.fuzz.mutations import mutate

FEW = 15
SECONDS = 20.0
"""The longest that one file may take, on a busy machine."""
GROWTH = 768 * 2**10
"""KiB by which the process may grow, whatever the files say."""


@pytest.fixture(params=KINDS)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Kind, Path]]:
    kind = KINDS[request.param]
    kind.make(tmp_path)
    kind.read(tmp_path)
    yield kind, tmp_path
    shutil.rmtree(tmp_path)  # hundreds of damaged files are of no use to anybody


def try_damaged(kind: Kind, folder: Path, count: int, seed: int) -> int:
    """Read a folder again and again, each time with another damaged file; returns how many were refused."""
    files = sorted(file for pattern in kind.files for file in folder.glob(pattern) if file.is_file())
    assert files
    whole = {file: file.read_bytes() for file in files}
    before, refused = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
    longest = 0
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        file = files[number % len(files)]
        file.write_bytes(mutate(whole[file], file.name, rng))
        began = time.perf_counter()
        try:
            kind.read(folder)
        except LacError as error:
            refused += 1
            longest = max(longest, len(str(error)))
        except Exception as error:
            raise AssertionError(f"number {number} of seed {seed}, {file.name}: {type(error).__name__}") from error
        assert time.perf_counter() - began < SECONDS, (number, seed, file)
        file.write_bytes(whole[file])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GROWTH
    assert longest < 4000
    return refused


def test_some_damaged_files(case: tuple[Kind, Path]) -> None:
    assert try_damaged(*case, FEW, seed=1)


@pytest.mark.slow
def test_many_damaged_files(case: tuple[Kind, Path]) -> None:
    assert try_damaged(*case, case[0].many, seed=2)
