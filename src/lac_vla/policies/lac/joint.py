"""Both networks and all cameras in one go, for inference: the same numbers, from a third of the calls."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from lac_vla.policies.lac.config import LACConfig
from lac_vla.policies.lac.networks import Predictor, Selector


class Joint:
    """Selector and predictor as one network of twice the width, in groups, over one canvas.

    At this size a call costs more than its arithmetic. On the canvas all cameras lie side by side with an empty
    column of tokens between them, which is to the convolutions what padding is at an image's edge.

    Args:
        config: Their shape.
        selector: Its weights are copied: train it further, and make another.
        predictor: As ``selector``; ``None`` to leave it out.

    Attributes:
        alone: Whether the selector is alone.
    """

    def __init__(self, config: LACConfig, selector: Selector, predictor: Predictor | None) -> None:
        grids, side = list(config.grids.values()), config.patch_pixels
        rows, cols = max(grid[0] for grid in grids), sum(grid[1] for grid in grids) + len(grids) - 1
        lefts = [sum(grid[1] + 1 for grid in grids[:camera]) for camera in range(len(grids))]
        trunks = [selector.trunk] if predictor is None else [selector.trunk, predictor.trunk]
        self._selector, self._predictor = deepcopy(selector), deepcopy(predictor)
        self.alone = predictor is None
        self._text = [deepcopy(trunk.text) for trunk in trunks if trunk.text is not None]
        self._shape, self._stride, self._width = (config.channels, rows * side, cols * side), side, config.width
        self._sizes = [grid[0] * grid[1] for grid in grids]
        self._windows = [
            (slice(0, grid[0] * side), slice(left * side, (left + grid[1]) * side))
            for grid, left in zip(grids, lefts, strict=True)
        ]
        with torch.no_grad():
            self._stem = torch.cat([trunk.stem.weight for trunk in trunks])
            self._blocks = [
                (
                    torch.cat([part.weight for part in parts]),
                    torch.cat([_bias(part) for part in parts]),
                )
                for parts in zip(*(trunk.convolutions for trunk in trunks), strict=True)
            ]
            self._inside = torch.zeros(1, 1, rows, cols)
            self._offset = torch.zeros(1, len(self._stem), rows, cols)
            for camera, (grid, left) in enumerate(zip(grids, lefts, strict=True)):
                here = slice(0, grid[0]), slice(left, left + grid[1])
                constant = torch.cat([trunk.camera[camera] + _bias(trunk.stem) for trunk in trunks])
                self._inside[0, 0][here] = 1
                self._offset[0][:, here[0], here[1]] = constant[:, None, None]
        self._places = torch.cat(
            [
                (torch.arange(grid[0])[:, None] * cols + left + torch.arange(grid[1])).flatten()
                for grid, left in zip(grids, lefts, strict=True)
            ]
        )

    def canvas(self, frames: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Make an empty canvas, (frames, channels, H, W), and on it, as views, the places of every camera."""
        canvas = torch.zeros(frames, *self._shape)
        return canvas, [canvas[:, :, rows, cols] for rows, cols in self._windows]

    def __call__(
        self, canvas: torch.Tensor, words: torch.Tensor | None, states: torch.Tensor | None = None
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Compute every frame's saliency of tokens, (N,), and logits over the ratios, (C,), none without a predictor.

        What follows the convolutions is done frame by frame: a frame's numbers do not depend on its company.

        Args:
            canvas: From :meth:`canvas`, the inputs in place.
            words: Bags of words, (frames, WORDS), for networks that read the instruction.
            states: Proprioception, (frames, S), for a predictor that reads it.
        """
        offset = self._offset
        if self._text:
            if words is None:
                raise ValueError("a policy that reads the instruction was given none")
            rows = [torch.cat([layer(own[None]) for layer in self._text], dim=1) for own in words]
            text = torch.cat(rows)[:, :, None, None]
            offset = offset + text * self._inside
        x = F.gelu(F.conv2d(canvas, self._stem, stride=self._stride) + offset)
        groups = len(self._stem) // self._width
        for index, (weight, bias) in enumerate(self._blocks):
            x = x * self._inside if index else x  # behind the stem the empty columns are zero as they are
            x = x + F.gelu(F.conv2d(x, weight, bias, padding=1, groups=groups))
        told = [None] * len(x) if states is None else [own[None] for own in states]
        read = x.flatten(2).index_select(2, self._places)
        return [self._read(own, state) for own, state in zip(read, told, strict=True)]

    def _read(self, features: torch.Tensor, state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Read saliency and logits off one frame's features, (2 · width, N), or (width, N) without a predictor."""
        head = self._selector.head
        saliency = self._selector.standard(F.linear(features[: self._width].T, head.weight.flatten(1), head.bias).T)[0]
        if self._predictor is None:
            return saliency, saliency[:0]
        cameras = torch.split(features[self._width :], self._sizes, dim=1)
        pooled = [part for camera in cameras for part in (camera.mean(dim=1), camera.amax(dim=1))]
        return saliency, self._predictor.read(torch.cat(pooled)[None], state)[0]


def canvas_tokens(grids: Mapping[str, tuple[int, int]]) -> int:
    """Count the places on the canvas of these grids, the empty ones included."""
    return max(rows for rows, _ in grids.values()) * (sum(cols for _, cols in grids.values()) + len(grids) - 1)


def _bias(layer: nn.Conv2d) -> torch.Tensor:
    return cast(torch.Tensor, layer.bias)  # all convolutions here have one
