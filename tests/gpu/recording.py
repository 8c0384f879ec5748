"""A stand-in for CUDA graphs on a CPU: it records the operations of a run, and replays them over the same memory.

What a graph bakes in, it bakes in: numbers of the host's, addresses, shapes. So a run that reads anything of the host
again, or that expects a new tensor, gives another answer here, as it would on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")


class RecordedGraph:
    """Implements :class:`lac_vla.engine.graphs.Graph`."""

    def __init__(self) -> None:
        self.replays = 0
        self._tape: list[tuple[Any, Any, Any, Any]] = []

    def capture(self, work: Callable[[], T]) -> T:
        with _Recorder(self._tape):
            return work()

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, recorded in self._tape:
            for old, new in zip(tree_leaves(recorded), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.numel() and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class _Recorder(TorchDispatchMode):
    def __init__(self, tape: list[tuple[Any, Any, Any, Any]]) -> None:
        super().__init__()
        self._tape = tape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._tape.append((func, args, kwargs or {}, out))
        return out
