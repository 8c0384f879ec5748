"""The one layer loop: prefill of the active rows over cached keys and values, then appended tokens on top.

Active rows keep their original positions, write their new keys and values into their slots and attend to every slot,
cached ones included (paper, inference). Nothing of transformers is patched: a layer is cut at its attention
(:class:`~lac_vla.models.base.DecoderLayer`), and the attention is torch's own kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from lac_vla.cache import VisualKVCache
from lac_vla.errors import InputError
from lac_vla.models.base import Backbone, Rotary
from lac_vla.types import Beyond, BoolArray, Decision, TokenLayout, Watch

Refine: TypeAlias = Callable[[int, torch.Tensor, Decision], Decision]


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows that a run of layers computes, and what they see.

    Attributes:
        positions: Their slots in the sequence, int64, (rows,).
        rotary: Their position embedding.
        slots: The slots they may look at, int64, (slots,); ``None`` for all of the prompt.
        mask: bool, (asking, slots); ``None`` where the kernel's own causal mask says the same.
        complete: Whether these are all rows of the prompt.
        asking: How many of them, the last ones, attend; the others leave no more than their keys and values. ``None``
            for all.
    """

    positions: torch.Tensor
    rotary: Rotary
    slots: torch.Tensor | None
    mask: torch.Tensor | None
    complete: bool
    asking: int | None = None


@dataclass
class Prompt:
    """A prompt in the cache, open for more tokens.

    Attributes:
        hidden: Normalised last hidden states of the suffix, (n_suffix, width).
        decision: What was computed, after refinement.
        rotary: Position embedding of every slot, those of tokens yet to be appended included.
        length: Tokens of the prompt.
        appended: Tokens behind it so far.
        slots: Per layer, the prompt's slots that exist there; ``None`` for all of them.
    """

    hidden: torch.Tensor
    decision: Decision
    rotary: Rotary
    length: int
    appended: int = 0
    slots: list[torch.Tensor | None] = field(default_factory=list)


def partial_prefill(
    backbone: Backbone,
    cache: VisualKVCache,
    layout: TokenLayout,
    decision: Decision,
    embeddings: torch.Tensor,
    watch: Watch | None = None,
    refine: Refine | None = None,
) -> Prompt:
    """Compute the rows that ``decision`` keeps and leave every slot of the prompt valid in the cache.

    Args:
        backbone: The model.
        cache: Opened by ``begin(layout, …)``; holds the previous frame's slots if the decision reuses any.
        layout: Where the tokens are.
        decision: How deep every visual token is computed.
        embeddings: Of the prefix, of the visual tokens with depth > 0 and of the suffix, in order, (rows, width).
        watch: Attention to compute aside and to leave in ``cache.attention``.
        refine: Asked to refine the decision after every watched layer, see
            :meth:`lac_vla.policies.base.CachePolicy.refine`.

    Returns:
        The prompt's hidden states, and the state that :func:`extend` goes on from.

    Raises:
        InputError: If ``embeddings`` does not have one row for every token that is computed.
    """
    alive = _alive(layout, decision.depth > 0)
    if embeddings.shape[0] != int(alive.sum()):
        raise InputError(f"{embeddings.shape[0]} embeddings for {int(alive.sum())} tokens to compute")
    every = torch.arange(layout.length + backbone.max_new_tokens, device=embeddings.device)
    prompt = Prompt(embeddings, decision, backbone.rotary(every), layout.length)
    hidden = embeddings
    rows = _rows(backbone, layout, alive, decision, prompt.rotary)
    for index, layer in enumerate(backbone.layers):
        if index and (decision.depth == index).any():  # tokens whose computation ends here
            still = _alive(layout, decision.depth > index)
            hidden = hidden[torch.from_numpy(still[alive]).to(hidden.device)]
            alive = still
            rows = _rows(backbone, layout, alive, decision, prompt.rotary)
        if index == len(backbone.layers) - 1 and not _watches_all(watch, index):
            rows = _suffix_asks(backbone, layout, rows)
        query, key, value = layer.qkv(hidden, rows.rotary, rows.asking)
        cache.write(index, slice(0, layout.length) if rows.complete else rows.positions, key, value)
        keys, values = _read(cache, index, layout.length, rows.slots)
        hidden = layer.finish(hidden[-query.shape[1] :], _attend(query, keys, values, rows.mask))
        prompt.slots.append(rows.slots)
        if watch is not None and index in watch.layers:
            cache.attention[index] = _watched(watch, layout, query, keys, rows, backbone)
            if refine is not None:
                decision = refine(index, cache.attention[index], decision)
    prompt.hidden = backbone.norm(hidden[-layout.n_suffix :])
    prompt.decision = decision
    return prompt


