"""Oracles: which visual tokens to refresh, by looking at what every policy can only guess, the dense pass of the frame.

They are limits for what is learned, and cost far too much to drive anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch

Divergence: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
"""Masks M, 1 = active, (B, N) → how far the frame's answers are from the dense pass's, (B,)."""


def refresh_values(divergence: Divergence, mask: torch.Tensor) -> torch.Tensor:
    """Compute to first order by how much refreshing each token lowers the divergence, −∂D/∂M_i at the mask M, (N,).

    This is the gradient that the selector is trained by, see :mod:`lac_vla.training.mixed`.
    """
    leaf = mask.detach()[None].clone().requires_grad_()
    with torch.enable_grad():
        [slope] = torch.autograd.grad(divergence(leaf).sum(), leaf)
    return -slope[0]


def value_order(divergence: Divergence, n_tokens: int) -> torch.Tensor:
    """Order tokens by their first-order value where all of them are stale, the largest first, int64, (N,).

    To first order values add up, so that its first k tokens are the best k.
    """
    values = refresh_values(divergence, torch.zeros(n_tokens))
    return values.argsort(descending=True, stable=True).cpu()


@torch.no_grad()
def drop_order(divergence: Divergence, order: torch.Tensor, chunk: int, limit: int) -> torch.Tensor:
    """Order tokens greedily by how much refreshing them really lowers the divergence, chunk by chunk.

    Args:
        divergence: Of the frame.
        order: Of all tokens, (N,); its runs of ``chunk`` tokens are the chunks.
        chunk: Tokens that are tried, and taken, together.
        limit: Tokens to order so; the others follow as they stood.

    Returns:
        int64, (N,).
    """
    left, taken = list(torch.split(order, chunk)), torch.zeros(0, dtype=torch.int64)
    while left and len(taken) < limit:
        trials = torch.zeros(len(left), len(order))
        trials[:, taken] = 1
        for trial, tokens in zip(trials, left, strict=True):
            trial[tokens] = 1
        taken = torch.cat([taken, left.pop(int(divergence(trials).argmin()))])
    return torch.cat([taken, *left])


def first_masks(order: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Make masks that refresh the first tokens of an order, as many as each count says, (counts, N)."""
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    return (rank < torch.tensor(counts)[:, None]).float()
