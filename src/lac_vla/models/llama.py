"""A Hugging Face ``LlamaForCausalLM``, cut into the ``DecoderLayer``s that the engine runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from lac_vla.checks import shortened
from lac_vla.errors import CheckpointError, InputError
from lac_vla.models.protocols import DecoderShape, QueryRows, Rotary
from lac_vla.transfer import upload_ids
from lac_vla.types import TokenLayout


def build_llama(text_config: Mapping[str, Any]) -> LlamaForCausalLM:
    """Make a language model (on the current default device) from ``LlamaConfig``'s arguments.

    Raises:
        CheckpointError: If there is no such language model.
    """
    arguments = {key: value for key, value in text_config.items() if key != "model_type"}
    try:
        return LlamaForCausalLM(LlamaConfig(**arguments))
    except Exception as error:  # several kinds, of transformers, huggingface_hub and torch
        raise CheckpointError(f"text_config describes no Llama that can be built: {shortened(error)}") from error


def reset_rotary(model: LlamaForCausalLM | LlamaModel, device: torch.device) -> None:
    """Compute the rotary frequencies anew, float32, on ``device``: a model from ``meta`` has none."""
    inner = getattr(model, "model", model)
    inner.rotary_emb = type(inner.rotary_emb)(config=model.config).to(device)


def rotate(x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Rotate queries or keys, (..., heads, rows, head_dim), by their positions (half-split convention)."""
    cos, sin = rotary
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def make_rotary(positions: torch.Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Rotary:
    """Make the factors of :func:`rotate`, each (rows, head_dim), of int64 positions (rows,); computed in float32."""
    exponent = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    angle = positions.float()[:, None] * (1.0 / theta**exponent)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rms_norm(x: torch.Tensor, module: Any) -> torch.Tensor:
    """Run a ``LlamaRMSNorm`` by torch's own kernel: one call in place of six, the same but for rounding."""
    return F.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)


BLOCK = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
"""The parts of a block that is run here; one that has more (Qwen3 normalises its queries) is refused."""


class LlamaLayer:
    """A Hugging Face Llama or Qwen2 block as a :class:`lac_vla.models.protocols.DecoderLayer`; no weights of its own.

    Both methods also take leading batch dimensions.

    Args:
        block: A ``LlamaDecoderLayer``.
        head_dim: Width of a head.

    Raises:
        InputError: If the block has further parts.
    """

    def __init__(self, block: nn.Module, head_dim: int) -> None:
        parts = cast(Any, block)
        attention = parts.self_attn
        for module, known in ((block, BLOCK), (attention, ATTENTION)):
            if more := {name for name, _ in module.named_children()} - known:
                raise InputError(f"{type(module).__name__} has {sorted(more)}, which this decoder would leave out")
        self._queries, self._keys, self._values = attention.q_proj, attention.k_proj, attention.v_proj
        self._out = attention.o_proj
        self._mlp = parts.mlp
        self._norm_in = parts.input_layernorm
        self._norm_out = parts.post_attention_layernorm
        self._head_dim = head_dim

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(*x.shape[:-1], x.shape[-1] // self._head_dim, self._head_dim).transpose(-3, -2)

    def qkv(
        self, hidden: torch.Tensor, rotary: Rotary, query_rows: QueryRows | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Normalise and project rows; see :meth:`lac_vla.models.protocols.DecoderLayer.qkv`."""
        normed = rms_norm(hidden, self._norm_in)
        keys, values = rotate(self._heads(self._keys(normed)), rotary), self._heads(self._values(normed))
        if query_rows is not None:
            cos, sin = rotary
            normed, rotary = normed[..., query_rows, :], (cos[..., query_rows, :], sin[..., query_rows, :])
        return rotate(self._heads(self._queries(normed)), rotary), keys, values

    def finish(self, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Run what follows the attention; see :meth:`lac_vla.models.protocols.DecoderLayer.finish`."""
        hidden = hidden + self._out(attended.transpose(-3, -2).flatten(-2))
        return cast(torch.Tensor, hidden + self._mlp(rms_norm(hidden, self._norm_out)))


class LlamaStack:
    """Implements :class:`lac_vla.models.protocols.Decoder` over the blocks of a language model, without its head.

    Args:
        model: The blocks, embedding and final normalisation.

    Attributes:
        layers: The decoder blocks.
        shape: Their sizes.
        kv_heads: Key/value heads of a block.
        head_dim: Width of a head.
        causal: Always.
    """

    causal: bool = True

    def __init__(self, model: LlamaModel) -> None:
        config = model.config
        self._blocks = model
        if getattr(config, "use_sliding_window", False):
            raise InputError("a decoder with sliding windows cannot be run: every row must see the whole prompt")
        width = getattr(config, "head_dim", None)  # Qwen2's configurations have none
        self.head_dim: int = width or config.hidden_size // config.num_attention_heads
        self.kv_heads: int = config.num_key_value_heads or config.num_attention_heads
        self.shape = DecoderShape(
            layers=int(config.num_hidden_layers),
            width=int(config.hidden_size),
            kv_width=self.kv_heads * self.head_dim,
            ffn=int(config.intermediate_size),
            q_width=int(config.num_attention_heads) * self.head_dim,
        )
        self.layers = tuple(LlamaLayer(block, self.head_dim) for block in model.layers)

    @property
    def device(self) -> torch.device:
        """The device that the model is on."""
        device: torch.device = self._blocks.norm.weight.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the hidden states."""
        dtype: torch.dtype = self._blocks.norm.weight.dtype
        return dtype

    def visible(self, layout: TokenLayout, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor | None:
        """Let every position see itself and what is before it: (rows,) and (slots,) → bool, (rows, slots)."""
        return keys[None, :] <= queries[:, None]

    def rotary(self, positions: torch.Tensor) -> Rotary:
        """Make the factors of :func:`rotate`, each (rows, head_dim), of int64 positions (rows,).

        The sine of the first half is negative: so a rotation needs no negated copy.
        """
        like = self._blocks.norm.weight[:0].detach()
        cos, sin = self._blocks.rotary_emb(like, positions[None])
        half = self.head_dim // 2
        return cos[0], torch.cat((-sin[0, :, :half], sin[0, :, half:]), dim=-1)

    def norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """Run the final normalisation."""
        return rms_norm(hidden, self._blocks.norm)

    def embed(self, ids: torch.Tensor | Sequence[int]) -> torch.Tensor:
        """Embed token ids: (...) → (..., width)."""
        return cast(torch.Tensor, self._blocks.embed_tokens(upload_ids(ids, self.device)))


class LlamaDecoder(LlamaStack):
    """Is a :class:`LlamaStack` with the language model's head.

    Args:
        model: The language model: a ``LlamaForCausalLM``, or one of the same parts, as ``Qwen2ForCausalLM`` is.
    """

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__(model.model)
        self._model = model

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Score all tokens: (..., width) → (..., vocabulary)."""
        return cast(torch.Tensor, self._model.lm_head(hidden))


class BidirectionalLlamaDecoder(LlamaDecoder):
    """A language model all of whose tokens see each other; there is never a mask.

    Attributes:
        causal: Never.
    """

    causal = False

    def visible(self, layout: TokenLayout, queries: torch.Tensor, keys: torch.Tensor) -> None:
        """Let every position see all others."""
