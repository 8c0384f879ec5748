"""A tiny model in a folder, on a fake simulator."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.evaluation.worlds import FakeEnv, save_tiny

from lac_vla.sims.libero.benchmark import Libero


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(Libero, "make_env", lambda self, task: FakeEnv(self.suite, task))
    monkeypatch.setattr(Libero, "instructions", lambda self: ("pick up the bowl", "open the drawer"))
    return str(save_tiny(tmp_path / "model"))
