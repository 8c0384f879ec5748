"""``lac bench``: that what it compares is the same computation, and that its file says what was measured."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import replace
from mmap import mmap
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from rich.console import Console

from lac_vla import VLA, CachedVLA, CheckpointError, Dense, InputError, LacError, MissingExtraError, random_vla
from lac_vla.bench import BenchConfig, BenchResult, bench_tables, engine, model, run, run_bench
from lac_vla.bench import config as bench_config
from lac_vla.bench.batch import Robots
from lac_vla.bench.chart import COLOURS
from lac_vla.bench.config import SHAPES
from lac_vla.bench.engine import LAYOUT, Prefills
from lac_vla.bench.frame import _targets as frame_targets
from lac_vla.bench.frame import measure_frames
from lac_vla.bench.lerobot_session import LeRobotSession
from lac_vla.bench.measure import Ratio, Target, take_turns
from lac_vla.bench.memory import resident_mb
from lac_vla.bench.methods import cached_vla, make_methods
from lac_vla.bench.roofline import Roofline, floors
from lac_vla.bench.scene import make_scene, synthetic
from lac_vla.bench.stock import StockSession
from lac_vla.bench.sweep import expand, scripted
from lac_vla.cost import layer_macs
from lac_vla.dataset_keys import DatasetKeys
from lac_vla.datasets import DatasetWriter, LeRobotDataset
from lac_vla.engine.plan import FramePlan, FrameResult
from lac_vla.models.cogact.config import TINY_COGACT
from lac_vla.models.heads.tokens import TokenHead
from lac_vla.models.prismatic.presets import LLAMA_8X512, PRESETS
from lac_vla.models.protocols import DecoderShape
from lac_vla.policies import POLICIES, Random
from lac_vla.timing import STAGES, WINDOWS, Stopwatch
from lac_vla.types import Decision, TokenLayout
from tests.engine.scenes import frame as shot

SMALL = replace(
    LLAMA_8X512,
    text_config={
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512 + 64,
        "pad_token_id": 0,
    },
)


def with_small_shape(patch: pytest.MonkeyPatch) -> None:
    """Add a decoder of milliseconds, which the targets are applied to."""
    patch.setitem(PRESETS, "small", SMALL)
    patch.setattr(bench_config, "SHAPES", (*SHAPES, "small"))
    patch.setattr(engine, "TARGET_SHAPE", "small")


@pytest.fixture(scope="module")
def tiny() -> VLA:
    return random_vla("tiny", seed=2)


@pytest.fixture(autouse=True)
def small_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    with_small_shape(monkeypatch)


def config(out: Path, **changes: Any) -> BenchConfig:
    quick = BenchConfig(
        out=out,
        random_weights="tiny",
        shape="small",
        active=(0.5, 0.25),
        rounds=3,
        policies=("motion:ratio=0.5", "random:ratio=0.25"),
        frames=4,
        warmup=1,
        memory_frames=25,
        threads=1,
    )
    return replace(quick, **changes)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two episodes of 3 and 4 frames with the tiny model's cameras and a state of 5 numbers."""
    root = tmp_path_factory.mktemp("bench") / "demos"
    frames = synthetic(("agentview", "wrist"), 5, 7, 0).frames
    with DatasetWriter(root, 10) as writer:
        for part in (frames[:3], frames[3:]):
            images = {camera: np.stack([f.images[camera] for f in part]) for camera in ("agentview", "wrist")}
            state = np.stack([f.proprio for f in part])
            writer.add_episode(images=images, state=state, action=np.zeros((len(part), 7), np.float32), task="wave")
    return root


# What is compared is the same computation.


@torch.inference_mode()
@pytest.mark.parametrize("active", [1.0, 0.5, 0.1])
def test_stock_and_engine_prefill_the_same(active: float) -> None:
    """The prompt is the cached one, so that reuse must be exact as well."""
    prefills = Prefills(random_vla(SMALL), seed=0)
    decision = prefills.decision(active)
    assert decision.active.sum() == round(active * LAYOUT.n_visual)
    torch.testing.assert_close(prefills.ours(decision)(), prefills.stock(), rtol=1e-5, atol=1e-5)


