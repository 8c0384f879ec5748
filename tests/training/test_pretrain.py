"""The training of the bundled model, on a tiny one: exactness of the coarse phase, resuming, failure."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lac_vla import CachedVLA, CheckpointError, EngineOptions, Frame, InputError, load_vla, random_vla, save_vla
from lac_vla.datasets.writer import DatasetWriter
from lac_vla.models.cogact.config import PRESETS as COGACT_PRESETS
from lac_vla.models.cogact.config import CogACTConfig
from lac_vla.models.heads.diffusion import SCHEDULE
from lac_vla.models.heads.dit import DiTConfig
from lac_vla.models.heads.sampler import Sampling
from lac_vla.models.prismatic.presets import MINI, PRESETS, TINY
from lac_vla.models.prismatic.towers import ViTConfig
from lac_vla.training.config import PretrainConfig
from lac_vla.training.pretrain import Pretraining, pretrain
from lac_vla.training.recipes import RECIPES


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
    monkeypatch.setitem(PRESETS, "mini", replace(TINY, proprio_dim=8, norm_stats=MINI.norm_stats, text_config=text))


@pytest.fixture
def config(dataset: Path, tmp_path: Path) -> PretrainConfig:
    return PretrainConfig(
        dataset, tmp_path / "run", coarse_samples=32, fine_samples=32, batch=8, every=16, held_out=0.25, warmup=2
    )


def test_the_saved_model_acts(config: PretrainConfig) -> None:
    vla = load_vla(pretrain(config))
    images = {camera: np.zeros((256, 256, 3), np.uint8) for camera in ("agentview", "wrist")}
    frame = Frame(images, "pick up the bowl", np.zeros(8, np.float32))
    assert vla.processor.prompt(frame).layout.n_visual == 36 + 16
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
    loss = run.loss
    positions = loss._positions((1, 0, 2), behind=3)
    grid = torch.arange(36).view(6, 6)[1::2, 0::2].flatten() + 1
    expected = [0, *grid.tolist(), *range(37, 53), 53, 54, 55]
    assert positions.tolist() == expected
    batch = run.data.batch(run.data.train[:4], None)
    vision = loss.model.vision_backbone
    full = vision(batch.images)
    torch.testing.assert_close(vision(batch.images, {"agentview": (1, 0, 2)})[:, :9], full[:, grid - 1])


def test_the_last_layer_is_computed_for_the_rows_that_are_read(config: PretrainConfig) -> None:
    loss = Pretraining(config).loss
    inputs = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([9, 9])
    whole = loss._decode(inputs, torch.arange(9), lengths, 9)
    torch.testing.assert_close(loss._decode(inputs, torch.arange(9), lengths, 3), whole[:, -3:])


@pytest.fixture
def diffusion(config: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> PretrainConfig:
    """A head with a chunk of 6 on the trunk of a short run with action tokens."""
    start = pretrain(replace(config, out=config.out.with_name("trunk"), coarse_samples=8, fine_samples=8))
    cogact = CogACTConfig(
        replace(PRESETS["mini"], prompt_end_id=None),
        DiTConfig(24, 1, 2, horizon=6, condition=32),
        prompt_end=(2,),
        sampling=Sampling(steps=4),
        gripper=(1.0, -1.0),
        ensemble=3,
    )
    monkeypatch.setitem(COGACT_PRESETS, "mini-cogact", cogact)
    monkeypatch.setitem(RECIPES, "mini-cogact", replace(RECIPES["mini-cogact"], start=start))
    return replace(
        config, model="mini-cogact", coarse_samples=0, fine_samples=64, frozen_samples=32, frozen_frames=16, chunk=4
    )


def test_cogact_starts_from_a_trunk_and_acts(diffusion: PretrainConfig) -> None:
    saved = pretrain(diffusion)
    vla, trunk = load_vla(saved), load_vla(RECIPES["mini-cogact"].start)
    assert vla.config.gripper == (1.0, -1.0)
    assert (vla.config.prompt_end, vla.ensemble, vla.head.sampling.steps) == ((2,), 3, 4)
    assert vla.processor.prompt_ids("pick up the bowl") == trunk.processor.prompt_ids("pick up the bowl")
    images = {camera: np.zeros((256, 256, 3), np.uint8) for camera in ("agentview", "wrist")}
    chunk = CachedVLA(vla).session().act(Frame(images, "pick up the bowl", np.zeros(8, np.float32)))
    assert chunk.shape == (6, 7)
    assert set(chunk[:, 6]) <= {-1.0, 1.0}
    lines = [json.loads(line) for line in (diffusion.out / "metrics.jsonl").read_text().splitlines()]
    assert {"held_out_noise", "held_out_sampled", "held_out_hindsight"} <= set(lines[-1])


def test_what_is_loaded_is_held_fixed_at_first(diffusion: PretrainConfig) -> None:
    run = Pretraining(diffusion)
    names = [name for name, _ in run.loss.model.named_parameters() if not name.startswith("action_model")]
    weights = dict(run.loss.model.named_parameters())
    start = load_vla(RECIPES["mini-cogact"].start).module.state_dict()
    for name in names:
        assert torch.equal(weights[name], start[name]), name
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    while run.frozen:
        run.step()
    moved = {name for name, weight in weights.items() if not torch.equal(weight, before[name])}
    assert moved.isdisjoint(names)
    assert any("blocks" in name for name in moved)
    run.step()
    assert not torch.equal(weights["projector.fc1.weight"], before["projector.fc1.weight"])


def trained_at_first(config: PretrainConfig) -> set[str]:
    """Names of the modules that the first step of a run moves while what was loaded is held fixed."""
    run = Pretraining(config)
    before = {name: weight.detach().clone() for name, weight in run.loss.model.named_parameters()}
    run.step()
    assert run.frozen
    weights = run.loss.model.named_parameters()
    return {name.partition(".")[0] for name, weight in weights if not torch.equal(weight, before[name])}


def test_a_head_that_is_loaded_learns_while_the_trunk_is_held_fixed(diffusion: PretrainConfig) -> None:
    start = pretrain(diffusion)
    assert trained_at_first(replace(diffusion, start=start, out=diffusion.out.with_name("more"))) == {"action_model"}


def test_reading_ahead_is_what_a_step_would_read(diffusion: PretrainConfig) -> None:
    run = Pretraining(replace(diffusion, shift=0.0, proprio_noise=0.0, proprio_dropout=0.0, frozen_frames=1000))
    state = run.random.rng.bit_generator.state
    read, targets = run.read_ahead(run.loss)
    assert run.random.rng.bit_generator.state == state
    assert len(read) == len(run.data.train) == len(targets.chunk)
    order = np.random.default_rng(run.config.seed + 1).permutation(run.data.train)
    assert torch.equal(targets.chunk, run.data.batch(order, None).targets.chunk)


@pytest.mark.parametrize("stop", [2, 5])
def test_a_run_with_a_fixed_trunk_resumes_exactly(diffusion: PretrainConfig, stop: int) -> None:
    resumes_exactly(diffusion, stop)


def resumes_exactly(config: PretrainConfig, stop: int) -> None:
    unbroken, broken = Pretraining(config), Pretraining(config)
    for _ in range(7):
        unbroken.step()
    for _ in range(stop):
        broken.step()
    config.out.mkdir()
    broken.save()
    resumed = Pretraining(config)
    resumed.resume()
    for _ in range(7 - stop):
        resumed.step()
    for (name, one), (_, other) in zip(
        unbroken.average.state_dict().items(), resumed.average.state_dict().items(), strict=True
    ):
        assert torch.equal(one, other), name


VIT = ViTConfig(16, 3, 2, 32, patch=8, neck=24)


@pytest.fixture
def tower(config: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> PretrainConfig:
    """A transformer for the first camera of a model of a short run."""
    start = pretrain(replace(config, out=config.out.with_name("conv"), coarse_samples=8, fine_samples=8))
    vlm = PRESETS["mini"]
    cameras = (replace(vlm.cameras[0], tower=VIT), vlm.cameras[1])
    monkeypatch.setitem(PRESETS, "mini-vit", replace(vlm, vision_backbone_id="towers", cameras=cameras))
    monkeypatch.setitem(RECIPES, "mini-vit", replace(RECIPES["mini-vit"], start=start))
    return replace(config, model="mini-vit", coarse_samples=40, fine_samples=24, frozen_samples=32)


def test_a_new_tower_imitates_the_old_one_while_the_rest_is_fixed(tower: PretrainConfig) -> None:
    run, start = Pretraining(tower), load_vla(RECIPES["mini-vit"].start).module.state_dict()
    new, old = "vision_backbone.towers.agentview.", {}
    for name, weight in run.loss.state_dict().items():
        assert "stem" not in name or "wrist" in name  # the teacher is not saved
        old[name] = weight.clone()
        if name.startswith("model.") and new not in name:
            assert torch.equal(weight, start[name.removeprefix("model.")]), name
    while run.frozen:
        assert run.step().keys() == {"imitation"}
    for name, weight in run.loss.state_dict().items():
        assert torch.equal(weight, old[name]) == (new not in name), name
    assert run.step().keys() >= {"tokens", "chunk", "hindsight"}
    assert not torch.equal(run.loss.model.projector.fc1.weight, start["projector.fc1.weight"])


def test_the_imitation_is_that_of_the_moved_old_tower(tower: PretrainConfig) -> None:
    """Against the definition; nothing is left for a tower that says what the old one says; and training lowers it."""
    run = Pretraining(replace(tower, frozen_samples=3200, coarse_samples=3200, warmup=10))
    loss, start = run.loss, load_vla(RECIPES["mini-vit"].start).module.vision_backbone.towers["agentview"]
    batch = run.data.batch(run.data.train[:8], run.random)
    assert batch.shifts["agentview"].any()
    with torch.no_grad():
        target = start(batch.images["agentview"], None, batch.shifts["agentview"])
        found = loss.model.vision_backbone(batch.images)[:, :36]
        expected = (found - target).square().sum() / (target - target.mean(dim=(0, 1))).square().sum()
        first = loss.imitate(batch)["imitation"]
        torch.testing.assert_close(first, expected)
    for _ in range(60):
        run.step()
    with torch.no_grad():
        assert loss.imitate(batch)["imitation"] < 0.8 * first
    loss.model.vision_backbone.towers["agentview"].forward = lambda pixels: start(
        pixels, None, batch.shifts["agentview"]
    )
    assert loss.imitate(batch)["imitation"] == 0


def test_a_model_with_a_new_tower_acts(tower: PretrainConfig) -> None:
    vla = load_vla(pretrain(tower))
    assert vla.module.config.cameras[0].tower == VIT
    images = {camera: np.zeros((256, 256, 3), np.uint8) for camera in ("agentview", "wrist")}
    frame = Frame(images, "pick up the bowl", np.zeros(8, np.float32))
    assert CachedVLA(vla, options=EngineOptions(vision_kv_reuse=True)).session().act(frame).shape == (7,)
    lines = [json.loads(line) for line in (tower.out / "metrics.jsonl").read_text().splitlines()]
    assert {"held_out_imitation", "held_out_tokens", "held_out_action_error"} <= set(lines[-1])


@pytest.mark.parametrize("stop", [2, 5])
def test_a_run_with_a_new_tower_resumes_exactly(tower: PretrainConfig, stop: int) -> None:
    resumes_exactly(tower, stop)


def test_there_must_be_a_tower_to_imitate(tower: PretrainConfig, tmp_path: Path) -> None:
    cameras = tuple(replace(camera, tower=None) for camera in PRESETS["mini"].cameras)
    vlm = replace(TINY, vision_backbone_id="siglip", vit_towers=(VIT,), cameras=cameras[:1])
    save_vla(random_vla(vlm), tmp_path / "shared")
    (tmp_path / "shared" / "tokenizer.json").write_bytes(
        (RECIPES["mini-vit"].start / "tokenizer.json").read_bytes()  # type: ignore[operator]
    )
    with pytest.raises(CheckpointError, match="no tower of its own for camera 'agentview'"):
        Pretraining(replace(tower, start=tmp_path / "shared"))


def test_the_noise_loss_is_that_of_the_forward_process(diffusion: PretrainConfig) -> None:
    """Against the definition, written out; and a head that knows the noise has none."""
    run = Pretraining(diffusion)
    loss = run.loss
    targets = run.data.batch(run.data.train[:3], None).targets
    feature = torch.randn(3, 1, 32, generator=torch.Generator().manual_seed(1))
    found = loss.losses(feature, targets, None, torch.Generator().manual_seed(5))["noise"]
    generator = torch.Generator().manual_seed(5)
    clean = torch.cat([targets.chunk] * 8)
    t = torch.randint(100, (24,), generator=generator)
    noise = torch.randn(clean.shape, generator=generator)
    squares, net = 0.0, loss.head.model.net
    for index in range(24):
        bar = SCHEDULE.alpha_bar[int(t[index])]
        noisy = bar**0.5 * clean[index] + (1 - bar) ** 0.5 * noise[index]
        predicted = net(noisy[None].float(), t[index : index + 1], feature[index % 3][None])
        squares += float((predicted[0].detach() - noise[index]).square().mean()) / 24
    assert float(found.detach()) == pytest.approx(squares, rel=1e-4)
    assert set(targets.chunk[..., 6].unique().tolist()) <= {0.0, 1.0}  # 1 is open: −1 in the data set
    assert torch.equal(
        targets.chunk[:, 0, 6], torch.from_numpy(run.data.bank.action[run.data.train[:3], 6] < 0).float()
    )


def test_a_start_that_does_not_fit(diffusion: PretrainConfig, config: PretrainConfig, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing is loaded"):
        Pretraining(replace(config, frozen_samples=8))
    save_vla(random_vla(MINI), tmp_path / "wide")
    (tmp_path / "wide" / "tokenizer.json").write_bytes(
        (RECIPES["mini-cogact"].start / "tokenizer.json").read_bytes()  # type: ignore[operator]
    )
    with pytest.raises(CheckpointError, match="another --start"):
        Pretraining(replace(diffusion, start=tmp_path / "wide"))


def test_nan_stops_with_the_last_state_kept(config: PretrainConfig) -> None:
    run = Pretraining(config)
    config.out.mkdir()
    run.step()
    run.save()
    before = (config.out / "state.pt").read_bytes()
    with torch.no_grad():
        next(iter(run.loss.parameters())).fill_(float("nan"))
    with pytest.raises(InputError, match="resume with a lower --lr"):
        run.step()
    assert (config.out / "state.pt").read_bytes() == before


def test_a_state_of_another_model_is_refused(config: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config.out.mkdir()
    Pretraining(config).save()
    vlm = PRESETS["mini"]
    wider = {**vlm.text_config, "intermediate_size": 96}
    monkeypatch.setitem(PRESETS, "mini", replace(vlm, text_config=wider))
    with pytest.raises(CheckpointError, match="another --out"):
        Pretraining(config).resume()


def test_missing_camera(config: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = PRESETS["mini"]
    cameras = (replace(vlm.cameras[0], name="overhead"), vlm.cameras[1])
    monkeypatch.setitem(PRESETS, "mini", replace(vlm, cameras=cameras))
    with pytest.raises(InputError, match=r"\['overhead'\] are missing.*--camera overhead=KEY"):
        Pretraining(config)
