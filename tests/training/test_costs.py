"""What ratios cost: as a stream measures it; learned by the predictor alone; kept, resumed and refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.training.test_train import dataset, model, rows, short_run  # noqa: F401 - fixtures
from tests.training.worlds import SIDE, losses_of, store_of, tiny

from lac_vla import InputError, LACPolicy
from lac_vla.policies.base import cache_lowest
from lac_vla.training.begin import first_policy
from lac_vla.training.config import TrainConfig
from lac_vla.training.costs import EVERY, FILE, RatioCosts, measure_costs
from lac_vla.training.lac import LACLoss
from lac_vla.training.stream import Stream
from lac_vla.training.train import Training, train


def exact_losses() -> LACLoss:
    vla = tiny()
    losses = losses_of(vla, store_of(vla))
    torch.nn.init.normal_(losses.policy.predictor.head.weight, std=3.0)
    return LACLoss(vla, losses.store, losses.policy, "distill", exact=True)


def test_costs_are_those_of_every_episode_s_own_stream() -> None:
    losses = exact_losses()
    losses.policy.recovery = 0.0
    store, ratios = losses.store, losses.config.ratios
    found = measure_costs(losses)
    assert len(found.frames) == len(np.unique(found.frames)) > len(store.start)
    for first, stop in zip(store.start, store.stop, strict=True):
        stream = Stream(losses, int(first))
        for frame in range(int(first) + 1, int(stop)):
            stream.next()
            choice = stream.choice()
            if (frame - first) % EVERY == 0:
                [row] = np.flatnonzero(found.frames == frame)
                masks = np.stack([~cache_lowest(choice.scores[0].numpy(), ratio) for ratio in ratios])
                with torch.no_grad():
                    expected = stream.divergence(torch.from_numpy(masks).float())
                np.testing.assert_allclose(found.divergence[row], expected.numpy(), rtol=1e-3, atol=1e-6)
                np.testing.assert_array_equal(found.age[row], stream.age.numpy())
                assert ratios[int(found.of(np.array([row])).logits(losses).argmax())] == pytest.approx(
                    1 - float(choice.mask.mean()), abs=0.5 / len(choice.mask[0])
                )
            stream.commit(choice.mask[0])


def costs_of(losses: LACLoss, divergence: np.ndarray) -> RatioCosts:
    measured = measure_costs(losses)
    return replace(measured, divergence=divergence[: len(measured.frames)].astype(np.float32))


def test_the_likeliest_ratio_becomes_the_one_that_is_expected_to_cost_least() -> None:
    """Frames of which nothing is known but what they cost in the mean, in which few carry most."""
    losses = exact_losses()
    ratios, rng = np.array(losses.config.ratios), np.random.default_rng(0)
    mean = 1e-2 * ratios**4
    divergence = mean * rng.gamma(0.3, 1 / 0.3, (1000, len(ratios)))
    divergence[-1] = mean
    costs = costs_of(losses, np.tile(mean, (1000, 1)))
    lam = 0.015
    expected = int((mean + lam * (1 - ratios)).argmin())
    assert 0 < expected < len(ratios) - 1
    losses.policy.predictor.forget()
    optimiser = torch.optim.Adam(losses.policy.predictor.parameters(), lr=1e-2)
    noisy = [
        replace(costs, divergence=rng.permutation(divergence)[: len(costs.frames)].astype(np.float32))
        for _ in range(150)
    ]
    for draw in noisy:
        loss, _ = draw.loss(losses, lam, float((mean + lam * (1 - ratios)).mean()))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        found = costs.logits(losses).mean(dim=0).numpy()
    cost = mean + lam * (1 - ratios)
    np.testing.assert_allclose(-found, np.log(cost / cost.mean()), atol=0.3)
    assert ratios[int(found.argmax())] == pytest.approx(ratios[expected], abs=0.11)


def test_a_price_is_found_for_a_mean_and_hindsight_is_the_limit() -> None:
    losses = exact_losses()
    ratios = np.array(losses.config.ratios)
    hard = np.random.default_rng(0).lognormal(-6, 2, (1000, 1))
    costs = costs_of(losses, hard * ratios**2)
    means = [float(ratios[costs.cheapest(ratios, costs.price(ratios, target))].mean()) for target in (0.3, 0.6, 0.85)]
    assert means == pytest.approx([0.3, 0.6, 0.85], abs=0.1)
    compared = costs.compare(losses)
    assert compared["divergence_best"] <= min(compared["divergence"], compared["divergence_fixed"]) + 1e-9


@pytest.fixture
def config(model: Path, dataset: Path, tmp_path: Path) -> TrainConfig:  # noqa: F811
    return replace(short_run(model, dataset, tmp_path / "run"), predictor_steps=4, target_ratio=0.6)


def test_the_predictor_alone_learns_and_a_stopped_run_goes_on(config: TrainConfig, tmp_path: Path) -> None:
    first = train(replace(config, out=tmp_path / "first", predictor_steps=0))
    alone = replace(config, start=first, stage1_steps=0, stage2_steps=0)
    whole = LACPolicy.from_pretrained(train(alone)).networks.state_dict()
    for name, weight in LACPolicy.from_pretrained(first).networks.state_dict().items():
        assert torch.equal(weight, whole[name]) == name.startswith("selector"), name
    noted = rows(alone.out)
    assert {row["stage"] for row in noted} == {4}
    assert {"lam", "argmax_ratio", "held_out_costs_divergence"} <= {name for row in noted for name in row}
    stopped = replace(alone, out=tmp_path / "stopped")
    train(stopped, max_seconds=1e-9)
    measured = (stopped.out / FILE).stat().st_mtime_ns
    [kept] = (stopped.out / "store").glob("costs-*.npz")
    assert kept.read_bytes() == (stopped.out / FILE).read_bytes(), "for other runs on this store"
    again = LACPolicy.from_pretrained(train(stopped)).networks.state_dict()
    assert (stopped.out / FILE).stat().st_mtime_ns == measured, "costs are measured once"
    assert all(torch.equal(weight, again[name]) for name, weight in whole.items())
    (stopped.out / FILE).write_bytes(b"damaged")
    with pytest.raises(InputError, match="measures it again"):
        RatioCosts.read(stopped.out / FILE)
    gone = replace(alone, out=tmp_path / "gone")
    train(gone, max_seconds=1e-9)
    (gone.out / FILE).unlink()
    with pytest.raises(InputError, match=r"costs.npz is gone.*another --out"):
        train(gone)


def test_the_predictors_own_stage_begins_without_a_preference_on_the_episodes_trained_on(config: TrainConfig) -> None:
    vla = tiny()
    run = Training(replace(config, stage1_steps=0, stage2_steps=2, patch_pixels=SIDE), vla, store_of(vla, episodes=4))
    config.out.mkdir()
    while run.stage < 4:
        run.advance()
    head = run.policy.predictor.head.weight
    assert run.optimiser.state[head]["step"] == 2
    torch.nn.init.normal_(head, std=3.0)  # far from what a step or two can reach
    held = np.isin(run.losses.episode[run.costs.frames], run.losses.episode[run.held_first])
    assert 0 < held.sum() < len(held)
    run.costs.divergence[held] = np.nan  # nothing is learned from the episodes held out
    run.advance()
    assert 0 < head.abs().max() <= 2 * config.lr
    assert run.optimiser.state[head]["step"] == 1


def test_finer_candidates_begin_as_the_old_ones(config: TrainConfig, tmp_path: Path) -> None:
    vla = tiny()
    grids = dict(vla.grids)
    old = first_policy(replace(config, predictor_steps=0), vla, grids)
    torch.nn.init.normal_(old.predictor.head.weight, std=3.0)
    old.save_pretrained(tmp_path / "old")
    finer = replace(config, start=tmp_path / "old", ratios=(0.0, 0.25, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95))
    new = first_policy(finer, vla, grids)
    pooled = torch.randn(200, old.predictor.hidden.in_features)
    with torch.no_grad():
        chosen = [
            [policy.config.ratios[at] for at in policy.predictor.read(pooled).argmax(dim=1)] for policy in (old, new)
        ]
    assert chosen[0] == chosen[1]
    assert len(set(chosen[0])) > 2
    with pytest.raises(InputError, match=r"made with other \['ratios'\]"):
        first_policy(replace(finer, predictor_steps=0), vla, grids)
    for change in ({"fixed_ratio": 0.5}, {"vision_kv_reuse": True}, {"predictor_steps": -1}):
        with pytest.raises(InputError, match=r"predictor|steps at least 0"):
            replace(config, **change)  # type: ignore[arg-type]
