"""What ratios cost: as a stream measures it; learned by the predictor alone; kept, resumed and refused."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.training.recorded import MAX_AGE, STATE, record, session_of, told
from tests.training.test_train import dataset, model, rows, short_run  # noqa: F401 - fixtures
from tests.training.worlds import SIDE, losses_of, store_of, tiny

from lac_vla import InputError, LACPolicy
from lac_vla.files import locked
from lac_vla.policies.base import cache_lowest
from lac_vla.training.begin import divide_episodes, first_policy
from lac_vla.training.config import TrainConfig
from lac_vla.training.costs import EVERY, KeptCosts, RatioCosts
from lac_vla.training.lac import LACLoss
from lac_vla.training.run_files import load_state, save_state
from lac_vla.training.store import FrameStore
from lac_vla.training.stream import Stream
from lac_vla.training.train import Training, train


def exact_losses() -> LACLoss:
    vla = tiny()
    losses = losses_of(vla, store_of(vla))
    torch.nn.init.normal_(losses.policy.predictor.head.weight, std=3.0)
    return LACLoss(vla, losses.store, losses.policy, "distill", exact=True)


def measured(losses: LACLoss, folder: Path) -> RatioCosts:
    kept = KeptCosts(losses, folder)
    assert kept.measure()
    return kept.read()


def test_costs_are_measured_on_the_cache_that_a_real_session_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recovery, maximum age, and episodes of unequal length side by side, against sessions one frame at a time."""
    monkeypatch.setattr("lac_vla.training.costs.groups", lambda store, episodes: [episodes])  # not the longest first
    world = record(tmp_path)
    vla, policy = world.vla(), LACPolicy.from_pretrained(world.policy)
    store = FrameStore.build(vla, world.dataset, tmp_path / "store", flow="dis", patch_pixels=SIDE)
    losses = LACLoss(vla, store, policy, "distill", exact=True)
    found = measured(losses, tmp_path / "store")
    ratios, seen, ages = policy.config.ratios, [], []
    for number, (first, stop) in enumerate(zip(store.start, store.stop, strict=True)):
        stream = Stream(losses, int(first))
        for frame, (age, reference, info) in enumerate(session_of(world, vla, policy, number), int(first) + 1):
            stream.next()
            scores = stream.choice().scores[0].numpy()
            if (frame - first) % EVERY == 0:
                [row] = np.flatnonzero(found.frames == frame)
                seen.append(frame)
                ages.append(age)
                np.testing.assert_array_equal(found.age[row], age)
                chosen = int(found.of(np.array([row])).logits(losses).argmax())
                assert ratios[chosen] == info.nominal_ratio
                for own, image in zip(found.reference, reference.values(), strict=True):
                    np.testing.assert_array_equal(own[row], image)
                masks = torch.from_numpy(np.stack([~cache_lowest(scores, ratio) for ratio in ratios])).float()
                with torch.no_grad():
                    expected = stream.divergence(masks)
                np.testing.assert_allclose(found.divergence[row], expected.numpy(), rtol=1e-3, atol=1e-6)
            stream.commit(torch.from_numpy(info.active).float())
        assert frame == stop - 1
    assert sorted(seen) == sorted(found.frames)
    assert np.max(ages) == MAX_AGE


def test_costs_are_kept_once_by_policy_and_model_and_go_on_where_they_were_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lac_vla.training.robots.TOGETHER", 2)
    losses = exact_losses()
    kept = KeptCosts(losses, tmp_path / "store")
    assert not kept.measure(max_seconds=0.0)
    [first] = kept.folder.glob("*.npz")
    written = first.stat().st_mtime_ns
    assert not kept.whole
    assert kept.measure(max_seconds=0.0)
    assert first.stat().st_mtime_ns == written
    whole = kept.read()
    names = [kept.name]
    for weight in (losses.policy.selector.shift, next(losses.vla.module.parameters())):  # a weight in mid-depth, too
        with torch.no_grad():
            weight += 1e-3
        names.append(KeptCosts(losses, tmp_path / "store").name)
    with monkeypatch.context() as patch:  # files are named by groups
        patch.setattr("lac_vla.training.robots.TOGETHER", 6)
        names.append(KeptCosts(losses, tmp_path / "store").name)
        assert not KeptCosts(losses, tmp_path / "store", kept.name).whole
    assert len(set(names)) == 4
    first.write_bytes(b"damaged")
    with pytest.raises(InputError, match="measures it again"):
        kept.read()
    first.unlink()
    assert kept.measure()
    again = kept.read()
    np.testing.assert_array_equal(again.frames, whole.frames)
    np.testing.assert_array_equal(again.divergence, whole.divergence)


