"""Static shapes: the decoder's layers over buffers that never move, on a GPU replayed as CUDA graphs.

At batch 1 a GPU finishes a layer's kernels sooner than the host launches them. A graph is launched once for all
layers; it needs the same shapes at the same addresses every time. So there is one set of buffers for every stack,
region of the store, number of rows and number of rows with queries in the last layer, whose masks reach over the whole
region and hide what does not exist: a prompt may change its length, its rows may be any, and the graph stays. Round
with ``bucket`` too, or every number of active tokens makes a shape of its own.

A shape that comes for the first time runs over its buffers as it is, which also makes the libraries' handles; the
second time it is captured, then replayed. On a CPU nothing is captured: the same path, a little slower than the
ordinary loop, is what the tests hold to it. The attention passes over the hidden slots, too (up to twice
:data:`CAPACITY_MULTIPLE`, and those of rows yet to come), which no count of MACs includes.

What does not run in one go through all layers falls back to the ordinary loop: decisions that end in mid-depth,
probed layers other than the last, pruning, and several sequences at once.
:attr:`lac_vla.engine.step_info.StepInfo.eager_runs` says how many runs did.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lac_vla.engine.kv_cache import SlotCache
from lac_vla.engine.layers import LayersOutput, Segment, run_layers
from lac_vla.models.protocols import DecoderLayer, KeysValues, Rotary

CAPACITY_MULTIPLE = 64
"""Rows that an instruction may be longer than the first one, at least, before all graphs have to be made anew. A
region's size is a multiple of it, so that the masks' rows are aligned."""
LIMIT = 48
"""Shapes that are kept: with a bucket of 16, those of 256 visual tokens with and without draft, and decoding."""


class GraphEntry:
    """The buffers of one shape, and the graph over them.

    Args:
        segment: A run's segment.
        hidden: Like the residual stream, (rows, width).
        cos: Like a half of the position embedding, (rows, head_dim).
    """

    def __init__(self, segment: Segment, hidden: torch.Tensor, cos: torch.Tensor) -> None:
        rows, queries, size = segment.n_rows, segment.n_queries, segment.size
        self.hidden = torch.empty_like(hidden)
        self.rotary = torch.empty_like(cos), torch.empty_like(cos)
        positions = torch.empty(rows, dtype=torch.int64, device=hidden.device)
        mask = torch.empty(rows, size, dtype=torch.bool, device=hidden.device)
        final = None if queries is None else mask.new_empty(queries, size)
        self.segment = Segment(rows, positions, size, segment.start, size, None, mask, False, queries, final)
        if segment.cross is not None:
            self.segment.cross = {layer: _buffers(pair, size) for layer, pair in segment.cross.items()}
            self.segment.cross_mask = torch.empty_like(mask)
        self._cross: Mapping[int, KeysValues] | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._out: LayersOutput | None = None
        self._warm = False

    def fill(self, hidden: torch.Tensor, rotary: Rotary, segment: Segment) -> None:
        """Put a run's arguments into the buffers."""
        self.hidden.copy_(hidden)
        for buffer, part in zip(self.rotary, rotary, strict=True):
            buffer.copy_(part)
        positions, mask, final = self.segment.positions, self.segment.mask, self.segment.final_mask
        if not isinstance(positions, torch.Tensor) or mask is None:  # pragma: no cover - made above
            raise RuntimeError("a graph's buffers are incomplete")
        if isinstance(segment.positions, torch.Tensor):
            positions.copy_(segment.positions)
        else:
            torch.arange(segment.positions, segment.positions + segment.n_rows, out=positions)
        mask.zero_()
        mask[:, : segment.length] = True if segment.mask is None else segment.mask
        if segment.mask is None and segment.causal:
            mask.tril_()
        if final is not None:
            final.zero_()
            final[:, : segment.length] = True if segment.final_mask is None else segment.final_mask
        if segment.cross is not None:
            self._fill_cross(segment, segment.cross)

    def _fill_cross(self, segment: Segment, cross: Mapping[int, KeysValues]) -> None:
        mask, buffers = self.segment.cross_mask, self.segment.cross
        if mask is None or buffers is None:  # pragma: no cover - made above
            raise RuntimeError("a graph's buffers are incomplete")
        slots = next(iter(cross.values()))[0].shape[1] if cross else 0
        mask.zero_()
        mask[:, :slots] = True if segment.cross_mask is None else segment.cross_mask
        if cross is not self._cross:  # once in a frame
            for layer, pair in cross.items():
                for buffer, part in zip(buffers[layer], pair, strict=True):
                    buffer[:, :slots].copy_(part)
                    buffer[:, slots:] = 0  # a longer prompt's may be NaN, which a mask does not hide
            self._cross = cross

    def run(self, layers: Sequence[DecoderLayer], store: SlotCache, pool: Any) -> LayersOutput:
        """Run the layers over the buffers; what is returned holds until the next run of any shape."""
        if self._graph is None and (not self._warm or not self.hidden.is_cuda):
            self._warm = True
            return run_layers(layers, self.hidden, self.rotary, [self.segment], store)
        if self._graph is None or self._out is None:
            graph = torch.cuda.CUDAGraph()
            # other threads (another robot's session, a decision under way) may use the GPU meanwhile
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                self._out = run_layers(layers, self.hidden, self.rotary, [self.segment], store)
            self._graph = graph
        self._graph.replay()
        return self._out


