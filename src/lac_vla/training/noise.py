"""A camera's noise on recorded pictures, so that luck can be told from what lasts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lac_vla.types import UInt8Image


@dataclass(frozen=True)
class PixelNoise:
    """Gaussian noise, independent in every pixel and channel, as a camera's read-out adds it.

    Attributes:
        sigma: Standard deviation in grey levels; 0 for none.
        seed: Two streams of the same pictures have the same noise if their seeds are the same.
    """

    sigma: float = 0.0
    seed: int = 0

    def generator(self, episode: int) -> np.random.Generator:
        """Make the chance of an episode, to be drawn from frame by frame."""
        return np.random.default_rng([self.seed, episode])

    def add(self, images: Mapping[str, UInt8Image], rng: np.random.Generator) -> dict[str, UInt8Image]:
        """Add noise to the pictures of a frame, camera → uint8, H×W×3; rounded, and clipped to 0..255."""
        if not self.sigma:
            return dict(images)
        noisy = {}
        for camera, image in images.items():
            noise = self.sigma * rng.standard_normal(image.shape, dtype=np.float32)
            noisy[camera] = np.clip(np.rint(image + noise), 0, 255).astype(np.uint8)
        return noisy
