"""What the engine needs of a model: the ``Backbone`` protocol. An adapter wraps a model family; nothing is patched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch

from lac_vla.types import BoolArray, FloatArray, Frame, TokenLayout, UInt8Image

Rotary: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""Cosine and sine, each (rows, head_dim), signed and ordered as the model's own layers take them."""


class Extend(Protocol):
    """Runs tokens behind the prompt."""

    def __call__(self, embeddings: torch.Tensor, at: int | None = None) -> torch.Tensor:
        """Append tokens.

        Args:
            embeddings: (n, width).
            at: How many of the tokens appended before stay; the new ones take the place of the others. ``None``: all.

        Returns:
            Their last hidden states, (n, width).
        """
        ...


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a Llama-like decoder.

    Attributes:
        layers: Blocks.
        width: D, of the residual stream and of the queries.
        kv_width: D_kv, of the keys (kv_heads · head_dim).
        ffn: M, of the gated feed-forward network.
    """

    layers: int
    width: int
    kv_width: int
    ffn: int


class DecoderLayer(Protocol):
    """One decoder block, cut where the cache comes in: between the projections and the attention."""

    def qkv(
        self, hidden: torch.Tensor, rotary: Rotary, asking: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Normalise and project rows.

        Args:
            hidden: Residual stream of the rows, (rows, width).
            rotary: Position embedding of the rows.
            asking: How many rows, the last ones, need queries at all; ``None`` for every row.

        Returns:
            Queries (heads, asking, head_dim), keys and values (kv_heads, rows, head_dim); queries and keys rotated.
        """
        ...

    def finish(self, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Output projection, residual, feed-forward.

        Args:
            hidden: The rows of :meth:`qkv` that have queries, (rows, width).
            attended: Attention output, (heads, rows, head_dim).

        Returns:
            The rows' new residual stream, (rows, width).
        """
        ...


class TowerMemory(Protocol):
    """What a vision tower keeps from one frame to the next; its content is the backbone's own affair."""

    @property
    def nbytes(self) -> int:
        """Memory that it takes, bytes."""
        ...


class Backbone(Protocol):
    """A frozen VLA, seen by the engine. Batch size is one: one robot, one frame.

    Attributes:
        name: For tables and error messages.
        layers: The decoder blocks.
        shape: The decoder's sizes.
        kv_heads: Key/value heads of a block.
        head_dim: Width of a head.
        device: Where it lives.
        dtype: Of its hidden states.
        causal: Whether every token sees just the tokens up to itself. If not, the visual tokens' keys and values
            depend on the text behind them, and a new instruction drops the cache.
        max_new_tokens: How many tokens ``act`` appends at most.
        grids: Camera → (rows, cols) of its visual tokens, in token order.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def layers(self) -> Sequence[DecoderLayer]: ...  # noqa: D102
    @property
    def shape(self) -> DecoderShape: ...  # noqa: D102
    @property
    def kv_heads(self) -> int: ...  # noqa: D102
    @property
    def head_dim(self) -> int: ...  # noqa: D102
    @property
    def device(self) -> torch.device: ...  # noqa: D102
    @property
    def dtype(self) -> torch.dtype: ...  # noqa: D102
    @property
    def causal(self) -> bool: ...  # noqa: D102
    @property
    def max_new_tokens(self) -> int: ...  # noqa: D102
    @property
    def grids(self) -> Mapping[str, tuple[int, int]]: ...  # noqa: D102

    def pixels(self, frame: Frame) -> dict[str, UInt8Image]:
        """The cameras' images in the model's crop and size (geometry only), uint8, H×W×3; checks the cameras."""
        ...

    def layout(self, frame: Frame) -> TokenLayout:
        """Where the tokens of this frame's prompt are."""
        ...

    def tower_memory(self) -> TowerMemory | None:
        """An empty memory of a session's frames for :meth:`features`; ``None`` if the tower cannot have one."""
        ...

    def look(self, pixels: Mapping[str, UInt8Image], memory: Any = None) -> Any:
        """What the vision tower can compute before it is known which tokens matter.

        Args:
            pixels: See :meth:`pixels`.
            memory: What :meth:`features` will be given.

        Returns:
            For :meth:`features`.
        """
        ...

    def features(self, glance: Any, computed: BoolArray | None = None, memory: Any = None) -> torch.Tensor:
        """Vision tower: features of the visual tokens that are computed.

        Args:
            glance: From :meth:`look`.
            computed: Which, bool, (N,); ``None`` for all. A tower leaves out work that only the others need.
            memory: From :meth:`tower_memory`: the tower computes these tokens alone, over what it remembers of the
                others. ``None``: the features do not depend on what else is computed.

        Returns:
            (n, features).
        """
        ...

    def see(self, pixels: Mapping[str, UInt8Image]) -> torch.Tensor:
        """Vision tower: features of every visual token, (N, features)."""
        ...

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """Projector, row by row: (n, features) → (n, width)."""
        ...

    def prefix(self, frame: Frame) -> torch.Tensor:
        """Embeddings of the tokens before the visual ones, (n_prefix, width)."""
        ...

    def suffix(self, frame: Frame) -> torch.Tensor:
        """Embeddings of the tokens behind the visual ones: proprioception, text; (n_suffix, width)."""
        ...

    def rotary(self, positions: torch.Tensor) -> Rotary:
        """Position embedding of sequence positions, int64, (rows,)."""
        ...

    def norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """The decoder's final normalisation."""
        ...

    def visible(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Which key positions a query position may attend to.

        Args:
            queries: Positions, int64, (rows,).
            keys: Positions, int64, (slots,).

        Returns:
            bool, (rows, slots).
        """
        ...

    def draft(self, last: Mapping[str, Any]) -> torch.Tensor | None:
        """A guess at the tokens that :meth:`act` will append, to ride along in the prefill; asked if ``causal``.

        Args:
            last: What :meth:`act` recorded about the preceding action.

        Returns:
            Embeddings, (n, width), n < ``max_new_tokens``; ``None`` for a head that appends nothing.
        """
        ...

    def act(
        self,
        frame: Frame,
        hidden: torch.Tensor,
        extend: Extend,
        rng: np.random.Generator,
        last: Mapping[str, Any] | None = None,
    ) -> tuple[FloatArray, dict[str, Any]]:
        """Turn the prompt's last hidden states into an action.

        Args:
            frame: The observation (its images are no longer needed).
            hidden: Normalised last hidden states of the suffix, and of the draft behind it, (n_suffix + draft, width).
            extend: Appends tokens to the sequence (autoregressive decoding).
            rng: The session's generator for actions that are sampled: the only source of chance.
            last: What the draft was made of; ``None`` if there is none. It never changes the action.

        Returns:
            The action in the robot's own units, float32, (action_dim,) or (horizon, action_dim); and what is worth
            recording about it (token ids, …).
        """
        ...
