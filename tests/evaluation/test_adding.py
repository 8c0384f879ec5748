"""A policy, or an action head, takes one object and one line in a registry: all else is there."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from tests.evaluation.worlds import FakeEnv, save_tiny

from lac_vla.evaluation.config import EvalConfig
from lac_vla.evaluation.runner import evaluate
from lac_vla.models import FAMILIES, VLA
from lac_vla.models.heads.base import ActionHead, AppendRows, Decoding, HeadContext
from lac_vla.policies import POLICIES, CachePolicy, cache_lowest
from lac_vla.report import build_report
from lac_vla.results.records import EpisodeRecord, read_episodes
from lac_vla.results.summary import summarize
from lac_vla.results.table import method_tables
from lac_vla.sims.libero.benchmark import Libero
from lac_vla.types import Decision, PolicyInput


@pytest.fixture(autouse=True)
def fake_simulator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Libero, "make_env", lambda self, task: FakeEnv(self.suite, task))


def play(model: Path, out: Path, *policies: str) -> dict[str, list[EpisodeRecord]]:
    """Evaluate, and see every method in records, summary, tables and the page."""
    run = evaluate(EvalConfig(str(model), out, policies, tasks=(0,), init_states=(3, 5), videos=0))
    episodes = read_episodes(run / "episodes.jsonl")
    by_method = {name: [e for e in episodes if e.method == name] for name in dict.fromkeys(e.method for e in episodes)}
    summary = summarize(episodes)
    cells = [cell for table in method_tables(summary) for row in table.rows for cell in row]
    page = build_report([run], out / "report.html").read_text(encoding="utf-8")
    for name, found in by_method.items():
        row = summary.row(name)
        assert row is not None
        assert (row.trials, len(found)) == (2, 2)
        assert name in cells
        assert name in page
    return by_method


@dataclass(frozen=True)
class TopRows(CachePolicy):
    """Reuses the tokens at the top of every picture."""

    ratio: float = 0.5

    def decide(self, inputs: PolicyInput) -> Decision:
        place = np.concatenate([np.arange(c.size) / c.size for c in inputs.layout.cameras])
        return Decision.reuse(cache_lowest(place, self.ratio), inputs.n_layers, nominal_ratio=self.ratio)


def test_a_policy_is_one_class_and_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POLICIES, "top-rows", TopRows)
    played = play(save_tiny(tmp_path / "tiny"), tmp_path / "run", "dense", "top-rows:ratio=0.25")
    assert list(played) == ["dense", "top-rows-0.25"]
    for episode in played["top-rows-0.25"]:
        assert episode.metrics["ratio_nominal"][1:] == [0.25] * (len(episode.metrics["ratio_nominal"]) - 1)
        assert episode.metrics["ratio_effective"][1:] == pytest.approx([0.25] * (len(episode.metrics["macs"]) - 1))


class ToyExpert(ActionHead):
    """Answers with a chunk of two actions that it reads from keys and values; its own row runs behind the prompt."""

    reads: ClassVar = "kv"
    horizon = 2
    max_new_tokens = 1

    def __init__(self, vla: VLA) -> None:
        self.weight = torch.linspace(-1, 1, 14 * vla.decoder.head_dim).view(14, -1)
        self.stack = vla.decoder  # the same blocks again, over the same keys and values
        self.start = torch.ones(1, vla.decoder.shape.width)

    def decode(self, context: HeadContext) -> Decoding:
        assert context.hidden.shape[0] == 0, "the last layer computed no queries"
        read = context.values(1)[:, context.layout.visual].mean(dim=(0, 1)) + context.keys(0).mean(dim=(0, 1))
        row = yield AppendRows(self.start, 0, self.stack)
        action = torch.tanh(self.weight @ read + row.mean()).view(2, 7).numpy()
        return action, {"normalized": action.tolist()}


def test_a_head_that_reads_keys_and_values_is_one_class_and_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = FAMILIES["openvla"]

    def load(folder: Path, data: Any, **options: Any) -> VLA:
        vla = base.load(folder, data, **options)
        return replace(vla, head=ToyExpert(vla), family="toy")

    monkeypatch.setitem(FAMILIES, "toy", replace(base, load=load))
    model = save_tiny(tmp_path / "tiny")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "toy"}))
    played = play(model, tmp_path / "run", "dense", "random:ratio=0.5", "motion:ratio=0.5", "staged@vla-cache")
    dense, reused = (played[name][0].metrics for name in ("dense", "random-0.5"))
    assert max(reused["ratio_effective"]) == pytest.approx(0.5)
    assert dense["macs"][1] > reused["macs"][1] > 0


def test_such_a_heads_answer_depends_on_what_is_reused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its keys and values are the cache's: with everything recomputed it answers as dense does, else it need not."""
    from tests.engine.scenes import frame

    from lac_vla import CachedVLA, Dense, Random, random_vla

    vla = random_vla("tiny", seed=3)
    vla = replace(vla, head=ToyExpert(vla))
    dense, full, half = (CachedVLA(vla, p).session() for p in (Dense(), Random(0.0), Random(0.5)))
    for i in range(3):
        expected = dense.act(frame(i))
        np.testing.assert_allclose(full.act(frame(i)), expected, atol=1e-6)
        answer = half.act(frame(i))
    assert np.abs(answer - expected).max() > 1e-4
