"""Sees, on a robot's first observation, that the engine answers as the model without it does, on this machine."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from lac_vla.engine.options import NONE
from lac_vla.factory import CachedVLA
from lac_vla.policies import Dense
from lac_vla.types import Frame, SkippedTokens

TOLERANCE, COARSE = 1e-3, 5e-2
"""Most difference, as a share of the largest value of the action: in float32, and in types of 16 bits."""


def without_cache(vla: CachedVLA) -> CachedVLA:
    """Make the same model compute every frame in full, no option on."""
    return replace(vla, policy=Dense(), flow=None, options=NONE)


def fault(vla: CachedVLA, frame: Frame, seed: int) -> str | None:
    """Compare what the engine answers to an observation, shown twice, with what the model without it does.

    The first time everything is computed; the second time the policy reuses what it wants, and as nothing has moved,
    the answer must be the same. Both are asked in sessions of their own. A policy that prunes, or predicts how slots
    change, answers otherwise by design: of it, the first answer alone is compared.

    Args:
        vla: Model and policy.
        frame: The observation.
        seed: Of the sessions.

    Returns:
        What is wrong; ``None`` if nothing.

    Raises:
        InputError: If the frame does not fit the model.
    """
    frame = replace(frame, images={name: image.copy() for name, image in frame.images.items()})  # a camera may go on
    plain, own = without_cache(vla).session(seed), vla.session(seed)
    share = TOLERANCE if vla.model.dtype in (torch.float32, torch.float64) else COARSE
    for which in ("computed in full", "with reuse"):
        expected = plain.act(frame)
        try:
            action = own.act(frame)
        except Exception as error:  # whatever it is: the robot has an answer without it
            return f"the engine failed on the first observation, {which} ({error})"
        decision = None if own.last_info is None else own.last_info.decision
        predicts = vla.policy.slot_macs > 0
        if decision is not None and (decision.skipped is SkippedTokens.PRUNE or (predicts and decision.ratio > 0)):
            return None
        apart = float(np.abs(action - expected).max() / max(1e-6, float(np.abs(expected).max())))
        if not apart <= share:
            return (
                f"on the first observation, {which}, the engine's action is {apart:.2g} of its largest value away from "
                f"the model's own, more than {share:g}"
            )
    return None
