"""Shapes of the vision towers, and the published vision transformers by their timm names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from lac_vla.checks import check_fields
from lac_vla.errors import CheckpointError

Triple: TypeAlias = tuple[float, float, float]
Keep: TypeAlias = tuple[int, int, int]
"""Row offset, column offset and stride of a regular subset of a token grid."""

DEEPEST = 1000
"""Layers that a network has at most: a larger number is a damaged file, and would take for ever to build."""


@dataclass(frozen=True)
class ConvTowerConfig:
    """A convolutional tower. Every width but the last is a convolution of stride 2.

    Attributes:
        widths: Channels of the convolutions; the last is the width of the features.
        norm_groups: Groups of the normalisation behind each of the inner convolutions; 0 for none.
    """

    widths: tuple[int, ...] = (32, 64, 128, 192)
    norm_groups: int = 8

    def __post_init__(self) -> None:
        """Check that such a tower exists."""
        check_fields(self, CheckpointError)
        if min(self.widths, default=0) < 1 or self.norm_groups < 0 or len(self.widths) > DEEPEST:
            raise CheckpointError(f"a convolutional tower cannot have {self}")
        if len(self.widths) < 3:
            raise CheckpointError(f"a convolutional tower needs at least 3 widths, got {self.widths}")
        if self.norm_groups and any(width % self.norm_groups for width in self.widths[1:-1]):
            raise CheckpointError(f"widths {self.widths[1:-1]} are no multiples of norm_groups {self.norm_groups}")

    @property
    def stride(self) -> int:
        """Pixels between two tokens."""
        return int(2 ** (len(self.widths) - 1))

    @property
    def features(self) -> int:
        """Width of the features."""
        return self.widths[-1]


@dataclass(frozen=True)
class ViTConfig:
    """A vision transformer in timm's layout. Its features are the patch tokens behind its last but one block.

    Attributes:
        width: Channels.
        depth: Blocks, the unused last one included.
        heads: Attention heads.
        mlp_width: Hidden channels of a block's feed-forward network.
        patch: Side of a patch, pixels.
        registers: Number of register tokens.
        class_token: Whether there is a class token.
        layer_scale: Whether the branches of a block are scaled.
        neck: Width that a linear layer behind the blocks brings the features to; ``None`` for no such layer.
        mean: Mean per channel that RGB in 0..1 is normalised with.
        std: Standard deviation per channel.
        language: Width of the language embedding that scales and shifts every block's tokens behind the attention
            (FiLM); ``None`` for none.
    """

    width: int
    depth: int
    heads: int
    mlp_width: int
    patch: int = 14
    registers: int = 0
    class_token: bool = False
    layer_scale: bool = False
    neck: int | None = None
    mean: Triple = (0.5, 0.5, 0.5)
    std: Triple = (0.5, 0.5, 0.5)
    language: int | None = None

    def __post_init__(self) -> None:
        """Check that such a transformer exists."""
        check_fields(self, CheckpointError)
        sizes = (self.width, self.heads, self.mlp_width, self.patch, 1 if self.neck is None else self.neck)
        if min(sizes) < 1 or not 1 < self.depth <= DEEPEST or self.width % self.heads or self.registers < 0:
            raise CheckpointError(f"a vision transformer cannot have {self}")
        if min(self.std) <= 0:
            raise CheckpointError(f"std is {self.std}; images cannot be divided by it")

    @property
    def stride(self) -> int:
        """Pixels between two tokens."""
        return self.patch

    @property
    def features(self) -> int:
        """Width of the features."""
        return self.width if self.neck is None else self.neck


TowerConfig: TypeAlias = ConvTowerConfig | ViTConfig
"""Towers of a single camera."""


IMAGENET: tuple[Triple, Triple] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
DINOV2_LARGE = ViTConfig(
    1024, 24, 16, 4096, registers=4, class_token=True, layer_scale=True, mean=IMAGENET[0], std=IMAGENET[1]
)
SIGLIP_SO400M = ViTConfig(1152, 27, 16, 4304)

TIMM_TOWERS: dict[str, ViTConfig] = {
    "vit_large_patch14_reg4_dinov2.lvd142m": DINOV2_LARGE,
    "vit_so400m_patch14_siglip_224": SIGLIP_SO400M,
    "vit_so400m_patch14_siglip_384": SIGLIP_SO400M,
}


def towers_of(config: Mapping[str, Any]) -> tuple[ViTConfig, ...]:
    """Read the vision transformers of a ``config.json``: ``vit_towers``, or the official ``timm_model_ids``.

    Raises:
        CheckpointError: If a tower is not known.
    """
    if config.get("vit_towers"):
        return tuple(vit_of(tower) for tower in config["vit_towers"])
    names = config.get("timm_model_ids", ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"])
    unknown = [name for name in names if name not in TIMM_TOWERS]
    if unknown:
        raise CheckpointError(
            f"unknown vision towers {unknown}: describe them in config.json as vit_towers, or use one of "
            f"{list(TIMM_TOWERS)}"
        )
    return tuple(TIMM_TOWERS[name] for name in names)


def tower_of(data: Mapping[str, Any]) -> TowerConfig:
    """Read a camera's tower in a ``config.json``: a convolution has ``widths``, a vision transformer a ``width``."""
    if "widths" in data:
        return ConvTowerConfig(**{**data, "widths": tuple(data["widths"])})
    return vit_of(data)


def vit_of(data: Mapping[str, Any]) -> ViTConfig:
    """Read a vision transformer in a ``config.json``."""
    plain: dict[str, Any] = {key: tuple(value) if key in ("mean", "std") else value for key, value in data.items()}
    return ViTConfig(**plain)
