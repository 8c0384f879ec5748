"""Every kind of file that is read: a small whole one of each, and how what it belongs to is read to its end."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from lac_vla import CachedVLA, Frame, LACConfig, LACPolicy, Random, load_vla, random_vla, save_vla
from lac_vla.datasets import DatasetAppender, DatasetWriter, LeRobotDataset
from lac_vla.models import FAMILIES
from lac_vla.models.tokenizer import FileTokenizer, train_tokenizer
from lac_vla.report import build_training_report
from lac_vla.report.training import training_table
from lac_vla.report.training_run import TrainingRun
from lac_vla.results.records import read_episodes
from lac_vla.results.summary import summarize
from lac_vla.serving.raw import COLUMNS, RawEpisode, RawWriter
from lac_vla.sims.libero.collect import load_episode
from lac_vla.training.run_files import load_state, save_state
from lac_vla.training.store import FrameStore
from tests.engine.test_towers import seen
from tests.results.test_damaged import LINE, show
from tests.sims.test_packing import stage

TASK = "pick up the bowl"
FRAMES = 4


@dataclass(frozen=True)
class Kind:
    """What is read together.

    Attributes:
        make: Fills a folder.
        read: Reads it to its end.
        files: Patterns of the files that are damaged.
        many: How many are tried in the slow test: of every format, JSON to MP4, at least 10,000 over all kinds.
    """

    make: Callable[[Path], object]
    read: Callable[[Path], object]
    files: tuple[str, ...]
    many: int = 10_000


def make_dataset(folder: Path) -> None:
    rng = np.random.default_rng(0)
    with DatasetWriter(folder / "data", 20, provenance={"simulator": "none"}) as writer:
        for episode in range(2):
            images = {"front": rng.integers(0, 255, (FRAMES, 16, 16, 3)).astype(np.uint8)}
            state, action = (rng.normal(size=(FRAMES, n)).astype(np.float32) for n in (2, 3))
            writer.add_episode(images, state, action, f"task {episode}", metadata={"seed": episode})


def make_pictures(folder: Path) -> None:
    make_dataset(folder)
    info = folder / "data/meta/info.json"
    content = json.loads(info.read_text())
    content["features"]["observation.images.front"]["dtype"] = "image"
    info.write_text(json.dumps(content))
    png = cv2.imencode(".png", np.zeros((16, 16, 3), np.uint8))[1].tobytes()
    path = folder / "data/data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    cells = pa.array([{"bytes": png, "path": None}] * table.num_rows)
    pq.write_table(table.append_column("observation.images.front", cells), path)


def read_dataset(folder: Path) -> None:
    dataset = LeRobotDataset(folder / "data")
    assert dataset.total_frames >= 0
    for episode in dataset:
        for camera in episode.images:
            episode.images.window(camera, 0, 1)
            assert np.isfinite(episode.action).all()
            assert episode.images[camera].dtype == np.uint8
    dataset.stats  # noqa: B018
    DatasetAppender(folder / "data")


def make_model(family: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        vla = random_vla(FAMILIES[family].tiny)
        save_vla(replace(vla, encode=FileTokenizer(train_tokenizer([TASK], 300))), folder)

    return make


def read_model(folder: Path) -> None:
    vla = load_vla(folder)
    session = CachedVLA(vla, Random(0.5)).session()
    for number in range(2):
        assert np.isfinite(session.act(seen(vla, number))).all()


def make_policy(folder: Path) -> None:
    LACPolicy(LACConfig(grids={"front": (2, 2)}, width=8)).save_pretrained(folder / "policy", about={"steps": 3})


def make_training(folder: Path) -> None:
    make_policy(folder)
    (folder / "config.json").write_text(json.dumps({"stage1_steps": 1, "stage2_steps": 2, "window": 3}))
    rows = [{"step": step, "stage": 1 + step // 2, "seconds": 0.5, "loss": 2.0 / step} for step in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arrays = {"score": np.ones((2, 3, 4), np.float32), "mask": np.ones((2, 3, 4), bool)}
    np.savez(
        folder / "saliency.npz",
        image_front=np.zeros((2, 12, 16, 3), np.uint8),
        **{f"{name}_front": array for name, array in arrays.items()},
    )


def read_training(folder: Path) -> None:
    training_table(TrainingRun.read(folder)).to_terminal()


def report_training(folder: Path) -> None:
    build_training_report(folder, folder / "report.html")


def make_evaluation(folder: Path) -> None:
    lines = [LINE | {"init_state": state, "method": name} for state in range(3) for name in ("dense", "motion-0.5")]
    (folder / "episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "summary.json").write_text(json.dumps({"created": "2025", "versions": {"torch": "2"}, "notes": ["one"]}))


def read_log(folder: Path) -> None:
    summarize(read_episodes(folder / "episodes.jsonl"))


def make_raw(folder: Path) -> None:
    writer = RawWriter(folder / "1.frames", {"session": "a"})
    for at in range(FRAMES):
        frame = Frame({"front": np.zeros((16, 16, 3), np.uint8)}, TASK, np.zeros(2, np.float32))
        writer.write(frame, np.zeros(3, np.float32), dict.fromkeys(COLUMNS, at))
    writer.finish("reset")


def read_raw(folder: Path) -> None:
    raw = RawEpisode.read(folder / "1.frames")
    for values in (raw.arrays["state"], *raw.arrays["images"].values()):
        np.array(values)


def make_store(folder: Path) -> None:
    make_model("openvla")(folder / "model")
    make_store_data(folder)
    FrameStore.build(load_vla(folder / "model"), folder / "data", folder / "store", flow="none", patch_pixels=4)


def make_store_data(folder: Path) -> None:
    with DatasetWriter(folder / "data", 20) as writer:
        images = {camera: np.zeros((FRAMES, 16, 16, 3), np.uint8) for camera in ("agentview", "wrist")}
        writer.add_episode(images, np.zeros((FRAMES, 2), np.float32), np.zeros((FRAMES, 7), np.float32), TASK)


def read_store(folder: Path) -> None:
    store = FrameStore.open(folder / "store")
    for array in (store.visual, store.suffix, *store.images.values()):
        np.array(array[:1])


def make_state(folder: Path) -> None:
    save_state(folder, {"step": 3, "networks": {"a": torch.ones(3)}, "rng": torch.get_rng_state()[:64]})


def make_staged(folder: Path) -> None:
    stage(folder, 0, 0, "png")


KINDS: dict[str, Kind] = {
    "dataset's descriptions": Kind(make_dataset, read_dataset, ("data/meta/*.json",), 2_000),
    "dataset's tables": Kind(make_dataset, read_dataset, ("data/**/*.parquet",), 6_000),
    "dataset's pictures": Kind(make_pictures, read_dataset, ("data/data/**/*.parquet",), 4_000),
    "dataset's videos": Kind(make_dataset, read_dataset, ("data/**/*.mp4",)),
    "staged episode": Kind(make_staged, lambda folder: [load_episode(file) for file in folder.iterdir()], ("*.npz",)),
    "recorded episode": Kind(make_raw, read_raw, ("*.frames",)),
    "evaluation's log": Kind(make_evaluation, read_log, ("*.jsonl",)),
    "evaluation's report": Kind(make_evaluation, show, ("*.json", "*.jsonl"), 200),
    "training": Kind(make_training, read_training, ("*.json", "*.jsonl", "*.npz", "policy/*.json"), 4_000),
    "training's report": Kind(make_training, report_training, ("*.json", "*.jsonl", "*.npz", "policy/*.json"), 200),
    "training's state": Kind(make_state, load_state, ("*.pt",)),
    "stored frames": Kind(make_store, read_store, ("store/*",)),
    "policy": Kind(make_policy, LACPolicy.from_pretrained, ("policy/*.json", "policy/*.safetensors"), 4_000),
    **{
        f"{family}'s {what}": Kind(make_model(family), read_model, (pattern,), 1_500)
        for family in FAMILIES
        for what, pattern in (("descriptions", "*.json"), ("weights", "*.safetensors"))
    },
}
