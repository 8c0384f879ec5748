"""CogACT as the engine sees it: a Prismatic prompt, from whose last hidden state actions are drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lac_vla.errors import CheckpointError
from lac_vla.models.base import Extend
from lac_vla.models.cogact.config import CogACTConfig
from lac_vla.models.cogact.model import CogACTVLA
from lac_vla.models.prismatic.backbone import PrismaticBackbone
from lac_vla.models.prismatic.prompt import Encode
from lac_vla.types import FloatArray, Frame

GRIPPER_THRESHOLD = 0.5
"""Normalised gripper values from here on mean 1, open; below it 0, closed. Source: CogACT's released decoding."""


@dataclass(frozen=True)
class Ended:
    """A tokenizer with tokens behind its own.

    Attributes:
        encode: The tokenizer.
        end: The tokens.
    """

    encode: Encode
    end: tuple[int, ...]

    def __call__(self, text: str) -> list[int]:
        """Token ids of a text."""
        return [*self.encode(text), *self.end]


class CogACTBackbone:
    """Implements :class:`lac_vla.models.base.Backbone` for CogACT.

    All that concerns the prompt is a :class:`PrismaticBackbone`'s; here is what becomes of its last hidden state.

    Args:
        config: What the model was built from.
        model: The modules.
        encode: The tokenizer: text → token ids.
        name: For tables and error messages.
        unnorm_key: Data set whose statistics give actions their units; may be ``None`` if there is only one.
        cameras: Names of the cameras in ``Frame.images``, in the model's order; ``None`` for its own names.
        image_pipeline: A key of :data:`lac_vla.models.prismatic.images.PIPELINES`; ``None`` for the own one.

    Attributes:
        config: What the model was built from.
        model: The modules.
        encode: The tokenizer.
        sampling: How actions are drawn; may be replaced.
        action_range: Units of the actions.

    Raises:
        InputError: If an argument does not fit the model.
        CheckpointError: If the statistics are incomplete, or of another number of values than the head's actions.
    """

    max_new_tokens = 0

    def __init__(
        self,
        config: CogACTConfig,
        model: CogACTVLA,
        encode: Encode,
        *,
        name: str = "cogact",
        unnorm_key: str | None = None,
        cameras: Sequence[str] | None = None,
        image_pipeline: str | None = None,
    ) -> None:
        vlm = PrismaticBackbone(
            model,
            Ended(encode, config.prompt_end),
            name=name,
            unnorm_key=unnorm_key,
            cameras=cameras,
            image_pipeline=image_pipeline,
        )
        if vlm.action_range.dim != config.head.action_dim:
            raise CheckpointError(
                f"statistics of {vlm.action_range.dim} action values, an action head of {config.head.action_dim}"
            )
        self.config = config
        self.model = model
        self.encode = encode
        self.sampling = config.sampling
        self.action_range = vlm.action_range
        self._vlm = vlm
        self._chunk = (1, config.head.horizon, config.head.action_dim)
        # The prompt is the VLM's alone.
        self.name, self.grids, self.causal = vlm.name, vlm.grids, vlm.causal
        self.layers, self.shape, self.kv_heads, self.head_dim = vlm.layers, vlm.shape, vlm.kv_heads, vlm.head_dim
        self.pixels, self.layout, self.project = vlm.pixels, vlm.layout, vlm.project
        self.tower_memory, self.look, self.features, self.see = vlm.tower_memory, vlm.look, vlm.features, vlm.see
        self.prefix, self.suffix = vlm.prefix, vlm.suffix
        self.rotary, self.norm, self.visible = vlm.rotary, vlm.norm, vlm.visible
        self.prompt_ids, self.normalize_proprio = vlm.prompt_ids, vlm.normalize_proprio

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self._vlm.device

    @property
    def ensemble(self) -> int:
        """Number of the last chunks that an evaluation averages unless told otherwise."""
        return self.config.ensemble

    @property
    def horizon(self) -> int:
        """Number of actions of an answer."""
        return self.config.head.horizon

    @property
    def dtype(self) -> torch.dtype:
        """Of the VLM's hidden states; the action head's is its own."""
        return self._vlm.dtype

    def draft(self, last: Mapping[str, Any]) -> None:
        """There are no action tokens to guess."""

    def act(
        self,
        frame: Frame,
        hidden: torch.Tensor,
        extend: Extend,
        rng: np.random.Generator,
        last: Mapping[str, Any] | None = None,
    ) -> tuple[FloatArray, dict[str, Any]]:
        """Draw a chunk of actions from the cognition feature, the prompt's last hidden state.

        Noise is drawn on the host, so that a seed means the same on every device.

        Returns:
            The actions in the units of the data set, float32, (horizon, action_dim), the gripper closed or open; and,
            as lists, the chunk in [-1, 1] (``normalized``).
        """
        head = self.model.action_model
        like = head.net.positional_embedding

        def draw() -> torch.Tensor:
            return torch.from_numpy(rng.standard_normal(self._chunk, dtype=np.float32)).to(like.device, like.dtype)

        drawn = head.sample(hidden[-1:][None].to(like.dtype), self.sampling, draw)
        normalized = np.clip(drawn[0].float().cpu().numpy(), -1.0, 1.0)
        normalized[:, -1] = normalized[:, -1] >= GRIPPER_THRESHOLD
        return self.unnormalize_actions(normalized).astype(np.float32), {"normalized": normalized.tolist()}

    def unnormalize_actions(self, normalized: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """What the head draws, [-1, 1], the gripper 0 closed .. 1 open → units of the data set, (..., action_dim)."""
        actions = self.action_range.unnormalize(normalized)
        if not self.action_range.mask[-1]:
            closed, opened = self.config.gripper
            actions[..., -1] = closed + (opened - closed) * actions[..., -1]
        return actions

    def normalize_actions(self, actions: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Units of the data set → what the head draws, not clipped, (..., action_dim)."""
        normalized = self.action_range.normalize(actions)
        if not self.action_range.mask[-1]:
            closed, opened = self.config.gripper
            normalized[..., -1] = (normalized[..., -1] - closed) / (opened - closed)
        return normalized
