"""Prefill of the active rows over cached keys and values, then appended rows on top; any number of sequences at once.

Active rows keep their original positions, write their new keys and values into their slots and attend to every slot,
cached ones included (paper, inference). Sequences may leave tokens out from different layers on, and have attention
probed in different layers: the packed run stops wherever the rows of one of them change.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
import torch

from lac_vla.engine.kv_cache import Region
from lac_vla.engine.layers import (
    KVStore,
    LayersOutput,
    RunLayers,
    Segment,
    attention_probabilities,
    query_counts,
    run_layers,
)
from lac_vla.models.heads.base import AppendRows
from lac_vla.models.protocols import Decoder, DecoderStack, Rotary
from lac_vla.transfer import upload
from lac_vla.types import AttentionProbe, BoolArray, Decision, SkippedTokens, TokenLayout

Refine: TypeAlias = Callable[[int, torch.Tensor, Decision], Decision]
"""See :meth:`lac_vla.policies.base.CachePolicy.refine`, without the layout."""


@dataclass(eq=False)
class SequenceState:
    """A prompt in the cache, open for more rows.

    Attributes:
        layout: Of the prompt.
        region: Where the store keeps it.
        decision: What is computed; after the prefill, as it was refined.
        draft: Rows behind the prompt that are part of the prefill.
        probe: Attention to compute aside.
        refine: Asked to refine the decision after every probed layer.
        reads_hidden: Whether the head reads the last hidden states; if not, the last layer computes no queries but
            for a probe.
        hidden: Normalised last hidden states of the suffix, and of the draft behind it, (n_suffix + draft, width).
        attention: Layer → probed attention.
        appended: Rows behind the prompt so far.
        slots: Per layer, the prompt's slots that exist there, int64; ``None`` for all of them.
        decode_passes: First and one-past-last appended row of every pass of the decoder's own stack so far.
        stack_passes: The same for every other stack, in order.
        prompt_passes: Passes over the prompt so far, the first one included.
        error: What went wrong with this sequence alone; it takes no further part in a run.
    """

    layout: TokenLayout
    region: Region
    decision: Decision
    draft: int = 0
    probe: AttentionProbe | None = None
    refine: Refine | None = None
    reads_hidden: bool = True
    hidden: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    attention: dict[int, torch.Tensor] = field(default_factory=dict)
    appended: int = 0
    slots: list[torch.Tensor | None] = field(default_factory=list)
    decode_passes: list[tuple[int, int]] = field(default_factory=list)
    stack_passes: list[tuple[DecoderStack, int, int]] = field(default_factory=list)
    prompt_passes: int = 1
    error: Exception | None = None

    def again(self) -> SequenceState:
        """Open the prompt once more, as it was decided on in the end: nothing is probed, and no draft rides along."""
        self.prompt_passes += 1
        self.appended = 0
        return replace(self, draft=0, probe=None, refine=None, slots=[])

    @property
    def n_computed(self) -> int:
        """Rows of the prefill."""
        hidden = self.layout.n_visual - int(np.count_nonzero(self.decision.exit_layer))
        return self.layout.length - hidden + self.draft

    @property
    def n_queries(self) -> int | None:
        """Rows at the end of the prefill that have queries in the last layer; ``None`` for all."""
        probe = self.probe if self.probe is not None and self.decision.n_layers - 1 in self.probe.layers else None
        if probe is not None and probe.rows == "all":
            return None
        return self.layout.n_suffix + self.draft if self.reads_hidden or probe is not None else 0


class Cursor(ABC):
    """One sequence's way through the layers of a stack.

    Args:
        sequence: State of the sequence.
        rotary: Position embedding from slot 0 on.
    """

    def __init__(self, sequence: SequenceState, rotary: Rotary) -> None:
        self.sequence, self._rotary = sequence, rotary

    @abstractmethod
    def segment(self, layer: int) -> tuple[Segment, Rotary]:
        """Plan the rows from a layer on, and give them their position embedding."""

    @abstractmethod
    def next_stop(self, layer: int) -> int:
        """Find the last layer, plus one, up to which the rows stay the same and nothing looks at them."""

    def kept(self, layer: int) -> torch.Tensor | None:
        """List which of the present rows go on in a layer, int64, (kept,); ``None`` for all."""
        return None

    def after(self, stop: int, query: torch.Tensor, keys: torch.Tensor) -> None:  # noqa: B027 - most rows are not probed
        """See the queries and keys of layer ``stop`` − 1."""


def run_packed(
    stack: DecoderStack,
    cursors: Sequence[Cursor],
    embeddings: Sequence[torch.Tensor],
    store: KVStore,
    run: RunLayers = run_layers,
) -> list[torch.Tensor]:
    """Run the rows of several sequences through all layers of a stack.

    Args:
        stack: The layers.
        cursors: One for every sequence.
        embeddings: Of their rows, each (rows, width).
        store: Keys and values.
        run: Runs consecutive layers.

    Returns:
        Normalised last hidden states of the rows of every sequence that have queries there, each (rows, width).
        Sequences that fail alone, in :meth:`Cursor.after`, are marked; theirs is empty.
    """
    n_layers, first = len(stack.layers), 0
    hidden = list(embeddings)
    alive = list(range(len(cursors)))
    while first < n_layers and alive:
        for i in alive:
            if (kept := cursors[i].kept(first)) is not None:
                hidden[i] = hidden[i][kept]
        stop = min(cursors[i].next_stop(first) for i in alive)
        segments, rotaries = zip(*(cursors[i].segment(first) for i in alive), strict=True)
        rotary = _packed([cos for cos, _ in rotaries]), _packed([sin for _, sin in rotaries])
        out: LayersOutput = run(stack.layers, _packed([hidden[i] for i in alive]), rotary, segments, store, first, stop)
        packed = stack.norm(out.hidden) if stop == n_layers else out.hidden
        rows: Sequence[torch.Tensor] = [packed]
        queries: Sequence[torch.Tensor] = [out.query]
        if len(alive) > 1:
            counts = query_counts(segments) if stop == n_layers else [segment.n_rows for segment in segments]
            rows, queries = torch.split(packed, counts), torch.split(out.query, counts, dim=1)
        for i, own, query, keys in zip(tuple(alive), rows, queries, out.keys, strict=True):
            hidden[i] = own
            try:
                cursors[i].after(stop, query, keys)
            except Exception as error:  # of this sequence alone: the others get their answers
                cursors[i].sequence.error = error
                hidden[i] = own[:0]
                alive.remove(i)
        first = stop
    return hidden


class PrefillCursor(Cursor):
    """The rows of a prompt that its decision keeps, and of a draft behind it.

    Args:
        decoder: The model's.
        sequence: The prompt.
        rotary: Position embedding from slot 0 on.
    """

    def __init__(self, decoder: Decoder, sequence: SequenceState, rotary: Rotary) -> None:
        super().__init__(sequence, rotary)
        self._decoder = decoder
        self._mask = self._row_mask(0)
        self._segment: Segment | None = None
        self._positions = torch.zeros(0)
        sequence.appended = sequence.draft

    def kept(self, layer: int) -> torch.Tensor | None:
        """See :meth:`Cursor.kept`: tokens whose exit layer is reached are gone."""
        mask = self._row_mask(layer)
        if np.array_equal(mask, self._mask):
            return None
        kept, self._mask, self._segment = mask[self._mask], mask, None
        return upload(np.flatnonzero(kept), self._decoder.device)

    def next_stop(self, layer: int) -> int:
        """See :meth:`Cursor.next_stop`."""
        decision, probe = self.sequence.decision, self.sequence.probe
        ends = [int(exit_layer) for exit_layer in np.unique(decision.exit_layer) if exit_layer > layer]
        ends += [probed + 1 for probed in (probe.layers if probe is not None else ()) if probed >= layer]
        return min([*ends, len(self._decoder.layers)])

    def segment(self, layer: int) -> tuple[Segment, Rotary]:
        """See :meth:`Cursor.segment`."""
        if self._segment is None:
            self._segment = self._plan()
        own = slice(self._mask.size) if self._mask.all() else self._positions
        return self._segment, (self._rotary[0][own], self._rotary[1][own])

    def after(self, stop: int, query: torch.Tensor, keys: torch.Tensor) -> None:
        """Keep which slots exist, and probe the attention if the policy wants it."""
        sequence, segment = self.sequence, self._segment
        if segment is None:  # pragma: no cover - it was just run
            raise RuntimeError("no segment was planned")
        draft, probe, layer = sequence.draft, sequence.probe, stop - 1
        exist = None if segment.slots is None else segment.slots[: len(segment.slots) - draft]
        sequence.slots += [exist] * (stop - len(sequence.slots))
        if probe is None or layer not in probe.layers:
            return
        sequence.attention[layer] = self._probe(probe, query, keys, exist)
        if sequence.refine is not None:
            sequence.decision = sequence.refine(layer, sequence.attention[layer], sequence.decision)

    def _row_mask(self, layer: int) -> BoolArray:
        """Tell which slots of prompt and draft are computed in a layer, bool, (length + draft,)."""
        layout = self.sequence.layout
        mask = np.ones(layout.length + self.sequence.draft, dtype=np.bool_)
        mask[layout.visual] = self.sequence.decision.exit_layer > layer
        return mask

    def _plan(self) -> Segment:
        sequence, decoder, mask = self.sequence, self._decoder, self._mask
        layout, start = sequence.layout, sequence.region.start
        every = torch.arange(mask.size, device=decoder.device)
        complete = bool(mask.all())
        self._positions = every if complete else upload(np.flatnonzero(mask), decoder.device)
        slots = None
        if sequence.decision.skipped is SkippedTokens.PRUNE and not complete:
            slots = self._positions  # what is pruned is gone; everything else is computed
        visible = None
        if not (decoder.causal and (complete or slots is not None)):
            visible = decoder.visible(layout, self._positions, every if slots is None else slots)
        segment = Segment(
            n_rows=len(self._positions),
            positions=start if complete else self._positions + start if start else self._positions,
            length=mask.size,
            start=start,
            size=sequence.region.size,
            slots=slots,
            mask=visible,
            causal=decoder.causal,
        )
        n_queries = sequence.n_queries
        if n_queries is None:
            return segment
        final = self._positions[len(self._positions) - n_queries :]
        final_mask: torch.Tensor | None = None
        if visible is not None:
            final_mask = visible[len(visible) - n_queries :]
        elif decoder.causal:
            final_mask = decoder.visible(layout, final, self._positions)  # without a mask, rows are slots
        return replace(segment, n_queries=n_queries, final_mask=final_mask)

    def _probe(
        self, probe: AttentionProbe, query: torch.Tensor, keys: torch.Tensor, exist: torch.Tensor | None
    ) -> torch.Tensor:
        """Compute the attention of the probed rows, mean over heads, (rows, slots).

        A draft is no part of the prompt: its rows are not probed, and nothing before them sees its slots.
        """
        layout, draft = self.sequence.layout, self.sequence.draft
        asked = query.shape[1] - draft
        stop = asked - (layout.n_unread if probe.rows == "last" else 0)
        rows = slice(stop - {"last": 1, "suffix": layout.n_suffix, "all": asked}[probe.rows], stop)
        positions = self._positions[len(self._positions) - draft - asked : len(self._positions) - draft][rows]
        slots = torch.arange(layout.length, device=query.device) if exist is None else exist
        visible = self._decoder.visible(layout, positions, slots)
        return attention_probabilities(query[:, rows], keys[:, : len(slots)], visible)


class AppendCursor(Cursor):
    """Rows behind all that is in the sequence, or over a part of what was appended before.

    Args:
        stack: The layers that they run through.
        sequence: State of the sequence; it grows.
        rows: The rows.
        rotary: Position embedding from slot 0 on.
    """

    def __init__(self, stack: DecoderStack, sequence: SequenceState, rows: AppendRows, rotary: Rotary) -> None:
        super().__init__(sequence, rotary)
        kept = sequence.appended if rows.at is None else rows.at
        n_rows = rows.embeddings.shape[0]
        self._start = sequence.layout.length + kept
        self._stop = self._start + n_rows
        self._n_layers = len(stack.layers)
        self._cross = rows.cross
        own = slice(self._start, self._stop)
        self._rows_rotary = rotary[0][own], rotary[1][own]
        self._visible: torch.Tensor | None = None
        if n_rows > 1:  # a single new row sees all that exists: no mask to build, and the kernel's fast path
            every = torch.arange(self._stop, device=rows.embeddings.device)
            self._visible = stack.visible(sequence.layout, every[self._start :], every)
        sequence.appended = kept + n_rows
        if rows.stack is None:
            sequence.decode_passes.append((kept, sequence.appended))
        else:
            sequence.stack_passes.append((rows.stack, kept, sequence.appended))

    def next_stop(self, layer: int) -> int:
        """See :meth:`Cursor.next_stop`."""
        slots = self.sequence.slots
        return next((i for i in range(layer + 1, self._n_layers) if slots[i] is not slots[layer]), self._n_layers)

    def segment(self, layer: int) -> tuple[Segment, Rotary]:
        """See :meth:`Cursor.segment`."""
        exist = self.sequence.slots[layer]
        slots, mask, region = exist, self._visible, self.sequence.region
        if exist is not None:
            new = torch.arange(self.sequence.layout.length, self._stop, device=exist.device)
            slots = torch.cat([exist, new])
            mask = mask[:, slots] if mask is not None else None
        first, n_rows = region.start + self._start, self._stop - self._start
        segment = Segment(n_rows, first, self._stop, region.start, region.size, slots, mask, causal=False)
        if self._cross is not None:
            segment.cross, segment.cross_mask = self._cross, self._cross_mask(exist, n_rows)
        return segment, self._rows_rotary

    def _cross_mask(self, exist: torch.Tensor | None, n_rows: int) -> torch.Tensor | None:
        """Tell which of the prompt's slots the rows see; ``None`` if it is every one."""
        length = self.sequence.layout.length
        mask = None if self._visible is None else self._visible[:, :length]
        if exist is None:
            return mask
        there = torch.zeros(length, dtype=torch.bool, device=exist.device).index_fill_(0, exist, True)
        return there.expand(n_rows, -1) if mask is None else mask & there


def _packed(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