def test_stock_and_dense_session_act_the_same(tiny: VLA) -> None:
    stock, session = StockSession(tiny), CachedVLA(tiny, Dense()).session()
    for frame in synthetic(("agentview", "wrist"), None, 4, 1).frames:
        np.testing.assert_allclose(stock.act(frame), session.act(frame), atol=1e-6)
        assert stock.last_info is not None
        assert session.last_info is not None
        assert stock.last_info.metadata["tokens"] == session.last_info.metadata["tokens"]
        assert stock.last_info.stages["prefill"] > 0
        assert stock.last_info.stages["bookkeeping"] == 0


@torch.inference_mode()
def test_the_stock_model_sees_everything_where_ours_does() -> None:
    """Stock Llama without a mask would be causal, and another model."""
    oft = random_vla("oft-tiny", seed=2)
    stock, session = StockSession(oft), CachedVLA(oft, Dense()).session()
    for frame in synthetic(("agentview", "wrist"), None, 2, 1).frames:
        np.testing.assert_allclose(stock.act(frame), session.act(frame), rtol=1e-5, atol=1e-5)
    prefills = Prefills(oft, seed=0)
    torch.testing.assert_close(prefills.ours(prefills.decision(0.5))(), prefills.stock(), rtol=1e-5, atol=1e-5)


def test_stock_and_dense_session_draw_the_same_from_cogact() -> None:
    """The same noise too, episode by episode."""
    cogact = random_vla(TINY_COGACT, seed=2)
    stock, session = StockSession(cogact, seed=7), CachedVLA(cogact, Dense()).session(seed=7)
    for episode in range(2):
        for observation in synthetic(("agentview", "wrist"), None, 2, episode).frames:
            np.testing.assert_allclose(stock.act(observation), session.act(observation), atol=1e-4)
            assert stock.last_info is not None
            assert stock.last_info.decode_passes == ()
            assert stock.last_info.stages["prefill"] > 0 < stock.last_info.stages["decode"]
        stock.reset()
        session.reset()


# Sweeps.


@pytest.mark.parametrize(
    ("text", "specs"),
    [
        ("random:ratio=.25,.5", ["random:ratio=.25", "random:ratio=.5"]),
        ("motion:ratio=.5,keep=wrist", ["motion:ratio=.5,keep=wrist"]),
        ("m:a=1,2,b=3,4", ["m:a=1,b=3", "m:a=1,b=4", "m:a=2,b=3", "m:a=2,b=4"]),
        ("dense", ["dense"]),
        ("motion:.5", ["motion:.5"]),
    ],
)
def test_several_values_are_several_policies(text: str, specs: list[str]) -> None:
    assert expand(text) == specs


@pytest.mark.parametrize("kept", [0, 2, 6])
@pytest.mark.parametrize("policy", [Dense(), Random(0.5)], ids=["dense", "random"])
def test_so_many_drafted_tokens_are_accepted_as_were_prescribed(tiny: VLA, policy: Any, kept: int) -> None:
    """Behind them every pass settles one token, whatever the frame and whatever is reused."""
    assert isinstance(tiny.head, TokenHead)
    session = CachedVLA(scripted(tiny, tiny.head, kept), policy).session()
    for seed in range(3):
        session.act(shot(seed))
        assert session.last_info is not None
        starts = [start for start, _ in session.last_info.decode_passes]
        assert starts == (list(range(6)) if seed == 0 else list(range(kept, 6)))
        assert session.last_info.draft == (0 if seed == 0 else 6)


# Floors.

LLAMA_7B = DecoderShape(layers=32, width=4096, kv_width=4096, ffn=11008)


@pytest.mark.parametrize(
    ("gpu", "ridge", "prefill", "decode"),
    [("rtx4090", 164, 22.6, 12.8), ("a100", 153, 12.0, 6.4), ("h100", 295, 3.9, 3.9), ("h200", 206, 3.8, 2.7)],
)
def test_floors_of_a_7b_decoder(gpu: str, ridge: float, prefill: float, decode: float) -> None:
    """Worked out by hand: 1.867 T MACs for 285 rows in every layer, 12.95 GB of weights."""
    roofline = Roofline(gpu, LLAMA_7B)
    assert roofline.ridge == pytest.approx(ridge, rel=0.005)
    assert roofline.weight_ms == pytest.approx(decode, rel=0.01)
    every_row = roofline.compute_ms(32 * layer_macs(LLAMA_7B, 285, 285))
    assert max(every_row, roofline.weight_ms) == pytest.approx(prefill, rel=0.01)
    layout = TokenLayout.of({"camera": (16, 16)}, 1, 28)
    least = roofline.prefill_ms(layout, Decision.dense(256, 32), n_queries=28)
    assert 0.96 * prefill < least < 1.01 * prefill  # in the last layer few rows have queries
    assert roofline.decode_ms(layout, Decision.dense(256, 32), [(0, 1), (1, 2)]) == 2 * roofline.weight_ms


