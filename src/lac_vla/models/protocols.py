"""The four parts of a VLA: processor, vision encoder, decoder, action head. A family builds them; nothing is patched.

frame → Processor → images, prompt            (on the host)
images → VisionEncoder → visual tokens
prompt, visual tokens → Decoder → hidden states, keys and values
hidden states, or keys and values → ActionHead → actions
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch

from lac_vla.types import BoolArray, FloatArray, Frame, TokenLayout, UInt8Image

KeysValues: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""Keys and values, each (..., kv_heads, slots, head_dim)."""
Rotary: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""Cosine and sine, each (rows, head_dim), signed and ordered as the model's own layers take them."""
QueryRows: TypeAlias = slice | torch.Tensor
"""The rows of a run that have queries: a slice, or their indices, int64."""


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a stack of Llama-like blocks.

    Attributes:
        layers: Blocks.
        width: D, of the residual stream.
        kv_width: D_kv, of the keys (kv_heads · head_dim).
        ffn: M, of the gated feed-forward network.
        q_width: D_q, of the queries (heads · head_dim); 0 for D.
        cross: Layers without keys and values of their own, see :attr:`DecoderStack.layers`.
    """

    layers: int
    width: int
    kv_width: int
    ffn: int
    q_width: int = 0
    cross: frozenset[int] = frozenset()

    @property
    def queries(self) -> int:
        """Width of the queries, D_q."""
        return self.q_width or self.width


class DecoderLayer(Protocol):
    """One decoder block, cut where the cache comes in: between the projections and the attention.

    Leading batch dimensions are allowed everywhere.
    """

    def qkv(
        self, hidden: torch.Tensor, rotary: Rotary, query_rows: QueryRows | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Normalise and project rows.

        Args:
            hidden: Residual stream of the rows, (rows, width).
            rotary: Position embedding of the rows.
            query_rows: Rows that need queries at all; ``None`` for every row.

        Returns:
            Queries (heads, query rows, head_dim), keys and values (kv_heads, rows, head_dim); queries and keys
            rotated. A layer of cross-attention has no own keys and values: they are of no rows.
        """
        ...

    def finish(self, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Run output projection, residual and feed-forward.

        Args:
            hidden: The rows of :meth:`qkv` that have queries, (rows, width).
            attended: Attention output, (heads, rows, head_dim).

        Returns:
            The rows' new residual stream, (rows, width).
        """
        ...


class DecoderStack(Protocol):
    """Blocks that run one after the other over the same rows: the decoder's own, or those of an action expert.

    Attributes:
        layers: The blocks. Some of an expert's may be cross-attention: whoever appends rows gives these the keys and
            values that they attend to (:attr:`lac_vla.models.heads.base.AppendRows.cross`).
        shape: Their sizes.
    """

    @property
    def layers(self) -> Sequence[DecoderLayer]: ...  # noqa: D102
    @property
    def shape(self) -> DecoderShape: ...  # noqa: D102

    def rotary(self, positions: torch.Tensor) -> Rotary:
        """Make the position embedding of sequence positions, int64, (rows,)."""
        ...

    def norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """Run the final normalisation."""
        ...

    def visible(self, layout: TokenLayout, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor | None:
        """Tell which key positions a query position may attend to.

        Args:
            layout: Of the prompt.
            queries: Positions, int64, (rows,).
            keys: Positions, int64, (slots,).

        Returns:
            bool, (rows, slots); ``None`` where every row sees every slot, so that the attention needs no mask.
        """
        ...


class Decoder(DecoderStack, Protocol):
    """The language model, whose keys and values are cached.

    Attributes:
        kv_heads: Key/value heads of a block.
        head_dim: Width of a head.
        device: Where it lives.
        dtype: Of its hidden states.
        causal: Whether every token sees just the tokens up to itself. If not, the visual tokens' keys and values
            depend on the text behind them, and a new instruction drops the cache.
    """

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


class VisionKVCache(Protocol):
    """Keys and values that a vision encoder keeps from one frame to the next; its content is the encoder's own."""

    @property
    def nbytes(self) -> int:
        """Memory that it takes, bytes."""
        ...


@dataclass(frozen=True, eq=False)
class PromptInputs:
    """A frame's instruction and state as the model takes them, on the host.

    Attributes:
        ids: Token ids of the whole prompt, without the visual tokens.
        state: Normalised proprioception, float32, (proprio_dim,); ``None`` if the model takes none.
        layout: Where the tokens are.
    """

    ids: Sequence[int]
    state: FloatArray | None
    layout: TokenLayout


class Processor(Protocol):
    """Turns a frame into what the model takes, and checks it. One that inherits this takes no state by default.

    Attributes:
        grids: Camera → (rows, cols) of its visual tokens, in token order.
        state_dim: Values of the proprioception that it takes; ``None`` for none.
    """

    @property
    @abstractmethod
    def grids(self) -> Mapping[str, tuple[int, int]]: ...  # noqa: D102
    @property
    def state_dim(self) -> int | None:  # noqa: D102
        return None

    @abstractmethod
    def images(self, frame: Frame) -> dict[str, UInt8Image]:
        """Crop and resize the cameras' images to the model's size (geometry only), uint8, H×W×3.

        Raises:
            InputError: If a camera is missing.
        """
        ...

    @abstractmethod
    def prompt(self, frame: Frame) -> PromptInputs:
        """Tokenise the instruction and normalise the state.

        Raises:
            InputError: If the state is missing or of another length, or the instruction is too long.
        """
        ...

    @abstractmethod
    def embed(self, prompt: PromptInputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Embed the tokens before and behind the visual ones: (n_prefix, width) and (n_suffix, width)."""
        ...


class VisionEncoder(Protocol):
    """Turns the cameras' images into visual tokens.

    One that inherits this needs :meth:`encode_tokens` alone: then the stem is the images, features are projected
    already, and no attention is cached. One whose stem is made camera by camera also has ``split_stem`` and
    ``join_stem`` (:class:`SplitsStems`): the stem of a picture that has not changed is not made again.
    """

    def kv_cache(self) -> VisionKVCache | None:
        """Make an empty cache for a session's frames; ``None`` if the encoder has no attention to cache."""
        return None

    def encode_stem(self, frame: Frame, images: Mapping[str, UInt8Image], kv_cache: Any = None) -> Any:
        """Compute what does not depend on which tokens matter.

        Args:
            frame: The observation, for encoders that resize by themselves.
            images: See :meth:`Processor.images`; where stems can be split, perhaps of some cameras alone.
            kv_cache: What :meth:`encode_tokens` will be given.

        Returns:
            For :meth:`encode_tokens`.
        """
        return images

    def encode_stems(self, frames: Sequence[Frame], images: Sequence[Mapping[str, UInt8Image]]) -> Sequence[Any]:
        """Compute the stems of several frames at once, as :meth:`encode_stem` does one by one without a cache."""
        return [self.encode_stem(frame, shown) for frame, shown in zip(frames, images, strict=True)]

    @abstractmethod
    def encode_tokens(self, stem: Any, token_mask: BoolArray | None = None, kv_cache: Any = None) -> torch.Tensor:
        """Compute the features of some visual tokens.

        Args:
            stem: From :meth:`encode_stem`.
            token_mask: Which tokens, bool, (N,); ``None`` for all. Work that only the others need is left out.
            kv_cache: From :meth:`kv_cache`: these tokens alone are computed, over the cached keys and values of the
                others. ``None``: the features do not depend on what else is computed.

        Returns:
            (n, features).
        """
        ...

    def encode_tokens_of(self, stems: Sequence[Any], token_masks: Sequence[BoolArray]) -> list[torch.Tensor]:
        """Compute the features of tokens of several frames, as :meth:`encode_tokens` does without a cache."""
        return [self.encode_tokens(stem, mask) for stem, mask in zip(stems, token_masks, strict=True)]

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """Project features row by row: (n, features) → (n, width)."""
        return features


class StaticVision(VisionEncoder):
    """Takes part in CUDA graphs: its stem is a function of tensors of the same shapes in every frame.

    So are :meth:`VisionEncoder.project` and, with a cache, what :meth:`VisionEncoder.encode_tokens` has run over it by
    :meth:`lac_vla.models.transformer.ImageKVCache.run`.
    """

    @abstractmethod
    def inputs(self, frames: Sequence[Frame], images: Sequence[Mapping[str, UInt8Image]]) -> Sequence[torch.Tensor]:
        """Bring to the device, without waiting, what the stem of some frames is made of."""

    @abstractmethod
    def stem(self, *inputs: torch.Tensor, whole: bool) -> Any:
        """Compute the stem of one frame on the device, as tensors.

        Args:
            inputs: From :meth:`inputs`.
            whole: Run the blocks of transformers, too: without a cache, they need all patches in any case.
        """

    def encode_stem(self, frame: Frame, images: Mapping[str, UInt8Image], kv_cache: Any = None) -> Any:
        """Compute what does not depend on which tokens matter; see :meth:`VisionEncoder.encode_stem`."""
        return self.stem(*self.inputs([frame], [images]), whole=kv_cache is None)


@runtime_checkable
class SplitsStems(Protocol):
    """A vision encoder whose stem is made camera by camera: a camera's part depends on its picture and the instruction.

    A part is a tensor, or tensors in lists and tuples.
    """

    def split_stem(self, stem: Any) -> Sequence[Any]:
        """Take a stem of :meth:`VisionEncoder.encode_stem` apart: a part for each of its cameras, in order."""
        ...

    def join_stem(self, parts: Sequence[Any]) -> Any:
        """Put the parts of all cameras together, for :meth:`VisionEncoder.encode_tokens`."""
        ...
