"""A frozen model over stored frames: its decoder runs on the embeddings that were computed once."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from lac_vla.models import VLA
from lac_vla.training.mixed import LayerKV, MixedOutput, mixed_forward
from lac_vla.training.precision import autocast
from lac_vla.training.store import FrameStore
from lac_vla.training.tower import VisionOutput
from lac_vla.types import IntArray, PolicyInput


class StoredModel:
    """Runs a frozen model's decoder over stored frames, dense or over slots of earlier ones.

    Args:
        vla: The frozen model; its weights should want no gradient. Its head has the task loss.
        store: The frames.
        exact: Whether the model multiplies in its own dtype, as at inference, and not in a faster one.

    Attributes:
        vla: As given.
        store: As given.
        exact: As given.
        device: The model's.
        episode: Of every frame, its number in the store, (F,).
    """

    def __init__(self, vla: VLA, store: FrameStore, *, exact: bool = False) -> None:
        self.vla, self.store, self.exact, self.device = vla, store, exact, vla.device
        self.episode = np.repeat(np.arange(len(store.start)), store.stop - store.start)

    def decode(
        self,
        frames: IntArray,
        mask: torch.Tensor | None = None,
        old: LayerKV | None = None,
        probe_layers: tuple[int, ...] = (),
        vision: VisionOutput | None = None,
        compact: bool = False,
    ) -> MixedOutput:
        """Run the decoder over the prompts of some frames and the rows forced behind them, :func:`mixed_forward`.

        The visual tokens are the stored ones, or those of ``vision``.
        """
        store, head, dtype = self.store, self.vla.head, self.vla.dtype
        order = np.asarray(frames)
        visual = self._stored(order) if vision is None else vision.visual
        suffix = self.load(store.suffix, order).to(dtype)
        lengths = torch.from_numpy(store.suffix_length[order]).to(self.device)
        with torch.no_grad():
            answer = head.forced(self.load(store.targets, order))
            prefix = torch.from_numpy(store.prefix).to(self.device, dtype).expand(len(order), -1, -1)
            tail = suffix  # the sequence is [prefix | visual | suffix | forced rows | padding]
            if answer is not None:
                tail = F.pad(suffix, (0, 0, 0, answer.shape[1]))
                places = lengths[:, None] + torch.arange(answer.shape[1], device=self.device)
                tail = tail.scatter(1, places[..., None].expand_as(answer), answer.to(dtype))
        embeddings = torch.cat([prefix, visual, tail], dim=1)  # differentiable: a tower that reuses depends on the mask
        layout, rows = store.layout, {"n_rows": head.n_rows, "n_before": head.n_before}
        whole = layout.visual.stop + lengths
        with nullcontext() if self.exact else autocast(self.device):
            return mixed_forward(
                self.vla,
                embeddings,
                layout,
                whole,
                **rows,
                mask=mask,
                old=old,
                probe_layers=probe_layers,
                compact=compact,
            )

    def refresh(
        self, frames: IntArray, active: torch.Tensor, reference: list[torch.Tensor], age: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Update reference pixels and ages as a session does."""
        pixels, ages, side = [], [], self.store.patch_pixels
        for camera, before, old in zip(self.store.layout.cameras, reference, age, strict=True):
            fresh = active[:, camera.tokens].view(-1, camera.rows, camera.cols)
            large = fresh.repeat_interleave(side, 1).repeat_interleave(side, 2)[..., None]
            pixels.append(torch.where(large, self.pixels(camera.name, frames), before))
            ages.append(torch.where(fresh, torch.zeros_like(old), old + 1))
        return pixels, ages

    def policy_input(
        self, frame: int, reference: list[torch.Tensor], age: torch.Tensor, rng: np.random.Generator
    ) -> PolicyInput:
        """Make what a policy decides by; the pictures are as small as those that are stored.

        Args:
            frame: Not an episode's first.
            reference: Of every camera, the pixels that its slots were computed from, uint8, (H, W, 3).
            age: Of every slot, in frames, (N,).
            rng: Of the session.
        """
        store = self.store
        return PolicyInput(
            layout=store.layout,
            n_layers=self.vla.n_layers,
            instruction=store.instructions[self.episode[frame]],
            pixels={name: np.asarray(images[frame]) for name, images in store.images.items()},
            previous={name: np.asarray(images[frame - store.stride]) for name, images in store.images.items()},
            reference={name: old.cpu().numpy() for name, old in zip(store.grids, reference, strict=True)},
            flow={name: store.patch_pixels * flow[frame].astype(np.float32) for name, flow in store.flow.items()},
            age=age.long().cpu().numpy(),
            rng=rng,
            proprio=store.state[frame] if store.state.size else None,
        )

    def pixels(self, camera: str, frames: IntArray) -> torch.Tensor:
        """Load a camera's pictures as the networks see them, uint8, (B, H, W, 3)."""
        return self.load(self.store.images[camera], frames)

    def load(self, array: Any, frames: IntArray) -> torch.Tensor:
        """Load some frames of one of the store's arrays, (B, …)."""
        return torch.from_numpy(np.asarray(array[frames])).to(self.device)

    def _stored(self, frames: IntArray) -> torch.Tensor:
        """Load the embeddings of the visual tokens as a whole tower gives them, (B, N, width)."""
        return self.load(self.store.visual, frames).to(self.vla.dtype)