def test_below_the_ridge_fewer_rows_buy_nothing() -> None:
    layout = TokenLayout.of({"camera": (16, 16)}, 1, 28)
    result = floors(Roofline("h200", LLAMA_7B), "x", layout, 7, (0.75, 0.5, 0.1), n_queries=28)
    assert [row.rows for row in result.rows] == [285, 221, 157, 55]
    assert [row.bound for row in result.rows] == ["compute", "compute", "bandwidth", "bandwidth"]
    assert result.rows[2].faster == result.rows[3].faster
    assert result.passes == 6
    assert result.rows[0].action_ms == pytest.approx(result.rows[0].prefill_ms + 6 * result.pass_ms)


def test_floors_of_a_7b_model_need_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "_free_memory", lambda: 0)
    for name, passes in (("openvla-7b", 6), ("cogact-7b", 0)):
        ran = run_bench(config(tmp_path, random_weights=name, sections=("roofline",), roofline="a100"))
        assert ran.roofline is not None
        assert ran.roofline.parameters == 32 * (4 * 4096**2 + 3 * 4096 * 11008)
        assert (ran.roofline.visual_tokens, ran.roofline.passes) == (256, passes)
        assert ran.targets == ()
        assert len(bench_tables(ran)) == 1


def test_floors_are_of_what_the_engine_computes(tmp_path: Path) -> None:
    """In the last layer the suffix alone has queries; a state is part of it."""
    ran = run_bench(config(tmp_path, random_weights="mini", sections=("roofline",), roofline="h200"))
    assert ran.roofline is not None
    mini = random_vla("mini", device="meta")
    roofline, n_suffix = Roofline("h200", mini.decoder.shape), ran.roofline.tokens - ran.roofline.visual_tokens - 1
    layout = TokenLayout.of(mini.grids, 1, n_suffix)
    dense = Decision.dense(layout.n_visual, mini.n_layers)
    assert ran.roofline.rows[0].prefill_ms == roofline.prefill_ms(layout, dense, n_queries=n_suffix)
    assert ran.roofline.rows[0].prefill_ms < roofline.prefill_ms(layout, dense)


# A model that says no tokens; floors, sweeps and the chart of a whole run.


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> BenchResult:
    with pytest.MonkeyPatch.context() as patch:
        with_small_shape(patch)
        return run_bench(
            config(
                tmp_path_factory.mktemp("swept"),
                sections=("frame",),
                policies=("random:ratio=.5,.9",),
                options=("draft", "default+bucket=8+cuda_graphs"),
                acceptance=(0.5,),
                roofline="h100",
            )
        )


def test_a_sweep_says_what_is_prescribed(swept: BenchResult) -> None:
    assert swept.frame is not None
    rows = {row.name: row for row in swept.frame.rows}
    methods = ["dense", "random:ratio=.5", "random:ratio=.9"]
    optioned = [f"{m} +{option}{end}" for option in ("draft", "default+bucket=8+cuda_graphs") for m in methods
               for end in ("", ", 3/6 accepted")]  # fmt: skip
    assert list(rows) == ["dense stock", *methods, *optioned]
    half = rows["random:ratio=.9 +default+bucket=8+cuda_graphs, 3/6 accepted"]
    assert half.swept == ("ratio", "acceptance")
    assert (half.accepted, half.passes, half.same_actions) == (0.5, 3, None)
    assert half.ratio_effective == pytest.approx(1 - 8 / 52)
    assert half.faster_than_equal["model_call"] != half.faster_than_dense["model_call"]
    assert rows["dense +draft"].swept == ()
    assert rows["random:ratio=.5"].swept == ("ratio",)
    assert swept.frame.random_weights
    assert json.loads((swept.config.out / "bench.json").read_text(encoding="utf-8"))["frame"]["rows"][-1]["swept"]


