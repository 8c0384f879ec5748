"""π0's and π0.5's heads in training: what they are in a session, and a gradient through the expert to the mask."""

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

from lac_vla import VLA, CachedVLA, InputError, LACPolicy, Random, load_vla, random_vla, save_vla
from lac_vla.datasets.writer import DatasetWriter
from lac_vla.models.tokenizer import FileTokenizer, train_tokenizer
from lac_vla.training import precision
from lac_vla.training.store import FrameStore
from lac_vla.training.train import train
from lac_vla.types import Frame

TEXTS = ("stop", "put the mug on the plate, then stop")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
LENGTH = 4


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact comparisons need float32 products."""
    monkeypatch.setattr(precision, "AUTOCAST", False)


@pytest.fixture(params=["pi0", "pi05"])
def vla(request: pytest.FixtureRequest) -> VLA:
    return tiny(f"{request.param}-tiny")


def observed(number: int) -> Frame:
    return frame(number, TEXTS[number // LENGTH])


def seen_store(vla: VLA) -> FrameStore:
    """Two episodes, with prompts of two lengths, of what the model really sees; embeddings unrounded."""
    store = store_of(vla, 2, LENGTH, instructions=TEXTS)
    frames = [observed(number) for number in range(2 * LENGTH)]
    with torch.inference_mode():
        visual = [vla.encode_image(each).numpy() for each in frames]
        texts = [vla.processor.embed(vla.processor.prompt(each))[1].numpy() for each in frames]
    lengths = np.array([len(text) for text in texts])
    assert lengths[0] < lengths[LENGTH]
    suffix = np.stack([np.pad(text, ((0, lengths.max() - len(text)), (0, 0)), constant_values=9.0) for text in texts])
    return replace(store, visual=np.stack(visual), suffix=suffix, suffix_length=lengths)


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
        numbers = np.array([at, LENGTH + at])
        for session, number in zip(sessions, numbers, strict=True):
            session.act(observed(int(number)))
        masks = [session.last_info.decision.active for session in sessions if session.last_info is not None]
        assert (np.mean(masks) < 0.7) == (at > 0)
        output = losses.decode(numbers, mask=torch.from_numpy(np.stack(masks)).float() if at else None, old=old)
        old = output.store.slots
        states = np.stack([observed(int(number)).proprio for number in numbers])  # type: ignore[arg-type]
        told = torch.from_numpy(head.with_states(np.zeros((2, 0), np.float32), states))
        for step, time in enumerate(head.config.times):
            both = seen[step], seen[steps + step]
            noised, expected = (torch.stack(parts) for parts in zip(*both, strict=True))
            found = head.train_velocity(output.context(), told, noised, torch.full((2,), time))
            torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("loss", ["distill", "demo"])
def test_the_loss_moves_both_networks(vla: VLA, loss: str) -> None:
    """λ = 0: all that moves them comes through keys and values."""
    losses = losses_of(vla, store_of(vla, instructions=TEXTS), loss)
    losses.window(np.array([0, 8]), 4, WARM, torch.Generator().manual_seed(0), lam=0.0)
    assert min(gradients(losses).values()) > 1e-6


@pytest.mark.parametrize("loss", ["distill", "demo"])
def test_the_gradient_of_the_mask_is_that_of_finite_differences(vla: VLA, loss: str) -> None:
    """∂L/∂M of both prompts of a batch, through the expert."""
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


@torch.no_grad()
def test_the_loss_is_nothing_where_there_is_nothing_to_learn(vla: VLA) -> None:
    """Against itself; and the error of the velocity, by hand, with the chance that the loss draws."""
    losses = losses_of(vla, store_of(vla, 2, LENGTH, instructions=TEXTS))
    context, head = losses.decode(np.array([0, LENGTH])).context(), vla.head
    targets = torch.from_numpy(losses.store.targets[[0, LENGTH]])
    assert not head.loss(context, targets, torch.Generator(), context).any()
    chance, expected = torch.Generator().manual_seed(5), torch.zeros(2)
    clean = torch.nn.functional.pad(targets[:, -28:].view(2, 4, 7), (0, 5))
    for _ in range(2):
        times = torch.rand(2, generator=chance) ** (2 / 3) * 0.999 + 0.001
        noise = torch.randn(2, 4, 12, generator=chance)
        noised = torch.lerp(clean, noise, times[:, None, None])
        found = head.train_velocity(context, targets[:, :-28], noised, times)  # type: ignore[attr-defined]
        expected += (found - noise + clean)[..., :7].square().mean(dim=(1, 2)) / 2
    torch.testing.assert_close(head.loss(context, targets, torch.Generator().manual_seed(5)), expected)


def test_targets(vla: VLA) -> None:
    head, rng = vla.head, np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (6, 7)).astype(np.float32)
    targets = head.targets(actions)
    assert (targets.shape, targets.dtype) == ((6, 28), np.float32)
    np.testing.assert_allclose(targets[4].reshape(4, 7), actions[[4, 5, 5, 5]], atol=1e-6)
    with pytest.raises(InputError, match="chunks of 4 × 7"):
        head.targets(actions[:, :6])
    with pytest.raises(InputError, match="other units"):
        head.targets(actions * 100)
    if vla.family == "pi0":
        states = rng.normal(size=(6, 8)).astype(np.float32)
        np.testing.assert_array_equal(head.with_states(targets, states)[:, 8:], targets)
        with pytest.raises(InputError, match="8 values"):
            head.with_states(targets, states[:, :0])


@pytest.mark.parametrize("loss", ["distill", "demo"])
def test_a_trained_policy_drives_the_model(vla: VLA, tmp_path: Path, loss: str) -> None:
    """``lac train`` from beginning to end, also where the model's own answers stand for actions."""
    rng = np.random.default_rng(0)
    with DatasetWriter(tmp_path / "demos", 20) as writer:
        for episode in range(4):
            images = {name: rng.integers(0, 255, (9, 64, 64, 3), dtype=np.uint8) for name in ("agentview", "wrist")}
            action, state = rng.uniform(-1, 1, (9, 7)), rng.uniform(-1, 1, (9, 8))
            text = "pick up the bowl" if episode % 2 else "put it down"
            writer.add_episode(images, state.astype(np.float32), action.astype(np.float32), text)
    encode = FileTokenizer(train_tokenizer(TEXTS, 320))
    save_vla(replace(random_vla(f"{vla.family}-tiny"), encode=encode), tmp_path / "vla")
    short = short_run(tmp_path / "vla", tmp_path / "demos", tmp_path / "run")
    config = replace(short, loss=loss, recovery=0.0)  # type: ignore[arg-type]
    policy = LACPolicy.from_pretrained(train(config))
    session = CachedVLA(load_vla(tmp_path / "vla"), policy).session()
    for number in range(3):
        session.act(frame(number))
    assert session.last_info is not None
    assert session.last_info.decision.nominal_ratio in config.ratios
    assert all(np.isfinite(list(row.values())).all() for row in rows(config.out))
