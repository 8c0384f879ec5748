"""A VLA: its four parts over one set of weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lac_vla.models.heads.base import ActionHead
from lac_vla.models.protocols import Decoder, Processor, VisionEncoder
from lac_vla.types import Frame


@dataclass(frozen=True, eq=False)
class VLA:
    """A frozen Vision-Language-Action model: its four parts over one set of weights. It follows training in place.

    Attributes:
        name: For tables and error messages.
        family: Key of :data:`lac_vla.models.FAMILIES`.
        config: What it was built from.
        module: All weights.
        processor: Frame → images and prompt.
        vision: Images → visual tokens.
        decoder: Visual tokens and text → hidden states, keys and values.
        head: These → actions.
        encode: The tokenizer: text → token ids.
        ensemble: Over how many of the last chunks an evaluation averages its actions unless told otherwise.
    """

    name: str
    family: str
    config: Any
    module: nn.Module
    processor: Processor
    vision: VisionEncoder
    decoder: Decoder
    head: ActionHead
    encode: Any = None
    ensemble: int = 1

    @property
    def device(self) -> torch.device:
        """The device that the model is on."""
        return self.decoder.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the hidden states."""
        return self.decoder.dtype

    @property
    def grids(self) -> Mapping[str, tuple[int, int]]:
        """Camera → (rows, cols) of its visual tokens, in token order."""
        return self.processor.grids

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.decoder.layers)

    @property
    def horizon(self) -> int:
        """Actions per answer."""
        return self.head.horizon

    def encode_image(self, frame: Frame) -> torch.Tensor:
        """Compute the projected tokens of a whole frame, (N, width)."""
        stem = self.vision.encode_stem(frame, self.processor.images(frame))
        return self.vision.project(self.vision.encode_tokens(stem))
