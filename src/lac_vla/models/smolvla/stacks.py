"""The two stacks of a SmolVLA: the prefix, whose keys and values are cached, and the expert behind it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn
from transformers import LlamaModel

from lac_vla.models.llama import LlamaLayer, LlamaStack, rms_norm, rotate
from lac_vla.models.protocols import KeysValues, QueryRows, Rotary
from lac_vla.types import TokenLayout


def visible(layout: TokenLayout, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Let everything see cameras and text; the state, and the actions behind it, are seen by what follows them alone.

    Args:
        layout: Of the prompt; its last token is the state.
        queries: Positions, int64, (rows,).
        keys: Positions, int64, (slots,).

    Returns:
        bool, (rows, slots).
    """
    return (keys < layout.length - 1) | (keys <= queries[:, None])


class PrefixStack(LlamaStack):
    """Implements :class:`lac_vla.models.protocols.Decoder`: cameras and text see each other."""

    causal = False

    def visible(self, layout: TokenLayout, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """See :func:`visible`."""
        return visible(layout, queries, keys)


class CrossLayer(LlamaLayer):
    """A block whose rows attend to projections of the prefix's keys and values alone.

    Args:
        block: A ``LlamaDecoderLayer``; its ``k_proj`` and ``v_proj`` take keys and values of all heads.
        head_dim: Width of a head.
        rotary: Number of rows → their position embedding, counted within their chunk.
    """

    def __init__(self, block: nn.Module, head_dim: int, rotary: Callable[[int], Rotary]) -> None:
        super().__init__(block, head_dim)
        self._rotary = rotary

    def qkv(
        self, hidden: torch.Tensor, rotary: Rotary, query_rows: QueryRows | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Make the queries, rotated by the rows' places in their chunk; keys and values are of no rows."""
        rows = slice(None) if query_rows is None else query_rows
        cos, sin = self._rotary(hidden.shape[-2])
        queries = self._heads(self._queries(rms_norm(hidden[..., rows, :], self._norm_in)))
        return rotate(queries, (cos[rows], sin[rows])), queries[..., :0, :], queries[..., :0, :]

    def project(self, keys: torch.Tensor, values: torch.Tensor) -> KeysValues:
        """Project the prefix's rotated keys and its values, each (..., kv_heads, slots, head_dim) → the same.

        In training the prefix may have been multiplied in another dtype.
        """
        keys, values = (part.transpose(-3, -2).flatten(-2).to(self._keys.weight.dtype) for part in (keys, values))
        return self._heads(self._keys(keys)), self._heads(self._values(values))


class ExpertStack(LlamaStack):
    """Implements :class:`lac_vla.models.protocols.DecoderStack`: self-attention behind the prefix, and to it.

    Args:
        model: The blocks.
        cross: Which of them are cross-attention.
        horizon: Rows of a chunk: they are run whole, one chunk behind the other.
    """

    def __init__(self, model: LlamaModel, cross: frozenset[int], horizon: int) -> None:
        super().__init__(model)
        self._horizon = horizon
        self._rotaries: dict[tuple[int, torch.dtype, torch.device], Rotary] = {}
        self.shape = replace(self.shape, cross=cross)
        self.cross_layers = {i: CrossLayer(model.layers[i], self.head_dim, self._within) for i in sorted(cross)}
        self.layers = tuple(self.cross_layers.get(i, layer) for i, layer in enumerate(self.layers))

    def visible(self, layout: TokenLayout, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """See :func:`visible`."""
        return visible(layout, queries, keys)

    def project(
        self, keys: Callable[[int], torch.Tensor], values: Callable[[int], torch.Tensor]
    ) -> dict[int, KeysValues]:
        """Project a prefix's keys and values for every layer of cross-attention: once for all runs of a frame."""
        return {i: layer.project(keys(i), values(i)) for i, layer in self.cross_layers.items()}

    def _within(self, n_rows: int) -> Rotary:
        """Make the position embedding of the rows of whole chunks, each counted from 0."""
        key = n_rows, self.dtype, self.device
        if key not in self._rotaries:
            with torch.inference_mode(False):  # kept: a loss may want it, too
                self._rotaries[key] = self.rotary(torch.arange(n_rows, device=self.device) % self._horizon)
        return self._rotaries[key]
