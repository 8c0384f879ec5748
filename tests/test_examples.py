"""The toy model of examples/: benchmarked, trained beside, served; as a user would, from its own folder."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lac_vla import CachedVLA, Frame, Motion, load_vla
from lac_vla.cli import main
from lac_vla.client.connection import Client
from lac_vla.datasets.writer import DatasetWriter
from lac_vla.serving.config import ServeConfig, make_server

EXAMPLES = Path(__file__).parents[1] / "examples"
MODEL = "own_model:load"
INSTRUCTION = "put the cup on the shelf"


@pytest.fixture(autouse=True)
def in_its_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.setattr(sys, "path", [*sys.path])


def frames(count: int) -> list[Frame]:
    rng = np.random.default_rng(0)
    scene = rng.integers(0, 255, (96, 128, 3), dtype=np.uint8)
    return [Frame({"front": np.roll(scene, 3 * step, axis=1)}, INSTRUCTION) for step in range(count)]


def test_it_is_as_short_as_it_says() -> None:
    assert len((EXAMPLES / "own_model.py").read_text().splitlines()) <= 80


@torch.no_grad()
def test_dense_is_what_transformers_computes() -> None:
    vla = load_vla(MODEL)
    for frame in frames(2):
        prefix, suffix = vla.processor.embed(vla.processor.prompt(frame))
        prompt = torch.cat([prefix, vla.encode_image(frame), suffix])[None]
        hidden = vla.module.language_model.model(inputs_embeds=prompt).last_hidden_state
        expected = vla.module.action(hidden[0, -1]).numpy()
        np.testing.assert_allclose(CachedVLA(vla).session().act(frame), expected, atol=1e-5)
    robot = CachedVLA(vla, Motion(0.5)).session()
    assert [robot.act(frame).shape for frame in frames(3)] == [(7,)] * 3
    assert robot.last_info is not None
    assert robot.last_info.ratio > 0.3


def test_it_goes_the_whole_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with DatasetWriter(tmp_path / "demos", 10) as writer:
        for _ in range(3):
            images = {"cam0": np.stack([frame.images["front"] for frame in frames(8)])}
            writer.add_episode(images, np.zeros((8, 2), np.float32), np.zeros((8, 7), np.float32), INSTRUCTION)
    camera = ["--camera", "front=cam0"]
    bench = ["bench", "--model", MODEL, "--sections", "frame", "--frames", "3", "--warmup", "1", "--options", "none"]
    main([*bench, "--policies", "motion", *camera, "--replay", str(tmp_path / "demos"), "--out", str(tmp_path / "b")])
    assert "dense stock" in capsys.readouterr().out
    run = ["train", "--model", MODEL, "--dataset", str(tmp_path / "demos"), *camera, "--out", str(tmp_path / "run")]
    main([*run, "--stage1-steps", "2", "--stage2-steps", "2", "--batch", "2", "--window", "3", "--held-out", "0.3"])
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite([row["task"] for row in rows if "task" in row]).all()
    asyncio.run(served(f"lac:path={tmp_path / 'run'}"))


async def served(policy: str) -> None:
    """Two requests of a robot to the server of the toy."""
    server = make_server(ServeConfig(MODEL, policy, port=0, camera=("front=observation/image",)))
    async with server:
        actions = await asyncio.to_thread(ask, f"ws://127.0.0.1:{server.port}")
    assert [action.shape for action in actions] == [(7,)] * 2


def ask(url: str) -> list[np.ndarray]:
    requests = [{"observation/image": frame.images["front"], "prompt": INSTRUCTION} for frame in frames(2)]
    with Client(url) as robot:
        return [np.asarray(robot.infer(request)["actions"]).ravel() for request in requests]
