"""A frame's budget: at most so many tokens are computed, and still none grows older than the maximum age."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lac_vla.policies.base import pixel_change
from lac_vla.types import BoolArray, Decision, IntArray, PolicyInput, SkippedTokens


def frames_of_age(max_age: int, steps_per_frame: int) -> int:
    """The age in frames from which on no slot is reused, of one in control steps: 1 at least."""
    return max(1, max_age // steps_per_frame)


def smallest_budget(n_visual: int, max_age: int) -> int:
    """The fewest tokens per frame with which no slot ever has to grow older than ``max_age``."""
    return -(-n_visual // (max_age + 1))


def must_refresh(age: IntArray, max_age: int, budget: int) -> BoolArray:
    """Tokens that must be computed now, if at most ``budget`` can be in this frame and in every later one.

    Slots that were computed together reach the maximum age together: waiting until then would break the budget in that
    one frame. So the oldest are computed ahead of time, as few as possible: earliest deadline first.

    Args:
        age: Of every slot before the frame, int64, (N,).
        max_age: What no slot may exceed.
        budget: Tokens per frame; below :func:`smallest_budget` it cannot be kept.

    Returns:
        bool, (N,).
    """
    left = np.maximum(max_age - age, 0)  # frames for which it can still wait
    waiting = np.bincount(left, minlength=max_age + 1).cumsum()  # how many cannot wait longer than 0, 1, 2, … frames
    count = max(0, int((waiting - budget * np.arange(waiting.size)).max()))
    tokens = np.zeros(age.size, dtype=np.bool_)
    tokens[np.argsort(left, kind="stable")[:count]] = True
    return tokens


def cap_to_budget(budget: int, decision: Decision, inputs: PolicyInput, max_age: int) -> Decision:
    """Hold a decision to a budget: first what is due, then what the policy wants, by how much its pixels changed.

    Args:
        budget: Tokens to compute; a token that is computed in half of the layers counts half.
        decision: Of the policy, whose skipped tokens are reused.
        inputs: What it was made of.
        max_age: What no slot may exceed: the budget gives way to it.

    Returns:
        The decision that is carried out.
    """
    urgent = must_refresh(inputs.age, max_age, budget)
    exit_layer = np.where(urgent, decision.n_layers, decision.exit_layer)
    if exit_layer.sum() > budget * decision.n_layers:
        rank = np.where(urgent, np.inf, pixel_change(inputs))
        order = np.argsort(-rank, kind="stable")
        over = exit_layer[order].cumsum() > budget * decision.n_layers
        exit_layer[order[over & ~urgent[order]]] = 0
    recovered = None if decision.recovered is None else decision.recovered & (exit_layer == decision.n_layers)
    return replace(decision, exit_layer=exit_layer.astype(np.int64), recovered=recovered)


def pad_to_bucket(decision: Decision, age: IntArray, bucket: int) -> Decision:
    """The decision with so many more tokens active that their number is a multiple of ``bucket``, or all are.

    The oldest cached tokens are added, of equal age the first: the extra work makes the cache fresher. They count as
    ``recovered``. Decisions that prune, or that leave tokens in mid-depth, have no one number of rows: they stay.

    Args:
        decision: What is computed.
        age: Of every slot, in frames, int64, (N,).
        bucket: At least 1.
    """
    cached = np.flatnonzero(decision.exit_layer == 0)
    active = decision.exit_layer.size - cached.size
    missing = min(-active % bucket, cached.size)
    if not missing or decision.skipped is not SkippedTokens.REUSE or active != np.count_nonzero(decision.active):
        return decision
    added = np.zeros(decision.exit_layer.size, dtype=np.bool_)
    added[cached[np.argsort(-age[cached], kind="stable")[:missing]]] = True
    recovered = added if decision.recovered is None else decision.recovered | added
    return replace(decision.with_active(added), recovered=recovered)
