"""Configurations of OpenVLA-OFT: a Prismatic VLM whose tokens all see each other, and a head that reads a chunk off it.

Source: OpenVLA-OFT (Kim et al., 2025, arXiv 2502.19645) and its released code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lac_vla.checks import check_fields
from lac_vla.errors import CheckpointError
from lac_vla.models.prismatic.config import CameraConfig, PrismaticConfig
from lac_vla.models.prismatic.presets import MINI, NO_STATS, OPENVLA_7B, TINY

HEADS = ("l1", "discrete", "diffusion")
BOUNDS = {"q99": ("q01", "q99"), "minmax": ("min", "max")}
"""Names of the statistics that [-1, 1] stands for, by the way of normalising."""
MOST_STEPS = 10_000
"""Of a diffusion head's training."""
STOP_TOKEN = 2
"""Llama 2's end of a sequence; it stands behind the placeholders."""


@dataclass(frozen=True)
class Platform:
    """Everything that no file of an official checkpoint says, but the robot does.

    Attributes:
        chunk: Actions of a chunk.
        action_dim: Values of an action.
        proprio_dim: Values of the proprioception.
        bounds: A key of :data:`BOUNDS`.
        cameras: Names of the cameras, in the model's order.
        image_pipeline: A key of :data:`lac_vla.models.images.PIPELINES`.
    """

    chunk: int
    action_dim: int
    proprio_dim: int
    bounds: str
    cameras: tuple[str, ...]
    image_pipeline: str = "libero"


PLATFORMS = {
    "libero": Platform(8, 7, 8, "q99", ("agentview", "wrist")),
    "aloha": Platform(25, 14, 14, "minmax", ("agentview", "left_wrist", "right_wrist"), "aloha"),
    "bridge": Platform(5, 7, 7, "q99", ("agentview",)),
}
"""The robots of the official code, by name. The cameras of ``bridge`` are the user's: pass ``cameras``."""


@dataclass(frozen=True)
class OFTConfig:
    """An OpenVLA-OFT model.

    Attributes:
        vlm: Towers, projectors and language model; a tower's ``language`` is set where FiLM conditions it.
        action_dim: Values of an action.
        chunk: Actions of a chunk.
        head: One of :data:`HEADS`.
        bounds: A key of :data:`BOUNDS`.
        stop_id: Token that ends the sequence.
        diffusion_steps: Steps that a diffusion head was trained with.
        sampling_steps: Steps that it takes.

    Raises:
        CheckpointError: If the parts do not fit together.
    """

    vlm: PrismaticConfig
    action_dim: int
    chunk: int
    head: str = "l1"
    bounds: str = "q99"
    stop_id: int = STOP_TOKEN
    diffusion_steps: int = 50
    sampling_steps: int = 50

    def __post_init__(self) -> None:
        """Check that the parts fit together."""
        check_fields(self, CheckpointError)
        if self.head not in HEADS:
            raise CheckpointError(f"head {self.head!r}: OpenVLA-OFT has {list(HEADS)}")
        if self.bounds not in BOUNDS:
            raise CheckpointError(f"bounds {self.bounds!r}: choose one of {list(BOUNDS)}")
        if not 1 <= self.n_placeholders <= self.vlm.llm_max_length or self.chunk < 1:
            raise CheckpointError(
                f"a chunk of {self.chunk} actions of {self.action_dim} values: give at least 1, and together no more "
                f"than the {self.vlm.llm_max_length} tokens of a prompt"
            )
        if not 0 <= self.stop_id < self.vlm.vocab_size:
            raise CheckpointError(f"stop_id is {self.stop_id}; the vocabulary has {self.vlm.vocab_size} tokens")
        if {tower.language for tower in self.vlm.vit_towers} not in (set(), {None}, {self.vlm.width}):
            raise CheckpointError("FiLM conditions all vision transformers, on embeddings of the decoder's width")
        if not 1 <= self.sampling_steps <= self.diffusion_steps <= MOST_STEPS:
            raise CheckpointError(
                f"{self.sampling_steps} of {self.diffusion_steps} steps are taken; give 1 to all of them, and at most "
                f"{MOST_STEPS}"
            )

    @property
    def film(self) -> bool:
        """True if the instruction conditions the vision transformers."""
        return any(tower.language is not None for tower in self.vlm.vit_towers)

    @property
    def n_placeholders(self) -> int:
        """Number of placeholders in the prompt: one for every value of the chunk."""
        return self.chunk * self.action_dim

    def to_json(self) -> dict[str, Any]:
        """Make plain data of everything but the VLM."""
        names = ("action_dim", "chunk", "head", "bounds", "stop_id", "diffusion_steps", "sampling_steps")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], norm_stats: Mapping[str, Any]) -> OFTConfig:
        """Read a ``config.json`` of ours.

        Raises:
            CheckpointError: If it is not understood.
        """
        try:
            return cls(PrismaticConfig.from_json({**data["vlm"], "norm_stats": norm_stats}), **data["oft"])
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"config.json does not describe an OpenVLA-OFT model: {error!r}") from error


def with_cameras(vlm: PrismaticConfig, names: tuple[str, ...]) -> PrismaticConfig:
    """Let the same towers see several cameras."""
    size = vlm.cameras[0].image_size
    return replace(vlm, cameras=tuple(CameraConfig(name, size) for name in names))


def with_film(vlm: PrismaticConfig) -> PrismaticConfig:
    """Let the instruction condition the vision transformers."""
    return replace(vlm, vit_towers=tuple(replace(tower, language=vlm.width) for tower in vlm.vit_towers))


_LIBERO = PLATFORMS["libero"]
OPENVLA_7B_OFT = OFTConfig(
    replace(
        with_cameras(OPENVLA_7B, _LIBERO.cameras),
        norm_stats={"none": {**NO_STATS["none"], "proprio": {"q01": [-1.0] * 8, "q99": [1.0] * 8}}},
        proprio_dim=_LIBERO.proprio_dim,
        image_resize_strategy=_LIBERO.image_pipeline,
    ),
    _LIBERO.action_dim,
    _LIBERO.chunk,
)
"""The published models for LIBERO."""

TINY_OFT = OFTConfig(TINY, 7, 3)
"""For tests."""

MINI_OFT = OFTConfig(replace(MINI, prompt_end_id=STOP_TOKEN), 7, 8)
"""``mini`` with OFT's attention and head. What ends its prompts ends its sequences, too."""

MINI_WIDOWX = OFTConfig(
    replace(
        MINI_OFT.vlm,
        norm_stats=NO_STATS,
        cameras=(replace(MINI.cameras[0], name="3rd_view_camera"),),
        proprio_dim=None,
    ),
    7,
    PLATFORMS["bridge"].chunk,
)
"""The same for SIMPLER's WidowX: one camera, no proprioception."""

PRESETS: dict[str, OFTConfig] = {
    "openvla-7b-oft": OPENVLA_7B_OFT,
    "mini-oft": MINI_OFT,
    "mini-widowx": MINI_WIDOWX,
    "oft-tiny": TINY_OFT,
}