def test_every_row_has_its_own_floor(swept: BenchResult) -> None:
    assert swept.frame is not None
    rows = {row.name: row for row in swept.frame.rows}
    floor = Roofline("h100", random_vla("tiny").decoder.shape)
    assert rows["dense"].floor_ms["prefill"] >= rows["random:ratio=.9"].floor_ms["prefill"] >= floor.weight_ms
    assert rows["dense"].floor_ms["decode"] == pytest.approx(6 * floor.weight_ms)
    assert rows["dense +draft, 3/6 accepted"].floor_ms["decode"] < rows["dense"].floor_ms["decode"]
    assert all(row.times_floor == {} for row in rows.values())  # this is no H100
    text = shown(swept)
    for word in ("84.6 % swept", "50.0 % swept", "floors of one h100", "floors only", "random weights: what is reused"):
        assert word in text


def test_the_chart_shows_every_stage_of_every_row(swept: BenchResult) -> None:
    assert swept.frame is not None
    root = ET.fromstring((swept.config.out / "bench.svg").read_text(encoding="utf-8"))
    space = {"s": "http://www.w3.org/2000/svg"}
    words = {element.text for element in root.findall("s:text", space)}
    assert {row.name for row in swept.frame.rows} | set(STAGES) <= words
    boxes = root.findall("s:rect", space)
    assert len(boxes) == len(STAGES) * (1 + len(swept.frame.rows))
    dense = next(row for row in swept.frame.rows if row.name == "dense")
    titled = {box.findtext("s:title", namespaces=space): float(box.get("width", "0")) for box in boxes}
    widths = {stage: next(w for t, w in titled.items() if t and t.startswith(f"dense: {stage} ")) for stage in COLOURS}
    longest = max(STAGES, key=lambda stage: dense.stages_ms[stage].p50)
    assert max(widths, key=lambda stage: widths[stage]) == longest
    assert len(root.findall("s:line[@class='floor']", space)) == len(swept.frame.rows)


def test_a_model_without_tokens_is_measured_like_any_other(tmp_path: Path) -> None:
    ran = run_bench(config(tmp_path, random_weights="cogact-tiny", sections=("frame",), options=("default",)))
    assert ran.frame is not None
    rows = {row.name: row for row in ran.frame.rows}
    assert ran.frame.model == "cogact-tiny"
    assert rows["dense stock"].same_actions == rows["dense"].same_actions == 1
    assert all(row.passes == 0 and row.accepted is None for row in rows.values())


@pytest.mark.parametrize("name", ["smolvla-tiny", "pi0-tiny", "pi05-tiny"])
def test_a_model_whose_expert_reads_keys_and_values_has_no_stock_row(name: str, tmp_path: Path) -> None:
    ran = run_bench(config(tmp_path, random_weights=name, sections=("frame", "memory"), options=("default",)))
    assert ran.frame is not None
    rows = {row.name: row for row in ran.frame.rows}
    assert "dense stock" not in rows
    assert all(row.faster_than_stock == {} and row.same_actions is None for row in rows.values())
    dense, policy = rows["dense"], next(row for row in rows.values() if not row.name.startswith("dense"))
    assert 0 < policy.macs["prefill"] < dense.macs["prefill"]
    assert policy.macs["decode"] == dense.macs["decode"] > 0  # the expert is not cached
    assert all(row.windows_ms["observation_to_action"].p50 > 0 for row in rows.values())
    console = Console(width=400, record=True)
    for table in bench_tables(ran):
        console.print(table)
    assert "no dense stock" in console.export_text()


def test_time_may_end_a_section(tmp_path: Path) -> None:
    ran = run_bench(config(tmp_path, sections=("frame",), frames=60, minutes=1e-6, options=()))
    assert ran.frame is not None
    assert ran.frame.frames == 1


