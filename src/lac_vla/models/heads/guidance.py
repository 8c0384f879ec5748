"""Guides a sampler towards the running chunk: real-time chunking's pseudo-inverse guidance.

Source: Black et al., 2025, arXiv 2506.07339, eqs. 2-5, after Pokle et al., 2024, arXiv 2310.04432. Times here are the
paper's τ: 0 is noise, 1 actions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from lac_vla.running_chunk import RealTimeChunk
from lac_vla.types import FloatArray


@contextmanager
def recording() -> Iterator[None]:
    """Record a gradient, although the engine runs without; never hold it open over a ``yield``."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def constant() -> Iterator[None]:
    """Compute what a gradient that is recorded later may read, but does not go through."""
    with torch.inference_mode(False), torch.no_grad():
        yield


@dataclass(frozen=True, eq=False)
class Guidance:
    """The chunk that is drawn is to agree with a target, as far as its weights say.

    Attributes:
        target: Y, the left-over in the units in which the chunk is drawn, float32, (horizon, width).
        weights: W, of every value, (horizon, width).
        limit: β, the most weight of the guidance.
    """

    target: torch.Tensor
    weights: torch.Tensor
    limit: float

    @classmethod
    def of(cls, rtc: RealTimeChunk, normalized: FloatArray, like: torch.Tensor) -> Guidance:
        """Make the guidance of a left-over.

        Args:
            rtc: The running chunk.
            normalized: Its left-over, padded, in the units in which the chunk is drawn, (horizon, A).
            like: What is drawn, (..., horizon, width): values behind the A of an action are not guided.
        """
        target = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
        weights, dim = torch.zeros_like(target), normalized.shape[-1]
        target[..., :dim] = torch.from_numpy(normalized).to(target)
        weights[..., :dim] = torch.from_numpy(rtc.weights(len(normalized))).to(target)[:, None]
        return cls(target, weights, rtc.max_guidance_weight)

    def correction(self, clean: torch.Tensor, noised: torch.Tensor, tau: float) -> torch.Tensor:
        """Compute what eq. 2 adds to the velocity (actions − noise): a clipped weight times a vector-Jacobian product.

        Args:
            clean: The actions that the model expects at the end, with their gradient, as ``target``.
            noised: What they depend on, of the same shape.
            tau: The time.
        """
        error = (self.target - clean.detach()) * self.weights
        [product] = torch.autograd.grad(clean, noised, error)
        return guidance_weight(tau, self.limit) * product


def guidance_weight(tau: float, limit: float) -> float:
    """Compute the guidance's weight, min(β, (1 − τ) / (τ r²)) with r² = (1 − τ)² / (τ² + (1 − τ)²), eqs. 2 and 4."""
    rest = 1.0 - tau
    if tau <= 0.0 or rest <= 0.0:
        return limit
    return min(limit, (tau**2 + rest**2) / (tau * rest))
