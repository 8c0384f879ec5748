"""Puts CogACT together: a Prismatic VLM, from whose last hidden state a diffusion head draws actions."""

from __future__ import annotations

from typing import Any

from lac_vla.models.cogact.config import CogACTConfig
from lac_vla.models.heads.diffusion import DiffusionHead, DiffusionModel
from lac_vla.models.prismatic.build import build_prismatic
from lac_vla.models.prismatic.model import PrismaticVLA
from lac_vla.models.tokenizer import Encode
from lac_vla.models.vla import VLA


class CogACTVLA(PrismaticVLA):
    """A Prismatic VLM with an action head beside it, which stays in float32 whatever the VLM's dtype.

    Attributes:
        action_model: The head.
    """

    def __init__(self, config: CogACTConfig) -> None:
        super().__init__(config.vlm)
        self.action_model = DiffusionModel(config.head)


def build_cogact(config: CogACTConfig, model: CogACTVLA, encode: Encode, **options: Any) -> VLA:
    """Build the VLA over its modules; see :func:`lac_vla.models.prismatic.build.build_prismatic` for the options.

    Raises:
        InputError: If an argument does not fit the model.
        CheckpointError: If the statistics are incomplete, or of another number of values than the head's actions.
    """
    return build_prismatic(
        model,
        encode,
        family="cogact",
        config=config,
        make_head=lambda _, units: DiffusionHead(
            model.action_model, config.head, units, config.sampling, config.gripper
        ),
        prompt_end=config.prompt_end,
        ensemble=config.ensemble,
        **{"name": "cogact", **options},
    )
