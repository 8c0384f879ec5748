"""Flow-matching heads in training: what they are in a session, and a gradient through the expert to the mask."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.engine.scenes import frame
from tests.training.test_lac_loss import WARM, gradients
from tests.training.test_train import rows, short_run
from tests.training.worlds import losses_of, store_of, tiny

from lac_vla import VLA, CachedVLA, EngineOptions, LACPolicy, Random, load_vla, random_vla, save_vla
from lac_vla.datasets.writer import DatasetWriter
from lac_vla.engine import layers
from lac_vla.models.tokenizer import FileTokenizer, train_tokenizer
from lac_vla.training import precision
from lac_vla.training.store import FrameStore
from lac_vla.training.train import train

TEXTS = ("stop", "put the mug on the plate, then stop")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
LENGTH = 4


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact comparisons need float32 products."""
    monkeypatch.setattr(precision, "AUTOCAST", False)


@pytest.fixture
def vla() -> VLA:
    return tiny("smolvla-tiny")


def seen_store(vla: VLA) -> FrameStore:
    """Two episodes, with prompts of two lengths, of what the model really sees; embeddings unrounded."""
    store = store_of(vla, 2, LENGTH, instructions=TEXTS)
    assert store.suffix_length[0] < store.suffix_length[LENGTH]
    suffix = store.suffix.copy()
    with torch.inference_mode():
        visual = [vla.encode_image(frame(number)).numpy() for number in range(2 * LENGTH)]
        for number in range(2 * LENGTH):
            own = vla.processor.embed(vla.processor.prompt(frame(number, TEXTS[number // LENGTH])))[1]
            suffix[number, : len(own)] = own.numpy()
    return replace(store, visual=np.stack(visual), suffix=suffix)


@torch.no_grad()
def test_velocities_in_training_are_those_of_sessions(vla: VLA, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every Euler step of several sparse frames of two prompts of different lengths in one batch."""
    head: Any = vla.head
    store, velocity = seen_store(vla), head.velocity
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def spy(shared: Any, noised: torch.Tensor, step: int) -> Any:
        found = yield from velocity(shared, noised, step)
        seen.append((noised.clone(), found.clone()))
        return found

    monkeypatch.setattr(head, "velocity", spy)
    losses, old, steps = losses_of(vla, store), None, head.config.steps
    sessions = [CachedVLA(vla, Random(0.6)).session(seed) for seed in range(2)]
    for at in range(LENGTH):
        seen.clear()
        for session, text, number in zip(sessions, TEXTS, (at, LENGTH + at), strict=True):
            session.act(frame(number, text))
        masks = [session.last_info.decision.active for session in sessions if session.last_info is not None]
        assert (np.mean(masks) < 0.7) == (at > 0)
        mask = torch.from_numpy(np.stack(masks)).float() if at else None
        output = losses.decode(np.array([at, LENGTH + at]), mask=mask, old=old)
        old = output.store.slots
        for step, time in enumerate(head.config.times):
            both = seen[step], seen[steps + step]
            noised, expected = (torch.stack(parts) for parts in zip(*both, strict=True))
            times = torch.full((2,), time)
            found = head.train_velocity(output.context(), torch.zeros(2, 0), noised, times)
            torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("loss", ["distill", "demo"])
def test_the_loss_moves_both_networks(vla: VLA, loss: str) -> None:
    """λ = 0: all that moves them comes through keys and values."""
    losses = losses_of(vla, store_of(vla, instructions=TEXTS), loss)
    losses.window(np.array([0, 8]), 4, WARM, torch.Generator().manual_seed(0), lam=0.0)
    assert min(gradients(losses).values()) > 1e-6


def test_a_prefix_in_bfloat16_has_about_the_same_loss(vla: VLA, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU that multiplies so, before an expert in float32; in both stages."""
    found = []
    for fast in (False, True):
        monkeypatch.setattr(precision, "AUTOCAST", fast)
        losses = losses_of(vla, store_of(vla, instructions=TEXTS))
        window = losses.window(np.array([0, 8]), 3, WARM, torch.Generator().manual_seed(0), lam=0.1)
        found.append([window["task"], float(losses.alignment(np.array([1, 9])).detach())])
    assert found[0] != found[1]
    np.testing.assert_allclose(found[1], found[0], rtol=0.03)


@pytest.mark.parametrize("loss", ["distill", "demo"])
def test_the_gradient_of_the_mask_is_that_of_finite_differences(vla: VLA, loss: str) -> None:
    """∂L/∂M of both prompts of a batch, through self- and cross-attention of the expert."""
    vla.module.double()
    store = store_of(vla, 2, LENGTH, instructions=TEXTS)
    losses, frames = losses_of(vla, store), np.array([1, LENGTH + 1])
    targets = torch.from_numpy(store.targets[frames])
    with torch.no_grad():
        old, teacher = losses.decode(frames - 1).store.slots, losses.decode(frames).context()
    mask = torch.from_numpy(np.random.default_rng(0).random((2, store.layout.n_visual)))

    def value(weights: torch.Tensor) -> torch.Tensor:
        context = losses.decode(frames, mask=weights, old=old).context()
        chance = torch.Generator().manual_seed(1)
        return vla.head.loss(context, targets, chance, teacher if loss == "distill" else None).sum()

    leaf = mask.clone().requires_grad_()
    (grad,) = torch.autograd.grad(value(leaf), leaf)
    for row, token in ((0, 0), (0, 20), (1, 7), (1, 31)):
        step = torch.zeros_like(mask)
        step[row, token] = 1e-4
        with torch.no_grad():
            slope = float(value(mask + step) - value(mask - step)) / 2e-4
        assert slope != 0
        assert float(grad[row, token]) == pytest.approx(slope, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("loss", ["distill", "demo"])
@pytest.mark.parametrize("vision", [False, True])
def test_a_trained_policy_drives_the_model(tmp_path: Path, loss: str, vision: bool) -> None:
    """``lac train`` from beginning to end, with the tower's reuse and without."""
    rng = np.random.default_rng(0)
    with DatasetWriter(tmp_path / "demos", 20) as writer:
        for episode in range(4):
            images = {name: rng.integers(0, 255, (9, 64, 64, 3), dtype=np.uint8) for name in ("agentview", "wrist")}
            action, state = rng.uniform(-1, 1, (9, 7)), rng.uniform(-1, 1, (9, 8))
            text = "pick up the bowl" if episode % 2 else "put it down"
            writer.add_episode(images, state.astype(np.float32), action.astype(np.float32), text)
    encode = FileTokenizer(train_tokenizer(TEXTS, 300))
    save_vla(replace(random_vla("smolvla-tiny"), encode=encode), tmp_path / "vla")
    short = short_run(tmp_path / "vla", tmp_path / "demos", tmp_path / "run")
    config = replace(short, loss=loss, recovery=0.0, vision_kv_reuse=vision)  # type: ignore[arg-type]
    policy = LACPolicy.from_pretrained(train(config))
    options = EngineOptions(vision_kv_reuse=vision)
    session = CachedVLA(load_vla(tmp_path / "vla"), policy, options=options).session()
    for number in range(3):
        session.act(frame(number))
    assert session.last_info is not None
    assert session.last_info.decision.nominal_ratio in config.ratios
    assert all(np.isfinite(list(row.values())).all() for row in rows(config.out))


@torch.no_grad()
def test_stage_one_learns_from_the_experts_attention(vla: VLA, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all its layers, self- and cross-attention, to the visual tokens; computed from what the kernels were given."""
    losses = losses_of(vla, store_of(vla, 2, LENGTH, instructions=TEXTS))
    frames, kernel = np.array([1, LENGTH + 1]), layers.attend
    n, seen = losses.store.layout.n_visual, list[torch.Tensor]()
    horizon = vla.head.horizon

    def spy(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, *rest: Any, **more: Any) -> Any:
        if query.shape[-2] == horizon:  # the expert's rows
            grouped = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
            scores = (query @ grouped.transpose(-1, -2)) / query.shape[-1] ** 0.5
            scores = scores if mask is None else scores + mask
            seen.append(scores.exp().div(scores.exp().sum(-1, keepdim=True))[..., :n].mean(dim=(1, 2)))
        return kernel(query, key, value, mask, *rest, **more)

    monkeypatch.setattr(layers, "attend", spy)
    found = losses.attention(frames)
    assert len(seen) == 2 * len(vla.decoder.layers)
    torch.testing.assert_close(found, torch.stack(seen).mean(dim=0))
    assert found.std(dim=1).min() > 0
