"""The differentiable relaxations of LAC's two discrete decisions (paper, eqs. 9-11), and the bridge between them.

Everything is hard in the forward pass, exactly what inference does, and soft in the backward pass. The paper leaves
open how the task gradient passes from the ratio, through the integer number of cached tokens, into the mask; here it
passes through a mixture of masks, one per candidate ratio (:func:`bridge`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def gumbel_noise(shape: torch.Size, generator: torch.Generator | None, device: torch.device) -> torch.Tensor:
    """Draw standard Gumbel noise, float32, on the CPU so that a seed means the same on every device."""
    uniform = torch.rand(shape, generator=generator).clamp(1e-9, 1 - 1e-7)
    return -torch.log(-torch.log(uniform)).to(device)


def soft_ratio(logits: torch.Tensor, noise: torch.Tensor | float, temperature: float) -> torch.Tensor:
    """Compute the Gumbel-Softmax over the candidate ratios, eq. 9: p̃ = softmax((L + g) / τ), (B, C)."""
    return ((logits + noise) / temperature).softmax(dim=-1)


def straight_through(soft: torch.Tensor) -> torch.Tensor:
    """Return the largest entry's one-hot forward, the soft distribution backward, eq. 10, (B, C)."""
    hard = torch.zeros_like(soft).scatter(-1, soft.argmax(dim=-1, keepdim=True), 1.0)
    return hard + (soft - soft.detach())


def candidate_masks(scores: torch.Tensor, ratios: Sequence[float], temperature: float) -> torch.Tensor:
    """Make the masks m_j of all candidate ratios, eq. 11, (B, C, N): 1 = active, 0 = cached.

    Forward, the k_j = ⌊N·r_j + ½⌋ lowest scores s, (B, N), are cached, ties going to the lower index. Backward, the
    mask is σ((s − θ_j) / τ_s), τ_s the temperature, θ_j the k_j-th lowest score, without gradient through θ_j; k_j = 0
    has no threshold and no gradient.
    """
    n = scores.shape[-1]
    ordered, order = scores.sort(dim=-1, stable=True)
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(n, device=scores.device).expand_as(order))
    masks = []
    for ratio in ratios:
        k = int(n * ratio + 0.5)
        hard = (rank >= k).to(scores.dtype)
        if k:
            soft = torch.sigmoid((scores - ordered[:, k - 1 : k].detach()) / temperature)
            hard = hard + (soft - soft.detach())
        masks.append(hard)
    return torch.stack(masks, dim=1)


def bridge(chosen: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Compute M = Σ_j p_j · m_j: forward the chosen ratio's hard mask, backward the task gradient for both networks.

    The straight-through choice p is (B, C), the masks (B, C, N), M (B, N). ∂L/∂s comes through the chosen mask's
    sigmoid; ∂L/∂p_j is how the loss would change, to first order, if more weight lay on the mask of ratio j.
    """
    return (chosen[..., None] * masks).sum(dim=1)


def ratio_reward(probabilities: torch.Tensor, ratios: torch.Tensor) -> torch.Tensor:
    """Compute L_ratio = −Σ_j p̃_j r_j, eq. 8: the negative expected cache ratio, (B,)."""
    return -(probabilities * ratios).sum(dim=-1)
