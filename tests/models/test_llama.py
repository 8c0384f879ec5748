"""The cut decoder layers against Hugging Face's own forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from lac_vla import InputError
from lac_vla.models.llama import LlamaDecoder, build_llama, reset_rotary, rms_norm

CONFIG = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 64,
}


def decoder(**config: Any) -> tuple[Any, LlamaDecoder]:
    """A small random language model and its cut."""
    torch.manual_seed(0)
    model = build_llama(CONFIG | config).eval()
    return model, LlamaDecoder(model)


def run(cut: LlamaDecoder, hidden: torch.Tensor) -> torch.Tensor:
    """All layers with plain causal attention; hidden is (..., rows, width)."""
    rotary = cut.rotary(torch.arange(hidden.shape[-2]))
    for layer in cut.layers:
        queries, keys, values = layer.qkv(hidden, rotary)
        attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
        hidden = layer.finish(hidden, attended)
    return cut.norm(hidden)


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_key_value_heads": 2},
        {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
        {"head_dim": 16},
    ],
)
def test_layers_equal_hugging_face(config: dict[str, Any]) -> None:
    model, cut = decoder(**config)
    embeddings = torch.randn(2, 17, 32)
    expected = model.model(inputs_embeds=embeddings).last_hidden_state
    torch.testing.assert_close(run(cut, embeddings), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(run(cut, embeddings[1]), expected[1], rtol=1e-5, atol=1e-5)
    assert cut.layers[0].qkv(embeddings[0], cut.rotary(torch.arange(17)))[1].shape == (
        cut.kv_heads,
        17,
        cut.head_dim,
    )


@torch.no_grad()
def test_qwen2_is_one_of_the_same_parts_and_qwen3_is_not() -> None:
    torch.manual_seed(0)
    sizes = {**CONFIG, "num_key_value_heads": 2}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes)).eval()
    for weight in model.parameters():  # its biases begin as zeros
        weight.normal_(0, 0.2)
    embeddings = torch.randn(2, 17, 32)
    expected = model.model(inputs_embeds=embeddings).last_hidden_state
    torch.testing.assert_close(run(LlamaDecoder(model), embeddings), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match=r"Qwen3Attention has .*k_norm"):
        LlamaDecoder(Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=8)))
    with pytest.raises(InputError, match="sliding windows"):
        LlamaDecoder(Qwen2ForCausalLM(Qwen2Config(**sizes, use_sliding_window=True)))


@torch.no_grad()
def test_rows_without_queries_leave_keys_and_values() -> None:
    _, cut = decoder(num_key_value_heads=2)
    rotary = cut.rotary(torch.arange(17))
    for hidden in (torch.randn(17, 32), torch.randn(2, 17, 32)):
        queries, keys, values = cut.layers[1].qkv(hidden, rotary)
        for rows in (slice(14, 17), torch.tensor([3, 4, 16]), slice(17, 17)):
            some = cut.layers[1].qkv(hidden, rotary, rows)
            torch.testing.assert_close(some, (queries[..., rows, :], keys, values))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_equals_hugging_face(dtype: torch.dtype) -> None:
    model, _ = decoder()
    norm = model.model.norm.to(dtype)
    norm.weight.copy_(torch.randn(32))
    x = (3 * torch.randn(17, 32)).to(dtype)
    torch.testing.assert_close(rms_norm(x, norm), norm(x))


@torch.no_grad()
def test_embeddings_and_logits_equal_hugging_face() -> None:
    model, cut = decoder()
    ids = torch.tensor([3, 1, 4, 1, 5])
    torch.testing.assert_close(cut.logits(run(cut, cut.embed(ids))), model(ids[None]).logits[0])


@torch.no_grad()
def test_rotary_takes_any_positions() -> None:
    _, cut = decoder()
    cos, sin = cut.rotary(torch.arange(300))
    some = torch.tensor([0, 299, 7])
    torch.testing.assert_close(cut.rotary(some), (cos[some], sin[some]))
    assert cos.shape == sin.shape == (300, cut.head_dim)


def test_rotary_survives_a_model_from_meta() -> None:
    model, cut = decoder()
    with torch.device("meta"):
        bare = build_llama(CONFIG)
    bare = bare.to(torch.bfloat16).to_empty(device="cpu")
    reset_rotary(bare, torch.device("cpu"))
    expected = cut.rotary(torch.arange(9))
    made = LlamaDecoder(bare).rotary(torch.arange(9))
    assert made[0].dtype == torch.bfloat16
    torch.testing.assert_close(made, tuple(x.to(torch.bfloat16) for x in expected), rtol=0, atol=0)
    assert model.model.rotary_emb.inv_freq.dtype == bare.model.rotary_emb.inv_freq.dtype == torch.float32
