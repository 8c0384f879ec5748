"""The loss of heads that bring none: how far what the head reads is from what it reads in the dense pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def relative_error(parts: Sequence[torch.Tensor], dense: Sequence[torch.Tensor], real: torch.Tensor) -> torch.Tensor:
    """Compute the squared distance of states over the squared length of the dense ones, mean over the parts.

    Args:
        parts: Hidden states, or every layer's keys and values; each (B, …, rows, width).
        dense: The same of the dense pass.
        real: Which rows count, bool, (B, rows).

    Returns:
        (B,), float32, at least 0.
    """
    total = torch.zeros(len(real), device=real.device)
    for part, goal in zip(parts, dense, strict=True):
        weight = real.view(len(real), *[1] * (part.ndim - 3), -1, 1)
        goal = goal.detach().float() * weight
        distance = (part.float() * weight - goal).square().flatten(1).sum(dim=1)
        total = total + distance / goal.square().flatten(1).sum(dim=1).clamp(min=1e-12)
    return total / len(parts)
