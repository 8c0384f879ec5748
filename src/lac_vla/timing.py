"""Timing of a frame, stage by stage."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

STAGES = ("preprocess", "flow", "policy", "tower", "projector", "prefill", "decode", "bookkeeping")
"""Stages of a frame, in order. Preprocess: image geometry, tokenisation, checks. Decode: action tokens and decoding."""

WINDOWS: Mapping[str, tuple[str, ...]] = {
    "decoder_prefill": ("prefill",),
    "model_call": ("tower", "projector", "prefill", "decode"),
    "observation_to_action": STAGES,
}
"""The three windows that every latency is reported in, as sums of stages."""


class Stopwatch:
    """Times the stages of one frame, waiting for the accelerator where there is one.

    Args:
        device: Where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._synchronise = device.type == "cuda"
        self.stages: dict[str, float] = dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of the block, in milliseconds, to the stage ``name``."""
        start = self._now()
        yield
        self.stages[name] += self._now() - start

    def _now(self) -> float:
        if self._synchronise:
            torch.cuda.synchronize()
        return time.perf_counter() * 1e3


def windows(stages: Mapping[str, float]) -> dict[str, float]:
    """Sum the stages of one frame into the three windows, in milliseconds."""
    return {window: sum(stages[stage] for stage in members) for window, members in WINDOWS.items()}
