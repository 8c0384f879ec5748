"""``lac bench``: that what it compares is the same computation, and that its file says what was measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from rich.console import Console

from lac_vla import CachedVLA, CheckpointError, Dense, InputError, LacError, PrismaticBackbone, random_vla
from lac_vla.bench import BenchConfig, BenchResult, bench_tables, engine, model, run, run_bench, shapes
from lac_vla.bench.engine import Prefills
from lac_vla.bench.frame import measure_frames
from lac_vla.bench.measure import Ratio, Target, take_turns
from lac_vla.bench.memory import resident_mb
from lac_vla.bench.scene import make_scene, synthetic
from lac_vla.bench.shapes import LAYOUT, decoder_config
from lac_vla.bench.stock import StockSession
from lac_vla.datasets import DatasetWriter
from lac_vla.policies import POLICIES, Random
from lac_vla.timing import STAGES, WINDOWS

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512 + 64,
    "pad_token_id": 0,
}


@pytest.fixture(scope="module")
def tiny() -> PrismaticBackbone:
    return random_vla("tiny", seed=2)


@pytest.fixture(autouse=True)
def small_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder of milliseconds, which the targets are applied to."""
    monkeypatch.setitem(shapes.SHAPES, "small", SMALL)  # type: ignore[arg-type]
    monkeypatch.setattr(engine, "TARGET_SHAPE", "small")


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
    prefills = Prefills(random_vla(decoder_config(SMALL)), seed=0)
    decision = prefills.decision(active)
    assert decision.active.sum() == round(active * LAYOUT.n_visual)
    torch.testing.assert_close(prefills.ours(decision)(), prefills.stock(), rtol=1e-5, atol=1e-5)


def test_stock_and_dense_session_act_the_same(tiny: PrismaticBackbone) -> None:
    stock, session = StockSession(tiny), CachedVLA(tiny, Dense()).session()
    for frame in synthetic(("agentview", "wrist"), None, 4, 1).frames:
        np.testing.assert_allclose(stock.act(frame), session.act(frame), atol=1e-6)
        assert stock.last is not None
        assert session.last is not None
        assert stock.last.info["tokens"] == session.last.info["tokens"]
        assert stock.last.stages["prefill"] > 0
        assert stock.last.stages["bookkeeping"] == 0


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
        patch.setitem(shapes.SHAPES, "small", SMALL)  # type: ignore[arg-type]
        patch.setattr(engine, "TARGET_SHAPE", "small")
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
    assert rows["25 % active"]["macs"] < rows["50 % active"]["macs"] < rows["dense"]["macs"]
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
        plain, levered = rows[method], rows[f"{method} +default"]
        assert plain["levers"] == ""
        assert plain["accepted"] is None
        assert plain["passes"] == 6 > levered["passes"]
        assert 0 <= levered["accepted"] <= 1
        assert levered["ratio_effective"] == plain["ratio_effective"]
        assert levered["same_tokens"] == plain["same_tokens"]  # no lever changes an action
    assert rows["dense +default"]["faster_than_equal"]["model_call"]["value"] == 1
    for row in rows.values():
        assert set(row["stages_ms"]) == set(STAGES)
        assert set(row["windows_ms"]) == set(row["faster_than_stock"]) == set(WINDOWS)
        assert all(value["n"] == 4 for value in row["windows_ms"].values())
        assert row["flops"] == 2 * sum(row["macs"].values())
    assert rows["dense"]["same_tokens"] == rows["dense stock"]["same_tokens"] == 1
    assert rows["dense"]["macs"] == rows["dense stock"]["macs"]
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


def test_the_tables_show_it(result: BenchResult) -> None:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for table in bench_tables(result):
        console.print(table)
    text = console.export_text()
    for word in ("25 % active", "decoder prefill", "random:ratio=0.25", "bookkeeping share", "process MB", "≤ 1.1 ×"):
        assert word in text


def test_replayed_frames_come_with_their_episodes(dataset: Path, tiny: PrismaticBackbone, tmp_path: Path) -> None:
    scene = make_scene(tiny, dataset, 6, 0)
    assert len(scene.frames) == 6
    assert scene.starts == {0, 3}
    assert {frame.instruction for frame in scene.frames} == {"wave"}
    measured = measure_frames(tiny, scene, config(tmp_path, policies=("random:ratio=0.5",)))
    ratio = measured.rows[-1].ratio_effective
    assert ratio == pytest.approx(4 / 5 * 0.5)  # five counted frames, one of them the first of its episode


def test_memory_of_the_process_is_read() -> None:
    before = resident_mb()
    block = np.ones(8_000_000)
    assert resident_mb() - before == pytest.approx(block.nbytes / 1e6, rel=0.2)


# Bad input, and what is left behind.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policies": ()}, "no policy"),
        ({"policies": ("clairvoyant",)}, "clairvoyant"),
        ({"memory_policy": "motion:ratio=2"}, "0..1"),
        ({"active": ()}, "active"),
        ({"active": (0.5, 0.0)}, "active"),
        ({"active": (1.5,)}, "active"),
        ({"sections": ()}, "no section"),
        ({"shape": "llama-1x1"}, "llama-8x512"),
        ({"rounds": 0}, "rounds"),
        ({"memory_frames": 0}, "memory_frames"),
        ({"warmup": 0}, "warmup"),
        ({"threads": -1}, "threads"),
        ({"flow": "raft"}, "raft"),
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
        ({"model": "no/such/folder"}, CheckpointError, "no/such/folder"),
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
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no CUDA device"):
        run_bench(config(tmp_path, device="cuda"))


def test_a_model_larger_than_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "_free_memory", lambda: 10**9)
    with pytest.raises(InputError, match=r"openvla-7b: its weights take 15.0 GB as torch.bfloat16"):
        run_bench(config(tmp_path, random_weights="openvla-7b", dtype="bfloat16"))


def test_a_dataset_must_have_the_models_cameras_and_state(dataset: Path, tmp_path: Path) -> None:
    tower = decoder_config(SMALL)  # its camera is called "camera"
    with pytest.raises(InputError, match=r"\['camera'\] are missing"):
        make_scene(random_vla(tower), dataset, 5, 0)
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
