"""Timing of a frame, stage by stage."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

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
    """Times the stages of one frame. It never waits for a GPU before its stages are read.

    By the host's clock, work that a GPU has yet to do counts in the stage that waits for it, mostly ``decode``: of a
    whole frame, and of the window ``observation_to_action``, the time is right, of its parts it is not. With ``events``
    the GPU itself marks where stages begin and end.

    Args:
        device: Where the work runs.
        events: Time by CUDA events, where the device has them; what reads the stages waits for the last event.
    """

    def __init__(self, device: torch.device, *, events: bool = False) -> None:
        self._events = events and device.type == "cuda"
        self._stages: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        self._marks: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._paused = 0.0

    @property
    def stages(self) -> dict[str, float]:
        """Milliseconds by stage so far."""
        for name, start, end in self._marks:
            end.synchronize()
            self._stages[name] += start.elapsed_time(end)
        self._marks.clear()
        return self._stages

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of the block, in milliseconds, to the stage ``name``."""
        if self._events:
            event: Any = torch.cuda.Event
            start, end = event(enable_timing=True), event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._marks.append((name, start, end))
            return
        began = time.perf_counter() - self._paused
        yield
        self._stages[name] += 1e3 * (time.perf_counter() - self._paused - began)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the time of the block out of the stage that it interrupts, by the host's clock."""
        began = time.perf_counter()
        yield
        self._paused += time.perf_counter() - began


def windows(stages: Mapping[str, float]) -> dict[str, float]:
    """Sum the stages of one frame into the three windows, in milliseconds."""
    return {window: sum(stages[stage] for stage in members) for window, members in WINDOWS.items()}
