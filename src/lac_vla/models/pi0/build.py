"""Puts a π0 or π0.5 together from its modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lac_vla.errors import InputError
from lac_vla.models.lerobot_layout import ACTION, STATE
from lac_vla.models.pi0.config import PIPELINES, STATE_PROMPTS, PiConfig
from lac_vla.models.pi0.gemma import GemmaDecoder
from lac_vla.models.pi0.head import PiHead
from lac_vla.models.pi0.model import PiModel
from lac_vla.models.pi0.processor import Letterbox, PiProcessor
from lac_vla.models.siglip import SiglipVision
from lac_vla.models.tokenizer import Encode
from lac_vla.models.vla import VLA


def build_pi0(
    model: PiModel,
    encode: Encode,
    *,
    name: str = "pi0",
    unnorm_key: str | None = None,
    cameras: Sequence[str] | None = None,
    image_pipeline: str | None = None,
    state_prompt: str | None = None,
) -> VLA:
    """Build the VLA over its modules; it holds no weights of its own and follows them.

    Args:
        model: The modules.
        encode: The tokenizer: text → token ids.
        name: For tables and error messages.
        unnorm_key: Must be ``None``: a checkpoint has the statistics of one data set.
        cameras: Names of the cameras in ``Frame.images``; fewer than the model has leave the last ones out.
        image_pipeline: One of :data:`lac_vla.models.pi0.config.PIPELINES`; ``None`` for the newest.
        state_prompt: See :class:`PiConfig`; ``None`` for the configuration's.

    Raises:
        InputError: If an argument does not fit the model.
        CheckpointError: If the statistics are incomplete.
    """
    config: PiConfig = model.config
    names = tuple(config.cameras.values()) if cameras is None else tuple(cameras)
    if not 1 <= len(set(names)) == len(names) <= len(config.cameras):
        raise InputError(f"the model has up to {len(config.cameras)} camera(s), `cameras` names {list(names)}")
    if unnorm_key is not None:
        raise InputError(f"{name} has the statistics of one data set: leave unnorm_key out")
    if image_pipeline is not None and image_pipeline not in PIPELINES:
        raise InputError(f"unknown image pipeline '{image_pipeline}': {name} knows {list(PIPELINES)}")
    if state_prompt is not None:
        if not config.adaptive or state_prompt not in STATE_PROMPTS:
            raise InputError(f"state_prompt '{state_prompt}': π0.5 knows {list(STATE_PROMPTS)}, π0 has none")
        config = replace(config, state_prompt=state_prompt)
    state_units = config.normalization.units(STATE, config.state_dim)
    action_units = config.normalization.units(ACTION, config.action_dim)
    decoder, head = GemmaDecoder(model.prefix), PiHead(model, action_units, state_units)
    letterbox = Letterbox(config.vision.pixels, -1.0 if image_pipeline == PIPELINES[1] else 0.0)
    processor = PiProcessor(config, encode, name, names, letterbox, state_units, decoder.embed)
    vision = SiglipVision(model.vision, model.projector, names, letterbox)
    return VLA(name, config.family, config, model, processor, vision, decoder, head, encode)
