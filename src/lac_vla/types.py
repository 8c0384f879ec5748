"""The vocabulary of the library: what a robot sees, where its tokens live, and what a policy decides about them.

Nothing here knows a model, a simulator or a policy. Everything above imports from here.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from lac_vla.checks import is_text, shortened
from lac_vla.errors import InputError

UInt8Image: TypeAlias = npt.NDArray[np.uint8]
FloatArray: TypeAlias = npt.NDArray[np.float32]
IntArray: TypeAlias = npt.NDArray[np.int64]
BoolArray: TypeAlias = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Frame:
    """One observation of one robot, validated on entry.

    Attributes:
        images: Camera name → RGB image, uint8, H×W×3 (any H, W ≥ 1).
        instruction: What to do, in words; not empty.
        proprio: Joint or end-effector state, float32, 1-D, finite; ``None`` if the model takes none.
        timestamp: Seconds, or ``None``.

    Raises:
        InputError: If anything has the wrong type, shape or dtype, or is not finite.
    """

    images: Mapping[str, UInt8Image]
    instruction: str
    proprio: FloatArray | None = None
    timestamp: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.images, Mapping):
            raise InputError(f"Frame.images is a {type(self.images).__name__}; give a mapping of cameras to images")
        object.__setattr__(self, "images", dict(self.images))
        if not self.images:
            raise InputError("Frame.images is empty: give at least one camera, e.g. {'agentview': rgb}")
        for camera, image in self.images.items():
            if not is_text(camera):
                raise InputError(f"Frame.images has the camera {shortened(camera)}; give names, as texts")
            if not isinstance(image, np.ndarray):
                raise InputError(f"image '{camera}' is a {type(image).__name__}; give a numpy array, uint8, H×W×3")
            if image.dtype != np.uint8:
                raise InputError(f"image '{camera}' has dtype {image.dtype}; give uint8 RGB in 0..255")
            if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
                raise InputError(f"image '{camera}' has shape {image.shape}; give H×W×3")
        if not isinstance(self.instruction, str):
            raise InputError(f"Frame.instruction is a {type(self.instruction).__name__}; give a text")
        if not is_text(self.instruction):
            raise InputError("Frame.instruction holds a lone surrogate: it was not decoded as the text that it was")
        if not self.instruction.strip():
            raise InputError("Frame.instruction is empty: say what the robot should do")
        if self.proprio is not None:
            proprio = _vector(self.proprio)
            if proprio.ndim != 1:
                raise InputError(f"proprio has shape {proprio.shape}; give a vector")
            if not np.isfinite(proprio).all():
                raise InputError("proprio holds NaN or infinity: drop this observation or repair the sensor's reading")
            object.__setattr__(self, "proprio", proprio)
        if self.timestamp is not None:
            number = isinstance(self.timestamp, int | float | np.integer | np.floating)
            if not number or abs(self.timestamp) > sys.float_info.max or self.timestamp != self.timestamp:
                raise InputError(f"timestamp is {shortened(self.timestamp)}; give seconds or None")

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Camera → (H, W)."""
        return {camera: (image.shape[0], image.shape[1]) for camera, image in self.images.items()}


def _vector(values: Any) -> FloatArray:
    """Copy a state, so that it stays what it is when the caller's buffer changes."""
    try:
        array = np.asarray(values)
        if array.dtype.kind in "biuf":
            with np.errstate(over="ignore"):  # what does not fit becomes infinite, and is refused
                return np.array(array, dtype=np.float32)
    except Exception as error:  # of numpy, or of whatever kind of array it is
        raise InputError(f"proprio cannot be read as a vector of numbers: {shortened(error)}") from error
    raise InputError(f"proprio is a {type(values).__name__} of {array.dtype}; give a vector of real numbers")


@dataclass(frozen=True)
class CameraGrid:
    """The visual tokens of one camera: a ``rows`` × ``cols`` raster whose first token is visual token ``start``."""

    name: str
    rows: int
    cols: int
    start: int

    @property
    def size(self) -> int:
        """Number of tokens."""
        return self.rows * self.cols

    @property
    def tokens(self) -> slice:
        """The camera's tokens within the visual block."""
        return slice(self.start, self.start + self.size)


