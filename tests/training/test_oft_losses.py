"""Heads that read rows within a prompt all of which sees itself: training equals a session, and its losses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.engine.scenes import frame
from tests.training.test_kv_heads import CLOSE, LENGTH, TEXTS, masks, seen_store, sessions_of
from tests.training.test_lac_loss import WARM, gradients
from tests.training.worlds import captured_hidden, losses_of, store_of

from lac_vla import VLA, InputError, random_vla
from lac_vla.engine import layers
from lac_vla.models.heads.chunk import ChunkHead, ChunkTokenHead, L1Head
from lac_vla.models.heads.chunk_diffusion import ChunkDiffusionHead
from lac_vla.models.oft.config import TINY_OFT, with_film
from lac_vla.models.prismatic.config import CameraConfig
from lac_vla.models.prismatic.presets import TINY
from lac_vla.models.prismatic.towers import ViTConfig
from lac_vla.training import precision
from lac_vla.training.tower import MixedTower

SMALL = replace(
    TINY, vision_backbone_id="vit", vit_towers=(ViTConfig(8, 3, 2, 16),), cameras=(CameraConfig("agentview", 56),)
)
ACTIONS = np.random.default_rng(0).uniform(-0.9, 0.9, (9, 7)).astype(np.float32)


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact comparisons need float32 products."""
    monkeypatch.setattr(precision, "AUTOCAST", False)


@pytest.fixture(params=["l1", "discrete", "diffusion"])
def vla(request: pytest.FixtureRequest) -> VLA:
    made = random_vla(replace(TINY_OFT, head=request.param, diffusion_steps=10, sampling_steps=2), seed=3)
    made.module.requires_grad_(False)
    return made


def head_of(vla: VLA) -> ChunkHead:
    assert isinstance(vla.head, ChunkHead)
    return vla.head


@torch.no_grad()
def test_training_reads_what_a_session_reads(vla: VLA) -> None:
    """Hidden states of the rows, over frames of two prompts of different lengths in one batch, on the stale cache."""
    if isinstance(vla.head, ChunkDiffusionHead):
        pytest.skip("its slots are those of the last step in a session, in training of a pass before them all")
    store = seen_store(vla)
    losses, sessions, old = losses_of(vla, store), sessions_of(vla), None
    for at in range(LENGTH):
        expected = []
        for session, text, number in zip(sessions, TEXTS, (at, LENGTH + at), strict=True):
            with captured_hidden(session) as captured:
                session.act(frame(number, text))
            expected.append(head_of(vla).rows(captured[0]))
        mask = masks(sessions)
        assert (mask.mean() < 0.7) == (at > 0)
        output = losses.decode(np.array([at, LENGTH + at]), mask=mask if at else None, old=old)
        torch.testing.assert_close(output.hidden, torch.stack(expected), **CLOSE)
        old = output.store.slots


@torch.no_grad()
def test_without_padding_there_is_no_mask(vla: VLA, monkeypatch: pytest.MonkeyPatch) -> None:
    masked: list[bool] = []
    attend = layers.attend

    def spy(*args: torch.Tensor, **options: bool) -> torch.Tensor:
        masked.append(args[3] is not None)
        assert not args[4]  # never causal
        return attend(*args, **options)

    monkeypatch.setattr(layers, "attend", spy)
    store = seen_store(vla)
    losses = losses_of(vla, store)
    short = replace(store, suffix=store.suffix[:, : int(store.suffix_length[0])])
    losses_of(vla, short).decode(np.array([0, 1]))
    assert not any(masked)
    masked.clear()
    losses.decode(np.array([0, LENGTH]))
    assert all(masked)


@torch.no_grad()
def test_a_prompt_run_again_is_the_prompt_with_another_suffix(vla: VLA) -> None:
    """In a batch of two lengths, over the same mixture; a part of the batch by itself as well."""
    store = seen_store(vla)
    losses, frames = losses_of(vla, store), np.array([1, LENGTH + 1])
    old = losses.decode(frames - 1).store.slots
    mask = torch.from_numpy(np.random.default_rng(0).random((2, store.layout.n_visual)) < 0.5).float()
    changed = replace(store, suffix=store.suffix * 0.5)
    expected = losses_of(vla, changed).decode(frames, mask=mask, old=old).hidden
    output = losses.decode(frames, mask=mask, old=old)
    for batch in (slice(None), slice(1, 2)):
        rerun = output.context(batch).rerun
        assert rerun is not None
        torch.testing.assert_close(rerun(lambda number, suffix: 0.5 * suffix), expected[batch])


