"""The vision encoder of OpenVLA-OFT with FiLM: its towers look with the instruction in mind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch

from lac_vla.models.prismatic.encoder import PrismaticVision, some
from lac_vla.models.prismatic.model import PrismaticVLA
from lac_vla.models.prismatic.vision import ViTBackbone
from lac_vla.models.transformer import FrameKVCache
from lac_vla.types import BoolArray, Frame, UInt8Image


class FiLMVision(PrismaticVision):
    """Conditions the towers on the frame's instruction.

    Args:
        model: The modules.
        cameras: Names of the cameras in ``Frame.images``, in the model's order.
        language: Instruction → what the towers are conditioned on, (width,).
    """

    def __init__(self, model: PrismaticVLA, cameras: Sequence[str], language: Callable[[str], torch.Tensor]) -> None:
        super().__init__(model, cameras)
        self._language = language

    @property
    def transformer_cameras(self) -> tuple[str, ...]:
        """None: in training, towers run without a frame's instruction."""
        return ()

    def kv_cache(self) -> FrameKVCache:
        """Make the memory of one session's transformers."""
        return FrameKVCache()

    def inputs(self, frames: Sequence[Frame], images: Sequence[Mapping[str, UInt8Image]]) -> list[torch.Tensor]:
        """Upload the pixels of every camera; behind them, the instruction's embedding, (width,)."""
        return [*super().inputs(frames, images), self._language(frames[0].instruction)]

    def stem(self, *inputs: torch.Tensor, whole: bool, names: Sequence[str] | None = None) -> Any:
        """Run what does not depend on which tokens matter, and keep the instruction's embedding with it."""
        *pixels, language = inputs
        return self._backbone.encode_stem(self._pixels(pixels, names), whole=whole, language=language), language

    def split_stem(self, stem: Any) -> Sequence[Any]:
        """Take a stem apart by cameras; the instruction's embedding stays with every part."""
        rows, language = stem
        return [(part, language) for part in super().split_stem(rows)]

    def join_stem(self, parts: Sequence[Any]) -> Any:
        """Put the cameras' parts together; all are of one instruction."""
        return super().join_stem([rows for rows, _ in parts]), parts[0][1]

    def encode_stems(self, frames: Sequence[Frame], images: Sequence[Mapping[str, UInt8Image]]) -> list[Any]:
        """Run it one by one: every frame's towers are conditioned on its own instruction."""
        return [self.encode_stem(frame, seen) for frame, seen in zip(frames, images, strict=True)]

    def encode_tokens(
        self, stem: Any, token_mask: BoolArray | None = None, kv_cache: FrameKVCache | None = None
    ) -> torch.Tensor:
        """Compute the features of the tokens in ``token_mask`` (all by default), (n, features)."""
        rows, language = stem
        return self._backbone.encode_tokens(rows, some(token_mask), kv_cache, language=language)

    @property
    def _backbone(self) -> ViTBackbone:
        return cast(ViTBackbone, self._model.vision_backbone)
