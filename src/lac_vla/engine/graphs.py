"""CUDA graphs: work over buffers that stay where they are is captured once, and launched as one from then on.

At batch 1 a GPU finishes kernels sooner than the host launches them. What is captured bakes in shapes, addresses and
the host's numbers, so that all that changes from frame to frame has to be in tensors that stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock, get_ident
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch.utils._pytree import tree_map

ROW_MULTIPLE = 16
"""Numbers of rows are rounded up to a multiple of this, but for the few of a decoding pass."""
FEW_ROWS = 8
CAPTURING = Lock()
"""Engines capture in turn: torch has one stream for it."""

T = TypeVar("T")


class Graph(Protocol):
    """Runs work once and can run it again, over the same memory."""

    def capture(self, work: Callable[[], T]) -> T:
        """Record the work; what is returned is valid from the first replay on, and until the next."""
        ...

    def replay(self) -> None:
        """Run what was recorded."""
        ...


MakeGraph = Callable[[], Graph]


class CUDAGraph:
    """Implements :class:`Graph` on a GPU.

    Args:
        pool: Memory that the graphs of one engine share.
    """

    def __init__(self, pool: Any) -> None:
        self._graph, self._pool = torch.cuda.CUDAGraph(), pool

    def capture(self, work: Callable[[], T]) -> T:
        """See :meth:`Graph.capture`."""
        # other threads (another robot's session, a decision under way) may use the GPU meanwhile
        with CAPTURING, torch.cuda.graph(self._graph, pool=self._pool, capture_error_mode="thread_local"):
            return work()

    def replay(self) -> None:
        """See :meth:`Graph.replay`."""
        self._graph.replay()


class GraphPool:
    """Makes graphs that share their memory: results are read before the next one runs."""

    def __init__(self) -> None:
        self._handle: Any = None

    def make(self) -> Graph:
        """Make a graph."""
        if self._handle is None:
            self._handle = torch.cuda.graph_pool_handle()
        return CUDAGraph(self._handle)

    def renew(self) -> None:
        """Give the graphs that are made from now on memory of their own."""
        self._handle = None


def padded(rows: int) -> int:
    """Round a number of rows up to one that has a shape."""
    return rows if rows <= FEW_ROWS else -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE


class Replayed(Generic[T]):
    """Runs the same work every time: plain at first, then as a graph.

    The plain run also makes the libraries' handles and plans, of which every thread has its own: what is captured was
    run in the same thread before.
    """

    def __init__(self) -> None:
        self._graph: Graph | None = None
        self._out: list[T] = []
        self._ran_in: set[int] = set()

    @property
    def captured(self) -> bool:
        """True once there is a graph."""
        return self._graph is not None

    def run(self, work: Callable[[], T], make_graph: MakeGraph | None) -> T:
        """Run the work, or replay it; what is returned holds until the next run of any graph of the same memory.

        Args:
            work: The same in every call.
            make_graph: Makes a graph to capture with; ``None`` where there are none, on a CPU.
        """
        if self._graph is None:
            if get_ident() not in self._ran_in or make_graph is None:
                self._ran_in.add(get_ident())
                return work()
            graph = make_graph()
            self._out, self._graph = [graph.capture(work)], graph
        self._graph.replay()
        return self._out[0]


class FunctionEntry:
    """Buffers for the tensors that a function takes, and the graph over them.

    Args:
        inputs: Tensors like those of every call.
    """

    def __init__(self, inputs: Sequence[torch.Tensor]) -> None:
        self._buffers = [torch.empty_like(part) for part in inputs]
        self._replayed = Replayed[Any]()

    @property
    def captured(self) -> bool:
        """True once there is a graph."""
        return self._replayed.captured

    def run(self, function: Callable[..., Any], inputs: Sequence[torch.Tensor], make_graph: MakeGraph | None) -> Any:
        """Call the function: it gives a tensor, or lists and tuples of them, which are the caller's own."""
        for buffer, part in zip(self._buffers, inputs, strict=True):
            buffer[:] = part
        return tree_map(torch.clone, self._replayed.run(lambda: function(*self._buffers), make_graph))
