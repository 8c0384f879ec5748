"""The training of the bundled SmolVLA, on a tiny one: the engine's prefix and expert, a start from another family."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.training.test_pretrain import config, dataset, resumes_exactly, tiny, tower  # noqa: F401
from torch.nn.utils.rnn import pad_sequence

from lac_vla import CachedVLA, CheckpointError, Frame, load_vla, random_vla, save_vla
from lac_vla.models.heads.flow_matching import FlowConfig, add_noise
from lac_vla.models.siglip import SiglipConfig
from lac_vla.models.smolvla.config import PRESETS as SMOLVLA_PRESETS
from lac_vla.models.smolvla.config import TINY_SMOLVLA, SmolVLAConfig, TextConfig
from lac_vla.models.tokenizer import SPECIALS
from lac_vla.session import head_rng
from lac_vla.training.config import PretrainConfig
from lac_vla.training.pretrain import Pretraining, pretrain
from lac_vla.training.pretrain_losses.base import Batch, Targets
from lac_vla.training.pretrain_losses.flow import FlowLoss
from lac_vla.training.pretrain_losses.transplant import GAIN
from lac_vla.training.recipes import RECIPES

CAMERAS = ("agentview", "wrist")
TEXTS = ("pick up the bowl", "place the cup on it, beside the bowl")


@pytest.fixture
def flow(tower: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> PretrainConfig:  # noqa: F811
    """A SmolVLA whose tower and language model are those of a short run with a vision transformer."""
    start = pretrain(replace(tower, frozen_samples=8, coarse_samples=8, fine_samples=8))
    small = SmolVLAConfig(
        TextConfig(32, 64, 2, 4, 2, 8, 320, 1e-6),
        SiglipConfig(16, 2, 2, 32, patch=8, table=6),
        CAMERAS,
        8,
        7,
        TINY_SMOLVLA.normalization,
        FlowConfig(horizon=5, width=8, steps=3),
        expert_width=24,
        expert_ffn=40,
        shuffle=2,
        state_width=9,
    )
    monkeypatch.setitem(SMOLVLA_PRESETS, "mini-flow", small)
    monkeypatch.setitem(RECIPES, "mini-flow", replace(RECIPES["mini-flow"], start=start))
    return replace(
        tower,
        out=tower.out.with_name("flow"),
        model="mini-flow",
        frozen_samples=16,
        coarse_samples=40,
        chunk=4,
        draws=3,
    )


def test_the_trained_model_acts(flow: PretrainConfig) -> None:
    vla = load_vla(pretrain(flow))
    assert (vla.family, vla.horizon) == ("smolvla", 5)
    frame = Frame({c: np.zeros((256, 256, 3), np.uint8) for c in CAMERAS}, TEXTS[0], np.zeros(8, np.float32))
    assert vla.processor.prompt(frame).layout.n_visual == 2 * 9
    assert CachedVLA(vla).session().act(frame).shape == (5, 7)
    lines = [json.loads(line) for line in (flow.out / "metrics.jsonl").read_text().splitlines()]
    assert {"held_out_velocity", "held_out_sampled", "held_out_hindsight"} <= set(lines[-1])


@pytest.mark.parametrize("stop", [1, 4])
def test_a_run_resumes_exactly(flow: PretrainConfig, stop: int) -> None:
    resumes_exactly(flow, stop)


def test_what_is_loaded_is_held_fixed_at_first(flow: PretrainConfig) -> None:
    run = Pretraining(flow)
    before = {name: weight.detach().clone() for name, weight in run.loss.model.named_parameters()}
    while run.frozen:
        run.step()
    moved = {name for name, weight in run.loss.model.named_parameters() if not torch.equal(weight, before[name])}
    assert all(
        "lm_expert" in name or "action_" in name or "state_proj" in name or "post_layernorm" in name for name in moved
    )
    assert len(moved) > 20
    run.step()
    weights = dict(run.loss.model.named_parameters())
    parts = ("vision_model.encoder", "vision_model.embeddings", "connector", "text_model.layers.0.self_attn.q_proj")
    for part in parts:
        assert any(part in name and not torch.equal(weights[name], before[name]) for name in weights), part


def tiny_batch(loss: FlowLoss) -> tuple[list[Frame], Batch]:
    """Two frames of unlike instructions, as a robot sees them and as training does."""
    rng, side = np.random.default_rng(0), loss.config.vision.pixels
    frames = [
        Frame(
            {c: rng.integers(0, 255, (side, side, 3), dtype=np.uint8) for c in CAMERAS},
            text,
            rng.normal(size=8).astype(np.float32),
        )
        for text in TEXTS
    ]
    images = {
        c: torch.stack([torch.from_numpy(f.images[c]).permute(2, 0, 1).float() / 127.5 - 1 for f in frames])
        for c in CAMERAS
    }
    ids = [torch.tensor(loss.text_ids(f.instruction)) for f in frames]
    state = np.stack([loss.vla.processor.normalize_state(f.proprio) for f in frames])  # type: ignore[attr-defined]
    chunk, hindsight = torch.rand(2, 8, 7), torch.rand(2, 3, 3)
    targets = Targets(chunk, hindsight, torch.ones(2, 3))
    lengths = torch.tensor([len(part) for part in ids])
    assert lengths[0] != lengths[1]
    return frames, Batch(images, {}, torch.from_numpy(state), pad_sequence(ids, batch_first=True), lengths, targets)


@pytest.fixture
def loss() -> FlowLoss:
    return FlowLoss(random_vla("smolvla-tiny", seed=1), PretrainConfig(Path("-"), Path("-"), draws=3))


@torch.no_grad()
def test_training_computes_what_the_engine_computes(loss: FlowLoss) -> None:
    """Several chunks at once behind padded prompts, each as if alone: an action drawn so is the session's."""
    frames, batch = tiny_batch(loss)
    vla, flow = loss.vla, loss.head.config
    sessions = [CachedVLA(vla).session(seed) for seed in (3, 3)]
    noise = [head_rng(3).standard_normal((flow.horizon, flow.width), dtype=np.float32) for _ in frames]
    other = torch.randn(flow.horizon, flow.width)
    chunks = torch.stack([chunk for own in noise for chunk in (other, torch.from_numpy(own), -other)])
    _, context = loss.read(batch, None)
    for time in flow.times:
        velocity = loss.head.train_velocity(context, chunks[:, 0, :0], chunks, torch.full((6,), time))
        chunks = chunks - velocity / flow.steps
    for number, (session, frame) in enumerate(zip(sessions, frames, strict=True)):
        drawn = loss.head.units.unnormalize(chunks[3 * number + 1, :, :7].numpy())
        np.testing.assert_allclose(session.act(frame), drawn, atol=2e-5)


