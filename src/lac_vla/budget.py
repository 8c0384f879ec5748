"""A frame's budget: at most so many tokens are computed, and still none grows older than the maximum age."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lac_vla.policies.base import pixel_change
from lac_vla.types import BoolArray, Decision, IntArray, View


def smallest_limit(n_visual: int, max_age: int) -> int:
    """The fewest tokens per frame with which no slot ever has to grow older than ``max_age``."""
    return -(-n_visual // (max_age + 1))


def due(age: IntArray, max_age: int, limit: int) -> BoolArray:
    """Tokens that must be computed now, if at most ``limit`` can be in this frame and in every later one.

    Slots that were computed together reach the maximum age together: waiting until then would break the limit in that
    one frame. So the oldest are computed ahead of time, as few as possible: earliest deadline first.

    Args:
        age: Of every slot before the frame, int64, (N,).
        max_age: What no slot may exceed.
        limit: Tokens per frame; below :func:`smallest_limit` it cannot be kept.

    Returns:
        bool, (N,).
    """
    left = np.maximum(max_age - age, 0)  # frames for which it can still wait
    waiting = np.bincount(left, minlength=max_age + 1).cumsum()  # how many cannot wait longer than 0, 1, 2, … frames
    count = max(0, int((waiting - limit * np.arange(waiting.size)).max()))
    tokens = np.zeros(age.size, dtype=np.bool_)
    tokens[np.argsort(left, kind="stable")[:count]] = True
    return tokens


def within(limit: int, decision: Decision, view: View, max_age: int) -> Decision:
    """Hold a decision to a budget: first what is due, then what the policy wants, by how much its pixels changed.

    Args:
        limit: Tokens to compute; a token that is computed in half of the layers counts half.
        decision: Of the policy, with reuse beyond its depth.
        view: What it was made of.
        max_age: What no slot may exceed: the limit gives way to it.

    Returns:
        The decision that is carried out.
    """
    urgent = due(view.age, max_age, limit)
    depth = np.where(urgent, decision.n_layers, decision.depth)
    if depth.sum() > limit * decision.n_layers:
        rank = np.where(urgent, np.inf, pixel_change(view))
        order = np.argsort(-rank, kind="stable")
        beyond = depth[order].cumsum() > limit * decision.n_layers
        depth[order[beyond & ~urgent[order]]] = 0
    recovered = None if decision.recovered is None else decision.recovered & (depth == decision.n_layers)
    return replace(decision, depth=depth.astype(np.int64), recovered=recovered)
