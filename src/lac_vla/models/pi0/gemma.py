"""Gemma blocks as ``DecoderLayer``s: PaliGemma's prefix, and an action expert over the same keys and values.

Norms multiply by 1 + weight; those of π0.5's expert take scale, shift and a gate from the time instead (adaRMS).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from transformers import GemmaConfig as HFGemmaConfig
from transformers.models.gemma.modeling_gemma import GemmaDecoderLayer, GemmaRMSNorm

from lac_vla.errors import CheckpointError
from lac_vla.models.llama import make_rotary, rotate
from lac_vla.models.protocols import DecoderShape, QueryRows, Rotary
from lac_vla.transfer import upload_ids
from lac_vla.types import TokenLayout

THETA, EPS = 10000.0, 1e-6


@dataclass(frozen=True)
class GemmaConfig:
    """A stack of Gemma blocks.

    Attributes:
        width: Of the residual stream.
        depth: Blocks.
        mlp_width: Of the gated feed-forward network.
        heads: Query heads.
        kv_heads: Key/value heads.
        head_dim: Width of a head.

    Raises:
        CheckpointError: If the heads do not fit together.
    """

    width: int
    depth: int
    mlp_width: int
    heads: int = 8
    kv_heads: int = 1
    head_dim: int = 256

    def __post_init__(self) -> None:
        """Check the heads."""
        if min(self.depth, self.heads, self.kv_heads) < 1 or self.heads % self.kv_heads or self.head_dim % 2:
            raise CheckpointError(f"Gemma blocks cannot have {self}")

    @property
    def shape(self) -> DecoderShape:
        """Sizes as the engine counts them."""
        kv_width, q_width = self.kv_heads * self.head_dim, self.heads * self.head_dim
        return DecoderShape(self.depth, self.width, kv_width, self.mlp_width, q_width)


class AdaptiveNorm(nn.Module):
    """The weights of a norm whose scale, shift and gate are linear in a condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, 3 * width)


class GemmaStack(nn.Module):
    """The weights of a stack: transformers' Gemma blocks, and the norm behind them.

    Args:
        config: Its shape.
        adaptive: Whether its norms are conditioned.
        vocab_size: Rows of the embedding; 0 for none.
    """

    def __init__(self, config: GemmaConfig, *, adaptive: bool = False, vocab_size: int = 0) -> None:
        super().__init__()
        self.config = config
        own = HFGemmaConfig(
            vocab_size=vocab_size or 256,
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.depth,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_dim,
            hidden_act="gelu_pytorch_tanh",
            hidden_activation="gelu_pytorch_tanh",
            rms_norm_eps=EPS,
            attention_bias=False,
        )
        self.layers = nn.ModuleList(GemmaDecoderLayer(own, index) for index in range(config.depth))
        self.norm: nn.Module = GemmaRMSNorm(config.width, eps=EPS)
        if adaptive:
            for layer in cast(Any, self.layers):
                layer.input_layernorm = AdaptiveNorm(config.width)
                layer.post_attention_layernorm = AdaptiveNorm(config.width)
            self.norm = AdaptiveNorm(config.width)
        if vocab_size:
            self.embed_tokens = nn.Embedding(vocab_size, config.width)

    @property
    def norms(self) -> list[nn.Module]:
        """All norms in order: two of every block, and the last."""
        pairs = ((layer.input_layernorm, layer.post_attention_layernorm) for layer in cast(Any, self.layers))
        return [norm for pair in pairs for norm in pair] + [self.norm]


class Norm(Protocol):
    """A norm before a branch of a block, and what weighs the branch when it is added."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise (..., width)."""
        ...

    def gate(self, branch: torch.Tensor) -> torch.Tensor:
        """Weigh the branch's output, (..., width)."""
        ...


@dataclass(frozen=True, eq=False)
class PlainNorm:
    """Gemma's norm, which multiplies by 1 + weight; in the precision of the weight."""

    module: Any

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise (..., width)."""
        weight = self.module.weight
        return F.rms_norm(x.to(weight.dtype), weight.shape, 1.0 + weight, EPS).to(x.dtype)

    def gate(self, branch: torch.Tensor) -> torch.Tensor:
        """Leave the branch as it is."""
        return branch


@dataclass(frozen=True, eq=False)
class ModulatedNorm:
    """An adaptive norm at a given condition.

    Attributes:
        scale: (width,), or (B, 1, width); its precision is the norm's.
        shift: As ``scale``.
        weigh: The gate, as ``scale``.
    """

    scale: torch.Tensor
    shift: torch.Tensor
    weigh: torch.Tensor

    @classmethod
    def of(cls, norm: AdaptiveNorm, condition: torch.Tensor) -> ModulatedNorm:
        """Modulate by a condition, (..., width)."""
        return cls(*norm.dense(condition).chunk(3, dim=-1))

    def __getitem__(self, index: int) -> ModulatedNorm:
        """Take one of several conditions."""
        return ModulatedNorm(self.scale[index], self.shift[index], self.weigh[index])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise (..., width)."""
        normed = F.rms_norm(x.to(self.scale.dtype), x.shape[-1:], None, EPS)
        return (normed * (1.0 + self.scale) + self.shift).to(x.dtype)

    def gate(self, branch: torch.Tensor) -> torch.Tensor:
        """Weigh the branch."""
        return (branch * self.weigh).to(branch.dtype)


