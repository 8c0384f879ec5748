"""Heads without an engine: what they read is given, and what they append is answered by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from lac_vla import VLA, Frame
from lac_vla.models.heads.base import AppendRows, HeadContext, alone
from lac_vla.types import FloatArray


def decode(
    vla: VLA,
    frame: Frame,
    hidden: torch.Tensor,
    extend: Callable[[AppendRows], torch.Tensor] = pytest.fail,
    seed: int = 0,
) -> tuple[FloatArray, dict[str, Any]]:
    """Let a head answer.

    Args:
        vla: Whose head.
        frame: The observation.
        hidden: Last hidden states of the prompt, (rows, width).
        extend: Rows that the head appends → their last hidden states; by default it must append none.
        seed: Of its chance.

    Returns:
        The action, and what the head says of it.
    """
    layout, rng = vla.processor.prompt(frame).layout, np.random.default_rng(seed)
    decoding = alone(vla.head.decode(HeadContext(frame, layout, hidden, pytest.fail, pytest.fail, rng)))
    try:
        rows = next(decoding)
        while True:
            rows = decoding.send(extend(rows))
    except StopIteration as answer:
        action, metadata = answer.value
        return action, metadata
