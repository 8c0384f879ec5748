"""The baseline: the same weights as the stock ``transformers`` code runs them, without our engine."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import numpy as np
import torch

from lac_vla.cost import one_by_one
from lac_vla.engine.step_info import StepInfo
from lac_vla.errors import InputError
from lac_vla.models import VLA
from lac_vla.models.heads.base import HeadContext, alone
from lac_vla.models.heads.tokens import TokenHead
from lac_vla.session import head_rng
from lac_vla.timing import Stopwatch
from lac_vla.types import Decision, FloatArray, Frame, TokenLayout

STOCK = "dense stock"
"""Name of the baseline in results and tables."""


@contextmanager
def torchs_attention() -> Iterator[None]:
    """Let torch choose cuDNN's attention, as it does by default and an engine on a GPU does not; process-wide."""
    before = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def dense_info(layout: TokenLayout, n_layers: int, **told: Any) -> StepInfo:
    """Report a frame of a baseline, which computes everything; ``told`` are further fields of the report."""
    n = layout.n_visual
    return StepInfo(
        layout=layout,
        decision=Decision.dense(n, n_layers),
        forced=np.zeros(n, dtype=np.bool_),
        age=np.zeros(n, dtype=np.int64),
        **told,
    )


@torchs_attention()
def stock_prefill(model: VLA, embeddings: torch.Tensor) -> Any:
    """Run ``LlamaModel`` over a prompt, (length, width), with the ``DynamicCache`` that decoding needs afterwards.

    Of a model whose tokens all see each other, with a mask that hides nothing: without one, stock Llama is causal.
    """
    length = len(embeddings)
    mask = None if model.decoder.causal else embeddings.new_zeros(1, 1, length, length)
    return language_model(model).model(inputs_embeds=embeddings[None], attention_mask=mask, use_cache=True)


def has_stock(model: VLA) -> bool:
    """Tell if ``transformers`` alone runs the model up to its head: not where an expert reads keys and values."""
    return model.head.reads == "hidden" and hasattr(model.module, "language_model")


def language_model(model: VLA) -> Any:
    """Get the ``LlamaForCausalLM`` of a model."""
    return model.module.language_model


class StockSession:
    """A robot's session on the stock model: nothing is kept from one frame to the next.

    Tower, projector, then ``LlamaForCausalLM``: SDPA attention, a new ``DynamicCache`` per frame, logits of the
    last row alone, greedy tokens one by one. That is what ``generate`` does, without its own bookkeeping, which
    would add milliseconds to the baseline. The first token's logits count as prefill here, in the engine as
    decoding. Before another head the prompt goes through ``LlamaModel`` likewise; the head, no part of transformers,
    is ours.

    Args:
        model: The model.
        seed: Of what the action head leaves to chance: the same noise as in a session of this seed.

    Attributes:
        last_info: Report of the last frame.
    """

    described = "the same model through transformers' LlamaForCausalLM, SDPA, DynamicCache, greedy"

    def __init__(self, model: VLA, seed: int = 0) -> None:
        self.last_info: StepInfo | None = None
        self._model = model
        self._seed = seed
        self._rng = head_rng(seed)

    def reset(self) -> None:
        """Begin a new episode."""
        self.last_info = None
        self._rng = head_rng(self._seed)

    @torchs_attention()
    @torch.inference_mode()
    def act(self, frame: Frame) -> FloatArray:
        """Answer an observation with an action in the robot's own units, float32."""
        model = self._model
        clock = Stopwatch(model.device, events=True)
        with clock.stage("preprocess"):
            images, prompt = model.processor.images(frame), model.processor.prompt(frame)
        with clock.stage("tower"):
            features = model.vision.encode_tokens(model.vision.encode_stem(frame, images))
        with clock.stage("projector"):
            prefix, suffix = model.processor.embed(prompt)
            embeddings = torch.cat([prefix, model.vision.project(features), suffix])
        head = model.head
        if isinstance(head, TokenHead):
            action, metadata = self._decode(head, embeddings, clock)
        else:
            with clock.stage("prefill"):
                hidden = stock_prefill(model, embeddings).last_hidden_state[0]
            with clock.stage("decode"):
                decoding = alone(head.decode(HeadContext(frame, prompt.layout, hidden, _none, _none, self._rng)))
                try:
                    next(decoding)
                    raise InputError(f"{model.name} appends rows: it has no stock baseline to time against")
                except StopIteration as answer:
                    action, metadata = answer.value
        self.last_info = dense_info(
            prompt.layout,
            model.n_layers,
            dense_reason="stock model",
            stages=clock.stages,
            metadata=metadata,
            pixels=images,
            decode_passes=one_by_one(head.max_new_tokens),
        )
        return action

    def _decode(self, head: TokenHead, prompt: torch.Tensor, clock: Stopwatch) -> tuple[FloatArray, dict[str, Any]]:
        """Decode greedy action tokens."""
        stock = language_model(self._model)
        # transformers calls it so from 5.24 on; the older name goes in 5.40
        name = "cache" if "cache" in inspect.signature(stock.forward).parameters else "past_key_values"
        with clock.stage("prefill"):
            out = stock(inputs_embeds=prompt[None], use_cache=True, logits_to_keep=1)
        with clock.stage("decode"):
            chosen = [out.logits[:, -1].argmax(dim=-1)]
            while len(chosen) < head.max_new_tokens:
                cache = {name: out[name]}
                out = stock(input_ids=chosen[-1][None], **cache, use_cache=True, logits_to_keep=1)
                chosen.append(out.logits[:, -1].argmax(dim=-1))
            tokens = torch.cat(chosen).tolist()
            action = head.action_range.unnormalize(head.tokenizer.decode(tokens)).astype(np.float32)
        return action, {"tokens": tokens}


def _none(layer: int) -> NoReturn:
    raise InputError("a stock model's keys and values are not shown to heads")
