"""The baseline: the same weights as the stock ``transformers`` code runs them, without our engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from lac_vla.bench.model import Timed
from lac_vla.cost import one_by_one
from lac_vla.engine.step_info import StepInfo
from lac_vla.models import CogACTBackbone
from lac_vla.models.prismatic.backbone import PrismaticBackbone
from lac_vla.session import action_noise
from lac_vla.timing import Stopwatch
from lac_vla.types import Decision, FloatArray, Frame

STOCK = "dense stock"
"""Name of the baseline in results and tables."""


def stock_prefill(backbone: Timed, embeddings: torch.Tensor) -> Any:
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
    decoding. CogACT's prompt goes through ``LlamaModel`` likewise; its action head, no part of transformers, is ours.

    Args:
        backbone: The model.
        seed: Of what the action head leaves to chance: the same noise as in a session of this seed.

    Attributes:
        last: What the last call of :meth:`act` did, as a :class:`lac_vla.session.StepInfo`.
    """

    def __init__(self, backbone: Timed, seed: int = 0) -> None:
        self.last_info: StepInfo | None = None
        self._backbone = backbone
        self._seed = seed
        self._noise = action_noise(seed)

    def reset(self) -> None:
        """Begin a new episode."""
        self.last_info = None
        self._noise = action_noise(self._seed)

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
        if isinstance(backbone, CogACTBackbone):
            action, info = self._draw(backbone, frame, prompt, clock)
        else:
            action, info = self._decode(backbone, prompt, clock)
        n, depth = layout.n_visual, len(backbone.layers)
        self.last_info = StepInfo(
            layout=layout,
            decision=Decision.dense(n, depth),
            forced=np.zeros(n, dtype=np.bool_),
            age=np.zeros(n, dtype=np.int64),
            dense_reason="stock model",
            stages=clock.stages,
            metadata=info,
            pixels=pixels,
            full_last_layer=True,
            decode_passes=one_by_one(backbone.max_new_tokens),
        )
        return action

    @staticmethod
    def _decode(
        backbone: PrismaticBackbone, prompt: torch.Tensor, clock: Stopwatch
    ) -> tuple[FloatArray, dict[str, Any]]:
        """Greedy action tokens."""
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
        return action, {"tokens": tokens}

    def _draw(
        self, backbone: CogACTBackbone, frame: Frame, prompt: torch.Tensor, clock: Stopwatch
    ) -> tuple[FloatArray, dict[str, Any]]:
        """A chunk of actions from the prompt's last hidden state."""

        def no_more(embeddings: torch.Tensor, at: int | None = None) -> torch.Tensor:
            raise NotImplementedError("this head appends no tokens")

        with clock.stage("prefill"):
            hidden = stock_prefill(backbone, prompt).last_hidden_state[0]
        with clock.stage("decode"):
            return backbone.act(frame, hidden, no_more, self._noise)
