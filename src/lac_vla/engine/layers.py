"""The decoder loop: rows of any number of sequences, packed; attention and cache writes sequence by sequence.

Inference, training with mixed keys and values, and pretraining run this loop; they differ in the store that stands
between a layer's new keys and values and its attention. Nothing of transformers is patched: a layer is cut at its
attention (:class:`~lac_vla.models.protocols.DecoderLayer`), and the attention is torch's own kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, cast

import torch
import torch.nn.functional as F  # noqa: N812

from lac_vla.models.protocols import DecoderLayer, KeysValues, QueryRows, Rotary


@dataclass(eq=False, slots=True)  # made for every run: a frozen one takes several times as long
class Segment:
    """The rows of one sequence in a packed run, and what they see. In training: of a batch of sequences.

    Attributes:
        n_rows: How many rows.
        positions: Their slots in the store, int64, (rows,); or the first of them, if they stand in a row.
        length: The sequence's slots 0..length-1 exist.
        start: The sequence's first slot in the store.
        size: Slots that it has there.
        slots: Those of its slots that exist, int64, (slots,); ``None`` for all.
        mask: bool, (rows, slots); ``None`` where ``causal`` says enough.
        causal: What is meant where there is no mask: that rows and slots are the same sequence, and every row sees
            itself and what is before it; if not, every row sees every slot.
        n_queries: Rows at the end that alone have queries in the last layer of the stack; the others leave no more
            than their keys and values there. ``None`` for all.
        final_mask: Their mask there, bool, (n_queries, slots); ``None`` if they see every slot.
        cross: Layer → keys and values that the rows attend to there; the store is left alone.
        cross_mask: Their mask, bool, (rows, slots); ``None`` if every row sees all of them.
    """

    n_rows: int
    positions: torch.Tensor | int
    length: int
    start: int = 0
    size: int = 0
    slots: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    causal: bool = True
    n_queries: int | None = None
    final_mask: torch.Tensor | None = None
    cross: Mapping[int, KeysValues] | None = None
    cross_mask: torch.Tensor | None = None


class KVStore(Protocol):
    """Stands between a layer's new keys and values and its attention."""

    def update(
        self, layer: int, segment: Segment, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the new keys and values of a segment's rows, and return those that its rows may see.

        Args:
            layer: Number of the layer.
            segment: Whose rows they are.
            keys: (..., kv_heads, rows, head_dim).
            values: As ``keys``.

        Returns:
            Keys and values, each (..., kv_heads, slots, head_dim).
        """
        ...


class PackedKVStore(KVStore, Protocol):
    """Takes the rows of several sequences at once."""

    def update_packed(
        self, layer: int, segments: Sequence[Segment], positions: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> list[KeysValues]:
        """Take the new keys and values of several segments' rows, as :meth:`update` does of one.

        Args:
            layer: Number of the layer.
            segments: Whose rows they are, in order.
            positions: Slots of all the rows, int64, (Σ rows,).
            keys: (kv_heads, Σ rows, head_dim).
            values: As ``keys``.

        Returns:
            Of every segment, as :meth:`update` returns them.
        """
        ...


class NoCache:
    """Keeps nothing: every row sees the rows of its own pass. Used in pretraining."""

    def update(
        self, layer: int, segment: Segment, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what was given; see :meth:`KVStore.update`."""
        return keys, values


@dataclass(eq=False, slots=True)
class LayersOutput:
    """The result of a run of layers.

    Attributes:
        hidden: Residual stream of the rows that have queries in the last of the layers, (..., rows, width).
        query: Their queries there, (..., heads, rows, head_dim); empty if none has.
        keys: Per segment, the keys that they saw there, (..., kv_heads, slots, head_dim).
    """

    hidden: torch.Tensor
    query: torch.Tensor
    keys: Sequence[torch.Tensor]


Between: TypeAlias = Callable[[], object]
"""It is called between two pieces of a run, and may run other sessions' plans: the run goes on with what is its own."""
RunLayers: TypeAlias = Callable[..., LayersOutput]
""":func:`run_layers`, or whatever computes the same."""


def run_layers(
    layers: Sequence[DecoderLayer],
    hidden: torch.Tensor,
    rotary: Rotary,
    segments: Sequence[Segment],
    store: KVStore | PackedKVStore,
    first: int = 0,
    stop: int | None = None,
    between: Between = lambda: None,
) -> LayersOutput:
    """Run consecutive layers of a stack over the same rows.

    Args:
        layers: All blocks of the stack.
        hidden: Residual stream of the packed rows, (..., Σ rows, width).
        rotary: Their position embedding.
        segments: Whose rows they are, in order.
        store: Gives every layer the keys and values that its rows see; a packed one, if there are several segments.
        first: First layer to run.
        stop: One past the last; ``None`` for all.
        between: Called in the middle of every layer, and behind it.

    Returns:
        See :class:`LayersOutput`.
    """
    stop = len(layers) if stop is None else stop
    autocast = torch.is_autocast_enabled(hidden.device.type)
    masks = [_additive(segment.mask, hidden.dtype) for segment in segments]
    cross_masks = [_additive(segment.cross_mask, hidden.dtype) for segment in segments]
    counts = [segment.n_rows for segment in segments]
    positions = _positions(segments, hidden.device) if len(segments) > 1 else None
    query, seen = hidden, list[torch.Tensor]()
    for index in range(first, stop):
        layer, final = layers[index], index == len(layers) - 1
        rows = query_rows(segments, hidden.device) if final else None
        query, key, value = layer.qkv(hidden, rotary, rows)
        queries: Sequence[torch.Tensor] = [query]
        if len(segments) > 1:
            queries = torch.split(query, query_counts(segments) if final else counts, dim=-2)
        if not key.shape[-2]:  # layers that attend elsewhere make none
            stored = [(key, value)] * len(segments)
        elif positions is None:
            stored = [store.update(index, segments[0], key, value)]
        else:
            stored = cast(PackedKVStore, store).update_packed(index, segments, positions, key, value)
        seen, attended = [], []
        for segment, added, across, asked, (seen_keys, seen_values) in zip(
            segments, masks, cross_masks, queries, stored, strict=True
        ):
            if segment.cross is not None and index in segment.cross:
                (seen_keys, seen_values), mask, causal = segment.cross[index], across, False
            else:
                mask, causal = added, segment.causal
                if final and segment.n_queries is not None:
                    mask, causal = segment.final_mask, False
            seen.append(seen_keys)
            if asked.shape[-2]:
                attended.append(attend(asked, seen_keys, seen_values, mask, causal, precise=autocast))
        between()
        if rows is not None:
            hidden = hidden[..., rows, :]
        if attended:
            hidden = layer.finish(hidden, attended[0] if len(attended) == 1 else torch.cat(attended, dim=-2))
            between()
    return LayersOutput(hidden, query, seen)


def query_counts(segments: Sequence[Segment]) -> list[int]:
    """Count the rows of every segment that have queries in the last layer."""
    return [segment.n_rows if segment.n_queries is None else segment.n_queries for segment in segments]


def query_rows(segments: Sequence[Segment], device: torch.device) -> QueryRows | None:
    """List the rows of packed segments that have queries in the last layer; ``None`` for all."""
    if all(segment.n_queries is None for segment in segments):
        return None
    if len(segments) == 1:
        only = segments[0]
        return slice(only.n_rows - (only.n_queries or 0), only.n_rows)
    parts, stop = [], 0
    for segment, count in zip(segments, query_counts(segments), strict=True):
        stop += segment.n_rows
        parts.append(torch.arange(stop - count, stop, device=device))
    return torch.cat(parts)


def _positions(segments: Sequence[Segment], device: torch.device) -> torch.Tensor:
    """List the slots of all rows of packed segments, int64, (Σ rows,)."""
    return torch.cat(
        [
            torch.arange(own.positions, own.positions + own.n_rows, device=device)
            if isinstance(own.positions, int)
            else own.positions
            for own in segments
        ]
    )


def _additive(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Make a mask that is added to the scores: the kernel would make it of a bool one anew in every layer."""
    return None if mask is None else torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    *,
    precise: bool = False,
) -> torch.Tensor:
    """Scaled dot-product attention of (..., heads, rows, head_dim) over (..., kv_heads, slots, head_dim).

    Args:
        query: Queries.
        key: Keys.
        value: Values.
        mask: bool or additive, (rows, slots); ``None`` where ``causal`` says enough.
        causal: Without a mask, whether rows and slots are the same sequence, or every row sees every slot.
        precise: Compute in float32 under autocast: on a CPU the backward pass of attention is several times slower in
            bfloat16.

    Returns:
        (..., heads, rows, head_dim).
    """
    if precise and query.device.type == "cpu":
        with torch.autocast("cpu", enabled=False):
            return attend(query.float(), key.float(), value.float(), mask, causal).to(query.dtype)
    groups = query.shape[-3] // key.shape[-3]
    if query.is_cuda and query.ndim == 3 and mask is not None and groups > 1:
        # torch has no fast kernel for grouped heads with a mask: heads of a group are rows over the same keys
        rows = query.reshape(key.shape[0], groups * query.shape[1], query.shape[2])
        return attend(rows, key, value, mask.repeat(groups, 1), causal=False).reshape(query.shape)
    single = query.ndim == 3
    attended: torch.Tensor = F.scaled_dot_product_attention(
        query[None] if single else query,
        key[None] if single else key,
        value[None] if single else value,
        attn_mask=mask if mask is None or mask.dtype == torch.bool else mask.to(query.dtype),
        is_causal=causal and mask is None,
        enable_gqa=query.shape[-3] != key.shape[-3],
    )
    return attended[0] if single else attended


def attention_probabilities(query: torch.Tensor, key: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
    """Compute attention aside, beside the kernel that computes the model; mean over heads, in float32.

    Args:
        query: (..., heads, rows, head_dim).
        key: (..., kv_heads, slots, head_dim).
        visible: Which slots a row sees, bool, (..., rows, slots); ``None`` for all.

    Returns:
        (..., rows, slots).
    """
    query, key = query.float(), key.float()
    if query.shape[-3] != key.shape[-3]:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    scores = (query @ key.transpose(-1, -2)).div_(math.sqrt(query.shape[-1]))
    if visible is not None:
        scores.masked_fill_(~visible.unsqueeze(-3), -torch.inf)
    return scores.softmax(dim=-1).mean(dim=-3)
