"""Static shapes: the decoder's layers over buffers that never move, on a GPU replayed as CUDA graphs.

At batch 1 a GPU finishes a layer's kernels sooner than the host launches them. A graph is launched once for all
layers; it needs the same shapes at the same addresses every time. So there is one set of buffers for every stack,
number of rows and number of rows with queries in the last layer; both are rounded up, and rows that nobody reads stand
before the real ones. The masks reach over a whole region of the store and hide what does not exist, and the region's
slots are gathered by their indices: any session's region, a prompt of another length and any rows are the same graph.

A shape that comes for the first time runs over its buffers as it is, which also makes the libraries' handles; the
second time it is captured, then replayed. After :meth:`CUDAGraphRunner.freeze` no shape is added: what is new runs in
the ordinary loop. More sessions or far longer prompts than were foreseen make the store grow, and all graphs void. On a
CPU nothing is captured: the same path, a little slower than the ordinary loop, is what the tests hold to it. The
attention passes over the hidden slots, too (up to twice :data:`CAPACITY_MULTIPLE`, and those of rows yet to come),
which no count of MACs includes, nor are the padding's rows in one.

What does not run in one go through all layers falls back to the ordinary loop: decisions that end in mid-depth,
probed layers other than the last, pruning, and several sequences at once.
:attr:`lac_vla.engine.step_info.StepInfo.eager_runs` says how many runs did.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from lac_vla.engine.kv_cache import SlotCache
from lac_vla.engine.layers import LayersOutput, Segment, run_layers
from lac_vla.models.protocols import DecoderLayer, KeysValues, Rotary

CAPACITY_MULTIPLE = 64
"""Rows that an instruction may be longer than the first one, at least, before all graphs have to be made anew. A
region's size is a multiple of it, so that the masks' rows are aligned."""
ROW_MULTIPLE = 16
"""Numbers of rows are rounded up to a multiple of this, but for the few of a decoding pass."""
FEW_ROWS = 8
LIMIT = 128
"""Shapes that are kept, of all stacks."""


class Graph(Protocol):
    """Runs work once and can run it again, over the same memory."""

    def capture(self, work: Callable[[], LayersOutput]) -> LayersOutput:
        """Record the work; what is returned is valid from the first replay on, and until the next."""
        ...

    def replay(self) -> None:
        """Run what was recorded."""
        ...


class CUDAGraph:
    """Implements :class:`Graph` on a GPU.

    Args:
        pool: Memory that the graphs of one engine share.
    """

    def __init__(self, pool: Any) -> None:
        self._graph, self._pool = torch.cuda.CUDAGraph(), pool

    def capture(self, work: Callable[[], LayersOutput]) -> LayersOutput:
        """See :meth:`Graph.capture`."""
        # other threads (another robot's session, a decision under way) may use the GPU meanwhile
        with torch.cuda.graph(self._graph, pool=self._pool, capture_error_mode="thread_local"):
            return work()

    def replay(self) -> None:
        """See :meth:`Graph.replay`."""
        self._graph.replay()


def padded(rows: int) -> int:
    """Round a number of rows up to one that has a shape."""
    return rows if rows <= FEW_ROWS else -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE


class GraphEntry:
    """The buffers of one shape, and the graph over them.

    Args:
        layers: The stack; it lives as long as the entry, which is found by its identity.
        segment: A run's segment.
        hidden: Like the residual stream, (rows, width).
        cos: Like a half of the position embedding, (rows, head_dim).
        store: Keys and values.
    """

    def __init__(
        self,
        layers: Sequence[DecoderLayer],
        segment: Segment,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        store: SlotCache,
    ) -> None:
        rows, size, queries = padded(segment.n_rows), segment.size, segment.n_queries
        queries = None if queries is None else min(rows, padded(queries))
        self._layers = layers
        self.hidden = hidden.new_zeros(rows, *hidden.shape[1:])
        self.rotary = cos.new_zeros(rows, *cos.shape[1:]), cos.new_zeros(rows, *cos.shape[1:])
        positions = torch.zeros(rows, dtype=torch.int64, device=hidden.device)
        slots = torch.zeros(size, dtype=torch.int64, device=hidden.device)
        mask = torch.zeros(rows, size, dtype=torch.bool, device=hidden.device)
        final = None if queries is None else mask.new_zeros(queries, size)
        self.segment = Segment(rows, positions, store.n_slots, 0, size, slots, mask, False, queries, final)
        if segment.cross is not None:
            self.segment.cross = {layer: _buffers(pair, size) for layer, pair in segment.cross.items()}
            self.segment.cross_mask = torch.zeros_like(mask)
        self._cross: Mapping[int, KeysValues] | None = None
        self._graph: Graph | None = None
        self._out: LayersOutput | None = None
        self._warm = False

    @property
    def captured(self) -> bool:
        """True once there is a graph."""
        return self._graph is not None

    def fill(self, hidden: torch.Tensor, rotary: Rotary, segment: Segment) -> None:
        """Put a run's arguments into the buffers: behind rows that see one slot, and write into the region's last."""
        positions, slots, mask, final = self._buffers
        first, stop, length = len(self.hidden) - segment.n_rows, segment.start + segment.size, segment.length
        for buffer, part in zip((self.hidden, *self.rotary), (hidden, *rotary), strict=True):
            buffer[:first] = 0
            buffer[first:] = part
        torch.arange(segment.start, stop, out=slots)
        positions[:first] = stop - 1
        if isinstance(segment.positions, torch.Tensor):
            positions[first:] = segment.positions
        else:
            torch.arange(segment.positions, segment.positions + segment.n_rows, out=positions[first:])
        _show(mask, first, length, segment.mask)
        if segment.mask is None and segment.causal:
            mask[first:].tril_()
        if final is not None and segment.n_queries is not None:
            _show(final, len(final) - segment.n_queries, length, segment.final_mask)
        if segment.cross is not None:
            self._fill_cross(segment, segment.cross, first)

    @property
    def _buffers(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        positions, slots, mask = self.segment.positions, self.segment.slots, self.segment.mask
        if not isinstance(positions, torch.Tensor) or slots is None or mask is None:  # pragma: no cover - made above
            raise RuntimeError("a graph's buffers are incomplete")
        return positions, slots, mask, self.segment.final_mask

    def _fill_cross(self, segment: Segment, cross: Mapping[int, KeysValues], first: int) -> None:
        mask, buffers = self.segment.cross_mask, self.segment.cross
        if mask is None or buffers is None:  # pragma: no cover - made above
            raise RuntimeError("a graph's buffers are incomplete")
        length = next(iter(cross.values()))[0].shape[1] if cross else 0
        _show(mask, first, length, segment.cross_mask)
        if cross is not self._cross:  # once in a frame
            for layer, pair in cross.items():
                for buffer, part in zip(buffers[layer], pair, strict=True):
                    buffer[:, :length] = part
                    buffer[:, length:] = 0  # a longer prompt's may be NaN, which a mask does not hide
            self._cross = cross

    def run(self, store: SlotCache, make_graph: Callable[[], Graph] | None) -> LayersOutput:
        """Run the layers over the buffers; what is returned holds until the next run of any shape."""

        def work() -> LayersOutput:
            return run_layers(self._layers, self.hidden, self.rotary, [self.segment], store)

        if self._graph is None and (not self._warm or make_graph is None):
            self._warm = True
            return work()
        if self._graph is None or self._out is None:
            graph = make_graph() if make_graph is not None else None
            if graph is None:  # pragma: no cover - checked above
                raise RuntimeError("there is no graph to capture with")
            self._out, self._graph = graph.capture(work), graph
        self._graph.replay()
        return self._out


def _show(mask: torch.Tensor, first: int, length: int, visible: torch.Tensor | None) -> None:
    """Let rows from ``first`` on see what is ``visible`` of the first ``length`` slots, and those before one slot."""
    mask.zero_()
    mask[:first, 0] = True
    mask[first:, :length] = True if visible is None else visible


def _buffers(pair: KeysValues, size: int) -> KeysValues:
    """Make zeros like keys and values, for ``size`` slots: what is masked must be finite."""
    keys, values = (part.new_zeros(part.shape[0], size, part.shape[2]) for part in pair)
    return keys, values


class CUDAGraphRunner:
    """Runs layers as :func:`lac_vla.engine.layers.run_layers` does, over static buffers where it can. One per engine.

    The model's weights may change in place, but must not be replaced by other tensors.

    Args:
        device: Where the model is.

    Attributes:
        static_runs: Runs over static buffers so far.
        eager_runs: Runs by the ordinary loop so far.
        region_size: Slots of the largest region so far: new ones get as many, so that they share the graphs.
        make_graph: Makes a graph to capture with; ``None`` where there are none, on a CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.static_runs = self.eager_runs = self.region_size = 0
        self.make_graph: Callable[[], Graph] | None = self._cuda_graph if device.type == "cuda" else None
        self._entries: OrderedDict[tuple[int, int, int, int | None, bool], GraphEntry] = OrderedDict()
        self._keys: torch.Tensor | None = None  # those that the graphs read; held, so that no other takes their place
        self._pool: Any = None
        self._frozen = False

    def __len__(self) -> int:
        """Number of shapes."""
        return len(self._entries)

    @property
    def captured(self) -> int:
        """Number of graphs."""
        return sum(entry.captured for entry in self._entries.values())

    def freeze(self) -> None:
        """Add no shape from now on, unless the store grows: an episode never waits for a capture."""
        self._frozen = True

    def _cuda_graph(self) -> Graph:
        if self._pool is None:  # graphs share their memory: results are read before the next one runs
            self._pool = torch.cuda.graph_pool_handle()
        return CUDAGraph(self._pool)

    def size_for(self, needed: int) -> int:
        """Return how many slots a region gets that needs so many; the last one is written by padding alone."""
        if needed >= self.region_size:
            self.region_size = needed + 2 * CAPACITY_MULTIPLE - needed % CAPACITY_MULTIPLE
        return self.region_size

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
        whole = len(segments) == 1 and not first and stop in (None, len(layers)) and segment.slots is None
        entry = self._entry(layers, segment, hidden, rotary, store) if whole else None
        if entry is None:
            self.eager_runs += 1
            return run_layers(layers, hidden, rotary, segments, store, first, stop)
        self.static_runs += 1
        entry.fill(hidden, rotary, segment)
        out = entry.run(store, self.make_graph)
        asked = segment.n_rows if segment.n_queries is None else segment.n_queries
        skipped = len(out.hidden) - asked
        return LayersOutput(out.hidden[skipped:], out.query[:, skipped:], out.keys)

    def _entry(
        self, layers: Sequence[DecoderLayer], segment: Segment, hidden: torch.Tensor, rotary: Rotary, store: SlotCache
    ) -> GraphEntry | None:
        """Find the buffers of a shape, or make them; ``None`` if it is new and none is to be added."""
        if self._keys is not store.keys:
            self._entries.clear()  # the store has grown: the graphs' addresses are gone, and all begins anew
            self._keys, self._frozen = store.keys, False
            self._pool = None
        queries = None if segment.n_queries is None else padded(segment.n_queries)
        key = (id(layers), segment.size, padded(segment.n_rows), queries, segment.cross is not None)
        if key not in self._entries:
            if self._frozen:
                return None
            self._entries[key] = GraphEntry(layers, segment, hidden, rotary[0], store)
            if len(self._entries) > LIMIT:
                self._entries.popitem(last=False)
        self._entries.move_to_end(key)
        return self._entries[key]
