"""The diffusion head's losses: its targets, both losses, what it refuses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.training.worlds import tiny

from lac_vla import InputError, random_vla
from lac_vla.models.cogact.config import TINY_COGACT
from lac_vla.models.heads.base import ActionHead, AppendRows, LossContext
from lac_vla.models.heads.diffusion import DRAWS, SCHEDULE, DiffusionHead
from lac_vla.types import TokenLayout

STATS = {"ours": {"action": {"q01": [-2.0] * 7, "q99": [2.0] * 7, "mask": [True] * 6 + [False]}}}
ACTIONS = np.random.default_rng(0).uniform(-2, 2, (20, 7)).astype(np.float32)
ACTIONS[:, 6] = np.where(np.arange(20) < 11, -1, 1)


def head_with(gripper: tuple[float, float]) -> DiffusionHead:
    head = random_vla(replace(TINY_COGACT, vlm=replace(TINY_COGACT.vlm, norm_stats=STATS), gripper=gripper)).head
    assert isinstance(head, DiffusionHead)
    return head


def context_of(hidden: torch.Tensor) -> LossContext:
    """Of a head that reads hidden states alone, (B, n_rows, width)."""

    def none(_: int | AppendRows) -> torch.Tensor:
        raise AssertionError("only hidden states are read")

    lengths = torch.full((len(hidden),), 5)
    return LossContext(TokenLayout.of({"agentview": (2, 2)}, 1, 0), hidden, none, none, lengths, none)


def demo(head: ActionHead, hidden: torch.Tensor, targets: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return head.loss(context_of(hidden), targets, generator)


def distill(
    head: ActionHead, hidden: torch.Tensor, dense: torch.Tensor, targets: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    return head.loss(context_of(hidden), targets, generator, context_of(dense))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_targets_are_normalised_chunks_that_go_on_with_the_last_action() -> None:
    head = head_with((1.0, -1.0))
    chunks = head.targets(ACTIONS).reshape(20, 16, 7)
    normal = ACTIONS / 2
    normal[:, 6] = ACTIONS[:, 6] < 0
    np.testing.assert_allclose(chunks[0], normal[:16], atol=1e-6)
    np.testing.assert_allclose(chunks[18], normal[[18] + [19] * 15], atol=1e-6)
    own = np.stack([ACTIONS[:16]] * 3)  # what the model answered itself
    np.testing.assert_allclose(head.targets(own).reshape(3, 16, 7), chunks[[0, 0, 0]])
    assert np.array_equal(head.unnormalize_actions(chunks[0])[:, 6], ACTIONS[:16, 6])


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
        head_with((0.0, 1.0)).targets(actions)


def test_demo_is_the_mean_square_error_of_the_noise() -> None:
    head = tiny("cogact-tiny").head
    assert isinstance(head, DiffusionHead)
    hidden = torch.randn(2, 1, 32, generator=seeded())
    targets = torch.rand(2, 112, generator=seeded())
    found = demo(head, hidden, targets, seeded())
    generator = seeded()
    t = torch.randint(SCHEDULE.steps, (2 * DRAWS,), generator=generator)
    noise = torch.randn(2 * DRAWS, 16, 7, generator=generator)
    for row in range(2):
        squares = []
        for draw in range(row * DRAWS, (row + 1) * DRAWS):
            bar = SCHEDULE.alpha_bar[int(t[draw])]
            noisy = bar**0.5 * targets[row].view(16, 7) + (1 - bar) ** 0.5 * noise[draw]
            guess = head.model.net(noisy[None].float(), t[draw : draw + 1], hidden[row][None])
            squares.append(float((guess[0] - noise[draw]).square().mean()))
        assert float(found[row]) == pytest.approx(np.mean(squares), rel=1e-4)


def test_distillation_measures_the_distance_from_the_dense_prediction() -> None:
    head = tiny("cogact-tiny").head
    dense = torch.randn(3, 1, 32, generator=seeded())
    targets = torch.zeros(3, 112)
    assert torch.equal(distill(head, dense, dense, targets, seeded()), torch.zeros(3))
    shift = torch.randn(3, 1, 32, generator=torch.Generator().manual_seed(9))
    near, far = (distill(head, dense + step * shift, dense, targets, seeded()) for step in (0.05, 0.5))
    assert (near > 0).all()
    assert (far > 5 * near).all()
    assert torch.equal(near, distill(head, dense + 0.05 * shift, dense, targets, seeded()))
    assert not torch.equal(near, distill(head, dense + 0.05 * shift, dense, targets, torch.Generator().manual_seed(4)))


def test_the_dense_pass_is_the_teacher_and_gets_no_gradient() -> None:
    head = tiny("cogact-tiny").head
    hidden, dense = (torch.randn(2, 1, 32, generator=torch.Generator().manual_seed(s)).requires_grad_() for s in (0, 1))
    distill(head, hidden, dense, torch.zeros(2, 112), seeded()).sum().backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    assert float(hidden.grad.abs().sum()) > 0
    assert dense.grad is None


def test_fingerprints_tell_heads_apart() -> None:
    one, same, other = (random_vla("cogact-tiny", seed=seed).head for seed in (0, 0, 1))
    assert one.fingerprint() == same.fingerprint() != other.fingerprint()
    assert tiny().head.fingerprint() == b""
