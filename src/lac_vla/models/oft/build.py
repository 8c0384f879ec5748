"""Puts OpenVLA-OFT together: a Prismatic VLM without a causal mask, and a head that reads a chunk off its rows."""

from __future__ import annotations

from collections.abc import Sequence

from lac_vla.models.heads.base import ActionHead
from lac_vla.models.heads.chunk import ChunkMLP, ChunkTokenHead, L1Head
from lac_vla.models.heads.chunk_diffusion import ChunkDiffusionHead
from lac_vla.models.heads.sampler import Schedule
from lac_vla.models.heads.tokens import ActionTokenizer
from lac_vla.models.heads.units import Range, choose_stats
from lac_vla.models.llama import BidirectionalLlamaDecoder
from lac_vla.models.oft.config import BOUNDS, OFTConfig
from lac_vla.models.oft.processor import OFTProcessor
from lac_vla.models.oft.vision import FiLMVision
from lac_vla.models.prismatic.build import camera_names
from lac_vla.models.prismatic.encoder import PrismaticVision
from lac_vla.models.prismatic.model import MLP, PrismaticVLA
from lac_vla.models.tokenizer import Encode
from lac_vla.models.vla import VLA

EPSILON = 1e-8
"""The official code enlarges every span of the statistics by this."""


class OFTVLA(PrismaticVLA):
    """A Prismatic VLM with what reads and writes a chunk beside it.

    Attributes:
        action_head: The head's MLP; ``None`` for discrete tokens.
        noisy_action_projector: Embeds noisy values; for a diffusion head.
    """

    def __init__(self, config: OFTConfig) -> None:
        super().__init__(config.vlm)
        width = config.vlm.width
        self.action_head = None if config.head == "discrete" else ChunkMLP(width, config.action_dim)
        self.noisy_action_projector = MLP(1, width, width) if config.head == "diffusion" else None


def build_oft(
    config: OFTConfig,
    model: OFTVLA,
    encode: Encode,
    *,
    name: str = "oft",
    unnorm_key: str | None = None,
    cameras: Sequence[str] | None = None,
    image_pipeline: str | None = None,
) -> VLA:
    """Build the VLA over its modules; see :func:`lac_vla.models.prismatic.build.build_prismatic` for the arguments.

    Raises:
        InputError: If an argument does not fit the model.
        CheckpointError: If the statistics are incomplete, or of another number of values than the head's actions.
    """
    vlm = config.vlm
    names = camera_names(vlm, cameras)
    stats = choose_stats(vlm.norm_stats, unnorm_key)
    bounds = BOUNDS[config.bounds]
    decoder = BidirectionalLlamaDecoder(model.language_model)
    processor = OFTProcessor(
        config,
        model,
        encode,
        name,
        dict(zip(names, vlm.cameras, strict=True)),
        image_pipeline,
        None if vlm.proprio_dim is None else Range.of(stats, "proprio", bounds, EPSILON),
        decoder.embed,
    )
    vision = FiLMVision(model, names, processor.language) if config.film else PrismaticVision(model, names)
    units = Range.of(stats, "action", bounds, EPSILON)
    head: ActionHead
    if model.action_head is None:
        tokenizer = ActionTokenizer(vlm.vocab_size, vlm.n_action_bins, vlm.edge_token)
        head = ChunkTokenHead(decoder.logits, tokenizer, config.chunk, config.action_dim, units)
    elif model.noisy_action_projector is None:
        head = L1Head(model.action_head, config.chunk, units)
    else:
        head = ChunkDiffusionHead(
            model.action_head,
            model.noisy_action_projector,
            config.chunk,
            units,
            Schedule(config.diffusion_steps),
            config.sampling_steps,
            processor.time_row,
        )
    return VLA(name, "oft", config, model, processor, vision, decoder, head, encode)
