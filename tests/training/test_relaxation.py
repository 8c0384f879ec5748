"""Hard forward, soft backward: checked against inference's own rule, and against finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lac_vla.policies import cache_lowest
from lac_vla.training.relaxation import (
    bridge,
    candidate_masks,
    gumbel_noise,
    ratio_reward,
    soft_ratio,
    straight_through,
)

RATIOS = (0.0, 0.25, 0.5, 0.7, 0.8, 0.9)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.8]), min_size=1, max_size=23), st.sampled_from([*RATIOS, 1.0]))
def test_masks_are_the_rule_of_inference_ties_included(scores: list[float], ratio: float) -> None:
    mask = candidate_masks(torch.tensor([scores]), (ratio,), 0.1)[0, 0]
    assert np.array_equal(mask.numpy() == 0, cache_lowest(np.asarray(scores, np.float32), ratio))
    assert set(mask.tolist()) <= {0.0, 1.0}


def test_the_chosen_mask_is_the_forward_value() -> None:
    torch.manual_seed(0)
    scores, logits = torch.rand(5, 40), torch.randn(5, len(RATIOS))
    noise = gumbel_noise(logits.shape, torch.Generator().manual_seed(1), torch.device("cpu"))
    soft = soft_ratio(logits, noise, 0.7)
    mask = bridge(straight_through(soft), candidate_masks(scores, RATIOS, 0.1))
    for row in range(5):
        ratio = RATIOS[int((logits + noise)[row].argmax())]
        assert np.array_equal(mask[row].numpy() == 0, cache_lowest(scores[row].numpy(), ratio))


def test_gumbel_softmax_samples_the_softmax() -> None:
    """The hard choice follows softmax(L), whatever the temperature (Gumbel-max)."""
    logits = torch.tensor([0.0, 1.0, 2.0]).repeat(20000, 1)
    noise = gumbel_noise(logits.shape, torch.Generator().manual_seed(0), torch.device("cpu"))
    share = straight_through(soft_ratio(logits, noise, 0.3)).mean(dim=0)
    torch.testing.assert_close(share, logits[0].softmax(0), atol=0.015, rtol=0)


def test_gradient_of_the_bridge_equals_finite_differences_of_the_soft_relaxation() -> None:
    """dM/ds: of σ((s − θ)/τ_s) of the chosen ratio, θ held; dM/dL: of p̃ over the hard masks. In float64."""
    torch.manual_seed(0)
    tau, tau_s, n = 0.8, 0.15, 12
    scores = torch.rand(1, n, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(1, len(RATIOS), dtype=torch.float64, requires_grad=True)
    noise = torch.randn(1, len(RATIOS), dtype=torch.float64)
    task = torch.randn(1, n, dtype=torch.float64)  # ∂L/∂M
    (
        bridge(straight_through(soft_ratio(logits, noise, tau)), candidate_masks(scores, RATIOS, tau_s)) * task
    ).sum().backward()
    with torch.no_grad():
        chosen = int((logits + noise).argmax())
        hard = candidate_masks(scores, RATIOS, tau_s)
        k = int(n * RATIOS[chosen] + 0.5)
        threshold = scores[0].sort().values[k - 1].clone()
        assert k > 0

        def soft_mask(s: torch.Tensor) -> float:
            return float((torch.sigmoid((s - threshold) / tau_s) * task[0]).sum())

        def soft_choice(values: torch.Tensor) -> float:
            p = ((values + noise[0]) / tau).softmax(0)
            return float(((p[:, None] * hard[0]).sum(0) * task[0]).sum())

        for value, function in ((scores, soft_mask), (logits, soft_choice)):
            assert value.grad is not None
            for i in range(value.shape[1]):
                step = torch.zeros_like(value[0])
                step[i] = 1e-6
                slope = (function(value[0] + step) - function(value[0] - step)) / 2e-6
                assert float(value.grad[0, i]) == pytest.approx(slope, abs=1e-7)


def test_reward_is_the_negative_expected_ratio() -> None:
    p = torch.tensor([[0.5, 0.0, 0.5, 0.0, 0.0, 0.0]])
    assert float(ratio_reward(p, torch.tensor(RATIOS))) == pytest.approx(-0.25)


def test_noise_is_finite_and_seeded() -> None:
    shape = torch.Size((1000, 50))
    first, second = (gumbel_noise(shape, torch.Generator().manual_seed(4), torch.device("cpu")) for _ in range(2))
    assert torch.isfinite(first).all()
    assert torch.equal(first, second)
