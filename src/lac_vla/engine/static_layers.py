"""Static shapes: layers over buffers that never move, whatever the session, its prompt and its rows.

A graph needs the same shapes at the same addresses every time. So there is one set of buffers for every stack, number
of rows and number of rows with queries in the last layer; both are rounded up, and rows that nobody reads stand before
the real ones. The masks reach over a whole region of the store and hide what does not exist, and the region's slots are
gathered by their indices: any session's region, a prompt of another length and any rows are the same graph. Rows
behind the prompts of several sessions are a graph of their own for every number of sessions, all with as many rows as
the most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from lac_vla.engine.graphs import FEW_ROWS, MakeGraph, Replayed, padded
from lac_vla.engine.kv_cache import SlotCache
from lac_vla.engine.layers import LayersOutput, Segment, query_counts, run_layers
from lac_vla.models.protocols import DecoderLayer, KeysValues, Rotary

PACKED_ROWS = 64
"""Most rows of each of several sessions that are a graph: those of decoding passes and chunks of actions."""


class Shape(NamedTuple):
    """Runs that are alike in all of this are the same graph.

    Attributes:
        layers: Identity of the stack.
        sequences: How many.
        size: Slots of a sequence's region.
        rows: Of every sequence, rounded up.
        queries: Those of them that have queries in the last layer, rounded up; ``None`` for all.
        cross: Whether some layers attend to keys and values that are given.
    """

    layers: int
    sequences: int
    size: int
    rows: int
    queries: int | None
    cross: bool

    @classmethod
    def of(cls, layers: Sequence[DecoderLayer], segments: Sequence[Segment]) -> Shape | None:
        """Find the shape of a run through all layers; ``None`` if there is no graph for it."""
        first, rows = segments[0], max(segment.n_rows for segment in segments)
        rows = padded(rows if first.n_queries is None else max(rows, FEW_ROWS + 1))  # few are a decoding pass's alone
        if any(segment.slots is not None or segment.size != first.size for segment in segments):
            return None
        if len(segments) > 1 and (rows > PACKED_ROWS or any(segment.n_queries is not None for segment in segments)):
            return None
        queries = None if first.n_queries is None else min(rows, padded(first.n_queries))
        return cls(id(layers), len(segments), first.size, rows, queries, first.cross is not None)


class StaticLayers:
    """The buffers of one shape, and the graph over them.

    Args:
        layers: The stack; it lives as long as the entry, which is found by its identity.
        shape: The shape.
        segments: Of a run of this shape.
        hidden: Like the residual stream, (rows, width).
        cos: Like a half of the position embedding, (rows, head_dim).
        store: Keys and values.
    """

    def __init__(
        self,
        layers: Sequence[DecoderLayer],
        shape: Shape,
        segments: Sequence[Segment],
        hidden: torch.Tensor,
        cos: torch.Tensor,
        store: SlotCache,
    ) -> None:
        rows = shape.sequences * shape.rows
        self._layers, self._shape = layers, shape
        self.hidden = hidden.new_zeros(rows, *hidden.shape[1:])
        self.rotary = cos.new_zeros(rows, *cos.shape[1:]), cos.new_zeros(rows, *cos.shape[1:])
        self._places = [_Place(shape, segment, hidden.device, store.n_slots) for segment in segments]
        self._replayed = Replayed[LayersOutput]()

    @property
    def captured(self) -> bool:
        """True once there is a graph."""
        return self._replayed.captured

    @property
    def segments(self) -> list[Segment]:
        """Every sequence has buffers, which the layers are run over."""
        return [place.segment for place in self._places]

    def fill(self, hidden: torch.Tensor, rotary: Rotary, segments: Sequence[Segment]) -> None:
        """Put a run's arguments into the buffers: behind rows that see one slot, and write into the region's last."""
        at = 0
        for number, (place, segment) in enumerate(zip(self._places, segments, strict=True)):
            stop = (number + 1) * self._shape.rows
            own, first, unread = slice(at, at + segment.n_rows), stop - segment.n_rows, stop - self._shape.rows
            moved = place.fill(segment)
            pairs = zip((self.hidden, *self.rotary), (hidden, *rotary), strict=True)
            for buffer, part in pairs if moved else [(self.hidden, hidden)]:
                buffer[unread:first] = 0
                buffer[first:stop] = part[own]
            at += segment.n_rows

    def run(self, segments: Sequence[Segment], store: SlotCache, make_graph: MakeGraph | None) -> LayersOutput:
        """Run the layers over the buffers; what is returned holds until the next run of any shape."""
        out = self._replayed.run(
            lambda: run_layers(self._layers, self.hidden, self.rotary, self.segments, store), make_graph
        )
        rows = self._shape.rows if self._shape.queries is None else self._shape.queries
        stops = [(number + 1) * rows for number in range(len(segments))]
        real = [slice(stop - asked, stop) for stop, asked in zip(stops, query_counts(segments), strict=True)]
        if len(real) == 1:
            return LayersOutput(out.hidden[real[0]], out.query[:, real[0]], out.keys)
        hidden, query = torch.cat([out.hidden[own] for own in real]), torch.cat([out.query[:, own] for own in real], 1)
        return LayersOutput(hidden, query, out.keys)


class _Place:
    """One sequence's buffers in a shape.

    Args:
        shape: The shape.
        like: A run's segment.
        device: Where the buffers are.
        n_slots: Of the whole store, whose slots are gathered from.
    """

    def __init__(self, shape: Shape, like: Segment, device: torch.device, n_slots: int) -> None:
        rows, size = shape.rows, shape.size
        self._positions = torch.zeros(rows, dtype=torch.int64, device=device)
        self._slots = torch.zeros(size, dtype=torch.int64, device=device)
        self._mask = torch.zeros(rows, size, dtype=torch.bool, device=device)
        self._final = None if shape.queries is None else self._mask.new_zeros(shape.queries, size)
        self._cross = None if like.cross is None else {n: _buffers(pair, size) for n, pair in like.cross.items()}
        self._cross_mask = torch.zeros_like(self._mask)
        self.segment = Segment(
            rows, self._positions, n_slots, 0, size, self._slots, self._mask, False, shape.queries, self._final,
            self._cross, None if like.cross is None else self._cross_mask,
        )  # fmt: skip
        self._crossed: Mapping[int, KeysValues] | None = None
        self._plain: tuple[int, ...] | None = None

    def fill(self, segment: Segment) -> bool:
        """Put a run's segment into the buffers; ``False`` if it stands where the last one stood."""
        plain = _plain(segment)
        if plain is not None and plain == self._plain:
            return False
        self._plain = plain
        positions, length, stop = self._positions, segment.length, segment.start + segment.size
        first = len(positions) - segment.n_rows
        torch.arange(segment.start, stop, out=self._slots)
        positions[:first] = stop - 1
        if isinstance(segment.positions, torch.Tensor):
            positions[first:] = segment.positions
        else:
            torch.arange(segment.positions, segment.positions + segment.n_rows, out=positions[first:])
        _show(self._mask, first, length, segment.mask)
        if segment.mask is None and segment.causal:
            self._mask[first:].tril_()
        if self._final is not None and segment.n_queries is not None:
            _show(self._final, len(self._final) - segment.n_queries, length, segment.final_mask)
        if segment.cross is not None and self._cross is not None:
            self._fill_cross(segment, segment.cross, self._cross, first)
        return True

    def _fill_cross(
        self, segment: Segment, cross: Mapping[int, KeysValues], buffers: Mapping[int, KeysValues], first: int
    ) -> None:
        length = next(iter(cross.values()))[0].shape[1] if cross else 0
        _show(self._cross_mask, first, length, segment.cross_mask)
        if cross is not self._crossed:  # once in a frame
            for layer, pair in cross.items():
                for buffer, part in zip(buffers[layer], pair, strict=True):
                    buffer[:, :length] = part
                    buffer[:, length:] = 0  # a longer prompt's may be NaN, which a mask does not hide
            self._crossed = cross


def _plain(segment: Segment) -> tuple[int, ...] | None:
    """List all that a segment's buffers depend on where it is no tensor, as in every frame's steps of a chunk."""
    tensors = (segment.mask, segment.final_mask, segment.cross)
    if not isinstance(segment.positions, int) or any(part is not None for part in tensors):
        return None
    queries = segment.n_rows if segment.n_queries is None else segment.n_queries
    return segment.n_rows, segment.positions, segment.length, segment.start, segment.size, queries, segment.causal


def _show(mask: torch.Tensor, first: int, length: int, visible: torch.Tensor | None) -> None:
    """Let rows from ``first`` on see what is ``visible`` of the first ``length`` slots, and those before one slot."""
    mask.zero_()
    mask[:first, 0] = True
    mask[first:, :length] = True if visible is None else visible


def _buffers(pair: KeysValues, size: int) -> KeysValues:
    """Make zeros like keys and values, for ``size`` slots: what is masked must be finite."""
    keys, values = (part.new_zeros(part.shape[0], size, part.shape[2]) for part in pair)
    return keys, values