def test_the_gpu_script_runs_on_a_cpu(tmp_path: Path) -> None:
    """A step that fails does not stop the others, and is named."""
    script = Path(__file__).parents[1] / "scripts" / "gpu_session.sh"
    env = {**os.environ, "PYTHON": sys.executable, "GPU_TESTS": "--no-such-option"}
    command = ["bash", script, "--device", "cpu", "--random-weights", "tiny", "--out", tmp_path, "--minutes", "20"]
    subprocess.run(command, check=True, env=env, timeout=1200)
    traces = "traces-frame-tiny.tar"
    assert {file.name for file in tmp_path.iterdir()} == {"results.tar.gz", "steps.txt", "summary.md", traces}
    ends = {line.split()[0]: line.split()[-1] for line in (tmp_path / "steps.txt").read_text().splitlines()[1:]}
    assert {name for name, end in ends.items() if end == "failed"} == {"tests"}
    assert ends.keys() == {"tests", "frame-tiny", "batch-tiny", "kernels"}
    summary = (tmp_path / "summary.md").read_text(encoding="utf-8")
    for row in ("dense stock", "random:ratio=.8 +default+bucket=16+cuda_graphs", "one frame under the profiler"):
        assert row in summary
    with tarfile.open(tmp_path / "results.tar.gz") as packed:
        names = {Path(name).name for name in packed.getnames() if "/frame-tiny/" in name}
    assert {"bench.json", "bench.svg", "log.txt"} <= names
    with tarfile.open(tmp_path / traces) as packed:
        assert "trace-0.json.gz" in packed.getnames()


def test_every_round_runs_every_variant() -> None:
    orders = [order for _, order in take_turns(["a", "b", "c"], 20, 0, "test")]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert len({tuple(order) for order in orders}) > 1


def test_a_ratio_of_medians_and_the_quartiles_of_its_rounds() -> None:
    ratio = Ratio.of([2.0, 4.0, 60.0, 8.0, 9.0], [1.0, 2.0, 4.0, 8.0, 3.0])
    assert ratio == Ratio(8 / 3, 2.0, 3.0)
    assert Target.at_most("x", ratio, 2.7).reached
    assert not Target.at_least("x", ratio, 2.7).reached


def test_the_synthetic_scene_moves_before_a_background_that_stands_still() -> None:
    first, later = (f.images["cam"].astype(int) for f in synthetic(("cam",), None, 11, 0).frames[::10])
    change = np.abs(later - first).max(axis=2)
    assert 0.02 < (change > 30).mean() < 0.2
    assert 0 < np.median(change) < 10


# The file.


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> BenchResult:
    with pytest.MonkeyPatch.context() as patch:
        with_small_shape(patch)
        return run_bench(config(tmp_path_factory.mktemp("out")))


@pytest.fixture(scope="module")
def content(result: BenchResult) -> dict[str, Any]:
    return json.loads((result.config.out / "bench.json").read_text(encoding="utf-8"))


def test_the_file_says_under_which_conditions(content: dict[str, Any]) -> None:
    assert {"created", "command", "commit", "versions", "hardware", "units", "load"} <= set(content)
    assert content["config"]["policies"] == ["motion:ratio=0.5", "random:ratio=0.25"]
    assert content["hardware"]["threads"] == 1


def test_the_file_holds_no_folders_of_policies(result: BenchResult, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POLICIES, "learned", lambda path: Random())
    spec = "learned:path=/some/where/full"
    changed = replace(result, config=replace(result.config, policies=(spec,), memory_policy=spec))
    content = changed.to_json()["config"]
    assert (content["policies"], content["memory_policy"]) == (["learned:path=full"], "learned:path=full")


def test_the_file_holds_the_engine(content: dict[str, Any]) -> None:
    section = content["engine"]
    assert (section["tokens"], section["visual_tokens"], section["attention"]) == (282, 256, "sdpa")
    rows = {row["name"]: row for row in section["rows"]}
    assert list(rows) == ["dense stock", "dense", "50 % active", "25 % active"]
    assert [row["rows"] for row in section["rows"]] == [282, 282, 154, 90]
    assert (
        rows["25 % active"]["macs"] < rows["50 % active"]["macs"] < rows["dense"]["macs"] < rows["dense stock"]["macs"]
    )
    for row in rows.values():
        assert row["flops"] == 2 * row["macs"]
        assert row["latency_ms"]["n"] == 3
        assert 0 < row["latency_ms"]["p50"] <= row["latency_ms"]["p95"]
    assert rows["dense"]["faster_than_dense"] == {"value": 1, "low": 1, "high": 1}
    assert [target["limit"] for target in section["targets"]] == [1.10, 1.7, 2.5]