def test_the_velocity_loss_is_its_definition(loss: FlowLoss) -> None:
    _, batch = tiny_batch(loss)
    _, context = loss.read(batch, None)
    found = loss(batch, None, 0.5, torch.Generator().manual_seed(4))["velocity"]
    clean = torch.nn.functional.pad(batch.targets.chunk[:, :5], (0, loss.head.config.width - 7)).repeat_interleave(3, 0)
    times, noised, wanted = add_noise(clean, torch.Generator().manual_seed(4))
    error = 0.0
    for draw in range(3):  # one at a time, of both frames
        rows = torch.tensor([draw, 3 + draw])
        velocity = loss.head.train_velocity(context, clean[rows, 0, :0], noised[rows], times[rows])
        error += float((velocity - wanted[rows])[..., :7].square().mean()) / 3
    assert float(found) == pytest.approx(error, rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("keep", [(0, 0, 2), (1, 0, 2)])
def test_a_coarse_step_sees_every_second_token_at_its_own_place(loss: FlowLoss, keep: tuple[int, int, int]) -> None:
    """What is on the other squares of the board is not seen, by nobody; a token moved to another place is."""
    _, batch = tiny_batch(loss)
    side, token = loss.config.side, loss.config.vision.patch * loss.config.shuffle
    cells = torch.arange(side)
    shown = (cells[:, None] + cells) % 2 == sum(keep[:2]) % 2
    _, places = loss._look(batch.images, keep)
    assert places.tolist() == [c * side**2 + i for c in range(2) for i in shown.flatten().nonzero()[:, 0].tolist()]
    state, _ = loss.read(batch, keep)
    pixels = shown.repeat_interleave(token, 0).repeat_interleave(token, 1)
    for seen, mask in ((False, ~pixels), (True, pixels)):
        images = {c: torch.where(mask, -image, image) for c, image in batch.images.items()}
        changed, _ = loss.read(replace(batch, images=images), keep)
        assert torch.equal(changed, state) != seen
    assert not torch.allclose(loss.read(batch, None)[0], state)


@torch.no_grad()
def test_a_start_gives_tower_and_language_model(flow: PretrainConfig) -> None:
    """The tower's features are the old ones, the language model says the same of a larger residual stream."""
    run, start = Pretraining(flow), load_vla(RECIPES["mini-flow"].start)
    model, old = run.loss.model, start.module
    vit = old.vision_backbone.towers["agentview"]
    pixels = run.data.batch(run.data.train[:4], None).images["agentview"]
    x = vit.embed(vit.normalize(pixels))
    for block in vit.blocks:
        x = block(x)
    expected = model.vision.post_layernorm(x)
    torch.testing.assert_close(model.vision(pixels), expected, atol=5e-3, rtol=0)  # the two GELUs differ
    rows = torch.randn(1, 7, 32)
    ours = model.text(inputs_embeds=GAIN * rows).last_hidden_state
    torch.testing.assert_close(ours, old.language_model.model(inputs_embeds=rows).last_hidden_state)
    ids = torch.arange(9)
    embedded = model.text.embed_tokens(ids) * 32**0.5
    torch.testing.assert_close(embedded, GAIN * old.language_model.model.embed_tokens(ids))
    end = GAIN * old.language_model.model.embed_tokens.weight[SPECIALS.index("<out>")]
    torch.testing.assert_close(model.linear("state_proj").bias, end)


@torch.no_grad()
def test_the_connector_is_fitted_to_the_old_projector(flow: PretrainConfig) -> None:
    """No other linear map of the same features is closer, on the frames that it was fitted to."""
    run, start = Pretraining(flow), load_vla(RECIPES["mini-flow"].start)
    loss, old = run.loss, start.module
    pixels = torch.cat([run.data.batch(run.data.train[i : i + 1], None).images["agentview"] for i in range(24)])
    blocks = loss.model.vision(pixels).view(24, 3, 2, 3, 2, 16).transpose(2, 3).reshape(-1, 64)
    teacher = GAIN * old.projector(old.vision_backbone.towers["agentview"](pixels))
    wanted = teacher.view(24, 3, 2, 3, 2, 32).mean(dim=(2, 4)).reshape(-1, 32)
    fitted = loss.model.connector(blocks) * 32**0.5
    best = blocks @ torch.linalg.lstsq(blocks, wanted).solution
    assert (fitted - wanted).square().mean() < 1.5 * (best - wanted).square().mean() + 1e-3 * wanted.var()
    assert (fitted - wanted).square().mean() < 0.5 * wanted.square().mean()


def test_a_saved_model_starts_another_run(flow: PretrainConfig) -> None:
    first = pretrain(flow)
    again = Pretraining(replace(flow, start=first, out=flow.out.with_name("again")))
    saved = load_vla(first).module.state_dict()
    assert all(torch.equal(weight, saved[name]) for name, weight in again.loss.model.state_dict().items())


def test_a_start_without_a_vision_transformer_is_refused(flow: PretrainConfig) -> None:
    conv = RECIPES["mini-vit"].start
    with pytest.raises(CheckpointError, match="no vision transformer of its own for camera 'agentview'"):
        Pretraining(replace(flow, start=conv))


def test_a_start_of_other_sizes_is_refused(flow: PretrainConfig, tmp_path: Path) -> None:
    save_vla(replace(random_vla("smolvla-tiny"), encode=load_vla(RECIPES["mini-flow"].start).encode), tmp_path / "s")
    with pytest.raises(CheckpointError, match="another --start"):
        Pretraining(replace(flow, start=tmp_path / "s"))
