"""CogACT's head as a task: its targets, both losses, what it refuses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.training.worlds import tiny

from lac_vla import InputError, random_vla
from lac_vla.models.cogact.config import TINY_COGACT
from lac_vla.models.cogact.model import SCHEDULE
from lac_vla.training.tasks import DiffusionTask, task_of
from lac_vla.training.tasks.diffusion import DRAWS

STATS = {"ours": {"action": {"q01": [-2.0] * 7, "q99": [2.0] * 7, "mask": [True] * 6 + [False]}}}
ACTIONS = np.random.default_rng(0).uniform(-2, 2, (20, 7)).astype(np.float32)
ACTIONS[:, 6] = np.where(np.arange(20) < 11, -1, 1)


def task_with(gripper: tuple[float, float]) -> DiffusionTask:
    config = replace(TINY_COGACT, vlm=replace(TINY_COGACT.vlm, norm_stats=STATS), gripper=gripper)
    return DiffusionTask(random_vla(config))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_targets_are_normalised_chunks_that_go_on_with_the_last_action() -> None:
    task = task_with((1.0, -1.0))
    chunks = task.targets(ACTIONS).reshape(20, 16, 7)
    normal = ACTIONS / 2
    normal[:, 6] = ACTIONS[:, 6] < 0
    np.testing.assert_allclose(chunks[0], normal[:16], atol=1e-6)
    np.testing.assert_allclose(chunks[18], normal[[18] + [19] * 15], atol=1e-6)
    own = np.stack([ACTIONS[:16]] * 3)  # what the model answered itself
    np.testing.assert_allclose(task.targets(own).reshape(3, 16, 7), chunks[[0, 0, 0]])
    assert np.array_equal(task.model.unnormalize_actions(chunks[0])[:, 6], ACTIONS[:16, 6])


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (ACTIONS[:, :6], r"shape \(20, 6\); the model's are chunks of 16 × 7"),
        (np.zeros((4, 8, 7), np.float32), r"shape \(4, 8, 7\); the model's are chunks"),
        (100 * ACTIONS, "outside the model's range"),
        (ACTIONS, r"gripper runs from -1 to 1; the model's from 0, closed, to 1, open"),
    ],
)
def test_what_does_not_fit_is_refused(actions: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        task_with((0.0, 1.0)).targets(actions)


def test_demo_is_the_mean_square_error_of_the_noise() -> None:
    backbone = tiny("cogact-tiny")
    task = task_of(backbone)
    assert isinstance(task, DiffusionTask)
    hidden = torch.randn(2, 1, 32, generator=seeded())
    targets = torch.rand(2, 112, generator=seeded())
    found = task.demo(hidden, targets, seeded())
    generator = seeded()
    t = torch.randint(SCHEDULE.steps, (2 * DRAWS,), generator=generator)
    noise = torch.randn(2 * DRAWS, 16, 7, generator=generator)
    for row in range(2):
        squares = []
        for draw in range(row * DRAWS, (row + 1) * DRAWS):
            bar = SCHEDULE.alpha_bar[int(t[draw])]
            noisy = bar**0.5 * targets[row].view(16, 7) + (1 - bar) ** 0.5 * noise[draw]
            guess = backbone.model.action_model.net(noisy[None].float(), t[draw : draw + 1], hidden[row][None])
            squares.append(float((guess[0] - noise[draw]).square().mean()))
        assert float(found[row]) == pytest.approx(np.mean(squares), rel=1e-4)


def test_distillation_measures_the_distance_from_the_dense_prediction() -> None:
    task = task_of(tiny("cogact-tiny"))
    dense = torch.randn(3, 1, 32, generator=seeded())
    targets = torch.zeros(3, 112)
    assert torch.equal(task.distill(dense, dense, targets, seeded()), torch.zeros(3))
    shift = torch.randn(3, 1, 32, generator=torch.Generator().manual_seed(9))
    near, far = (task.distill(dense + step * shift, dense, targets, seeded()) for step in (0.05, 0.5))
    assert (near > 0).all()
    assert (far > 5 * near).all()
    assert torch.equal(near, task.distill(dense + 0.05 * shift, dense, targets, seeded()))
    assert not torch.equal(near, task.distill(dense + 0.05 * shift, dense, targets, torch.Generator().manual_seed(4)))


def test_the_dense_pass_is_the_teacher_and_gets_no_gradient() -> None:
    task = task_of(tiny("cogact-tiny"))
    hidden, dense = (torch.randn(2, 1, 32, generator=torch.Generator().manual_seed(s)).requires_grad_() for s in (0, 1))
    task.distill(hidden, dense, torch.zeros(2, 112), seeded()).sum().backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    assert float(hidden.grad.abs().sum()) > 0
    assert dense.grad is None


def test_fingerprints_tell_heads_apart() -> None:
    one, same, other = (random_vla("cogact-tiny", seed=seed) for seed in (0, 0, 1))
    assert task_of(one).fingerprint() == task_of(same).fingerprint() != task_of(other).fingerprint()
    assert task_of(tiny()).fingerprint() == b""