def test_the_file_holds_the_frames(content: dict[str, Any]) -> None:
    section = content["frame"]
    assert (section["model"], section["frames"], section["warmup"]) == ("tiny", 4, 1)
    rows = {row["name"]: row for row in section["rows"]}
    methods = ["dense", "motion:ratio=0.5", "random:ratio=0.25"]
    assert list(rows) == ["dense stock", *methods, *(f"{method} +default" for method in methods)]
    for method in methods:
        plain, optioned = rows[method], rows[f"{method} +default"]
        assert plain["options"] == ""
        assert plain["accepted"] is None
        assert plain["passes"] == 6 > optioned["passes"]
        assert 0 <= optioned["accepted"] <= 1
        assert optioned["ratio_effective"] == plain["ratio_effective"]
        assert optioned["same_actions"] == plain["same_actions"]  # no option changes an action
    assert rows["dense +default"]["faster_than_equal"]["model_call"]["value"] == 1
    for row in rows.values():
        assert set(row["stages_ms"]) == set(STAGES)
        assert set(row["windows_ms"]) == set(row["faster_than_stock"]) == set(WINDOWS)
        assert all(value["n"] == 4 for value in row["windows_ms"].values())
        assert row["flops"] == 2 * sum(row["macs"].values())
    assert rows["dense"]["same_actions"] == rows["dense stock"]["same_actions"] == 1
    ours, stock = rows["dense"]["macs"], rows["dense stock"]["macs"]
    assert stock["prefill"] > ours["prefill"]  # stock's last layer is for every row
    assert {**stock, "prefill": 0} == {**ours, "prefill": 0}
    assert rows["dense"]["bookkeeping"]["value"] > rows["dense stock"]["bookkeeping"]["value"] == 0
    assert rows["motion:ratio=0.5"]["ratio_effective"] == rows["motion:ratio=0.5"]["ratio_nominal"] == 0.5
    assert rows["motion:ratio=0.5"]["flops"] < rows["random:ratio=0.25"]["flops"] < rows["dense"]["flops"]
    assert [target["limit"] for target in section["targets"]] == [0.15] * 4


def test_the_file_holds_the_memory(content: dict[str, Any]) -> None:
    section = content["memory"]
    assert [point["frame"] for point in section["points"]] == [3, 5, 8, 10, 13, 15, 18, 20, 23, 25]
    assert all(point["process_mb"] > 50 for point in section["points"])
    assert section["cache_growth_mb"] == 0
    assert section["targets"][0]["value"] == section["growth_mb"]


