"""An engine's CUDA graphs: which there are, when they are made, and what has none.

A shape that comes for the first time in a thread runs over its buffers as it is, which also makes the libraries'
handles; the second time it is captured, then replayed, by every thread. After :meth:`CUDAGraphRunner.freeze` no shape
is added: what is new runs in the ordinary loop. More sessions or far longer prompts than were foreseen make the store
grow, and all graphs void. On a CPU nothing is captured: the same path, a little slower than the ordinary loop, is what
the tests hold to it. The attention passes over the hidden slots, too (up to twice :data:`CAPACITY_MULTIPLE`, and those
of rows yet to come), which no count of MACs includes, nor are the padding's rows in one.

What does not run in one go through all layers falls back to the ordinary loop: decisions that end in mid-depth,
probed layers other than the last, and pruning. So do the prompts of several sessions: their rows, in other numbers
every time, would be a graph each, and keep the GPU busy for longer than the host needs to launch what they go through.
:attr:`lac_vla.engine.step_info.StepInfo.eager_runs` says how many runs did.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch

from lac_vla.engine.graphs import FunctionEntry, GraphPool, MakeGraph
from lac_vla.engine.kv_cache import SlotCache
from lac_vla.engine.layers import LayersOutput, Segment, run_layers
from lac_vla.engine.static_layers import Shape, StaticLayers
from lac_vla.models.protocols import DecoderLayer, Rotary

CAPACITY_MULTIPLE = 64
"""Rows that an instruction may be longer than the first one, at least, before all graphs have to be made anew. A
region's size is a multiple of it, so that the masks' rows are aligned."""
LIMIT = 512
"""Shapes that are kept, of all stacks; and as many of functions."""

K = TypeVar("K")
V = TypeVar("V")


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
        self._pool = GraphPool()
        self.make_graph: MakeGraph | None = self._pool.make if device.type == "cuda" else None
        self._entries: OrderedDict[Shape, StaticLayers] = OrderedDict()
        self._functions: OrderedDict[Hashable, FunctionEntry] = OrderedDict()
        self._keys: torch.Tensor | None = None  # those that the graphs read; held, so that no other takes their place
        self._frozen = False

    def __len__(self) -> int:
        """Number of shapes, those of functions included."""
        return len(self._entries) + len(self._functions)

    @property
    def captured(self) -> int:
        """Number of graphs."""
        layers, functions = self._entries.values(), self._functions.values()
        return sum(entry.captured for entry in layers) + sum(entry.captured for entry in functions)

    def freeze(self) -> None:
        """Add no shape from now on, unless the store grows: an episode never waits for a capture."""
        self._frozen = True

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
        shape = None if first or stop not in (None, len(layers)) else Shape.of(layers, segments)
        entry = None if shape is None else self._entry(layers, shape, segments, hidden, rotary, store)
        if entry is None:
            self.eager_runs += 1
            return run_layers(layers, hidden, rotary, segments, store, first, stop)
        self.static_runs += 1
        entry.fill(hidden, rotary, segments)
        return entry.run(segments, store, self.make_graph)

    def function(self, name: Hashable, function: Callable[..., Any], *inputs: torch.Tensor) -> Any:
        """Call a function of tensors over buffers, as a graph where there is one.

        Args:
            name: The same function has the same name; its shapes are told apart.
            function: Gives a tensor, or lists and tuples of them. What it reads besides must stay where it is.
            inputs: The tensors.

        Returns:
            What the function gives.
        """
        key = name, *((part.shape, part.dtype) for part in inputs)
        if self._frozen and key not in self._functions:
            self.eager_runs += 1
            return function(*inputs)
        return _latest(self._functions, key, partial(FunctionEntry, inputs)).run(function, inputs, self.make_graph)

    def _entry(
        self,
        layers: Sequence[DecoderLayer],
        shape: Shape,
        segments: Sequence[Segment],
        hidden: torch.Tensor,
        rotary: Rotary,
        store: SlotCache,
    ) -> StaticLayers | None:
        """Find the buffers of a shape, or make them; ``None`` if it is new and none is to be added."""
        if self._keys is not store.keys:
            self._entries.clear()  # the store has grown: the graphs' addresses are gone, and all begins anew
            self._functions.clear()  # they hold the pool
            self._keys, self._frozen = store.keys, False
            self._pool.renew()
        if self._frozen and shape not in self._entries:
            return None
        make = partial(StaticLayers, layers, shape, segments, hidden, rotary[0], store)
        return _latest(self._entries, shape, make)


def _latest(entries: OrderedDict[K, V], key: K, make: Callable[[], V]) -> V:
    """Find an entry, or make it; of too many, the one goes that was not asked for longest."""
    if key not in entries:
        entries[key] = make()
        if len(entries) > LIMIT:
            entries.popitem(last=False)
    entries.move_to_end(key)
    return entries[key]