def extend(backbone: Backbone, cache: VisualKVCache, prompt: Prompt, embeddings: torch.Tensor) -> torch.Tensor:
    """Append tokens behind all that is in the sequence.

    Args:
        backbone: The model.
        cache: Holds the prompt, with room for the new tokens.
        prompt: State of the sequence; it grows.
        embeddings: (n, width).

    Returns:
        Normalised last hidden states of the new tokens, (n, width).
    """
    start = prompt.length + prompt.appended
    stop = start + embeddings.shape[0]
    cos, sin = prompt.rotary
    rotary = cos[start:stop], sin[start:stop]
    # A single new token sees all that exists: no mask to build, and the kernel's fast path.
    visible: torch.Tensor | None = None
    if embeddings.shape[0] > 1:
        every = torch.arange(stop, device=embeddings.device)
        visible = backbone.visible(every[start:], every)
    hidden = embeddings
    for index, layer in enumerate(backbone.layers):
        query, key, value = layer.qkv(hidden, rotary)
        cache.write(index, slice(start, stop), key, value)
        slots = prompt.slots[index]
        mask = visible
        if slots is not None:
            slots = torch.cat([slots, torch.arange(prompt.length, stop, device=slots.device)])
            mask = visible[:, slots] if visible is not None else None
        keys, values = _read(cache, index, stop, slots)
        hidden = layer.finish(hidden, _attend(query, keys, values, mask, causal=False))
    prompt.appended += embeddings.shape[0]
    return backbone.norm(hidden)


def _alive(layout: TokenLayout, visual: BoolArray) -> BoolArray:
    """Which slots of the prompt are computed, given the visual ones, bool, (length,)."""
    alive = np.ones(layout.length, dtype=np.bool_)
    alive[layout.visual] = visual
    return alive


def _rows(backbone: Backbone, layout: TokenLayout, alive: BoolArray, decision: Decision, rotary: Rotary) -> Rows:
    """Plan the rows of all layers until the next token stops."""
    cos, sin = rotary
    every = torch.arange(layout.length, device=cos.device)
    complete = bool(alive.all())
    positions = every if complete else torch.from_numpy(np.flatnonzero(alive)).to(cos.device)
    slots = None
    if decision.beyond is Beyond.PRUNE and not complete:
        slots = positions  # what is pruned is gone; everything else is computed
    mask: torch.Tensor | None = None
    if not (backbone.causal and (complete or slots is not None)):
        mask = backbone.visible(positions, every if slots is None else slots)
    return Rows(positions, (cos[positions], sin[positions]), slots, mask, complete)


def _watches_all(watch: Watch | None, layer: int) -> bool:
    """Whether a policy wants to see the attention of every row in a layer."""
    return watch is not None and watch.rows == "all" and layer in watch.layers


def _suffix_asks(backbone: Backbone, layout: TokenLayout, rows: Rows) -> Rows:
    """The last layer's rows: its hidden states are read at the suffix only."""
    n = layout.n_suffix
    if rows.mask is not None:
        return replace(rows, mask=rows.mask[-n:], asking=n)
    slots = rows.positions if rows.slots is None else rows.slots
    return replace(rows, mask=backbone.visible(rows.positions[-n:], slots), asking=n)


def _read(
    cache: VisualKVCache, layer: int, length: int, slots: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of the slots that exist in a layer, each (kv_heads, slots, head_dim)."""
    keys, values = cache.keys[layer, :, :length], cache.values[layer, :, :length]
    return (keys, values) if slots is None else (keys[:, slots], values[:, slots])


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, *, causal: bool = True
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
    watch: Watch, layout: TokenLayout, query: torch.Tensor, keys: torch.Tensor, rows: Rows, backbone: Backbone
) -> torch.Tensor:
    """Attention of the watched rows, mean over heads, (rows, slots), beside the kernel that computes the model."""
    first = {"last": -1, "suffix": -layout.n_suffix, "all": 0}[watch.rows]
    positions = rows.positions[first:]
    query = query[:, first:].float()
    keys = keys.float().repeat_interleave(query.shape[0] // keys.shape[0], dim=0)
    slots = torch.arange(layout.length, device=query.device) if rows.slots is None else rows.slots
    scores = query @ keys.transpose(1, 2) / math.sqrt(query.shape[-1])
    scores = scores.masked_fill(~backbone.visible(positions, slots), -torch.inf)
    return scores.softmax(dim=-1).mean(dim=0)
