"""Predicted changes of reused slots: nothing until learned, the same in training as in a session, a true gradient."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.engine.scenes import frame
from tests.training.test_train import dataset, model, rows, short_run  # noqa: F401 - fixtures
from tests.training.worlds import SIDE, store_of, tiny

from lac_vla import VLA, CachedVLA, CheckpointError, InputError, LACPolicy, random_vla
from lac_vla.cost import CostModel
from lac_vla.lerobot.self_check import fault
from lac_vla.policies import LACConfig, build_policy
from lac_vla.policies.spec import PolicySpec
from lac_vla.training import precision
from lac_vla.training.lac import LACLoss, Temperatures
from lac_vla.training.store import FrameStore
from lac_vla.training.train import train
from lac_vla.types import PolicyInput

COLD = Temperatures(0.5, 0.05)


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finite differences need float32 products."""
    monkeypatch.setattr(precision, "AUTOCAST", False)


@pytest.fixture(scope="module")
def vla() -> VLA:
    return tiny("smolvla-tiny")


def policy_of(vla: VLA, *, deltas: bool = True, learned: float = 0.0, **options: object) -> LACPolicy:
    """A policy of ratio 0.5; what it predicts is random, of about this size."""
    torch.manual_seed(0)
    slots = (vla.n_layers, vla.decoder.kv_heads, vla.decoder.head_dim)
    config = LACConfig(dict(vla.grids), slots=slots, recovery=0.0, width=8, patch_pixels=SIDE, **options)  # type: ignore[arg-type]
    policy = LACPolicy(config, ratio=0.5, deltas=deltas)
    assert policy.delta_network is not None
    torch.nn.init.normal_(policy.delta_network.out.weight, std=learned / 8) if learned else None
    return policy


