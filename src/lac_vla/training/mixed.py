"""Training's forward pass: every row is computed, and a mask mixes fresh with cached keys and values.

At every layer K = M·K_new + (1 − M)·K_old, and V alike, at the visual slots. With a hard M the active rows are exactly
those of sparse inference (it is the same loop over another store, and tested against the engine), while the cached rows
only carry what they would be if they were refreshed: ∂L/∂M_i = ⟨∂L/∂K_i, K_new,i − K_old,i⟩ + the same for V is the
first-order value of refreshing token i.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from lac_vla.engine.layers import Segment, attention_probabilities, run_layers
from lac_vla.errors import InputError
from lac_vla.models.heads.base import AppendRows, LossContext
from lac_vla.models.vla import VLA
from lac_vla.types import TokenLayout


@dataclass(frozen=True, eq=False)
class LayerKV:
    """Keys and values of a batch's visual slots, one entry per layer: each (B, kv_heads, N, head_dim), detached."""

    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Add a layer; it is detached."""
        self.keys.append(keys.detach())
        self.values.append(values.detach())

    def of(self, batch: slice) -> LayerKV:
        """Take a part of the batch."""
        return LayerKV([part[batch] for part in self.keys], [part[batch] for part in self.values])


class MixedKV:
    """Implements :class:`lac_vla.engine.layers.KVStore` for training: mixes fresh with cached keys and values.

    Args:
        visual: The visual slots of the sequence.
        mask: M, 1 = active, (B, N); ``None`` for a dense pass.
        old: The preceding frame's slots; needed with a mask.
        attached: Whether to keep every layer's keys and values, with their gradient, for a head that reads them.

    Attributes:
        slots: The visual slots as the next frame finds them.
        keys: Per layer, the mixed keys of the whole sequence, if they are kept.
        values: As ``keys``.
    """

    def __init__(
        self, visual: slice, mask: torch.Tensor | None = None, old: LayerKV | None = None, *, attached: bool = False
    ) -> None:
        self._visual, self._old, self._attached = visual, old, attached
        self._weight = None if mask is None or old is None else mask[:, None, :, None]
        self.slots = LayerKV()
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def update(
        self, layer: int, segment: Segment | None, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix, and keep the mixture; see :meth:`lac_vla.engine.layers.KVStore.update`."""
        if self._weight is not None and self._old is not None:
            keys = mix(keys, self._old.keys[layer], self._weight, self._visual)
            values = mix(values, self._old.values[layer], self._weight, self._visual)
        self.slots.append(keys[:, :, self._visual], values[:, :, self._visual])
        if self._attached:
            self.keys.append(keys)
            self.values.append(values)
        return keys, values


