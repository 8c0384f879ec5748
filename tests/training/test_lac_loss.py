"""Training's forward pass against the engine, gradients against the design's invariants, and planted problems."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.training.worlds import SIDE, losses_of, store_of, tiny

from lac_vla import InputError
from lac_vla.engine.kv_cache import Region, SlotCache
from lac_vla.engine.prefill import AppendCursor, PrefillCursor, SequenceState, run_packed
from lac_vla.models.heads.base import AppendRows
from lac_vla.training import lac, precision
from lac_vla.training.lac import LACLoss, Temperatures
from lac_vla.types import Decision, PolicyInput, TokenLayout

WARM = Temperatures(ratio=1.0, score=0.1)


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact comparisons need float32 products."""
    monkeypatch.setattr(precision, "AUTOCAST", False)


def gradients(losses: LACLoss) -> dict[str, float]:
    sums = {}
    for name, net in (("selector", losses.policy.selector), ("predictor", losses.policy.predictor)):
        grads = [weight.grad.abs().sum() for weight in net.parameters() if weight.grad is not None]
        sums[name] = float(sum(grads)) if grads else 0.0
    return sums


MODELS = ["tiny", "cogact-tiny"]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_mixed_forward_equals_sparse_inference(share: float, name: str) -> None:
    """Invariant 4, over several frames on the stale cache: hidden states of all rows read, and the slots kept."""
    vla = tiny(name)
    store, decoder = store_of(vla), vla.decoder
    losses = losses_of(vla, store)
    rng = np.random.default_rng(0)
    layout = TokenLayout.of(store.grids, 1, int(store.suffix_length[0]))
    pool, region = SlotCache(vla.n_layers, decoder.kv_heads, decoder.head_dim, torch.float32, vla.device), Region()
    pool.reserve(region, layout.length + 7)
    rotary = decoder.rotary(torch.arange(region.size))
    old = None
    for frame in range(4):
        n = layout.n_visual
        active = np.ones(n, bool) if frame == 0 else rng.random(n) < share
        sequence = SequenceState(layout, region, Decision.reuse(~active, vla.n_layers))
        with torch.inference_mode():
            visual = torch.from_numpy(store.visual[frame].astype(np.float32))[torch.from_numpy(active)]
            suffix = torch.from_numpy(store.suffix[frame])
            prompt = torch.cat([torch.from_numpy(store.prefix), visual, suffix])
            [expected] = run_packed(decoder, [PrefillCursor(decoder, sequence, rotary)], [prompt], pool)
            expected = expected[-1:]
            forced = vla.head.forced(torch.from_numpy(store.targets[frame : frame + 1]))
            if forced is not None:
                cursor = AppendCursor(decoder, sequence, AppendRows(forced[0]), rotary)
                expected = torch.cat([expected, *run_packed(decoder, [cursor], [forced[0]], pool)])
        mask = None if old is None else torch.from_numpy(active)[None].float()
        with torch.no_grad():
            result = losses.decode(np.array([frame]), mask=mask, old=old)
        torch.testing.assert_close(result.hidden[0], expected.clone(), atol=2e-5, rtol=1e-4)
        old = result.store.slots
        for layer in range(vla.n_layers):
            for kept, slots in ((old.keys, pool.keys), (old.values, pool.values)):
                torch.testing.assert_close(kept[layer][0], slots[layer][:, layout.visual].clone(), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("loss", ["distill", "demo"])
def test_the_task_loss_alone_moves_both_networks(loss: str, name: str) -> None:
    """Invariant 7: λ = 0."""
    vla = tiny(name)
    losses = losses_of(vla, store_of(vla), loss)
    losses.window(np.array([0, 8]), 4, WARM, torch.Generator().manual_seed(0), lam=0.0)
    assert min(gradients(losses).values()) > 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_without_the_task_loss_only_the_reward_moves_the_predictor(name: str) -> None:
    """Invariant 7, its other half."""
    vla = tiny(name)
    losses = losses_of(vla, store_of(vla))
    losses.window(np.array([0, 8]), 4, WARM, torch.Generator().manual_seed(0), lam=1.0, task_weight=0.0)
    moved = gradients(losses)
    assert moved["predictor"] > 1e-4
    assert moved["selector"] == 0
    for weight in losses.policy.predictor.parameters():
        weight.grad = None
    losses.window(np.array([0, 8]), 4, WARM, torch.Generator().manual_seed(0), lam=0.0, task_weight=0.0)
    assert gradients(losses)["predictor"] == 0


@pytest.mark.parametrize("name", MODELS)
def test_mask_gradient_is_the_first_order_value_of_refreshing(name: str) -> None:
    """∂L/∂M of the mixed forward against finite differences between old and new keys and values."""
    model = tiny(name)
    model.module.double()
    store = store_of(model)
    losses = losses_of(model, store)
    targets = torch.from_numpy(store.targets[1:2])
    with torch.no_grad():
        dense = losses.decode(np.array([0, 1]))
        old = dense.store.slots.of(slice(1))
    mask = torch.from_numpy(np.random.default_rng(0).random(store.visual.shape[1])).double()[None]

    def loss(values: torch.Tensor) -> torch.Tensor:
        context, same = losses.decode(np.array([1]), mask=values, old=old).context(), torch.Generator().manual_seed(0)
        return model.head.loss(context, targets, same, dense.context(slice(1, 2))).sum()

    leaf = mask.clone().requires_grad_()
    loss(leaf).backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    with torch.no_grad():
        for token in (0, 7, 20):
            step = torch.zeros_like(mask)
            step[0, token] = 1e-3
            slope = float(loss(mask + step) - loss(mask - step)) / 2e-3
            assert float(leaf.grad[0, token]) == pytest.approx(slope, rel=0.01, abs=1e-7)


def optimise(losses: LACLoss, steps: int, lam: float, *, length: int = 4, lr: float = 3e-3, stage: int = 2) -> None:
    nets = [*losses.policy.selector.parameters(), *losses.policy.predictor.parameters()]
    optimiser = torch.optim.Adam(nets, lr=lr)
    first = losses.store.windows(np.arange(len(losses.store.start)), length)
    for step in range(steps):
        rng = np.random.default_rng(step)
        optimiser.zero_grad()
        chosen = rng.choice(first, 8)
        if stage == 1:
            losses.alignment(chosen + 1).backward()  # type: ignore[no-untyped-call]
        else:
            losses.window(chosen, length, WARM, torch.Generator().manual_seed(step), lam=lam)
        optimiser.step()


def own_ratio(losses: LACLoss, length: int = 4) -> float:
    first = losses.store.windows(np.arange(len(losses.store.start)), length)
    return losses.window(first, length, WARM, None, lam=0.0, learn=False)["chosen_ratio"]


def test_a_planted_region_is_found_by_the_task_and_not_by_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first two rows' embeddings ever change, while other rows move more in the picture.

    Stage II must rank those two rows first. Stage I, whose attention teacher is made to point at the last two rows,
    does not.
    """
    vla = tiny()
    rows, cols = vla.grids["agentview"]
    n = sum(r * c for r, c in vla.grids.values())
    base = np.random.default_rng(9).normal(size=(n, vla.decoder.shape.width))
    matters = np.zeros(n, bool)
    matters[: 2 * cols] = True

    def draw(rng: np.random.Generator, at: int) -> np.ndarray:
        return np.where(matters[:, None], rng.normal(size=base.shape), base)

    def paint(rng: np.random.Generator, at: int, grid: tuple[int, int]) -> np.ndarray:
        image = np.full((grid[0] * SIDE, grid[1] * SIDE, 3), 90)
        image[: 2 * SIDE] = (200, 60, 60)
        image[2 * SIDE :] += rng.integers(-40, 41, image[2 * SIDE :].shape)  # moves, and means nothing
        return image.astype(np.uint8)

    store = store_of(vla, episodes=6, draw=draw, paint=paint)
    pointed = torch.zeros(1, n)
    pointed[:, (rows - 2) * cols : rows * cols] = 1.0
    monkeypatch.setattr(lac, "alignment_teacher", lambda attention: pointed.expand(attention.shape[0], -1))
    losses = losses_of(vla, store)

    def found() -> float:
        """Share of the planted tokens among the first as many ranks, agentview only."""
        frames = np.arange(1, 7)
        before = [torch.from_numpy(store.images[name][frames - 1]) for name in store.grids]
        young = [torch.zeros(len(frames), *grid) for grid in store.grids.values()]
        with torch.no_grad():
            scores = losses.choose(frames, before, young, WARM, None).scores[:, : rows * cols]
        top = scores.topk(2 * cols, dim=1).indices
        return float((top < 2 * cols).float().mean())

    optimise(losses, 30, 0.0, stage=1)
    assert found() < 0.2
    optimise(losses, 60, 0.05)
    assert found() > 0.9


def test_more_reward_means_more_reuse() -> None:
    vla = tiny()
    ratios = []
    for lam in (0.0, 0.1, 3.0):
        losses = losses_of(vla, store_of(vla))
        optimise(losses, 25, lam)
        ratios.append(own_ratio(losses))
    assert ratios == sorted(ratios)
    assert ratios[-1] > ratios[0] + 0.3


def test_the_ratios_of_inference_are_known_without_the_model() -> None:
    vla = tiny()
    losses = losses_of(vla, store_of(vla))
    torch.nn.init.normal_(losses.policy.predictor.head.weight, std=3.0)
    first = np.arange(4) * 8
    chosen = losses.ratios_chosen(first, 6)
    assert chosen.shape == (5, 4)
    assert len(chosen.unique()) > 2
    window = losses.window(first, 6, WARM, None, lam=0.0, learn=False)
    assert float(chosen.mean()) == pytest.approx(window["chosen_ratio"], abs=0.5 / losses.store.layout.n_visual)


def test_slots_are_refreshed_at_the_age_of_a_session_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between frames seven apart, one of 16 control steps is two frames old."""
    losses = losses_of(vla := tiny(), replace(store_of(vla, length=8 * 7), stride=7))
    losses.policy.ratio = 1.0
    ages, refresh = [], losses.refresh

    def spy(frames: Any, active: Any, reference: Any, age: Any) -> Any:
        ages.append(float(torch.cat([part.flatten() for part in age]).max()))
        return refresh(frames, active, reference, age)

    monkeypatch.setattr(losses, "refresh", spy)
    losses.ratios_chosen(np.array([0]), 8)
    assert max(ages) == 16 // 7


def test_a_static_stream_is_reused_and_a_moving_one_is_not() -> None:
    vla = tiny()
    n, width = sum(r * c for r, c in vla.grids.values()), vla.decoder.shape.width
    fixed = np.random.default_rng(1).normal(size=(n, width))
    still = store_of(
        vla,
        draw=lambda rng, at: fixed,
        paint=lambda rng, at, grid: np.full((grid[0] * SIDE, grid[1] * SIDE, 3), 120, np.uint8),
    )
    moving = store_of(vla)
    both = []
    for store in (still, moving):
        losses = losses_of(vla, store)
        optimise(losses, 40, 0.02)
        both.append(own_ratio(losses))
    assert both[0] > 0.7
    assert both[1] < 0.3


def test_inference_decides_as_training_does() -> None:
    """The same images give the same ratio and mask in a session's view and in the losses."""
    vla = tiny()
    store = store_of(vla)
    losses = losses_of(vla, store, recovery=0.0)
    torch.nn.init.normal_(losses.policy.predictor.head.weight)
    frames = np.array([3])
    before = [torch.from_numpy(store.images[name][frames - 1]) for name in store.grids]
    age = [torch.full((1, *grid), 2.0) for grid in store.grids.values()]
    with torch.no_grad():
        expected = losses.choose(frames, before, age, WARM, None).mask[0].numpy() > 0.5
    inputs = PolicyInput(
        layout=store.layout,
        n_layers=2,
        instruction="pick up the bowl",
        pixels={name: store.images[name][3] for name in store.grids},
        previous={name: store.images[name][2] for name in store.grids},
        reference={name: store.images[name][2] for name in store.grids},
        flow={name: np.zeros((*store.images[name].shape[1:3], 2), np.float32) for name in store.grids},
        age=np.full(store.layout.n_visual, 2),
        rng=np.random.default_rng(0),
    )
    assert np.array_equal(losses.policy.decide(inputs).active, expected)


def test_a_policy_for_another_layout_is_refused() -> None:
    vla = tiny()
    store = store_of(vla)
    other = losses_of(vla, store).policy
    with pytest.raises(InputError, match="token grids"):
        other.check_layout({"agentview": (16, 16)})


@pytest.mark.parametrize("loss", ["distill", "demo"])
def test_a_stride_is_an_episode_recorded_at_that_rate(loss: str) -> None:
    """Windows three frames apart are windows of the episode of which every third frame is kept, in both stages."""
    vla = tiny()
    whole = replace(store_of(vla, episodes=1, length=12), stride=3)
    names = ("visual", "suffix", "suffix_length", "targets")
    kept = {name: getattr(whole, name)[1::3] for name in names}
    images, flow = ({name: part[1::3] for name, part in parts.items()} for parts in (whole.images, whole.flow))
    thin = replace(whole, **kept, images=images, flow=flow, stop=np.array([4]), stride=1)
    assert whole.windows(np.array([0]), 4).tolist() == [0, 1, 2]
    assert thin.windows(np.array([0]), 4).tolist() == [0]
    sums = []
    for store, first, after in ((whole, 1, 7), (thin, 0, 2)):
        losses = losses_of(vla, store, loss)
        window = losses.window(np.array([first]), 4, WARM, None, lam=0.1)
        assert sum(gradients(losses).values()) > 0
        sums.append({**window, **gradients(losses), "alignment": float(losses.alignment(np.array([after])).detach())})
    assert sums[0] == pytest.approx(sums[1], rel=1e-5)