def slots_of(session: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of the visual slots, each (layers, heads, N, head_dim)."""
    region, store = session._region, session.engine.store  # type: ignore[attr-defined]
    visual = session.last_info.layout.visual  # type: ignore[attr-defined]
    own = slice(region.start + visual.start, region.start + visual.stop)
    return store.keys[:, :, own].clone(), store.values[:, :, own].clone()


def test_what_has_not_learned_changes_no_bit(vla: VLA) -> None:
    with_, without = (CachedVLA(vla, policy_of(vla, deltas=deltas)).session() for deltas in (True, False))
    for number in range(4):
        np.testing.assert_array_equal(with_.act(frame(number)), without.act(frame(number)))
    assert with_.last_info.ratio > 0.4
    for one, other in zip(slots_of(with_), slots_of(without), strict=True):
        assert torch.equal(one, other)


def test_slots_that_are_computed_stay_what_they_are(vla: VLA) -> None:
    session, dense = CachedVLA(vla, policy_of(vla, learned=1.0)).session(), CachedVLA(vla).session()
    for number in range(3):
        before = slots_of(session) if number else None
        plan = session.plan(frame(number))
        [result] = session.engine.run([plan])
        session.commit(plan, result)
        action, exact = result.action, dense.act(frame(number))
        if before is None:
            np.testing.assert_array_equal(action, exact)  # the first frame reuses nothing
            continue
        deltas = plan.decision()[0].deltas
        assert session.last_info.decision.deltas is None  # a report is kept, and they are large
        reused = torch.from_numpy(~session.last_info.decision.active)
        for old, new, fresh, added in zip(before, slots_of(session), slots_of(dense), deltas, strict=True):
            assert torch.equal(new[:, :, reused], old[:, :, reused] + added)
            # of the first layer they depend on nothing but the token itself
            torch.testing.assert_close(new[0][:, ~reused], fresh[0][:, ~reused], rtol=1e-4, atol=1e-5)
        assert not np.array_equal(action, exact)
    cost, step = CostModel.of(vla, frame(0)), session.last_info
    policy = policy_of(vla, learned=1.0)
    assert cost.step(step)["policy"] == policy.macs + policy.slot_macs * int(reused.sum())
    assert policy_of(vla, deltas=False).slot_macs == 0


def test_a_first_check_knows_that_the_second_answer_is_another(vla: VLA) -> None:
    assert fault(CachedVLA(vla, policy_of(vla, learned=9.0)), frame(0), 0) is None


@pytest.mark.parametrize("flow", ["dis", "none"])
def test_training_predicts_what_a_session_predicts(vla: VLA, flow: str) -> None:
    policy, store = policy_of(vla, learned=1.0, flow=flow), store_of(vla)
    rng = np.random.default_rng(1)
    moved = {name: rng.normal(size=part.shape).astype(np.float16) for name, part in store.flow.items()}
    losses = LACLoss(vla, replace(store, flow=moved), policy, "distill")
    dense = losses.decode(np.array([1, 9])).store.slots
    ages = [torch.from_numpy(rng.integers(0, 20, (2, *grid))) for grid in vla.grids.values()]
    with torch.no_grad():
        changed = losses.changed(dense, np.array([1, 9]), ages)
    for row, number in enumerate((1, 9)):
        pixels = {name: np.asarray(store.images[name][number]) for name in vla.grids}
        inputs = PolicyInput(
            layout=replace(store.layout, n_suffix=5), n_layers=vla.n_layers, instruction="go", pixels=pixels,
            previous=pixels, reference=pixels, rng=rng, age=np.concatenate([age[row].numpy().ravel() for age in ages]),
            flow={name: part[number].astype(np.float32) * SIDE for name, part in moved.items()},
        )  # fmt: skip
        reused = rng.random(store.layout.n_visual) < 0.5
        added = policy.deltas(inputs, reused)
        at = torch.from_numpy(reused)
        for layer in range(vla.n_layers):
            for kind, (old, new) in enumerate(((dense.keys, changed.keys), (dense.values, changed.values))):
                expected = (new[layer] - old[layer])[row][:, at]
                torch.testing.assert_close(added[kind, layer], expected, rtol=1e-3, atol=1e-4)


def test_the_gradient_is_that_of_finite_differences_and_moves_nothing_else(vla: VLA) -> None:
    policy = policy_of(vla, learned=0.5)
    losses = LACLoss(vla, store_of(vla), policy, "distill")
    for name, network in policy.networks.items():
        network.requires_grad_(name == "deltas")

    def loss(*, learn: bool = False) -> float:
        generator = torch.Generator().manual_seed(3)
        # one frame behind a dense one: between frames the cache is detached
        return losses.window(np.array([0, 8]), 2, COLD, generator, lam=0.1, learn=learn, deltas=True)["loss"]

    loss(learn=True)
    assert all(weight.grad is None for part in (policy.selector, policy.predictor) for weight in part.parameters())
    network = policy.delta_network
    direction = {name: weight.grad / weight.grad.norm() for name, weight in network.named_parameters()}
    for name, weight in network.named_parameters():
        with torch.no_grad():
            values = []
            for step in (1e-2, -2e-2):
                weight += step * direction[name]
                values.append(loss())
            weight += 1e-2 * direction[name]
        assert (values[0] - values[1]) / 2e-2 == pytest.approx(float(weight.grad.norm()), rel=0.1), name


def test_what_was_learned_is_kept_with_the_policy(vla: VLA, tmp_path: Path) -> None:
    policy = policy_of(vla, learned=1.0)
    policy.save_pretrained(tmp_path / "kept")
    loaded = build_policy(PolicySpec.parse(f"lac:path={tmp_path / 'kept'},deltas=true,ratio=0.5"))
    assert isinstance(loaded, LACPolicy)
    own, other = CachedVLA(vla, policy).session(), CachedVLA(vla, loaded).session()
    off = CachedVLA(vla, LACPolicy.from_pretrained(tmp_path / "kept", ratio=0.5)).session()
    for number in range(3):
        action = own.act(frame(number))
        np.testing.assert_array_equal(action, other.act(frame(number)))
        assert np.array_equal(action, off.act(frame(number))) == (number == 0)  # off by default
    other_model = random_vla("tiny")
    with pytest.raises(InputError, match=r"predicts keys and values of .*leave out deltas"):
        CachedVLA(other_model, LACPolicy(replace(loaded.config, grids=dict(other_model.grids)), deltas=True))
    LACPolicy(replace(policy.config, slots=None)).save_pretrained(tmp_path / "without")
    with pytest.raises(InputError, match="predicts no changes"):
        LACPolicy.from_pretrained(tmp_path / "without", deltas=True)
    (tmp_path / "kept" / "policy.safetensors").write_bytes((tmp_path / "without" / "policy.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="does not fit"):
        LACPolicy.from_pretrained(tmp_path / "kept")


def test_a_run_learns_the_changes_alone(model: Path, dataset: Path, tmp_path: Path) -> None:  # noqa: F811
    config = replace(short_run(model, dataset, tmp_path / "first"), stage1_steps=1, stage2_steps=1)
    first = train(config)
    config = replace(config, out=tmp_path / "second", start=first, stage1_steps=0, stage2_steps=0, delta_steps=4)
    before, after = LACPolicy.from_pretrained(first), LACPolicy.from_pretrained(train(config), deltas=True)
    for name, weight in before.networks.state_dict().items():
        assert torch.equal(weight, after.networks.state_dict()[name]), name
    assert after.delta_network is not None
    assert float(after.delta_network.out.weight.detach().abs().max()) > 0
    noted = rows(config.out)
    assert {row["stage"] for row in noted} == {3}
    assert all(np.isfinite(list(row.values())).all() for row in noted)
    assert {"held_out_task", "held_out_task_deltas"} <= {name for row in noted for name in row}
    assert FrameStore.open(config.out / "store").stride == 1
    with pytest.raises(InputError, match=r"made with other \['depth'\]"):
        train(replace(config, out=tmp_path / "third", depth=1))
