"""Puts a VLA together from the modules of a Prismatic model: processor, vision encoder and decoder, and a head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lac_vla.errors import InputError
from lac_vla.models.heads.base import ActionHead
from lac_vla.models.heads.tokens import ActionTokenizer, TokenHead
from lac_vla.models.heads.units import Range, choose_stats
from lac_vla.models.llama import LlamaDecoder
from lac_vla.models.prismatic.config import PrismaticConfig
from lac_vla.models.prismatic.encoder import PrismaticVision
from lac_vla.models.prismatic.model import PrismaticVLA
from lac_vla.models.prismatic.processor import PrismaticProcessor
from lac_vla.models.tokenizer import Encode
from lac_vla.models.vla import VLA

MakeHead = Callable[[LlamaDecoder, Range], ActionHead]
"""Decoder and units of the actions → head."""


def build_prismatic(
    model: PrismaticVLA,
    encode: Encode,
    *,
    name: str = "prismatic",
    unnorm_key: str | None = None,
    cameras: Sequence[str] | None = None,
    image_pipeline: str | None = None,
    family: str = "openvla",
    config: Any = None,
    make_head: MakeHead | None = None,
    prompt_end: tuple[int, ...] = (),
    ensemble: int = 1,
) -> VLA:
    """Build a VLA over the modules; it holds no weights of its own and follows them.

    Args:
        model: The modules.
        encode: The tokenizer: text → token ids.
        name: For tables and error messages.
        unnorm_key: Data set whose statistics give actions their units; may be ``None`` if there is only one.
        cameras: Names of the cameras in ``Frame.images``, in the model's order; ``None`` for its own names.
        image_pipeline: A key of :data:`lac_vla.models.images.PIPELINES`; ``None`` for the own one.
        family: Key of :data:`lac_vla.models.FAMILIES`.
        config: What the whole model was built from; by default the modules' own configuration.
        make_head: Makes another head than that of action tokens.
        prompt_end: Token ids behind the tokenizer's.
        ensemble: See :class:`VLA`.

    Raises:
        InputError: If an argument does not fit the model.
        CheckpointError: If the statistics are incomplete.
    """
    own = model.config
    names = camera_names(own, cameras)
    stats = choose_stats(own.norm_stats, unnorm_key)
    decoder = LlamaDecoder(model.language_model)
    action_range = Range.of(stats, "action")
    processor = PrismaticProcessor(
        model,
        (lambda text: [*encode(text), *prompt_end]) if prompt_end else encode,
        name,
        dict(zip(names, own.cameras, strict=True)),
        image_pipeline,
        None if own.proprio_dim is None else Range.of(stats, "proprio"),
        decoder.embed,
    )
    if make_head is None:
        tokenizer = ActionTokenizer(own.vocab_size, own.n_action_bins, own.edge_token)
        head: ActionHead = TokenHead(decoder.embed, decoder.logits, tokenizer, action_range)
    else:
        head = make_head(decoder, action_range)
    vision = PrismaticVision(model, names)
    return VLA(name, family, config or own, model, processor, vision, decoder, head, encode, ensemble)


def camera_names(config: PrismaticConfig, cameras: Sequence[str] | None) -> tuple[str, ...]:
    """Name the cameras as ``Frame.images`` does: as given, or by the model's own names.

    Raises:
        InputError: If they are not as many as the model's.
    """
    names = tuple(camera.name for camera in config.cameras) if cameras is None else tuple(cameras)
    if len(set(names)) != len(config.cameras) or len(names) != len(config.cameras):
        raise InputError(f"the model has {len(config.cameras)} camera(s), `cameras` names {list(names)}")
    return names