@dataclass(frozen=True)
class TokenLayout:
    """The places of a prompt's tokens: ``[prefix | visual tokens | suffix]``. The only holder of offsets.

    The prefix is BOS; the suffix is proprioception (if any) and text. Action tokens are appended behind it.

    Attributes:
        cameras: The cameras' grids, in token order.
        n_prefix: Tokens before the first visual token.
        n_suffix: Tokens after the last visual token.
        n_unread: How many of them, at the end, are there for others to see alone: the head does not read them.
    """

    cameras: tuple[CameraGrid, ...]
    n_prefix: int
    n_suffix: int
    n_unread: int = 0

    @classmethod
    def of(cls, grids: Mapping[str, tuple[int, int]], n_prefix: int, n_suffix: int, n_unread: int = 0) -> TokenLayout:
        """Lay the cameras' (rows, cols) grids one after the other."""
        cameras: list[CameraGrid] = []
        start = 0
        for name, (rows, cols) in grids.items():
            cameras.append(CameraGrid(name, rows, cols, start))
            start += rows * cols
        return cls(tuple(cameras), n_prefix, n_suffix, n_unread)

    @cached_property
    def n_visual(self) -> int:
        """Number of visual tokens N over all cameras."""
        return sum(camera.size for camera in self.cameras)

    @property
    def length(self) -> int:
        """Length of the whole prompt in tokens."""
        return self.n_prefix + self.n_visual + self.n_suffix

    @property
    def visual(self) -> slice:
        """Slots of the visual tokens in the sequence."""
        return slice(self.n_prefix, self.n_prefix + self.n_visual)

    @property
    def suffix(self) -> slice:
        """Slots of the tokens behind the visual ones."""
        return slice(self.n_prefix + self.n_visual, self.length)

    @property
    def grids(self) -> dict[str, tuple[int, int]]:
        """Camera → (rows, cols)."""
        return {camera.name: (camera.rows, camera.cols) for camera in self.cameras}

    def patch_mean(self, images: Mapping[str, npt.NDArray[Any]]) -> FloatArray:
        """Average one-channel images over the patch of every visual token.

        Args:
            images: Camera → H×W array, H and W multiples of the camera's rows and cols.

        Returns:
            One value per visual token, float32, shape (N,).
        """
        parts = []
        for camera in self.cameras:
            image = images[camera.name]
            height, width = image.shape
            patches = image.reshape(camera.rows, height // camera.rows, camera.cols, width // camera.cols)
            parts.append(patches.mean(axis=(1, 3), dtype=np.float32).reshape(-1))
        return np.concatenate(parts)


class SkippedTokens(Enum):
    """A token that a layer does not compute is reused or pruned there."""

    REUSE = "reuse"
    """Its slot keeps the keys and values of an earlier frame (caching across frames)."""
    PRUNE = "prune"
    """It is absent: nothing attends to it (pruning within the frame)."""


@dataclass(frozen=True, eq=False)
class Decision:
    """The layer at which every visual token leaves the computation of this frame.

    ``exit_layer[i]`` is the number of decoder layers, counted from the first, that compute visual token i; from there
    on it is reused or pruned. Plain reuse knows two values: 0 (cached) and ``n_layers`` (active). VLA-Cache's layer
    schedule, and FastV's and SparseVLM's pruning, use those between.

    Attributes:
        exit_layer: int64, shape (N,), each in 0..n_layers.
        n_layers: Number of decoder layers.
        skipped: What tokens are to the layers from ``exit_layer`` on.
        recovered: bool, shape (N,): tokens recomputed although the rule would have cached them (for display).
        nominal_ratio: The cache ratio the policy aimed at, in [0, 1]; ``None`` if it aims at none.
        deltas: Added to the keys and values of the tokens that no layer computes, before the frame is run,
            (2, layers, heads, tokens, head_dim); ``None`` for nothing. A session asks the policy last of all for it.
    """

    exit_layer: IntArray
    n_layers: int
    skipped: SkippedTokens = SkippedTokens.REUSE
    recovered: BoolArray | None = None
    nominal_ratio: float | None = None
    deltas: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.exit_layer.ndim != 1 or self.exit_layer.dtype != np.int64:
            raise InputError(
                f"Decision.exit_layer must be int64 (N,), got {self.exit_layer.dtype} {self.exit_layer.shape}"
            )
        if self.exit_layer.size and (self.exit_layer.min() < 0 or self.exit_layer.max() > self.n_layers):
            raise InputError(f"Decision.exit_layer must lie in 0..{self.n_layers}")
        if self.recovered is not None and self.recovered.shape != self.exit_layer.shape:
            raise InputError(f"Decision.recovered has shape {self.recovered.shape}, exit_layer {self.exit_layer.shape}")

    @classmethod
    def dense(cls, n_visual: int, n_layers: int) -> Decision:
        """Recompute everything."""
        return cls(np.full(n_visual, n_layers, dtype=np.int64), n_layers, nominal_ratio=0.0)

    @classmethod
    def reuse(
        cls,
        cached: BoolArray,
        n_layers: int,
        *,
        recovered: BoolArray | None = None,
        nominal_ratio: float | None = None,
    ) -> Decision:
        """Reuse the ``cached`` tokens (bool, (N,)) in every layer, recompute the others in every layer."""
        exit_layer = np.where(cached, 0, n_layers).astype(np.int64)
        return cls(exit_layer, n_layers, recovered=recovered, nominal_ratio=nominal_ratio)

    @property
    def active(self) -> BoolArray:
        """Tokens computed in every layer, bool, (N,)."""
        return np.asarray(self.exit_layer == self.n_layers)

    @property
    def ratio(self) -> float:
        """Effective ratio: the share of (token, layer) pairs that is not computed, in [0, 1]."""
        return 1.0 - float(self.exit_layer.sum()) / max(1, self.exit_layer.size * self.n_layers)

    def with_active(self, tokens: BoolArray) -> Decision:
        """Make the same decision with ``tokens`` (bool, (N,)) computed in every layer as well."""
        exit_layer = np.where(tokens, self.n_layers, self.exit_layer).astype(np.int64)
        return Decision(exit_layer, self.n_layers, self.skipped, self.recovered, self.nominal_ratio)


@dataclass(frozen=True)
class AttentionProbe:
    """Attention that a rule-based policy asks the engine to compute aside.

    Attributes:
        layers: Decoder layers to probe.
        rows: ``"last"``, the last prompt token that the head reads; ``"suffix"``, all tokens behind the visual ones;
            ``"all"``, every computed row.
    """

    layers: tuple[int, ...]
    rows: str = "suffix"


@dataclass(frozen=True, eq=False)
class PolicyInput:
    """All that a policy may see when it decides about a frame. Images are in the model's own crop and size.

    Attributes:
        layout: Where the tokens are.
        n_layers: Number of decoder layers.
        instruction: The frame's instruction.
        pixels: Camera → current image, uint8, H×W×3.
        previous: Camera → the preceding frame's image.
        reference: Camera → image put together from the pixels that every token's slot was computed from.
        flow: Camera → optical flow from the preceding frame to this one, pixels, float32, H×W×2; empty when the
            session estimates none.
        age: Frames since every token's slot was computed in full, int64, (N,).
        attention: Layer → probed attention of the preceding frame, mean over heads, (rows, keys).
        rng: The session's own seeded generator: the only source of randomness.
        proprio: The robot's state as the frame tells it, in its own units, float32, (S,); ``None`` if it tells none.
    """

    layout: TokenLayout
    n_layers: int
    instruction: str
    pixels: Mapping[str, UInt8Image]
    previous: Mapping[str, UInt8Image]
    reference: Mapping[str, UInt8Image]
    flow: Mapping[str, FloatArray]
    age: IntArray
    rng: np.random.Generator
    attention: Mapping[int, torch.Tensor] = field(default_factory=dict)
    proprio: FloatArray | None = None
