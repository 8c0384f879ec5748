"""The input of the two networks: the motion-aware V = [I; O] (paper, Notation), and ours beyond it.

Training and inference build it with the same function, from the same resized images.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch

from lac_vla.policies.lac.config import LACConfig
from lac_vla.types import FloatArray, PolicyInput

FLOW_LIMIT = 2.0
"""Flow is clipped to this many patches per frame: beyond, all that matters is that a patch moved."""
FLOW_GAIN = 2.0
WORDS = 512
"""Buckets that the words of an instruction are hashed into."""


def resize(image: npt.NDArray[Any], rows: int, cols: int, patch_pixels: int) -> npt.NDArray[Any]:
    """Resize an H×W×C image by area to ``patch_pixels`` pixels per token side."""
    size = (cols * patch_pixels, rows * patch_pixels)
    if (image.shape[1], image.shape[0]) == size:
        return image
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA))


def flow_in_patches(flow: FloatArray, rows: int, cols: int, patch_pixels: int) -> FloatArray:
    """Convert flow in pixels, H×W×2, to token sides, resized as the images are; float32."""
    height, width = flow.shape[:2]
    scale = np.asarray([cols / width, rows / height], dtype=np.float32)
    scaled = (flow.reshape(height, -1) * np.tile(scale, width)).reshape(flow.shape)  # long rows: several times faster
    return np.asarray(resize(scaled, rows, cols, patch_pixels), dtype=np.float32)


def compose(
    config: LACConfig,
    image: torch.Tensor,
    flow: torch.Tensor | None,
    reference: torch.Tensor | None,
    age: torch.Tensor | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compose one camera's input for both networks.

    Args:
        config: Which channels there are.
        image: Pixels, uint8, (B, H, W, 3), H = rows · patch_pixels.
        flow: In token sides, (B, H, W, 2); read if ``config.flow`` is not ``"none"``.
        reference: Pixels that the slots were computed from, uint8, (B, H, W, 3); read if inputs are ``"extended"``.
        age: Of the slots, in frames, (B, rows, cols); as ``reference``.
        out: Where to put it; ``None`` for a new tensor.

    Returns:
        float32, (B, channels, H, W).
    """
    batch, height, width, _ = image.shape
    if out is None:
        out = torch.empty(batch, config.channels, height, width, device=image.device)
    out[:, :3] = image.permute(0, 3, 1, 2)
    out[:, :3].mul_(2 / 255).sub_(1)
    if config.flow != "none":
        if flow is None:
            raise ValueError("a policy with flow channels was given no flow")
        out[:, 3:5] = flow.permute(0, 3, 1, 2)
        out[:, 3:5].clamp_(-FLOW_LIMIT, FLOW_LIMIT).mul_(FLOW_GAIN)
    if config.inputs == "extended":
        if reference is None or age is None:
            raise ValueError("a policy with extended inputs was given no reference or no age")
        change, old = out[:, -4:-1], out[:, -1]
        change.copy_((image.short() - reference.short()).abs_().permute(0, 3, 1, 2))
        change.log1p_().mul_(1 / math.log(256))  # most change is faint: one grey level must still be seen
        rows, cols, side = age.shape[1], age.shape[2], config.patch_pixels
        by_patch = old.view(batch, rows, side, cols, side)
        by_patch.copy_((age.float() / config.max_age).clamp_(max=1)[:, :, None, :, None])
    return out


def from_policy_inputs(
    config: LACConfig, inputs: Sequence[PolicyInput], places: Sequence[torch.Tensor] | None = None
) -> list[torch.Tensor]:
    """Compose the input of every camera, each (frames, channels, H, W), of what sessions give a policy.

    ``places`` are tensors to put them into; ``None`` for new ones.
    """
    composed = []
    for number, camera in enumerate(inputs[0].layout.cameras):
        shape, name = (camera.rows, camera.cols, config.patch_pixels), camera.name
        image = _batch([resize(each.pixels[name], *shape) for each in inputs])
        flow = reference = age = None
        if config.flow != "none":
            flow = _batch([flow_in_patches(each.flow[name], *shape) for each in inputs])
        if config.inputs == "extended":
            reference = _batch([resize(each.reference[name], *shape) for each in inputs])
            age = _batch([each.age[camera.tokens].reshape(camera.rows, camera.cols) for each in inputs])
        composed.append(compose(config, image, flow, reference, age, None if places is None else places[number]))
    return composed


def words(instructions: Sequence[str]) -> torch.Tensor:
    """Make bags of hashed words of the instructions, rows that sum to 1, float32, (B, WORDS)."""
    bags = torch.zeros(len(instructions), WORDS)
    for row, text in enumerate(instructions):
        for word in text.lower().split():
            bags[row, zlib.crc32(word.encode()) % WORDS] += 1
    return bags / bags.sum(dim=1, keepdim=True).clamp(min=1)


def _batch(arrays: Sequence[npt.NDArray[Any]]) -> torch.Tensor:
    return torch.from_numpy(np.stack(arrays))
