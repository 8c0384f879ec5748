"""Latency tables: what a frame takes on a device; measured here, derived elsewhere."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lac_vla import CachedVLA, InputError, random_vla
from lac_vla.bench import BenchConfig, make_table
from lac_vla.bench.derived import EFFICIENCY, derive
from lac_vla.bench.latency_table import Measured, fit
from lac_vla.bench.roofline import GPUS
from lac_vla.cli import main
from lac_vla.engine.options import EngineOptions
from lac_vla.engine.step_info import StepInfo
from lac_vla.realtime.device import FOLDER, DeviceTable, Shape, find_tables, fitting, quantities
from lac_vla.timing import STAGES
from tests.engine.scenes import ALL_POLICIES, frame

BUNDLED = sorted(FOLDER.glob("*.json"))


def step(policy: str, *, calls: int = 2, options: str = "none") -> StepInfo:
    """The report of a session's last frame."""
    vla = CachedVLA(random_vla("tiny", seed=3), ALL_POLICIES[policy](), options=EngineOptions.parse(options))
    session = vla.session()
    for index in range(calls):
        session.act(frame(index))
    assert session.last_info is not None
    return session.last_info


def test_units_are_what_the_frame_computed() -> None:
    dense, reused = step("dense", calls=1), step("motion")
    units = quantities(dense, "dense", flow=False)
    assert units["prefill"] == {"fixed": 1.0, "per_share": 1.0}
    assert units["policy"] == {"dense": 0.0}, "nobody was asked about the first frame"
    assert (units["decode"]["per_pass"], units["decode"]["per_row"]) == (6, 6)
    found = quantities(reused, "motion", flow=True)
    assert found["prefill"]["per_share"] == pytest.approx(1 - reused.ratio)
    assert 0 < found["projector"]["per_share"] == np.mean(reused.decision.exit_layer > 0) < 1
    assert (found["policy"], found["flow"]) == ({"motion": 1.0}, {"fixed": 1.0})
    assert quantities(step("vla-cache"), "vla-cache", flow=False)["probe"]["per_share"] > 0.5, "it looks at all rows"
    assert quantities(step("dense", options="draft"), "dense", flow=False)["decode"]["per_pass"] < 6


def test_a_table_is_linear_above_its_floor() -> None:
    table = derive(random_vla("openvla-7b", device="meta"), "rtx4090")
    cost = table.stages["prefill"]
    units = {"prefill": {"fixed": 1.0, "per_share": 1.0}}
    assert table.milliseconds(units) == pytest.approx(cost["fixed"] + cost["per_share"])
    assert table.milliseconds(units) > cost["floor"]
    assert table.milliseconds({"prefill": {"fixed": 1.0, "per_share": 0.0}}) == cost["floor"] > cost["fixed"]
    twice = {"prefill": {"fixed": 2.0, "per_share": 0.0}}
    assert table.milliseconds(twice) == pytest.approx(2 * cost["floor"])
    assert [replace(table, jitter=(0.5, 1.0, 3.0)).factor(at) for at in (0, 0.25, 0.5, 1)] == [0.5, 0.75, 1.0, 3.0]


@pytest.mark.parametrize("path", BUNDLED, ids=lambda path: path.stem)
def test_the_packages_tables_say_where_they_come_from(path: Path) -> None:
    table = DeviceTable.read(path)
    assert (table.name, table.device) == (path.stem, path.stem[: len(table.device)])
    assert table.source
    assert table.baseline
    if table.device not in GPUS:
        assert not table.shape.scaled, "measured, or to be: for its own model alone"
        return
    again = derive(random_vla(table.shape.model, device="meta"), table.device)
    assert again == table, "the command in its source writes it"
    assert table.shape.scaled


def test_the_derived_prefill_is_the_roofline_at_the_published_efficiency() -> None:
    """By hand, from the shapes: 286 rows, and 6.48 G parameters in the layers."""
    stages = derive(random_vla("openvla-7b", device="meta"), "rtx4090").stages
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert stages["decode"]["per_pass"] == pytest.approx(2 * weights / 1.008e12 * 1e3 / EFFICIENCY, rel=1e-4)
    rows = 2 * 286 * (weights + 32 * 2 * 4096 * 286) / 165.2e12 * 1e3 / EFFICIENCY
    assert stages["prefill"]["fixed"] + stages["prefill"]["per_share"] == pytest.approx(rows, rel=1e-4)


