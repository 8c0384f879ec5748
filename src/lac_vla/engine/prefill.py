"""The one layer loop: prefill of the active rows over cached keys and values, then appended tokens on top.

Active rows keep their original positions, write their new keys and values into their slots and attend to every slot,
cached ones included (paper, inference). Nothing of transformers is patched: a layer is cut at its attention
(:class:`~lac_vla.models.base.DecoderLayer`), and the attention is torch's own kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from lac_vla.engine.kv_cache import VisualKVCache, write
from lac_vla.errors import InputError
from lac_vla.models.base import Backbone, DecoderLayer, Rotary
from lac_vla.types import AttentionProbe, BoolArray, Decision, SkippedTokens, TokenLayout

Refine: TypeAlias = Callable[[int, torch.Tensor, Decision], Decision]


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows that a run of layers computes, and what they see.

    Attributes:
        positions: Their slots in the sequence, int64, (rows,); or the first of them, if they stand in a row.
        length: The slots 0..length-1 are those that may be seen.
        rotary: Their position embedding.
        slots: Those of the slots that exist, int64, (slots,); ``None`` for all.
        mask: bool, (rows, slots); ``None`` where ``causal`` says enough.
        causal: What is meant where there is no mask: that rows and slots are the same sequence, and every row sees
            itself and what is before it; if not, every row sees every slot.
        last: Mask of the rows at the end that alone ask in the last of the layers, bool, (asking, slots); the others
            leave no more than their keys and values there. ``None`` if all ask.
    """

    positions: torch.Tensor | int
    length: int
    rotary: Rotary
    slots: torch.Tensor | None
    mask: torch.Tensor | None
    causal: bool
    last: torch.Tensor | None = None


Run: TypeAlias = Callable[
    [Sequence[DecoderLayer], torch.Tensor, torch.Tensor, torch.Tensor, Rows], tuple[torch.Tensor, torch.Tensor]
]
""":func:`run_layers`, or whatever computes the same."""


@dataclass
class Prompt:
    """A prompt in the cache, open for more tokens.

    Attributes:
        hidden: Normalised last hidden states of the suffix, and of the draft behind it, (n_suffix + draft, width).
        decision: What was computed, after refinement.
        rotary: Position embedding of every slot, those of tokens yet to be appended included.
        length: Tokens of the prompt.
        draft: Tokens behind it that were part of the prefill.
        whole: Whether all rows asked in the last layer, not the suffix and the draft alone.
        appended: Tokens behind it so far.
        slots: Per layer, the prompt's slots that exist there; ``None`` for all of them.
        passes: First and one-past-last appended token of every :func:`extend` so far.
    """

    hidden: torch.Tensor
    decision: Decision
    rotary: Rotary
    length: int
    draft: int = 0
    whole: bool = False
    appended: int = 0
    slots: list[torch.Tensor | None] = field(default_factory=list)
    passes: list[tuple[int, int]] = field(default_factory=list)