class GemmaLayer:
    """A Gemma block as a :class:`lac_vla.models.protocols.DecoderLayer`; no weights of its own.

    Args:
        block: A ``GemmaDecoderLayer``.
        head_dim: Width of a head.
        norm_in: The norm before the attention.
        norm_out: The norm before the feed-forward network.
    """

    def __init__(self, block: nn.Module, head_dim: int, norm_in: Norm, norm_out: Norm) -> None:
        parts = cast(Any, block)
        attention = parts.self_attn
        self._queries, self._keys, self._values = attention.q_proj, attention.k_proj, attention.v_proj
        self._out, self._mlp = attention.o_proj, parts.mlp
        self._norm_in, self._norm_out, self._head_dim = norm_in, norm_out, head_dim

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(*x.shape[:-1], x.shape[-1] // self._head_dim, self._head_dim).transpose(-3, -2)

    def qkv(
        self, hidden: torch.Tensor, rotary: Rotary, query_rows: QueryRows | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Normalise and project rows; see :meth:`lac_vla.models.protocols.DecoderLayer.qkv`."""
        normed = self._norm_in(hidden)
        keys, values = rotate(self._heads(self._keys(normed)), rotary), self._heads(self._values(normed))
        if query_rows is not None:
            cos, sin = rotary
            normed, rotary = normed[..., query_rows, :], (cos[..., query_rows, :], sin[..., query_rows, :])
        return rotate(self._heads(self._queries(normed)), rotary), keys, values

    def finish(self, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Run what follows the attention; see :meth:`lac_vla.models.protocols.DecoderLayer.finish`."""
        hidden = hidden + self._norm_in.gate(self._out(attended.transpose(-3, -2).flatten(-2)))
        return hidden + self._norm_out.gate(self._mlp(self._norm_out(hidden)))


class GemmaBlocks:
    """Implements :class:`lac_vla.models.protocols.DecoderStack` over a stack, at one condition if it has any.

    Args:
        stack: The weights.
        norms: One for each of its norms; ``None`` for the plain ones.

    Attributes:
        layers: The blocks.
        shape: Their sizes.
    """

    def __init__(self, stack: GemmaStack, norms: Sequence[Norm] | None = None) -> None:
        config = stack.config
        own = [PlainNorm(norm) for norm in stack.norms] if norms is None else norms
        self.shape, self._head_dim = config.shape, config.head_dim
        self.layers = tuple(
            GemmaLayer(block, config.head_dim, norm_in, norm_out)
            for block, norm_in, norm_out in zip(stack.layers, own[:-1:2], own[1::2], strict=True)
        )
        self._norm, self._stack = own[-1], stack

    @property
    def weight(self) -> torch.Tensor:
        """A matrix of the first block: it tells device and type."""
        weight: torch.Tensor = cast(Any, self._stack.layers[0]).self_attn.q_proj.weight
        return weight

    def rotary(self, positions: torch.Tensor) -> Rotary:
        """Make the position embedding of int64 positions, (rows,)."""
        return make_rotary(positions, self._head_dim, THETA, self.weight.dtype)

    def norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """Run the final normalisation."""
        return self._norm(hidden)

    def visible(self, layout: TokenLayout, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor | None:
        """Let every position see every other, without a mask."""
        return None


class GemmaDecoder(GemmaBlocks):
    """Implements :class:`lac_vla.models.protocols.Decoder`: a prefix whose tokens all see each other.

    Attributes:
        kv_heads: Key/value heads of a block.
        head_dim: Width of a head.
        causal: Never.
    """

    causal = False

    def __init__(self, stack: GemmaStack) -> None:
        super().__init__(stack)
        self.kv_heads, self.head_dim = stack.config.kv_heads, stack.config.head_dim

    @property
    def device(self) -> torch.device:
        """The device that the model is on."""
        return self.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the hidden states."""
        return self.weight.dtype

    def embed(self, ids: Sequence[int]) -> torch.Tensor:
        """Embed token ids, times the root of the width: (n,) → (n, width)."""
        rows = self._stack.embed_tokens(upload_ids(ids, self.device))
        return cast(torch.Tensor, rows * self.shape.width**0.5)


class StateFirst(GemmaBlocks):
    """An expert whose first row, the state, sees the prompt and itself; the others see each other, too."""

    def visible(self, layout: TokenLayout, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Hide the actions from the state: (rows,) and (slots,) → bool, (rows, slots)."""
        return (keys <= layout.length)[None, :] | (queries > layout.length)[:, None]
