"""The training of the bundled model, on a tiny one: exactness of the coarse phase, resuming, failure."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lac_vla import CheckpointError, Frame, InputError, load_vla
from lac_vla.datasets.writer import DatasetWriter
from lac_vla.models.prismatic.presets import TINY
from lac_vla.training.config import PretrainConfig
from lac_vla.training.families import FAMILIES, TokenFamily
from lac_vla.training.pretrain import Pretraining, pretrain


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "demos"
    rng = np.random.default_rng(0)
    with DatasetWriter(root, 20) as writer:
        for episode in range(4):
            length = 12 + episode
            images = {c: rng.integers(0, 255, (length, 64, 64, 3), dtype=np.uint8) for c in ("agentview", "wrist")}
            action = rng.uniform(-1, 1, (length, 7)).astype(np.float32)
            action[:, 6] = np.where(np.arange(length) < 5, -1, 1)
            state = rng.normal(size=(length, 8)).astype(np.float32)
            writer.add_episode(images, state, action, "pick up the bowl" if episode % 2 else "place the cup on it")
    return root


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    text = {**TINY.text_config, "vocab_size": 576 + 64}
    monkeypatch.setitem(FAMILIES, "mini", TokenFamily(replace(TINY, proprio_dim=8, text_config=text)))


@pytest.fixture
def config(dataset: Path, tmp_path: Path) -> PretrainConfig:
    return PretrainConfig(
        dataset, tmp_path / "run", coarse_samples=32, fine_samples=32, batch=8, every=16, held_out=0.25, warmup=2
    )


def test_the_saved_model_acts(config: PretrainConfig) -> None:
    backbone = load_vla(pretrain(config))
    images = {camera: np.zeros((256, 256, 3), np.uint8) for camera in ("agentview", "wrist")}
    frame = Frame(images, "pick up the bowl", np.zeros(8, np.float32))
    assert backbone.layout(frame).n_visual == 36 + 16
    lines = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    assert {"held_out_tokens", "held_out_hindsight"} <= set(lines[-1])
    assert json.loads((config.out / "model" / "lac.json").read_text())["samples_shown"] == 64


def test_resume_equals_an_unbroken_run(config: PretrainConfig) -> None:
    unbroken, broken = Pretraining(config), Pretraining(config)
    for _ in range(6):
        unbroken.step()
    for _ in range(3):
        broken.step()
    config.out.mkdir()
    broken.save()
    resumed = Pretraining(config)
    resumed.resume()
    for _ in range(3):
        resumed.step()
    for (name, one), (_, other) in zip(
        unbroken.average.state_dict().items(), resumed.average.state_dict().items(), strict=True
    ):
        assert torch.equal(one, other), name


def test_a_coarse_step_sees_a_quarter_at_its_own_positions(config: PretrainConfig) -> None:
    """With attention cut to the same quarter, coarse and fine agree: the subset keeps features and positions."""
    run = Pretraining(config)
    objective = run.objective
    positions = objective._positions((1, 0, 2), behind=3)
    grid = torch.arange(36).view(6, 6)[1::2, 0::2].flatten() + 1
    expected = [0, *grid.tolist(), *range(37, 53), 53, 54, 55]
    assert positions.tolist() == expected
    batch = run.batch(run.train_frames[:4], augment=False)
    vision = objective.model.vision_backbone
    full = vision(batch.images)
    torch.testing.assert_close(vision(batch.images, {"agentview": (1, 0, 2)})[:, :9], full[:, grid - 1])


def test_nan_stops_with_the_last_state_kept(config: PretrainConfig) -> None:
    run = Pretraining(config)
    config.out.mkdir()
    run.step()
    run.save()
    before = (config.out / "state.pt").read_bytes()
    with torch.no_grad():
        next(iter(run.objective.parameters())).fill_(float("nan"))
    with pytest.raises(InputError, match="resume with a lower --lr"):
        run.step()
    assert (config.out / "state.pt").read_bytes() == before


def test_a_state_of_another_model_is_refused(config: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config.out.mkdir()
    Pretraining(config).save()
    vlm = FAMILIES["mini"].vlm
    wider = {**vlm.text_config, "intermediate_size": 96}
    monkeypatch.setitem(FAMILIES, "mini", TokenFamily(replace(vlm, text_config=wider)))
    with pytest.raises(CheckpointError, match="another --out"):
        Pretraining(config).resume()


def test_missing_camera(config: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = FAMILIES["mini"].vlm
    cameras = (replace(vlm.cameras[0], name="overhead"), vlm.cameras[1])
    monkeypatch.setitem(FAMILIES, "mini", TokenFamily(replace(vlm, cameras=cameras)))
    with pytest.raises(InputError, match="no camera 'overhead'"):
        Pretraining(config)
