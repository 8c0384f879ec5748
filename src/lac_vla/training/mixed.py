"""Training's forward pass: every row is computed, and a mask mixes fresh with cached keys and values.

At every layer K = M·K_new + (1 − M)·K_old, and V alike, at the visual slots. With a hard M the active rows are exactly
those of sparse inference (tested against the engine), while the cached rows only carry what they would be if they were
refreshed: ∂L/∂M_i = ⟨∂L/∂K_i, K_new,i − K_old,i⟩ + the same for V is the first-order value of refreshing token i.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812

from lac_vla.models.base import Backbone


@dataclass(frozen=True, eq=False)
class Slots:
    """Visual keys and values of a batch, one entry per layer: each (B, kv_heads, N, head_dim), detached."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]


@dataclass(frozen=True, eq=False)
class Forward:
    """What a pass leaves.

    Attributes:
        hidden: Normalised last hidden states of the rows asked for, (B, R, width).
        slots: The visual slots as the next frame finds them.
        attention: Attention of the rows asked for to the visual tokens, mean over heads and watched layers, (B, N);
            ``None`` unless asked for.
    """

    hidden: torch.Tensor
    slots: Slots
    attention: torch.Tensor | None


def mixed_forward(
    backbone: Backbone,
    embeddings: torch.Tensor,
    visual: slice,
    rows: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    old: Slots | None = None,
    watch: tuple[int, ...] = (),
) -> Forward:
    """Run a batch of prompts, with their action tokens, through the frozen decoder.

    Args:
        backbone: The model. Its attention must be causal if the prompts are padded on the right.
        embeddings: Whole sequences, (B, length, width).
        visual: Slots of the visual tokens.
        rows: Positions whose hidden states are wanted, int64, (B, R).
        mask: M, 1 = active, (B, N); ``None`` for a dense pass.
        old: The preceding frame's slots; needed with a mask.
        watch: Layers whose attention is averaged.

    Returns:
        See :class:`Forward`.
    """
    length = embeddings.shape[1]
    positions = torch.arange(length, device=embeddings.device)
    rotary = backbone.rotary(positions)
    visible = None if backbone.causal else backbone.visible(positions, positions)
    weight = None if mask is None else mask[:, None, :, None].to(embeddings.dtype)
    slots = Slots([], [])
    seen: list[torch.Tensor] = []
    hidden = embeddings
    for index, layer in enumerate(backbone.layers):
        query, key, value = layer.qkv(hidden, rotary)
        if weight is not None and old is not None:
            key = mix(key, old.keys[index], weight, visual)
            value = mix(value, old.values[index], weight, visual)
        slots.keys.append(key[:, :, visual].detach())
        slots.values.append(value[:, :, visual].detach())
        if index in watch:
            seen.append(_watch(query, key, rows, backbone)[..., visual].mean(dim=(1, 2)))
        # In float32: on a CPU the backward pass of attention is several times slower in bfloat16.
        precise = torch.float32 if embeddings.device.type == "cpu" else query.dtype
        with torch.autocast(embeddings.device.type, enabled=False):
            attended = F.scaled_dot_product_attention(
                query.to(precise),
                key.to(precise),
                value.to(precise),
                attn_mask=visible,
                is_causal=visible is None,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        hidden = layer.finish(hidden, attended.to(query.dtype))
    chosen = hidden.gather(1, rows[..., None].expand(-1, -1, hidden.shape[-1]))
    return Forward(backbone.norm(chosen), slots, torch.stack(seen).mean(dim=0) if seen else None)


def mix(fresh: torch.Tensor, old: torch.Tensor, weight: torch.Tensor, visual: slice) -> torch.Tensor:
    """Fresh keys or values with the visual slots mixed; exactly fresh where the weight is 1, exactly old where 0.

    Args:
        fresh: Of the whole sequence, (B, heads, length, head_dim).
        old: Of the visual slots, (B, heads, N, head_dim).
        weight: M, (B, 1, N, 1).
        visual: The visual slots.

    Returns:
        As ``fresh``.
    """
    new = fresh[:, :, visual]
    mixed = weight * new + (1 - weight) * old
    return torch.cat([fresh[:, :, : visual.start], mixed.to(fresh.dtype), fresh[:, :, visual.stop :]], dim=2)


def _watch(query: torch.Tensor, key: torch.Tensor, rows: torch.Tensor, backbone: Backbone) -> torch.Tensor:
    """Attention of some rows, (B, heads, R, slots): their own product, beside the kernel that computes the model."""
    heads, width = query.shape[1], query.shape[-1]
    index = rows[:, None, :, None].expand(-1, heads, -1, width)
    query = query.gather(2, index).float()
    key = key.float().repeat_interleave(heads // key.shape[1], dim=1)
    scores = query @ key.transpose(-1, -2) / math.sqrt(width)
    slots = torch.arange(key.shape[2], device=key.device)
    hidden = torch.stack([~backbone.visible(row, slots) for row in rows])
    return scores.masked_fill(hidden[:, None], -torch.inf).softmax(dim=-1)


def alignment_teacher(attention: torch.Tensor) -> torch.Tensor:
    """S_VLA of stage I, eq. 6: attention to the visual tokens, (B, N), min-max scaled to [0, 1] for every frame."""
    low, high = attention.amin(dim=1, keepdim=True), attention.amax(dim=1, keepdim=True)
    return (attention - low) / (high - low).clamp(min=1e-12)


def upper_half(n_layers: int) -> tuple[int, ...]:
    """Layers that the teacher of stage I is averaged over."""
    return tuple(range(n_layers // 2, n_layers))
