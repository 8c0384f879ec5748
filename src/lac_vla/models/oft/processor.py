"""The processor of OpenVLA-OFT: behind the text a placeholder for every value of the chunk, and a stop token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from lac_vla.models.heads.chunk import N_UNREAD, STOP_TOKENS
from lac_vla.models.oft.config import OFTConfig
from lac_vla.models.prismatic.processor import PrismaticProcessor
from lac_vla.models.protocols import PromptInputs
from lac_vla.types import Frame


class OFTProcessor(PrismaticProcessor):
    """Lays out ``[BOS | visual | proprio, if any | diffusion step, if any | text | placeholders | stop]``.

    Args:
        config: Of the model.
        arguments: Of :class:`PrismaticProcessor`.
    """

    state_limit = 1.0

    def __init__(self, config: OFTConfig, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._config = config

    @property
    def time_row(self) -> int:
        """Row of the suffix that tells a diffusion head's step."""
        return 0 if self._state_range is None else 1

    def prompt(self, frame: Frame) -> PromptInputs:
        """Lay out the prompt; see :meth:`PrismaticProcessor.prompt`."""
        prompt = super().prompt(frame)
        more = int(self._config.head == "diffusion") + self._config.n_placeholders + STOP_TOKENS
        layout = replace(prompt.layout, n_suffix=prompt.layout.n_suffix + more, n_unread=N_UNREAD)
        return replace(prompt, layout=layout)

    def embed(self, prompt: PromptInputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Embed the tokens; placeholders are zeros, and so is the diffusion step, which the head fills in."""
        prefix, suffix = super().embed(prompt)
        parts = [suffix, suffix.new_zeros(self._config.n_placeholders, suffix.shape[1]), self._stop()]
        if self._config.head == "diffusion":
            parts[:1] = [suffix[: self.time_row], suffix.new_zeros(1, suffix.shape[1]), suffix[self.time_row :]]
        return prefix, torch.cat(parts)

    def language(self, instruction: str) -> torch.Tensor:
        """Average the embeddings of the text, BOS and the stop token, which FiLM is conditioned on, (width,)."""
        return torch.cat([self._embed(self.prompt_ids(instruction)), self._stop()]).mean(dim=0)

    def _stop(self) -> torch.Tensor:
        return self._embed([self._config.stop_id])