@pytest.mark.parametrize("loss", ["distill", "demo"])
def test_the_loss_moves_both_networks(vla: VLA, loss: str) -> None:
    losses = losses_of(vla, store_of(vla, instructions=TEXTS), loss)
    losses.window(np.array([0, 8]), 4, WARM, torch.Generator().manual_seed(0), lam=0.0)
    assert min(gradients(losses).values()) > 1e-6


@pytest.mark.parametrize("loss", ["distill", "demo"])
def test_the_gradient_of_the_mask_is_that_of_finite_differences(vla: VLA, loss: str) -> None:
    vla.module.double()
    store = store_of(vla, 2, LENGTH, instructions=TEXTS)
    losses, frames = losses_of(vla, store), np.array([1, LENGTH + 1])
    targets = torch.from_numpy(store.targets[frames])
    targets = targets.double() if targets.is_floating_point() else targets
    with torch.no_grad():
        old, teacher = losses.decode(frames - 1).store.slots, losses.decode(frames).context()
    mask = torch.from_numpy(np.random.default_rng(0).random((2, store.layout.n_visual)))

    def value(weights: torch.Tensor) -> torch.Tensor:
        context = losses.decode(frames, mask=weights, old=old).context()
        generator = torch.Generator().manual_seed(1)
        return vla.head.loss(context, targets, generator, teacher if loss == "distill" else None).sum()

    leaf = mask.clone().requires_grad_()
    value(leaf).backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    for place in ((0, 0), (1, 20), (1, 51)):
        step = torch.zeros_like(mask)
        step[place] = 1e-5
        with torch.no_grad():
            slope = (value(mask + step) - value(mask - step)) / 2e-5
        torch.testing.assert_close(leaf.grad[place], slope, rtol=1e-3, atol=1e-7)


def test_targets(vla: VLA) -> None:
    """Normalised chunks that go on with the last action, or their tokens; scaled values are clipped."""
    head, horizon = head_of(vla), vla.horizon
    targets = head.targets(ACTIONS)
    assert targets.shape == (9, horizon * 7)
    chunk = targets[8].reshape(horizon, 7)
    assert (chunk == chunk[0]).all()
    if isinstance(head, ChunkTokenHead):
        np.testing.assert_array_equal(targets[0].reshape(horizon, 7), head.tokenizer.encode(ACTIONS[:horizon]))
        return
    np.testing.assert_allclose(targets[0].reshape(horizon, 7), ACTIONS[:horizon], atol=1e-6)
    wide = ACTIONS.copy()
    wide[0, 0] = 3.0
    assert head.targets(wide).max() == 1.0


def test_l1_is_the_mean_absolute_error(vla: VLA) -> None:
    if not isinstance(vla.head, L1Head):
        pytest.skip("of another head")
    store = store_of(vla, 1, LENGTH)
    losses, frames = losses_of(vla, store), np.array([1, 2])
    context, teacher = losses.decode(frames).context(), losses.decode(frames - 1).context()
    answers = vla.head.model(context.hidden).flatten(1)
    targets = torch.from_numpy(store.targets[frames])
    expected = (answers - targets).abs().mean(dim=1)
    torch.testing.assert_close(vla.head.loss(context, targets, torch.Generator()), expected)
    expected = (answers - vla.head.model(teacher.hidden).flatten(1)).abs().mean(dim=1)
    torch.testing.assert_close(vla.head.loss(context, targets, torch.Generator(), teacher), expected)
    assert vla.head.loss(context, targets, torch.Generator(), context).abs().max() == 0


def test_towers_that_need_the_instruction_are_not_trained_through() -> None:
    film = random_vla(replace(TINY_OFT, vlm=with_film(SMALL)))
    with pytest.raises(InputError, match="depends on the instruction"):
        MixedTower(film)
    MixedTower(random_vla(SMALL))