def _buffers(pair: KeysValues, size: int) -> KeysValues:
    """Make zeros like keys and values, for ``size`` slots: what is masked must be finite."""
    keys, values = (part.new_zeros(part.shape[0], size, part.shape[2]) for part in pair)
    return keys, values


class CUDAGraphRunner:
    """Runs layers as :func:`lac_vla.engine.layers.run_layers` does, over static buffers where it can. One per engine.

    The model's weights may change in place, but must not be replaced by other tensors.

    Attributes:
        static_runs: Runs over static buffers so far.
        eager_runs: Runs by the ordinary loop so far.
    """

    def __init__(self) -> None:
        self.static_runs = self.eager_runs = 0
        self._entries: OrderedDict[tuple[int, int, int, int | None, bool], GraphEntry] = OrderedDict()
        self._keys: torch.Tensor | None = None  # those that the graphs read; held, so that no other takes their place
        # Graphs share their memory: none runs beside another, and results are read before the next one runs.
        self._pool: Any = None

    def __len__(self) -> int:
        """Number of shapes."""
        return len(self._entries)

    def __call__(
        self,
        layers: Sequence[DecoderLayer],
        hidden: torch.Tensor,
        rotary: Rotary,
        segments: Sequence[Segment],
        store: SlotCache,
        first: int = 0,
        stop: int | None = None,
    ) -> LayersOutput:
        """Run consecutive layers. Nothing in here waits for the GPU, but for a capture."""
        segment = segments[0]
        if len(segments) > 1 or first or stop not in (None, len(layers)) or segment.slots is not None:
            self.eager_runs += 1
            return run_layers(layers, hidden, rotary, segments, store, first, stop)
        self.static_runs += 1
        if self._keys is not store.keys:
            self._entries.clear()  # the store has grown: the graphs' addresses are gone
            self._keys = store.keys
            self._pool = torch.cuda.graph_pool_handle() if store.keys.is_cuda else None
        key = (id(layers), segment.start, segment.n_rows, segment.n_queries, segment.cross is not None)
        if key not in self._entries:
            self._entries[key] = GraphEntry(segment, hidden, rotary[0])
            if len(self._entries) > LIMIT:
                self._entries.popitem(last=False)
        self._entries.move_to_end(key)
        entry = self._entries[key]
        entry.fill(hidden, rotary, segment)
        return entry.run(layers, store, self._pool)