def test_another_process_that_measures_is_waited_for(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    kept, held, enough = KeptCosts(exact_losses(), tmp_path / "store"), threading.Event(), threading.Event()

    def hold() -> None:
        with locked(kept.lock, "busy"):
            held.set()
            enough.wait(60)

    kept.lock.parent.mkdir()
    other = threading.Thread(target=hold)
    other.start()
    assert held.wait(60)
    assert not kept.measure(max_seconds=0.0)
    assert "another process measures" in "".join(capfd.readouterr())
    assert not kept.whole
    threading.Timer(0.5, enough.set).start()
    assert kept.measure()
    assert kept.whole
    other.join()


def costs_of(losses: LACLoss, folder: Path, divergence: np.ndarray) -> RatioCosts:
    found = measured(losses, folder)
    return replace(found, divergence=divergence[: len(found.frames)].astype(np.float32))


def test_the_likeliest_ratio_becomes_the_one_that_is_expected_to_cost_least(tmp_path: Path) -> None:
    """Frames of which nothing is known but what they cost in the mean, in which few carry most."""
    losses = exact_losses()
    ratios, rng = np.array(losses.config.ratios), np.random.default_rng(0)
    mean = 1e-2 * ratios**4
    divergence = mean * rng.gamma(0.3, 1 / 0.3, (1000, len(ratios)))
    divergence[-1] = mean
    costs = costs_of(losses, tmp_path, np.tile(mean, (1000, 1)))
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


def test_what_only_the_robot_feels_is_learned_too(tmp_path: Path) -> None:
    """Frames that look alike, of which those with the hand closed are hard."""
    vla, rng = told(), np.random.default_rng(0)
    still = np.full((6 * SIDE, 6 * SIDE, 3), 120, np.uint8)
    store = store_of(vla, episodes=6, paint=lambda rng, at, grid: still[: grid[0] * SIDE, : grid[1] * SIDE])
    state = rng.normal(size=(len(store), STATE)).astype(np.float32)
    state[:, 2] = 0.01 * np.where(rng.random(len(store)) < 0.5, 1.0, -1.0) + 3.0  # in the robot's own units
    state[:, 3] = 7.0  # never changes
    store = replace(store, state=state)
    learner = losses_of(vla, store, proprio=STATE)
    losses, predictor = LACLoss(vla, store, learner.policy, "distill", exact=True), learner.policy.predictor
    assert not predictor.standardised
    predictor.standardise(torch.from_numpy(state))
    assert predictor.standardised
    assert predictor.state_gain[2] == pytest.approx(100, rel=0.05)
    assert predictor.state_gain[3] == 0
    ratios = np.array(losses.config.ratios)
    found = measured(losses, tmp_path)
    closed = state[found.frames, 2] > 3
    costs = replace(found, divergence=(np.where(closed, 1.0, 0.001)[:, None] * ratios**2).astype(np.float32))
    predictor.forget()
    optimiser = torch.optim.Adam(predictor.parameters(), lr=1e-2)
    for _ in range(60):
        loss, _ = costs.loss(losses, 0.5, 0.3)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        chosen = ratios[costs.logits(losses).argmax(dim=1).numpy()]
        far = costs.logits(LACLoss(vla, replace(store, state=state + 1e6), learner.policy, "distill"))
    assert chosen[closed].max() < 0.5
    assert chosen[~closed].min() > 0.8
    assert bool(far.isfinite().all())


def test_a_predictor_that_reads_more_begins_as_the_one_that_read_less(config: TrainConfig, tmp_path: Path) -> None:
    vla = told()
    old = first_policy(replace(config, predictor_steps=0), vla, dict(vla.grids))
    torch.nn.init.normal_(old.predictor.head.weight, std=3.0)
    old.save_pretrained(tmp_path / "old")
    wider = replace(config, start=tmp_path / "old", proprio=True)
    new = first_policy(wider, vla, dict(vla.grids))
    assert new.config.proprio == STATE
    assert not new.predictor.standardised
    new.predictor.standardise(torch.randn(50, STATE))
    pooled = torch.randn(20, old.predictor.hidden.in_features)
    with torch.no_grad():
        torch.testing.assert_close(new.predictor.read(pooled, torch.randn(20, STATE)), old.predictor.read(pooled))
    new.save_pretrained(tmp_path / "new")
    again = first_policy(replace(wider, start=tmp_path / "new"), vla, dict(vla.grids))
    assert torch.equal(again.predictor.state_gain, new.predictor.state_gain)
    with pytest.raises(InputError, match=r"made with other \['proprio'\]"):
        first_policy(replace(wider, start=tmp_path / "new", proprio=False), vla, dict(vla.grids))
    with pytest.raises(InputError, match=r"made with other \['proprio'\]"):
        first_policy(replace(wider, predictor_steps=0), vla, dict(vla.grids))
    with pytest.raises(InputError, match=r"takes no proprioception.*leave it out"):
        first_policy(replace(config, proprio=True), tiny(), dict(vla.grids))


def test_proprioception_is_stored_and_learned_from_by_the_command(tmp_path: Path) -> None:
    world = record(tmp_path)
    run = short_run(world.model, world.dataset, tmp_path / "run")
    run = replace(run, stage1_steps=1, stage2_steps=1, predictor_steps=2, target_ratio=0.6, proprio=True)
    policy = LACPolicy.from_pretrained(train(run))
    store = FrameStore.open(run.out / "store")
    recorded = np.concatenate([[frame.proprio for frame in world.frames(number)] for number in range(4)])
    np.testing.assert_array_equal(store.state, recorded)
    _, held = divide_episodes(run, 4)
    shown = np.concatenate([recorded[store.start[e] : store.stop[e]] for e in range(4) if e not in held])
    np.testing.assert_allclose(policy.predictor.state_mean, shown.mean(axis=0), rtol=1e-4, atol=1e-5)
    for _, _, info in session_of(world, world.vla(), policy, 1):
        assert info.nominal_ratio in run.ratios
    meta = run.out / "store" / "store.json"
    meta.write_text(meta.read_text().replace('"has_state": true', '"has_state": false'))  # as it was stored before
    with pytest.raises(InputError, match=r"holds no proprioception.*another --store"):
        train(replace(run, out=tmp_path / "other", store=run.out / "store"))


def test_a_price_is_found_for_a_mean_and_hindsight_is_the_limit(tmp_path: Path) -> None:
    losses = exact_losses()
    ratios = np.array(losses.config.ratios)
    hard = np.random.default_rng(0).lognormal(-6, 2, (1000, 1))
    costs = costs_of(losses, tmp_path, hard * ratios**2)
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
    shared = alone.out / "store"
    [kept] = [path for path in shared.iterdir() if path.is_dir()]
    written = {path: path.stat().st_mtime_ns for path in kept.iterdir()}
    stopped = replace(alone, out=tmp_path / "stopped", store=shared)
    train(stopped, max_seconds=1e-9)
    again = LACPolicy.from_pretrained(train(stopped)).networks.state_dict()
    assert {path: path.stat().st_mtime_ns for path in kept.iterdir()} == written, "costs are measured once"
    assert [path.name for path in stopped.out.glob("*.npz")] == ["saliency.npz"], "they are kept with the store alone"
    assert all(torch.equal(weight, again[name]) for name, weight in whole.items())
    gone = replace(alone, out=tmp_path / "gone", store=shared)
    train(gone, max_seconds=1e-9)
    state = load_state(gone.out)
    assert state is not None
    save_state(gone.out, {**state, "costs": ""})  # as an earlier version did
    with pytest.raises(InputError, match=r"an earlier version began.*begin anew with another --out"):
        train(gone)
    save_state(gone.out, state)
    for path in written:
        path.unlink()
    with pytest.raises(InputError, match=r"is gone.*--store that the run was begun with.*another --out"):
        train(gone)


def test_a_run_whose_time_is_up_goes_on_to_measure(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lac_vla.training.robots.TOGETHER", 2)
    alone = replace(config, stage1_steps=0, stage2_steps=0)
    train(alone, max_seconds=1e-9)
    assert "the same command goes on" in "".join(capfd.readouterr())
    assert not rows(alone.out)
    state = load_state(alone.out)
    assert state is not None
    assert state["seconds"] > 0, "measuring counts"
    assert LACPolicy.from_pretrained(alone.out / "policy").about["steps"] == 0
    train(alone, max_seconds=1e-9)
    assert LACPolicy.from_pretrained(alone.out / "policy").about["steps"] == 1
    train(alone)
    assert LACPolicy.from_pretrained(alone.out / "policy").about["steps"] == 4


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