def run_layers(
    layers: Sequence[DecoderLayer],
    keys: torch.Tensor,
    values: torch.Tensor,
    hidden: torch.Tensor,
    rows: Rows,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run consecutive layers on the same rows.

    Args:
        layers: The decoder blocks.
        keys: Their part of the cache, (layers, kv_heads, capacity, head_dim); the rows' own are written into it.
        values: As ``keys``.
        hidden: Residual stream of the rows, (rows, width).
        rows: Which they are.

    Returns:
        The residual stream of the rows that ask in the last layer, (asking, width); and their queries there, (heads,
        asking, head_dim).
    """
    query, last = hidden, rows.last
    added = None if rows.mask is None else _added(rows.mask, hidden.dtype)
    for index, layer in enumerate(layers):
        mask, causal, asking = added, rows.causal, None
        if last is not None and index == len(layers) - 1:
            mask, causal, asking = last, False, last.shape[0]
        query, key, value = layer.qkv(hidden, rows.rotary, asking)
        write(keys[index], rows.positions, key)
        write(values[index], rows.positions, value)
        seen_keys, seen_values = keys[index, :, : rows.length], values[index, :, : rows.length]
        if rows.slots is not None:
            seen_keys, seen_values = seen_keys[:, rows.slots], seen_values[:, rows.slots]
        attended = _attend(query, seen_keys, seen_values, mask, causal=causal)
        hidden = layer.finish(hidden[-query.shape[1] :], attended)
    return hidden, query


def partial_prefill(
    backbone: Backbone,
    cache: VisualKVCache,
    layout: TokenLayout,
    decision: Decision,
    embeddings: torch.Tensor,
    watch: AttentionProbe | None = None,
    refine: Refine | None = None,
    *,
    draft: int = 0,
    run: Run = run_layers,
) -> Prompt:
    """Compute the rows that ``decision`` keeps and leave every slot of the prompt valid in the cache.

    Args:
        backbone: The model.
        cache: Opened by ``begin(layout, …)``; holds the previous frame's slots if the decision reuses any.
        layout: Where the tokens are.
        decision: How deep every visual token is computed.
        embeddings: Of the prefix, of the visual tokens with depth > 0, of the suffix, and of a draft of the tokens to
            be appended, in order, (rows, width).
        watch: Attention to compute aside and to leave in ``cache.attention``.
        refine: Asked to refine the decision after every watched layer, see
            :meth:`lac_vla.policies.base.CachePolicy.refine`.
        draft: How many of the rows, the last ones, are the draft.
        run: Runs the layers.

    Returns:
        The prompt's hidden states, and the state that :func:`extend` goes on from.

    Raises:
        InputError: If ``embeddings`` does not have one row for every token that is computed.
    """
    alive = _alive(layout, decision.exit_layer > 0, draft)
    if embeddings.shape[0] != int(alive.sum()):
        raise InputError(f"{embeddings.shape[0]} embeddings for {int(alive.sum())} tokens to compute")
    if cache.rotary is None:
        cache.rotary = backbone.rotary(torch.arange(cache.keys.shape[2], device=embeddings.device))
    n_layers, asking = len(backbone.layers), layout.n_suffix + draft
    whole = watch is not None and watch.rows == "all" and n_layers - 1 in watch.layers
    prompt = Prompt(embeddings, decision, cache.rotary, layout.length, draft, whole, draft)
    hidden, first = embeddings, 0
    while first < n_layers:
        still = _alive(layout, decision.exit_layer > first, draft)
        if not np.array_equal(still, alive):  # tokens whose computation ends here
            hidden, alive = hidden[torch.from_numpy(still[alive]).to(hidden.device)], still
        stop = _segment(decision, watch, first, n_layers)
        rows, positions = _rows(backbone, alive, decision, prompt.rotary)
        if stop == n_layers and not whole:
            rows = _suffix_asks(backbone, rows, positions, asking)
        keys, values = cache.keys[first:stop], cache.values[first:stop]
        hidden, query = run(backbone.layers[first:stop], keys, values, hidden, rows)
        kept = rows.slots[: len(rows.slots) - draft] if rows.slots is not None else None
        prompt.slots += [kept] * (stop - first)
        if watch is not None and stop - 1 in watch.layers:
            cache.attention[stop - 1] = _watched(watch, layout, query, keys[-1], rows, positions, backbone, draft)
            if refine is not None:
                decision = refine(stop - 1, cache.attention[stop - 1], decision)
        first = stop
    prompt.hidden = backbone.norm(hidden[-asking:])
    prompt.decision = decision
    return prompt


def extend(
    backbone: Backbone,
    cache: VisualKVCache,
    prompt: Prompt,
    embeddings: torch.Tensor,
    at: int | None = None,
    *,
    run: Run = run_layers,
) -> torch.Tensor:
    """Append tokens behind all that is in the sequence, or over a part of what was appended before.

    Args:
        backbone: The model.
        cache: Holds the prompt, with room for the new tokens.
        prompt: State of the sequence; it grows.
        embeddings: (n, width).
        at: How many of the appended tokens to keep; the others are overwritten. ``None`` for all of them.
        run: Runs the layers.

    Returns:
        Normalised last hidden states of the new tokens, (n, width).
    """
    kept = prompt.appended if at is None else at
    start = prompt.length + kept
    stop = start + embeddings.shape[0]
    cos, sin = prompt.rotary
    # A single new token sees all that exists: no mask to build, and the kernel's fast path.
    visible: torch.Tensor | None = None
    if embeddings.shape[0] > 1:
        every = torch.arange(stop, device=embeddings.device)
        visible = backbone.visible(every[start:], every)
    hidden, first = embeddings, 0
    while first < len(backbone.layers):
        exist = prompt.slots[first]
        until = first + 1
        while until < len(backbone.layers) and prompt.slots[until] is exist:
            until += 1
        slots, mask = exist, visible
        if exist is not None:
            slots = torch.cat([exist, torch.arange(prompt.length, stop, device=exist.device)])
            mask = visible[:, slots] if visible is not None else None
        rows = Rows(start, stop, (cos[start:stop], sin[start:stop]), slots, mask, causal=False)
        keys, values = cache.keys[first:until], cache.values[first:until]
        hidden, _ = run(backbone.layers[first:until], keys, values, hidden, rows)
        first = until
    prompt.appended = kept + embeddings.shape[0]
    prompt.passes.append((kept, prompt.appended))
    return backbone.norm(hidden)


def _alive(layout: TokenLayout, visual: BoolArray, draft: int) -> BoolArray:
    """Which slots of prompt and draft are computed, given the visual ones, bool, (length + draft,)."""
    alive = np.ones(layout.length + draft, dtype=np.bool_)
    alive[layout.visual] = visual
    return alive


def _segment(decision: Decision, watch: AttentionProbe | None, first: int, n_layers: int) -> int:
    """One past the last layer, from ``first`` on, that has the same rows and needs no look in between."""
    ends = [int(depth) for depth in np.unique(decision.exit_layer) if depth > first]
    ends += [layer + 1 for layer in (watch.layers if watch is not None else ()) if layer >= first]
    return min([*ends, n_layers])


def _rows(backbone: Backbone, alive: BoolArray, decision: Decision, rotary: Rotary) -> tuple[Rows, torch.Tensor]:
    """Plan the rows of all layers until the next token stops; and their slots, int64, (rows,)."""
    cos, sin = rotary
    every = torch.arange(alive.size, device=cos.device)
    complete = bool(alive.all())
    positions = every if complete else torch.from_numpy(np.flatnonzero(alive)).to(cos.device)
    slots = None
    if decision.skipped is SkippedTokens.PRUNE and not complete:
        slots = positions  # what is pruned is gone; everything else is computed
    mask: torch.Tensor | None = None
    if not (backbone.causal and (complete or slots is not None)):
        mask = backbone.visible(positions, every if slots is None else slots)
    own = slice(alive.size) if complete else positions
    return Rows(0 if complete else positions, alive.size, (cos[own], sin[own]), slots, mask, causal=True), positions


def _suffix_asks(backbone: Backbone, rows: Rows, positions: torch.Tensor, asking: int) -> Rows:
    """Rows up to the last layer: its hidden states are read at the suffix and the draft only."""
    if rows.mask is not None:
        return replace(rows, last=rows.mask[-asking:])
    return replace(rows, last=backbone.visible(positions[-asking:], positions))  # without a mask, rows are slots


def _added(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask as what is added to the scores: the kernel would make it of a bool one anew in every layer."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, *, causal: bool
) -> torch.Tensor:
    """Scaled dot-product attention of (heads, rows, head_dim) over (kv_heads, slots, head_dim).

    Without a mask, ``causal`` says whether rows and slots are the same sequence, or every row sees every slot.
    """
    attended: torch.Tensor = F.scaled_dot_product_attention(
        query[None],
        key[None],
        value[None],
        attn_mask=mask,
        is_causal=causal and mask is None,
        enable_gqa=query.shape[0] != key.shape[0],
    )
    return attended[0]


def _watched(
    watch: AttentionProbe,
    layout: TokenLayout,
    query: torch.Tensor,
    keys: torch.Tensor,
    rows: Rows,
    positions: torch.Tensor,
    backbone: Backbone,
    draft: int,
) -> torch.Tensor:
    """Attention of the watched rows, mean over heads, (rows, slots), beside the kernel that computes the model.

    A draft is no part of the prompt: its rows are not watched, and nothing before them sees its slots.
    """
    asking = query.shape[1] - draft
    first = asking - {"last": 1, "suffix": layout.n_suffix, "all": asking}[watch.rows]
    positions = positions[len(positions) - draft - asking + first : len(positions) - draft]
    query = query[:, first:asking].float()
    keys = keys[:, : layout.length].float()
    if rows.slots is not None:
        keys = keys[:, rows.slots[: len(rows.slots) - draft]]
    keys = keys.repeat_interleave(query.shape[0] // keys.shape[0], dim=0)
    every = torch.arange(layout.length, device=query.device)
    slots = every if rows.slots is None else rows.slots[: len(rows.slots) - draft]
    scores = query @ keys.transpose(1, 2) / math.sqrt(query.shape[-1])
    scores = scores.masked_fill(~backbone.visible(positions, slots), -torch.inf)
    return scores.softmax(dim=-1).mean(dim=0)
