"""Predicts how the keys and values of reused slots have changed: K = K_old + Δ, and V alike. Ours, and experimental."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from lac_vla.policies.lac.config import LACConfig
from lac_vla.policies.lac.inputs import FLOW_GAIN, FLOW_LIMIT

EMBEDDING = 16
"""Channels of a slot's embedding."""
HIDDEN = 64
"""Channels of the hidden layer."""


class Deltas(nn.Module):
    """One small network for all slots, on (flow, age, embedding of the slot). A new one predicts zero.

    Args:
        config: Whose ``slots`` say what is predicted.
    """

    def __init__(self, config: LACConfig) -> None:
        super().__init__()
        if config.slots is None:
            raise ValueError("the configuration does not say whose keys and values are predicted")
        self.slots, self.max_age, self.reads_flow = config.slots, config.max_age, config.flow != "none"
        layers, heads, width = config.slots
        self.embedding = nn.Parameter(torch.randn(config.n_visual, EMBEDDING))
        self.hidden = nn.Linear(EMBEDDING + 1 + 2 * self.reads_flow, HIDDEN)
        self.out = nn.Linear(HIDDEN, 2 * layers * heads * width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    @property
    def macs(self) -> int:
        """Multiply-accumulates per slot."""
        return self.hidden.weight.numel() + self.out.weight.numel()

    def forward(self, flow: torch.Tensor | None, age: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """Predict the changes of some slots since the preceding frame.

        Args:
            flow: Mean optical flow of the slots' patches, token sides, (B, n, 2); ``None`` for a policy without.
            age: Of the slots, frames, (B, n).
            embedding: Rows of :attr:`embedding`, (n, E).

        Returns:
            Of keys and of values, (2, layers, B, heads, n, width).
        """
        parts = [embedding.expand(len(age), -1, -1), (age.float() / self.max_age).clamp(max=1)[..., None]]
        if self.reads_flow:
            if flow is None:
                raise ValueError("a policy with flow was given none")
            parts.append(flow.float().clamp(-FLOW_LIMIT, FLOW_LIMIT) * FLOW_GAIN)
        out: torch.Tensor = self.out(F.gelu(self.hidden(torch.cat(parts, dim=-1))))
        return out.view(*out.shape[:2], 2, *self.slots).permute(2, 3, 0, 4, 1, 5)


def mean_flow(flow: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """Average optical flow over the patches of tokens: (B, H, W, 2), multiples of rows and cols → (B, rows·cols, 2)."""
    batch, height, width, _ = flow.shape
    patches = flow.float().view(batch, rows, height // rows, cols, width // cols, 2)
    return patches.mean(dim=(2, 4)).flatten(1, 2)
