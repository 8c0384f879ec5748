"""The baseline: the same weights as the stock ``transformers`` code runs them, without our engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from lac_vla.cost import one_by_one
from lac_vla.models import PrismaticBackbone
from lac_vla.timing import Stopwatch
from lac_vla.types import Decision, FloatArray, Frame
from lac_vla.vla import Step

STOCK = "dense stock"
"""Name of the baseline in results and tables."""


def stock_prefill(backbone: PrismaticBackbone, embeddings: torch.Tensor) -> Any:
    """``LlamaModel``'s forward pass over a prompt, with the ``DynamicCache`` that decoding needs afterwards.

    Args:
        backbone: The model.
        embeddings: Of the whole prompt, (length, width).

    Returns:
        ``BaseModelOutputWithPast``.
    """
    return backbone.model.language_model.model(inputs_embeds=embeddings[None], use_cache=True)


class StockSession:
    """A robot's session on the stock model: nothing is kept from one frame to the next.

    Tower, projector, then ``LlamaForCausalLM``: SDPA attention, a new ``DynamicCache`` per frame, logits of the
    last row alone, greedy tokens one by one. That is what ``generate`` does, without its own bookkeeping, which
    would add milliseconds to the baseline. The first token's logits count as prefill here, in the engine as
    decoding.

    Args:
        backbone: The model.

    Attributes:
        last: What the last call of :meth:`act` did, as a :class:`lac_vla.vla.Step`.
    """

    def __init__(self, backbone: PrismaticBackbone) -> None:
        self.last: Step | None = None
        self._backbone = backbone

    def reset(self) -> None:
        """Begin a new episode."""
        self.last = None

    @torch.inference_mode()
    def act(self, frame: Frame) -> FloatArray:
        """Answer an observation with an action in the robot's own units, float32."""
        backbone = self._backbone
        clock = Stopwatch(backbone.device)
        with clock.stage("preprocess"):
            pixels = backbone.pixels(frame)
            layout = backbone.layout(frame)
            prefix, suffix = backbone.prefix(frame), backbone.suffix(frame)
        with clock.stage("tower"):
            features = backbone.see(pixels)
        with clock.stage("projector"):
            prompt = torch.cat([prefix, backbone.project(features), suffix])
        model = backbone.model.language_model
        with clock.stage("prefill"):
            out = model(inputs_embeds=prompt[None], use_cache=True, logits_to_keep=1)
        with clock.stage("decode"):
            chosen = [out.logits[:, -1].argmax(dim=-1)]
            while len(chosen) < backbone.max_new_tokens:
                out = model(
                    input_ids=chosen[-1][None],
                    past_key_values=out.past_key_values,
                    use_cache=True,
                    logits_to_keep=1,
                )
                chosen.append(out.logits[:, -1].argmax(dim=-1))
            tokens = torch.cat(chosen).tolist()
            action = backbone.action_range.unnormalize(backbone.actions.decode(tokens)).astype(np.float32)
        n, depth = layout.n_visual, len(backbone.layers)
        self.last = Step(
            layout=layout,
            decision=Decision.dense(n, depth),
            forced=np.zeros(n, dtype=np.bool_),
            age=np.zeros(n, dtype=np.int64),
            dense_because="stock model",
            stages=clock.stages,
            info={"tokens": tokens},
            pixels=pixels,
            passes=one_by_one(backbone.max_new_tokens),
        )
        return action
