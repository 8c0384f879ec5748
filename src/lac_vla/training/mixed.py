"""Training's forward pass: every row is computed, and a mask mixes fresh with cached keys and values.

At every layer K = M·K_new + (1 − M)·K_old, and V alike, at the visual slots. With a hard M the active rows are exactly
those of sparse inference (it is the same loop over another store, and tested against the engine), while the cached rows
only carry what they would be if they were refreshed: ∂L/∂M_i = ⟨∂L/∂K_i, K_new,i − K_old,i⟩ + the same for V is the
first-order value of refreshing token i.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias

import torch

from lac_vla.engine.layers import Segment, attention_probabilities, run_layers
from lac_vla.errors import InputError
from lac_vla.models.heads.base import AppendRows, EditSuffix, LossContext
from lac_vla.models.protocols import Decoder, DecoderStack
from lac_vla.models.vla import VLA
from lac_vla.types import TokenLayout

Batch: TypeAlias = slice | torch.Tensor
"""A part of a batch: a slice, or row numbers, int64, of which one may come several times."""


@dataclass(frozen=True, eq=False)
class LayerKV:
    """Holds keys and values of a batch, one entry per layer: each (B, kv_heads, slots, head_dim)."""

    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Add a layer."""
        self.keys.append(keys)
        self.values.append(values)

    def of(self, batch: Batch) -> LayerKV:
        """Take a part of the batch."""
        return LayerKV([part[batch] for part in self.keys], [part[batch] for part in self.values])