def shown(result: BenchResult) -> str:
    console = Console(width=260, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for table in bench_tables(result):
        console.print(table)
    return console.export_text()


def test_the_tables_show_it(result: BenchResult) -> None:
    text = shown(result)
    for word in ("25 % active", "decoder prefill", "random:ratio=0.25", "bookkeeping share", "process MB", "≤ 1.1 ×"):
        assert word in text


def test_replayed_frames_come_with_their_episodes(dataset: Path, tiny: VLA, tmp_path: Path) -> None:
    scene = make_scene(tiny, dataset, 6, 0)
    assert len(scene.frames) == 6
    assert scene.starts == {0, 3}
    assert {frame.instruction for frame in scene.frames} == {"wave"}
    measured = measure_frames(tiny, scene, config(tmp_path, policies=("random:ratio=0.5",)))
    ratio = measured.rows[-1].ratio_effective
    assert ratio == pytest.approx(4 / 5 * 0.5)  # five counted frames, one of them the first of its episode


def test_lerobots_policy_is_a_baseline_of_its_models_where_it_is_installed(
    tiny: VLA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="beside --lerobot"):
        config(tmp_path, empty_cameras=1)
    with pytest.raises(InputError, match=r"no model of LeRobot's, .*leave out --lerobot"):
        list(make_methods(tiny, config(tmp_path, lerobot=True)))
    monkeypatch.setitem(sys.modules, "lerobot", None)
    with pytest.raises(MissingExtraError, match=r'pip install "lac-vla\[lerobot\]"'):
        list(make_methods(random_vla("smolvla-tiny"), config(tmp_path, lerobot=True)))


def test_memory_of_the_process_is_read() -> None:
    gc.collect()  # what earlier tests left is not to go in between
    size = 64_000_000
    before = resident_mb()
    with mmap(-1, size) as fresh:  # of the system: an array may lie where an earlier one was freed
        for page in range(0, size, 4096):
            fresh[page] = 1
        assert resident_mb() - before == pytest.approx(size / 1e6, rel=0.2)


# Bad input, and what is left behind.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policies": ("clairvoyant",)}, "clairvoyant"),
        ({"memory_policy": "motion:ratio=2"}, "0..1"),
        ({"active": ()}, "active"),
        ({"active": (0.5, 0.0)}, "active"),
        ({"active": (1.5,)}, "active"),
        ({"sections": ()}, "no section"),
        ({"shape": "llama-1x1"}, "llama-8x512"),
        ({"rounds": 0}, "rounds"),
        ({"memory_frames": 0}, "memory_frames"),
        ({"batch": ()}, "batch"),
        ({"batch": (2, 0)}, "batch"),
        ({"warmup": 0}, "warmup"),
        ({"threads": -1}, "threads"),
        ({"flow": "raft"}, "raft"),
        ({"roofline": "h999"}, "h200"),
        ({"sections": ("roofline",)}, "--roofline"),
        ({"acceptance": (1.5,)}, "acceptance"),
        ({"acceptance": (0.5,), "model": "some/checkpoint", "random_weights": None}, "random weights"),
        ({"model": "mini"}, "not both"),
        ({"minutes": -1}, "minutes"),
        ({"policies": ("random:ratio=.5,2",)}, "0..1"),
        ({"options": ("bucket=0",)}, "bucket"),
        ({"policies": ("motion", "motion")}, "two policies are called 'motion'"),
        ({"policies": ("lac",)}, "lac:path=FOLDER"),
        ({"memory_policy": "lac"}, "lac:path=FOLDER"),
    ],
)
def test_settings_without_sense_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        config(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"random_weights": "gigantic"}, InputError, "gigantic"),
        ({"random_weights": "cogact-tiny", "acceptance": (0.5,)}, InputError, "no tokens"),
        ({"model": "no/such/folder", "random_weights": None}, CheckpointError, "no/such/folder"),
        ({"device": "tpu"}, InputError, "tpu"),
        ({"device": "meta"}, InputError, "meta"),
        ({"replay": Path("no/such/dataset")}, LacError, "no/such/dataset"),
    ],
)
def test_faults_show_before_anything_is_measured(
    changes: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        run_bench(config(tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_the_default_is_the_bundled_model_with_its_policy() -> None:
    plain, random = BenchConfig(), BenchConfig(random_weights="openvla-7b")
    assert (plain.model, plain.random_weights, plain.policies) == ("mini", None, ("lac",))
    assert (random.model, random.policies) == (None, ("motion:ratio=0.5", "motion:ratio=0.7"))
    quick = BenchConfig(quick=True, frames=1000)
    assert quick.sections == ("frame",)
    assert 0 < quick.minutes <= 0.5
    assert quick.frames < 100


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no CUDA device"):
        run_bench(config(tmp_path, device="cuda"))


def test_a_model_larger_than_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "_free_memory", lambda: 10**9)
    with pytest.raises(InputError, match=r"openvla-7b: its weights take 15.0 GB as torch.bfloat16"):
        run_bench(config(tmp_path, random_weights="openvla-7b", dtype="bfloat16"))


def test_a_dataset_must_have_the_models_cameras_and_state(dataset: Path, tmp_path: Path) -> None:
    small = random_vla(SMALL)  # its camera is called "camera"
    with pytest.raises(InputError, match=r"\['camera'\] are missing.*--camera camera=KEY"):
        make_scene(small, dataset, 5, 0)
    scene = make_scene(small, dataset, 5, 0, DatasetKeys(("camera=wrist",)))
    wrist = LeRobotDataset(dataset).episode(0).images["wrist"]
    np.testing.assert_array_equal(scene.frames[1].images["camera"], wrist[1])
    with pytest.raises(InputError, match="needs 8 values"):
        run_bench(config(tmp_path, random_weights="mini", replay=dataset))


def test_a_dataset_shorter_than_the_warmup_is_refused(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="7 of them warm-up"):
        run_bench(config(tmp_path, sections=("frame",), warmup=7, replay=dataset))


def test_an_unwritable_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="--out"):
        run_bench(config(tmp_path / "file"))


def test_a_section_that_fails_takes_nothing_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("device lost")

    monkeypatch.setattr(run, "measure_memory", fail)
    threads = torch.get_num_threads(), cv2.getNumThreads()
    with pytest.raises(RuntimeError, match="device lost"):
        run_bench(config(tmp_path, sections=("engine", "memory"), threads=1))
    assert (torch.get_num_threads(), cv2.getNumThreads()) == threads
    content = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    assert content["engine"] is not None
    assert content["memory"] is None


def test_a_learned_policy_is_held_to_more(result: BenchResult) -> None:
    """Only where its ratios are its own: on recorded frames, with trained weights; with options, to one more."""
    assert result.frame is not None
    row = next(row for row in result.frame.rows if row.name == "motion:ratio=0.5 +default")
    slow, fast = Ratio(1.2, 1, 2), Ratio(2.5, 2, 3)
    windows = {"decoder_prefill": fast, "observation_to_action": slow}
    learned = replace(
        row, name="lac +default", deciding=Ratio(0.09, 0, 1), faster_than_equal=windows, faster_than_dense=windows
    )
    assert [target.reached for target in frame_targets(learned, earned=True)][1:] == [True, True, False, False]
    assert len(list(frame_targets(replace(learned, options=""), earned=True))) == 4
    assert len(list(frame_targets(learned, earned=False))) == len(list(frame_targets(row, earned=True))) == 1


# Several sessions on one engine.


def test_sessions_are_run_together_and_say_what_each_would_alone(tiny: VLA, tmp_path: Path) -> None:
    """Each session has a seed and a first frame of its own; a pass is one run of the engine."""
    vla = cached_vla(tiny, "random:ratio=0.5", "none", config(tmp_path))
    scene = make_scene(tiny, None, 7, 0)
    sessions = [vla.session(3 + number) for number in range(3)]
    expected = []
    for index in range(4):
        for number, session in enumerate(sessions):
            place = (index + (0, 2, 4)[number]) % 7
            if place == 0:
                session.reset()
            expected.append(session.act(scene.frames[place]))
    robots, together, found = Robots(vla, 3, 3), vla.engine.run, []
    ratios: list[float] = []

    def noted(plans: Sequence[FramePlan]) -> list[FrameResult]:
        found.append(together(plans))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vla.engine, "run", noted)
        for index in range(4):
            robots.act(scene, index, ratios)
    assert [len(results) for results in found] == [3, 3, 3, 3]
    actions = [result.action for results in found for result in results]
    np.testing.assert_allclose(np.stack(actions), expected, atol=1e-6)
    assert ratios == [0, 0, 0] + [0.5] * 8 + [0]  # the third session begins its episode again