@dataclass(frozen=True, eq=False)
class AppendedKV:
    """Implements :class:`lac_vla.engine.layers.KVStore` for rows behind a batch of prompts."""

    store: MixedKV

    def update(
        self, layer: int, segment: Segment, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put the rows behind the prompts' keys and values; see :meth:`lac_vla.engine.layers.KVStore.update`."""
        return torch.cat([self.store.keys[layer], keys], dim=2), torch.cat([self.store.values[layer], values], dim=2)


@dataclass(frozen=True, eq=False)
class MixedOutput:
    """What a pass leaves.

    Attributes:
        vla: The model.
        layout: Of the prompts, without a suffix.
        hidden: Normalised last hidden states of the rows asked for, (B, R, width).
        store: Keys and values.
        lengths: Of the prompts, int64, (B,).
        attention: Attention of the rows asked for to the visual tokens, mean over heads, rows and probed layers,
            (B, N); ``None`` unless asked for.
    """

    vla: VLA
    layout: TokenLayout
    hidden: torch.Tensor
    store: MixedKV
    lengths: torch.Tensor
    attention: torch.Tensor | None

    def context(self, batch: slice = slice(None)) -> LossContext:
        """Make what a head's loss reads of a part of the batch."""
        return LossContext(
            layout=self.layout,
            hidden=self.hidden[batch],
            keys=lambda layer: self.store.keys[layer][batch],
            values=lambda layer: self.store.values[layer][batch],
            lengths=self.lengths[batch],
            run=self._append,
        )

    def _append(self, rows: AppendRows) -> torch.Tensor:
        """Run rows behind the prompts, (B, n, width) → (B, n, width)."""
        if rows.at not in (None, 0) or not self.store.keys:
            raise InputError("a loss appends rows once, behind the prompt, and its head reads keys and values")
        stack = rows.stack or self.vla.decoder
        length, n_rows = self.store.keys[0].shape[2], rows.embeddings.shape[1]
        slots = torch.arange(length, device=self.lengths.device)
        positions = self.lengths[:, None] + torch.arange(n_rows, device=self.lengths.device)
        visible = torch.stack([stack.visible(self.layout, own, torch.cat([slots, own])) for own in positions])
        visible[..., :length] &= slots < self.lengths[:, None, None]  # what is behind a prompt is padding
        cos, sin = (part.view(*positions.shape, -1)[:, None] for part in stack.rotary(positions.flatten()))
        segment = Segment(n_rows, length, length + n_rows, mask=visible[:, None], causal=False)
        out = run_layers(stack.layers, rows.embeddings, (cos, sin), [segment], AppendedKV(self.store))
        return stack.norm(out.hidden)


def mixed_forward(
    vla: VLA,
    embeddings: torch.Tensor,
    layout: TokenLayout,
    lengths: torch.Tensor,
    *,
    n_rows: int = 1,
    mask: torch.Tensor | None = None,
    old: LayerKV | None = None,
    probe_layers: Sequence[int] = (),
) -> MixedOutput:
    """Run a batch of prompts, with the rows forced behind them, through the frozen decoder.

    Args:
        vla: The model. Its attention must be causal if the prompts are padded on the right.
        embeddings: Whole sequences, (B, length, width).
        layout: Of the prompts; its suffix does not count.
        lengths: Of the prompts, int64, (B,).
        n_rows: Hidden states wanted: those of the last prompt row and of the n_rows − 1 behind it.
        mask: M, 1 = active, (B, N); ``None`` for a dense pass.
        old: The preceding frame's slots; needed with a mask.
        probe_layers: Layers whose attention is averaged.

    Returns:
        See :class:`MixedOutput`.
    """
    decoder, reads_kv = vla.decoder, vla.head.reads == "kv"
    length = embeddings.shape[1]
    positions = torch.arange(length, device=embeddings.device)
    visible = None if decoder.causal else decoder.visible(layout, positions, positions)
    last = len(decoder.layers) - 1
    n_queries = 0 if reads_kv and last not in probe_layers else None
    segment = Segment(length, 0, length, mask=visible, n_queries=n_queries, final_mask=None)
    store = MixedKV(layout.visual, mask, old, attached=reads_kv)
    rows = lengths[:, None] - 1 + torch.arange(n_rows, device=lengths.device)
    rotary, hidden, first, maps = decoder.rotary(positions), embeddings, 0, []
    for stop in sorted({*(layer + 1 for layer in probe_layers), last + 1}):
        out = run_layers(decoder.layers, hidden, rotary, [segment], store, first, stop)
        hidden, first = out.hidden, stop
        if stop - 1 in probe_layers:
            query = out.query.gather(2, rows[:, None, :, None].expand(-1, out.query.shape[1], -1, out.query.shape[-1]))
            seen = torch.stack([decoder.visible(layout, row, positions) for row in rows])
            maps.append(attention_probabilities(query, out.keys[0], seen)[..., layout.visual].mean(dim=1))
    if not reads_kv:
        hidden = decoder.norm(hidden.gather(1, rows[..., None].expand(-1, -1, hidden.shape[-1])))
    return MixedOutput(vla, layout, hidden, store, lengths, torch.stack(maps).mean(dim=0) if maps else None)


def mix(fresh: torch.Tensor, old: torch.Tensor, weight: torch.Tensor, visual: slice) -> torch.Tensor:
    """Mix keys or values at the visual slots: exactly fresh where the weight is 1, exactly old where it is 0.

    Args:
        fresh: Of the whole sequence, (B, heads, length, head_dim).
        old: Of the visual slots, (B, heads, N, head_dim).
        weight: M, (B, 1, N, 1).
        visual: The visual slots.

    Returns:
        As ``fresh``.
    """
    weight = weight.to(fresh.dtype)
    mixed = weight * fresh[:, :, visual] + (1 - weight) * old
    return torch.cat([fresh[:, :, : visual.start], mixed.to(fresh.dtype), fresh[:, :, visual.stop :]], dim=2)


def alignment_teacher(attention: torch.Tensor) -> torch.Tensor:
    """S_VLA of stage I, eq. 6: attention to the visual tokens, (B, N), min-max scaled to [0, 1] for every frame."""
    low, high = attention.amin(dim=1, keepdim=True), attention.amax(dim=1, keepdim=True)
    return (attention - low) / (high - low).clamp(min=1e-12)


def upper_half(n_layers: int) -> tuple[int, ...]:
    """List the layers that the teacher of stage I is averaged over."""
    return tuple(range(n_layers // 2, n_layers))