class MixedKV:
    """Mixes fresh with cached keys and values, for training.

    It is a decoder's :class:`lac_vla.engine.layers.KVStore`, and a vision tower's
    :class:`lac_vla.models.transformer.KVCache`: every row is computed, so that it need not know which.

    Args:
        visual: The visual slots of the sequence.
        mask: M, 1 = active, (B, N); ``None`` for a dense pass.
        old: The preceding frame's slots; needed with a mask.
        keep: Whether a head reads keys and values, so that ``sequence`` is kept.
        computed: Places in the sequence of the rows that are computed, int64, (B, rows), where a hard mask leaves the
            others out, and the sequence's length; ``None`` if all are.

    Attributes:
        slots: The visual slots as the next frame finds them, detached.
        sequence: Mixed keys and values of the whole sequence, with their gradient, if they are kept.
    """

    def __init__(
        self,
        visual: slice,
        mask: torch.Tensor | None = None,
        old: LayerKV | None = None,
        *,
        keep: bool = False,
        computed: tuple[torch.Tensor, int] | None = None,
    ) -> None:
        self._visual, self._old, self._keep, self._computed = visual, old, keep, computed
        self._weight = None if mask is None or old is None else mask[:, None, :, None]
        self.slots, self.sequence = LayerKV(), LayerKV()

    def update(
        self, layer: int, rows: Any, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix, and keep the mixture; see :meth:`lac_vla.engine.layers.KVStore.update`."""
        if self._computed is not None and self._old is not None:
            keys, values = (
                self._placed(*parts, *self._computed)
                for parts in ((keys, self._old.keys[layer]), (values, self._old.values[layer]))
            )
        elif self._weight is not None and self._old is not None:
            keys = mix(keys, self._old.keys[layer], self._weight, self._visual)
            values = mix(values, self._old.values[layer], self._weight, self._visual)
        self.slots.append(keys[:, :, self._visual].detach(), values[:, :, self._visual].detach())
        if self._keep:
            self.sequence.append(keys, values)
        return keys, values

    def _placed(self, fresh: torch.Tensor, old: torch.Tensor, rows: torch.Tensor, length: int) -> torch.Tensor:
        """Put what was computed into the whole sequence, whose other slots are old."""
        whole = fresh.new_zeros(*fresh.shape[:2], length, fresh.shape[-1])
        whole[:, :, self._visual] = old
        return whole.scatter_(2, rows[:, None, :, None].expand_as(fresh), fresh)


@dataclass(frozen=True, eq=False)
class AppendedKV:
    """Implements :class:`lac_vla.engine.layers.KVStore` for rows behind a batch of prompts."""

    prompts: LayerKV

    def update(
        self, layer: int, segment: Segment, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put the rows behind the prompts' keys and values; see :meth:`lac_vla.engine.layers.KVStore.update`."""
        prompts = self.prompts
        return torch.cat([prompts.keys[layer], keys], dim=2), torch.cat([prompts.values[layer], values], dim=2)


@dataclass(frozen=True, eq=False)
class MixedOutput:
    """The result of a pass.

    Attributes:
        decoder: The model's.
        layout: Of the prompts, without a suffix.
        hidden: Normalised last hidden states of the rows asked for, (B, R, width); empty if the head reads keys and
            values.
        store: Keys and values.
        lengths: Of the prompts, int64, (B,).
        attention: Attention of the rows asked for to the visual tokens, mean over heads, rows and probed layers,
            (B, N), float32; ``None`` unless asked for.
        again: Runs a part of the batch once more, with edited suffixes.
    """

    decoder: Decoder
    layout: TokenLayout
    hidden: torch.Tensor
    store: MixedKV
    lengths: torch.Tensor
    attention: torch.Tensor | None
    again: Callable[[Batch, EditSuffix], torch.Tensor]

    def context(self, batch: Batch = slice(None), maps: list[torch.Tensor] | None = None) -> LossContext:
        """Make what a head's loss reads of a part of the batch.

        Args:
            batch: The part.
            maps: Takes the attention of all rows that the loss appends to the visual tokens, layer by layer, mean over
                heads and rows, (B, N), float32.
        """
        prompts, lengths = self.store.sequence.of(batch), self.lengths[batch]
        return LossContext(
            layout=self.layout,
            hidden=self.hidden[batch],
            keys=prompts.keys.__getitem__,
            values=prompts.values.__getitem__,
            lengths=lengths,
            run=partial(self._append, prompts, lengths, maps),
            rerun=partial(self.again, batch),
            n_layers=len(prompts.keys),
        )

    def _append(
        self, prompts: LayerKV, lengths: torch.Tensor, maps: list[torch.Tensor] | None, rows: AppendRows
    ) -> torch.Tensor:
        """Run rows behind the prompts, (B, n, width) → (B, n, width)."""
        if rows.at not in (None, 0) or not prompts.keys:
            raise InputError("a loss appends rows once, behind the prompt, and its head reads keys and values")
        stack = rows.stack or self.decoder
        length, n_rows = prompts.keys[0].shape[2], rows.embeddings.shape[1]
        own = lengths[:, None] + torch.arange(n_rows, device=lengths.device)
        slots = torch.arange(length, device=own.device).expand(len(own), -1)
        real = torch.cat([slots < lengths[:, None], torch.ones_like(own, dtype=torch.bool)], dim=1)
        visible = visible_slots(stack, self.layout, lengths, own, torch.cat([slots, own], dim=1), real)
        cos, sin = (part.view(*own.shape, -1)[:, None] for part in stack.rotary(own.flatten()))
        mask = visible[:, None]
        segment = Segment(n_rows, length, length + n_rows, mask=mask, cross=rows.cross, cross_mask=mask[..., :length])
        store, hidden, count = AppendedKV(prompts), rows.embeddings, len(stack.layers)
        if maps is None:
            return stack.norm(run_layers(stack.layers, hidden, (cos, sin), [segment], store).hidden)
        for layer in range(count):
            out = run_layers(stack.layers, hidden, (cos, sin), [segment], store, layer, layer + 1)
            [keys], hidden = out.keys, out.hidden
            with torch.autocast(keys.device.type, enabled=False):
                seen = attention_probabilities(out.query, keys, visible[..., : keys.shape[2]])
            maps.append(seen[..., self.layout.visual].mean(dim=1))
        return stack.norm(hidden)


def mixed_forward(
    vla: VLA,
    embeddings: torch.Tensor,
    layout: TokenLayout,
    lengths: torch.Tensor,
    *,
    n_rows: int = 1,
    n_before: int = 0,
    mask: torch.Tensor | None = None,
    old: LayerKV | None = None,
    probe_layers: Sequence[int] = (),
    compact: bool = False,
) -> MixedOutput:
    """Run a batch of prompts, with the rows forced behind them, through the frozen decoder.

    Args:
        vla: The model.
        embeddings: Whole sequences, right-padded, (B, length, width).
        layout: Of the prompts; its suffix does not count.
        lengths: Of the prompts, int64, (B,).
        n_rows: Hidden states wanted, in a row.
        n_before: Rows from the first of them to the last prompt row; what they reach beyond it is forced.
        mask: M, 1 = active, (B, N); ``None`` for a dense pass.
        old: The preceding frame's slots; needed with a mask.
        probe_layers: Layers whose attention is averaged.
        compact: Whether to leave out the rows that a hard mask has cached: the same answers for less, but no gradient
            reaches the mask. It has as many active tokens in every sequence of the batch; nothing is probed.
    """
    decoder, reads_kv = vla.decoder, vla.head.reads == "kv"
    length = embeddings.shape[1]
    positions = torch.arange(length, device=embeddings.device)
    rows = lengths[:, None] - 1 - n_before + torch.arange(n_rows, device=lengths.device)
    slots = positions.expand(len(lengths), -1)
    real = slots < lengths[:, None] + max(0, n_rows - 1 - n_before)
    visible = None
    if not (decoder.causal or (real.all() and decoder.visible(layout, positions[:1], positions) is None)):
        visible = visible_slots(decoder, layout, lengths, slots, slots, real)[:, None]
    last = len(decoder.layers) - 1
    n_queries = 0 if reads_kv and last not in probe_layers else None
    rotary, hidden, first, maps, computed = decoder.rotary(positions), embeddings, 0, [], None
    if compact and mask is not None:
        shown = torch.ones_like(real)
        shown[:, layout.visual] = mask > 0.5
        computed = shown.nonzero()[:, 1].view(len(shown), -1)
        visible = visible_slots(decoder, layout, lengths, computed, slots, real)[:, None]
        hidden = embeddings.gather(1, computed[..., None].expand(-1, -1, embeddings.shape[-1]))
        cos, sin = (part[computed][:, None] for part in rotary)
        rotary = (cos, sin)
    segment = Segment(hidden.shape[1], 0, length, mask=visible, causal=decoder.causal, n_queries=n_queries)
    store = MixedKV(layout.visual, mask, old, keep=reads_kv, computed=None if computed is None else (computed, length))
    for stop in sorted({*(layer + 1 for layer in probe_layers), last + 1}):
        out = run_layers(decoder.layers, hidden, rotary, [segment], store, first, stop)
        hidden, first = out.hidden, stop
        if stop - 1 in probe_layers:
            query = out.query.gather(2, rows[:, None, :, None].expand(-1, out.query.shape[1], -1, out.query.shape[-1]))
            seen = visible_slots(decoder, layout, lengths, rows, slots, real)
            with torch.autocast(query.device.type, enabled=False):
                maps.append(attention_probabilities(query, out.keys[0], seen)[..., layout.visual].mean(dim=1))
    read = rows[:, :0] if reads_kv else rows - (length - segment.n_rows)  # they stand behind all visual tokens
    hidden = decoder.norm(hidden.gather(1, read[..., None].expand(-1, -1, hidden.shape[-1])))
    attention = torch.stack(maps).mean(dim=0) if maps else None

    def again(batch: Batch, edit: EditSuffix) -> torch.Tensor:
        own, first = zip(embeddings[batch], lengths[batch].tolist(), strict=True), layout.visual.stop
        edited = [
            torch.cat([row[:first], edit(number, row[first:length]), row[length:]])
            for number, (row, length) in enumerate(own)
        ]
        return mixed_forward(
            vla,
            torch.stack(edited),
            layout,
            lengths[batch],
            n_rows=n_rows,
            n_before=n_before,
            mask=None if mask is None else mask[batch],
            old=None if old is None else old.of(batch),
            compact=compact,
        ).hidden

    return MixedOutput(decoder, layout, hidden, store, lengths, attention, again)


def visible_slots(
    stack: DecoderStack,
    layout: TokenLayout,
    lengths: torch.Tensor,
    queries: torch.Tensor,
    keys: torch.Tensor,
    real: torch.Tensor,
) -> torch.Tensor:
    """Tell which slots rows may attend to, each in its own prompt's layout, bool, (B, rows, slots).

    ``queries`` and ``keys`` are positions, (B, rows) and (B, slots); slots that are not ``real`` are padding, hidden.
    """
    layouts = [replace(layout, n_suffix=length - layout.visual.stop) for length in lengths.tolist()]
    seen = [stack.visible(own, *positions) for own, *positions in zip(layouts, queries, keys, strict=True)]
    shown = [torch.ones_like(real[:1]) if part is None else part for part in seen]
    return torch.stack([part.expand(queries.shape[1], -1) for part in shown]) & real[:, None]


def mix(fresh: torch.Tensor, old: torch.Tensor, weight: torch.Tensor, visual: slice) -> torch.Tensor:
    """Mix keys or values at the visual slots: exactly fresh where the weight is 1, exactly old where it is 0.

    ``fresh`` is of the whole sequence, (B, heads, length, head_dim), as the result; ``old`` of the visual slots,
    (B, heads, N, head_dim); the weight M is (B, 1, N, 1).
    """
    mixed = weight * fresh[:, :, visual] + (1 - weight) * old
    start, stop, _ = visual.indices(fresh.shape[2])
    return torch.cat([fresh[:, :, :start], mixed.to(fresh.dtype), fresh[:, :, stop:]], dim=2)


def alignment_teacher(attention: torch.Tensor) -> torch.Tensor:
    """Make S_VLA, eq. 6, of the attention to the visual tokens, (B, N): min-max scaled to [0, 1] for every frame."""
    low, high = attention.amin(dim=1, keepdim=True), attention.amax(dim=1, keepdim=True)
    return (attention - low) / (high - low).clamp(min=1e-12)