def test_the_file_holds_the_batch(tmp_path: Path) -> None:
    ran = run_bench(config(tmp_path, sections=("batch",), policies=("random:ratio=.5",), batch=(2, 4)))
    section = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))["batch"]
    assert section["random_weights"]
    rows = {(row["name"], row["sessions"]): row for row in section["rows"]}
    names = ["dense", "random:ratio=.5", "dense +default", "random:ratio=.5 +default"]
    assert list(rows) == [(name, sessions) for name in names for sessions in (1, 2, 4)]
    for (name, sessions), row in rows.items():
        assert row["latency_ms"]["n"] == 3
        assert row["frames_per_second"] == pytest.approx(1e3 * sessions / row["latency_ms"]["p50"])
        alone = rows[name, 1]["frames_per_second"]
        assert row["faster_than_one"]["value"] == pytest.approx(row["frames_per_second"] / alone)
        dense = rows[name.replace("random:ratio=.5", "dense"), sessions]["frames_per_second"]
        assert row["faster_than_dense"]["value"] == pytest.approx(row["frames_per_second"] / dense)
        assert (row["ratio_effective"] == 0) == name.startswith("dense")
    text = shown(ran)
    for word in ("batch: sessions on one engine", "frames per second", "random:ratio=.5 +default", "swept"):
        assert word in text


def test_lerobots_own_stages_are_timed_by_the_gpu_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks: list[str] = []

    class Event:
        def __init__(self, **_: Any) -> None:
            pass

        def record(self) -> None:
            clocks.append("event")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    session = LeRobotSession.__new__(LeRobotSession)
    session._clock, session._seen, session._macs = Stopwatch(torch.device("cuda"), events=True), set(), {}
    prefix = session._timed(lambda: clocks.append("work"), "forward")
    prefix()
    prefix()  # a step of the flow: in the stage around it
    assert clocks == ["event", "work", "event", "work"]
