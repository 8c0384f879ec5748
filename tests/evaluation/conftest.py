"""A tiny model in a folder, on a fake simulator."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.evaluation.worlds import FakeEnv

from lac_vla import random_vla, save_vla
from lac_vla.evaluation import worker
from lac_vla.models.prismatic.prompt import FileTokenizer, train_tokenizer


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(worker, "LiberoEnv", FakeEnv)
    monkeypatch.setattr(worker, "instructions", lambda suite: ("pick up the bowl", "open the drawer"))
    backbone = random_vla("tiny")
    words = backbone.model.config.vocab_size - backbone.model.config.n_action_bins
    backbone.encode = FileTokenizer(train_tokenizer(["pick up the bowl"], max(words, 259)))
    save_vla(backbone, tmp_path / "model")
    return str(tmp_path / "model")
