"""The visual key/value cache: what a session remembers between two camera frames.

A buffer and an indexed write. Every visual slot knows its age and the pixels it was computed from, so that staleness
is bounded and visible.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

from lac_vla.types import BoolArray, CameraGrid, Decision, TokenLayout, UInt8Image


class VisualKVCache:
    """Keys and values of one session: ``[prefix | visual tokens | suffix | appended tokens]`` per layer.

    Only the visual slots outlive a frame. The cache is warm after :meth:`commit`; from :meth:`begin` until then it is
    cold, so that a frame which fails half way can never be built upon.

    Attributes:
        keys: (layers, kv_heads, capacity, head_dim).
        values: As ``keys``.
        layout: Of the frame that the cache holds; ``None`` while it has held none.
        age: Frames since each visual slot was last computed in every layer, int64, (N,).
        pixels: Camera → last frame's image.
        reference: Camera → image of the pixels that each slot was computed from.
        instruction: Of the last frame.
        attention: Layer → watched attention of the last frame.
        rotary: Position embedding of every slot, see :meth:`lac_vla.models.base.Backbone.rotary`; ``None`` until it is
            computed for the present capacity.
        warm: Whether the visual slots may be reused.
    """

    def __init__(self, n_layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self.keys = torch.empty(n_layers, kv_heads, 0, head_dim, dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)
        self.layout: TokenLayout | None = None
        self.age: npt.NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self.pixels: Mapping[str, UInt8Image] = {}
        self.reference: dict[str, UInt8Image] = {}
        self.instruction = ""
        self.attention: dict[int, torch.Tensor] = {}
        self.rotary: tuple[torch.Tensor, torch.Tensor] | None = None
        self.warm = False

    @property
    def nbytes(self) -> int:
        """Memory held by the buffers, in bytes."""
        return 2 * self.keys.numel() * self.keys.element_size()

    def drop(self) -> None:
        """Forget the visual slots: the next frame will be computed in full."""
        self.warm = False
        self.attention = {}

    def begin(self, layout: TokenLayout, n_new: int, room: int = 0) -> None:
        """Open a frame: make room for its prompt and ``n_new`` appended tokens; cold until :meth:`commit`.

        Args:
            layout: Of the prompt.
            n_new: Tokens behind it.
            room: Where the buffers have to grow, they grow by this more for longer prompts to come, and to a multiple
                of it; 0 for just what is needed.
        """
        self.warm = False
        self.attention = {}
        needed = layout.length + n_new
        capacity = self.keys.shape[2]
        if needed > capacity:
            needed += 2 * room - needed % room if room else 0
            layers, heads, _, width = self.keys.shape
            # zeros, not empty: a masked slot of NaN would still poison the attention's weighted sum
            keys, values = (self.keys.new_zeros(layers, heads, needed, width) for _ in range(2))
            keys[:, :, :capacity], values[:, :, :capacity] = self.keys, self.values
            self.keys, self.values, self.rotary = keys, values, None

    def commit(
        self,
        layout: TokenLayout,
        pixels: Mapping[str, UInt8Image],
        instruction: str,
        decision: Decision,
        elapsed: int = 1,
    ) -> None:
        """Close a frame: its slots may be reused by the next one.

        Args:
            layout: Where the frame's tokens are.
            pixels: Camera → what the model saw.
            instruction: The frame's.
            decision: What was computed.
            elapsed: Frames by which the slots that were not computed grew older; 0 for a frame seen before.
        """
        active = decision.active
        if self.layout is None or self.layout.grids != layout.grids:  # all is active then
            self.age = np.zeros(layout.n_visual, dtype=np.int64)
            self.reference = {}
        self.age = np.where(active, 0, self.age + elapsed).astype(np.int64)
        for camera in layout.cameras:
            image = pixels[camera.name]
            if active[camera.tokens].all():
                self.reference[camera.name] = image.copy()
            else:
                copy_patches(self.reference[camera.name], image, active[camera.tokens], camera)
        self.layout, self.pixels, self.instruction, self.warm = layout, dict(pixels), instruction, True


def write(slots: torch.Tensor, positions: torch.Tensor | int, rows: torch.Tensor) -> None:
    """Put one layer's new keys, or values, into their slots.

    Args:
        slots: That layer's buffer, (kv_heads, capacity, head_dim).
        positions: Slots of the rows, int64, (rows,); or the first of them, if they stand in a row.
        rows: (kv_heads, rows, head_dim).
    """
    if isinstance(positions, torch.Tensor):
        slots.index_copy_(1, positions, rows)
    else:
        slots[:, positions : positions + rows.shape[1]] = rows


def copy_patches(target: UInt8Image, source: UInt8Image, tokens: BoolArray, camera: CameraGrid) -> None:
    """Copy the patches of ``tokens`` (bool, (rows·cols,)) from one H×W×3 image into another, in place."""
    height, width, channels = source.shape
    shape = (camera.rows, height // camera.rows, camera.cols, width // camera.cols, channels)
    chosen = tokens.reshape(camera.rows, camera.cols)
    target.reshape(shape).swapaxes(1, 2)[chosen] = source.reshape(shape).swapaxes(1, 2)[chosen]