def test_a_device_has_a_table_for_every_model_that_it_can_play() -> None:
    for preset, name in (("openvla-7b", "rtx4090-openvla-7b"), ("cogact-tiny", "rtx4090-cogact-7b")):
        assert fitting(find_tables("rtx4090"), random_vla(preset, device="meta")).name == name
    oft = find_tables("agx-orin-openvla-7b-oft")
    assert fitting(oft, random_vla("cogact-tiny", device="meta")).shape.model == "openvla-7b-oft"
    with pytest.raises(InputError, match="for the family openvla"):
        fitting(find_tables("rtx4090-openvla-7b"), random_vla("cogact-tiny", device="meta"))
    with pytest.raises(InputError, match=r"4 layers of 192 and 212 visual tokens, and .* has"):
        fitting(find_tables("cpu-mini"), random_vla("tiny"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"stages": {"prefill": {"fixed": -1.0}}}, "finite number, at least 0"),
        ({"stages": {"prefill": {"fixed": float("nan")}}}, "finite"),
        ({"stages": {"prefill": {"fixed": float("inf")}}}, "finite"),
        ({"stages": {"prefill": {"fixed": "fast"}}}, "no latency table"),
        ({"stages": {"prefill": {"fixed": 0.0}}}, "no time for the prefill"),
        ({"stages": {"prefill": {"fixed": 1.0}, "coffee": {"fixed": 1.0}}}, "the stages and their numbers are"),
        ({"stages": {"prefill": {"per_cup": 1.0}}}, "the stages and their numbers are"),
        ({"stages": [1]}, "no latency table"),
        ({"jitter": []}, "jitter"),
        ({"jitter": [1.0, 0.5]}, "quantiles never fall"),
        ({"jitter": [0.0, 1.0]}, "above 0"),
        ({"kind": "guessed"}, "kind"),
        ({"shape": {"model": "x", "families": ["gpt"], "layers": 1, "width": 1, "visual_tokens": 1}}, "give some of"),
        ({"shape": {"model": "x"}}, "no latency table"),
        ({"extra": 1}, "no latency table"),
    ],
)
def test_a_table_that_cannot_be_is_refused(wrong: dict[str, Any], message: str, tmp_path: Path) -> None:
    content = json.loads(BUNDLED[0].read_text())
    (tmp_path / "t.json").write_text(json.dumps({**content, **wrong}))
    with pytest.raises(InputError, match=message):
        DeviceTable.read(tmp_path / "t.json")


def test_a_table_comes_back_from_its_file(tmp_path: Path) -> None:
    table = replace(derive(random_vla("cogact-7b", device="meta"), "thor"), jitter=(0.9, 1.0, 1.4))
    (tmp_path / "t.json").write_text(json.dumps(table.to_json()))
    assert DeviceTable.read(tmp_path / "t.json") == table


def test_the_fit_finds_the_costs_behind_noisy_frames() -> None:
    rng = np.random.default_rng(0)
    frames = []
    for index in range(400):
        share, passes, sparse = float(rng.choice([0.1, 0.4, 1.0])), int(rng.integers(1, 7)), index % 2
        spent = dict.fromkeys(STAGES, 0.0) | {"preprocess": 1.0, "bookkeeping": 0.5}
        spent |= {"tower": 3.0, "prefill": 4.0 + 10.0 * share, "decode": 1.5 * passes, "flow": 0.6 * sparse}
        spent |= {"policy": 2.0 * sparse}
        noisy = {stage: ms * (5.0 if rng.random() < 0.05 else 1.0) for stage, ms in spent.items()}
        units = {
            "host": {"fixed": 1.0}, "flow": {"fixed": float(sparse)}, "policy": {"motion": float(sparse)},
            "vision": {"fixed": 1.0, "per_share": 1.0}, "projector": {"fixed": 1.0, "per_share": share},
            "prefill": {"fixed": 1.0, "per_share": share}, "probe": {"per_share": 0.0},
            "decode": {"per_pass": float(passes), "per_row": float(passes)}, "head": {"fixed": 1.0, "per_step": 0.0},
        }  # fmt: skip
        frames.append(Measured("motion", units, noisy))
    costs = fit(frames)
    assert (costs["host"]["fixed"], costs["flow"]["fixed"], costs["policy"]["motion"]) == (1.5, 0.6, 2.0)
    assert costs["prefill"] == pytest.approx({"fixed": 4.0, "per_share": 10.0}, abs=0.05)
    assert costs["vision"]["fixed"] + costs["vision"]["per_share"] == pytest.approx(3.0, abs=0.05)
    assert costs["decode"]["per_pass"] + costs["decode"]["per_row"] == pytest.approx(1.5, abs=0.05)
    assert (costs["probe"]["per_share"], costs["head"]["per_step"]) == (0.0, 0.0)


def test_this_machine_is_measured_and_its_table_plays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "here.json"
    main(["bench", "--random-weights", "tiny", "--latency-table", str(out), "--frames", "6", "--threads", "1"])
    table = DeviceTable.read(out)
    assert (table.kind, table.name, table.device, table.shape) == (
        "measured",
        "here",
        "cpu",
        Shape.of(random_vla("tiny")),
    )
    assert "latency table here" in " ".join(capsys.readouterr().out.split())
    assert len(table.jitter) == 21
    assert table.factor(0.5) == pytest.approx(1.0)
    assert "48 frames, synthetic" in table.source
    assert fitting(find_tables(str(out)), random_vla("tiny")) == table
    assert table.milliseconds(quantities(step("dense", calls=1), "dense", flow=False)) > 0


def test_what_cannot_be_written_is_refused_before_anything_is_measured() -> None:
    with pytest.raises(InputError, match=r"\*\.json"):
        make_table(BenchConfig(latency_table=Path("table.txt")))
