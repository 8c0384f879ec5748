"""Whatever a log holds, reading it gives records that can be shown, or one clear error."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lac_vla import InputError
from lac_vla.report import build_report
from lac_vla.results.records import EpisodeRecord, read_episodes
from lac_vla.results.summary import summarize
from lac_vla.results.table import method_tables

LINE: dict[str, Any] = {
    "method": "dense",
    "suite": "toy",
    "task": 0,
    "instruction": "go",
    "init_state": 1,
    "seed": 0,
    "success": True,
    "steps": 2,
    "horizon": 3,
    "latency_ms": {"observation_to_action": [1.0, 2.0]},
    "ratio_effective": [0.0, 0.5],
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from([*EpisodeRecord.__dataclass_fields__, "ratio_effective", "macs", "oldest_age", "ratio_nominal"])
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def show(folder: Path) -> None:
    for table in method_tables(summarize(read_episodes(folder / "episodes.jsonl"))):
        table.to_terminal()
    build_report([folder], folder / "report.html")


@QUICK
@given(st.lists(st.dictionaries(KEYS, JSON, max_size=3), min_size=1, max_size=3), JSON)
@example([{"latency_ms": {"observation_to_action": ["1"]}}], {})
@example([{"method": "\ud800"}], {"notes": 3})
@example([{"steps": 10**400, "latency_ms": {"model_call": [0, None, 1e308]}}], {"hardware": {"a": [[[[[]]]]]}})
@example([{}, {"method": "other", "latency_ms": {"observation_to_action": [0, 0]}}], {"methods": {"other": [1]}})
def test_a_log_is_shown_or_refused(tmp_path: Path, changes: list[dict[str, Any]], metadata: Any) -> None:
    lines = [json.dumps({**LINE, "init_state": number} | change) for number, change in enumerate(changes)]
    (tmp_path / "episodes.jsonl").write_text("".join(line + "\n" for line in lines))
    (tmp_path / "summary.json").write_text(json.dumps(metadata))
    with contextlib.suppress(InputError):
        show(tmp_path)


@QUICK
@given(st.binary(max_size=40), st.integers(0, 200), st.integers(0, 255))
@example(b"[" * 100_000 + b"\n", 0, 123)
@example(b'{"task": ' + b"1" * 5000 + b"}\n", 0, 123)
@example(b"3\n", 0, 123)
@example(b"null\n[]\n", 0, 123)
def test_damaged_bytes_are_refused_or_read(tmp_path: Path, more: bytes, at: int, byte: int) -> None:
    path, data = tmp_path / "episodes.jsonl", bytearray(json.dumps(LINE).encode() + b"\n")
    data[at % len(data)] = byte
    path.write_bytes(data + more)
    with contextlib.suppress(InputError):
        read_episodes(path)


@pytest.mark.parametrize(
    "change",
    [
        *({"task": -1}, {"task": True}, {"success": 1}, {"steps": 1.5}, {"video": 3}, {"method": ["dense"]}),
        *({"seed": 2**63}, {"actions_per_call": 0}, {"peak_memory_mb": "1"}, {"outcome": []}, {"macs": {"a": 1}}),
        *({"macs": [float("nan")]}, {"macs": [-1]}, {"latency_ms": {"model_call": 1}}),
        {"latency_ms": {"model_call": [float("inf")]}},
    ],
    ids=str,
)
def test_a_value_that_cannot_be_is_named(change: dict[str, Any]) -> None:
    [key] = change
    with pytest.raises(InputError, match="metrics" if key == "macs" else key):
        EpisodeRecord.from_json(LINE | change)
