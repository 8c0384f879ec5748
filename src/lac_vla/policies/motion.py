"""Motion: what did not move is reused. The obvious rule, without learning and without attention."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from lac_vla.errors import InputError
from lac_vla.policies.base import CachePolicy, cache_lowest, check_ratio, pixel_change
from lac_vla.types import Decision, PolicyInput


@dataclass(frozen=True)
class Motion(CachePolicy):
    """Reuse the tokens whose patches changed least since *their slot* was computed.

    The score is the mean absolute pixel change against the slot's own reference pixels (in 0..1, so slow drift adds
    up until it is noticed) plus the mean flow magnitude in units of the patch size.

    Attributes:
        ratio: Share of the visual tokens reused, in [0, 1].
        keep: Cameras whose tokens are recomputed in any case as long as the ratio leaves room, joined by ``+``: a
            robot's own wrist camera moves with all that it does.
    """

    ratio: float = 0.5
    keep: str = ""

    def __post_init__(self) -> None:
        check_ratio(self.ratio)

    @property
    def flow(self) -> str:
        """See :attr:`CachePolicy.flow`."""
        return "dis"

    def decide(self, inputs: PolicyInput) -> Decision:
        """See :meth:`CachePolicy.decide`."""
        score = pixel_change(inputs)
        if inputs.flow:
            speed = {
                camera.name: np.hypot(*cv2.split(inputs.flow[camera.name]))
                * (camera.rows / inputs.pixels[camera.name].shape[0])
                for camera in inputs.layout.cameras
            }
            score = score + inputs.layout.patch_mean(speed)
        grids = {camera.name: camera for camera in inputs.layout.cameras}
        above = (
            float(np.ptp(score)) + 1.0
        )  # more than between any two scores: kept tokens come first, and in their order
        for name in filter(None, self.keep.split("+")):
            if name not in grids:
                raise InputError(f"motion is to keep the camera '{name}'; the model has {sorted(grids)}")
            score[grids[name].tokens] += above
        return Decision.reuse(cache_lowest(score, self.ratio), inputs.n_layers, nominal_ratio=self.ratio)
