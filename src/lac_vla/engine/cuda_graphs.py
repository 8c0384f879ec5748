"""Static shapes: the decoder's layers over buffers that never move, on a GPU replayed as CUDA graphs.

At batch 1 a GPU finishes a layer's kernels sooner than the host launches them. A graph is launched once for all
layers; it needs the same shapes at the same addresses every time. So there is one set of buffers for every number of
rows (and of rows that ask in the last layer), whose masks reach over the whole capacity of the cache and hide what
does not exist: a prompt may change its length, its rows may be any, and the graph stays. Round with
``bucket`` too, or every number of active tokens makes a shape of its own.

A shape that comes for the first time runs over its buffers as it is, which also makes the libraries' handles; the
second time it is captured, then replayed. On a CPU nothing is captured: the same path, a little slower than the
ordinary loop, is what the tests hold to it. The attention passes over the hidden slots, too (up to
twice :data:`ROOM`, and those of tokens yet to come), which no count of MACs includes.

What does not run in one go through all layers falls back to the ordinary loop: decisions that end in mid-depth,
watched layers other than the last, and pruning. :attr:`lac_vla.session.StepInfo.eager_runs` says how many
runs did.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch

from lac_vla.engine.prefill import Rows, run_layers
from lac_vla.models.base import DecoderLayer

ROOM = 64
"""Tokens that an instruction may be longer than the first one, at least, before all graphs have to be made anew. The
cache's capacity is a multiple of it, so that the masks' rows are aligned."""
LIMIT = 48
"""Shapes that are kept: with a bucket of 16, those of 256 visual tokens with and without draft, and decoding."""


class Shape:
    """The buffers of one shape, and the graph over them.

    Args:
        rows: Rows that are computed.
        asking: Rows that ask in the last layer; ``None`` for all.
        capacity: Slots of the cache.
        hidden: Like the residual stream, (..., width).
        cos: Like a half of the position embedding, (..., head_dim).
    """

    def __init__(self, rows: int, asking: int | None, capacity: int, hidden: torch.Tensor, cos: torch.Tensor) -> None:
        self.hidden = hidden.new_empty(rows, hidden.shape[-1])
        self.rotary = cos.new_empty(rows, cos.shape[-1]), cos.new_empty(rows, cos.shape[-1])
        self.positions = torch.empty(rows, dtype=torch.int64, device=hidden.device)
        self.mask = torch.empty(rows, capacity, dtype=torch.bool, device=hidden.device)
        self.last = None if asking is None else self.mask.new_empty(asking, capacity)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._out: tuple[torch.Tensor, torch.Tensor] | None = None
        self._warm = False

    def fill(self, hidden: torch.Tensor, rows: Rows) -> None:
        """Put a run's arguments, see :func:`lac_vla.engine.prefill.run_layers`, into the buffers."""
        self.hidden.copy_(hidden)
        for buffer, part in zip(self.rotary, rows.rotary, strict=True):
            buffer.copy_(part)
        if isinstance(rows.positions, torch.Tensor):
            self.positions.copy_(rows.positions)
        else:
            torch.arange(rows.positions, rows.positions + len(self.positions), out=self.positions)
        self.mask.zero_()
        self.mask[:, : rows.length] = True if rows.mask is None else rows.mask
        if rows.mask is None and rows.causal:
            self.mask.tril_()
        if self.last is not None and rows.last is not None:
            self.last.zero_()
            self.last[:, : rows.length] = rows.last

    def run(
        self, layers: Sequence[DecoderLayer], keys: torch.Tensor, values: torch.Tensor, pool: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the layers over the buffers; what is returned holds until the next run of any shape."""
        if self._graph is None and (not self._warm or not self.hidden.is_cuda):
            self._warm = True
            return self._loop(layers, keys, values)
        if self._graph is None or self._out is None:
            graph = torch.cuda.CUDAGraph()
            # other threads (another robot's session, a decision under way) may use the GPU meanwhile
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                self._out = self._loop(layers, keys, values)
            self._graph = graph
        self._graph.replay()
        return self._out

    def _loop(
        self, layers: Sequence[DecoderLayer], keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = Rows(self.positions, self.mask.shape[1], self.rotary, None, self.mask, causal=False, last=self.last)
        return run_layers(layers, keys, values, self.hidden, rows)


class Graphs:
    """Runs layers as :func:`lac_vla.engine.prefill.run_layers` does, over static buffers where it can. One per session.

    The model's weights may change in place, but must not be replaced by other tensors.

    Args:
        n_layers: Of the decoder.

    Attributes:
        static: Runs over static buffers so far.
        eager_runs: Runs by the ordinary loop so far.
    """

    def __init__(self, n_layers: int) -> None:
        self.static = self.eager_runs = 0
        self._n_layers = n_layers
        self._shapes: OrderedDict[tuple[int, int | None], Shape] = OrderedDict()
        self._keys: torch.Tensor | None = None  # those that the graphs read; held, so that no other takes their place
        # Graphs share their memory: none runs beside another, and results are read before the next one runs.
        self._pool: Any = None

    def __len__(self) -> int:
        """Number of shapes."""
        return len(self._shapes)

    def __call__(
        self,
        layers: Sequence[DecoderLayer],
        keys: torch.Tensor,
        values: torch.Tensor,
        hidden: torch.Tensor,
        rows: Rows,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :func:`lac_vla.engine.prefill.run_layers`. Nothing in here waits for the GPU, but for a capture."""
        if len(layers) < self._n_layers or rows.slots is not None:
            self.eager_runs += 1
            return run_layers(layers, keys, values, hidden, rows)
        self.static += 1
        if self._keys is None or self._keys.data_ptr() != keys.data_ptr() or self._keys.shape != keys.shape:
            self._shapes.clear()  # the cache has grown: the graphs' addresses are gone
            self._keys = keys
            self._pool = torch.cuda.graph_pool_handle() if keys.is_cuda else None
        key = (hidden.shape[0], None if rows.last is None else rows.last.shape[0])
        if key not in self._shapes:
            self._shapes[key] = Shape(*key, keys.shape[2], hidden, rows.rotary[0])
            if len(self._shapes) > LIMIT:
                self._shapes.popitem(last=False)
        self._shapes.move_to_end(key)
        shape = self._shapes[key]
        shape.fill(hidden, rows)
        return shape.run(layers, keys, values, self._pool)
