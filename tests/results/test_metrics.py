"""A metric is one object: what is added to the registry appears everywhere, from the rollout to the pages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.engine.scenes import frame
from tests.report.pages import Page

from lac_vla import CachedVLA, Frame, Random, random_vla
from lac_vla.client.remote import RemoteReport
from lac_vla.cost import CostModel
from lac_vla.evaluation.rollout import EpisodeLog, rollout
from lac_vla.report import build_report
from lac_vla.results.metrics import METRICS, Metric
from lac_vla.results.records import EpisodeRecord, read_episodes
from lac_vla.results.summary import summarize
from lac_vla.results.table import method_tables
from lac_vla.serving.metrics import Metrics
from lac_vla.serving.sessions import Answer
from lac_vla.serving.snapshot import SessionSnapshot
from lac_vla.session import Session
from lac_vla.sims.base import Env


class Walk:
    """Three steps past changing pictures."""

    suite, task, instruction, horizon = "walk", 0, "walk", 3
    tick = Env.tick

    def reset(self, init_state: int, seed: int = 0) -> Frame:
        self.steps = 0
        return frame(0)

    def step(self, action: Any) -> tuple[Frame, bool]:
        self.steps += 1
        return frame(self.steps), False


def answer(session: Session) -> Answer:
    assert session.last_info is not None
    lac = {
        "late": None,
        "refreshed": 0,
        "waited_ms": 0.0,
        "ratio": session.last_info.ratio,
        "token_budget": None,
        "batch": 1,
    }
    return Answer({"lac": lac, "server_timing": {"infer_ms": 1.0}}, session.last_info, None, frame(0))


def test_one_new_object_appears_the_whole_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metric = Metric(
        "kept_tokens",
        "kept tokens",
        "Visual tokens computed in every layer.",
        lambda step: int(step.active.sum()),
        aggregate=max,
        text="{:.0f} tokens".format,
    )
    monkeypatch.setitem(METRICS, metric.name, metric)
    session = CachedVLA(random_vla("tiny"), Random(0.5)).session()
    record = rollout(EpisodeLog(Walk(), session, "random-0.5", 0))
    most = int(session.last_info.layout.n_visual) if session.last_info else 0
    values = record.metrics["kept_tokens"]
    assert len(values) == 3
    assert values[0] == most, "the first frame is dense"

    (tmp_path / "episodes.jsonl").write_text(json.dumps(record.to_json()) + "\n")
    assert read_episodes(tmp_path / "episodes.jsonl") == [record]
    summary = summarize([record])
    assert summary.methods[0].metrics["kept_tokens"] == most
    table = next(table for table in method_tables(summary) if "kept tokens" in table.headings)
    assert table.rows[0][table.headings.index("kept tokens")] == f"{most} tokens"
    assert "kept tokens: Visual tokens computed in every layer." in table.notes

    page = Page(build_report([tmp_path], tmp_path / "report.html").read_text(encoding="utf-8"))
    place = page.row("Method").index("kept tokens")
    assert page.row("random-0.5")[place] == f"{most} tokens"
    assert metric.help in page.text

    served = Metrics()
    served.count(answer(session), 0.1)
    assert f"lac_kept_tokens_sum {values[-1]:.1f}" in served.text().decode()
    live = SessionSnapshot("s", "robot", 0.0).after(answer(session), 1.0).summary(2.0, 16, None, draw=False)
    shown = {"heading": metric.heading, "help": metric.help, "text": f"{values[-1]} tokens"}
    assert shown in live["metrics"]


def test_every_metric_of_a_session_is_measured_and_a_server_reports_some() -> None:
    session = CachedVLA(random_vla("tiny"), Random(0.5)).session()
    cost = CostModel.of(session.model, frame(0))
    session.act(frame(0))
    session.act(frame(1))
    step = session.last_info
    assert step is not None
    measured = {name: metric.measure(step, cost) for name, metric in METRICS.items()}
    assert measured == {
        "ratio_nominal": step.nominal_ratio,
        "ratio_effective": step.ratio,
        "oldest_age": step.oldest_age,
        "macs": sum(cost.step(step).values()),
        "decode_passes": len(step.decode_passes),
        "accepted": step.accepted,
    }
    assert measured["macs"]
    assert METRICS["macs"].measure(step) is None, "nothing counts"
    report = RemoteReport(0.5, None, 3, {}, 1.0)
    told = {name: metric.measure(report, cost) for name, metric in METRICS.items()}
    assert {name for name, value in told.items() if value is not None} == {"ratio_effective", "oldest_age"}


def test_every_metric_explains_itself() -> None:
    assert len({metric.heading for metric in METRICS.values()}) == len(METRICS)
    for name, metric in METRICS.items():
        assert (name, metric.help[-1]) == (metric.name, ".")
        assert name not in EpisodeRecord.__dataclass_fields__, "in a line, metrics stand beside the fields"
        assert list(metric.buckets) == sorted(metric.buckets)


def test_prometheus_names_stay() -> None:
    session = CachedVLA(random_vla("tiny"), Random(0.5)).session()
    for seed in range(3):
        session.act(frame(seed))
    served = Metrics()
    served.count(answer(session), 0.1)
    text = served.text().decode()
    ratio = np.float64(session.last_info.ratio if session.last_info else np.nan)
    assert f"lac_cache_ratio_sum {ratio}" in text
    assert 'lac_cache_ratio_bucket{le="0.1"} 0.0' in text
    assert "lac_oldest_age_frames_count 1.0" in text
    assert "lac_decode_passes_count 1.0" in text
    assert "macs" not in text
