"""VLA-Cache: patches that did not change, and that the text does not attend to, are reused, the more the deeper.

*VLA-Cache: Efficient Vision-Language-Action Manipulation via Adaptive Token Caching*, arXiv 2502.02175. Two variants,
for the authors' code and their paper differ; a table has to say which one it shows.

``released``, as their code for OpenVLA (one camera) and OpenVLA-OFT (several, each on its own):

1. Static: cosine similarity of a patch's raw RGB values in the preceding and the current frame of at least 0.996; of
   those the 130 most similar of 256 (150 with several cameras).
2. Task-relevant: the 120 (100) tokens to which the preceding step's text attended most, at layer 15 of 32.
3. Reusable: static and not task-relevant, in raster order.
4. Schedule: the mean entropy of every layer's attention rows, scaled over the layers to 0..1 and turned over, is the
   share of the reusable tokens that the layer may leave out; upward steps from layer to layer are damped by 0.55. At
   layers 2, 6, 9 and 11 the first tokens up to that share leave the computation, at least one, and stay out. Everything
   before the first of these layers is computed in full.

``paper``: at most 100 static tokens; task-relevant is what reaches a threshold of 0.5, attention averaged over layers;
the share of a layer is the relative fall of the entropy from layer to layer, cumulated. What the paper leaves open is
decided so: the attention is averaged over all layers, and the threshold is on its range over a camera's tokens, scaled
to 0..1; tokens leave at every layer, the share cut off at 0 and 1, its gain 1, in raster order here, too.

Differences from the release: attention is computed aside, so the model itself keeps its fast kernel. The schedule's
entropies need all rows of all layers, those of the last layer included, which the engine would leave out otherwise:
in a shallow model this can cost more than the reuse saves. ``rows="suffix"``, not in the release, takes the entropies
of the text rows alone, nearly for nothing. Text rows are all tokens behind the visual ones, proprioception included.
Layers are of 32 and token numbers of 256 per camera, and scale with the model's. The release has no maximum age; the
session's ``max_age`` is this harness's, and so is the fully computed frame behind a scene cut.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from lac_vla.errors import InputError
from lac_vla.policies.base import CachePolicy, scale_count, scale_layers
from lac_vla.types import AttentionProbe, CameraGrid, Decision, FloatArray, IntArray, PolicyInput, UInt8Image

RELEVANCE_LAYER = 15
EXIT_LAYERS = (2, 6, 9, 11)


@dataclass(frozen=True)
class VLACache(CachePolicy):
    """Reuse what stayed the same in the picture and does not matter to the task. No training.

    Attributes:
        variant: ``released`` or ``paper``.
        similarity: Cosine similarity from which on a patch is static, in [0, 1].
        static: Most static tokens per 256 of a camera; ``None`` for the variant's own number.
        protect: Task-relevant tokens per 256 of a camera (``released``); ``None`` for the release's own number.
        task: Task-relevant from this share of the attention's range on, in [0, 1] (``paper``).
        growth: What is left of an upward step of the schedule, in [0, 1] (``released``).
        gain: What the cumulated fall of the entropy is multiplied by, ≥ 0 (``paper``).
        rows: Rows whose entropy makes the schedule: ``all``, or the cheaper ``suffix``.
    """

    variant: str = "released"
    similarity: float = 0.996
    static: float | None = None
    protect: float | None = None
    task: float = 0.5
    growth: float = 0.55
    gain: float = 1.0
    rows: str = "all"

    def __post_init__(self) -> None:
        if self.variant not in ("released", "paper"):
            raise InputError(f"unknown variant {self.variant!r} of VLA-Cache; choose 'released' or 'paper'")
        if self.rows not in ("all", "suffix"):
            raise InputError(f"unknown rows {self.rows!r} of VLA-Cache; choose 'all' or 'suffix'")
        for name in ("similarity", "task", "growth"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise InputError(f"VLA-Cache's {name} is {getattr(self, name)}; give a number in 0..1")
        if not 0.0 <= self.gain < float("inf"):
            raise InputError(f"VLA-Cache's gain is {self.gain}; give a number of at least 0")
        for name in ("static", "protect"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 256:
                raise InputError(f"VLA-Cache's {name} is {value}; give a number of tokens per 256, in 0..256")

    def probe(self, n_layers: int) -> AttentionProbe:
        """See :meth:`CachePolicy.probe`: the schedule compares all layers."""
        return AttentionProbe(tuple(range(n_layers)), self.rows)

    def decide(self, inputs: PolicyInput) -> Decision:
        """See :meth:`CachePolicy.decide`."""
        relevance = self._relevance(inputs)
        parts = [self._reusable(inputs, camera, relevance[camera.tokens]) for camera in inputs.layout.cameras]
        entropies = torch.stack([mean_entropy(inputs.attention[layer]) for layer in range(inputs.n_layers)])
        layers, shares = self._schedule(entropies.cpu().numpy())
        at_least = 1 if self.variant == "released" else 0
        exits = exit_layers(inputs.layout.n_visual, np.concatenate(parts), layers, shares, at_least)
        return Decision(exits, inputs.n_layers)

    def _relevance(self, inputs: PolicyInput) -> FloatArray:
        """Compute how much the text of the preceding step attended to every visual token, (N,)."""
        released = scale_layers(RELEVANCE_LAYER + 1, inputs.n_layers) - 1
        layers = [released] if self.variant == "released" else list(range(inputs.n_layers))
        maps = torch.stack([text_to_visual(inputs.attention[layer], inputs.layout.visual) for layer in layers])
        relevance: FloatArray = maps.mean(dim=0).cpu().numpy()
        return relevance

    def _reusable(self, inputs: PolicyInput, camera: CameraGrid, relevance: FloatArray) -> IntArray:
        """List the visual tokens of one camera that may be reused, in raster order."""
        similar = patch_similarity(inputs.previous[camera.name], inputs.pixels[camera.name], camera)
        several = len(inputs.layout.cameras) > 1
        own = 100 if self.variant == "paper" else 150 if several else 130
        static = static_tokens(similar, self.similarity, self._count(self.static, own, camera))
        if self.variant == "paper":
            low, high = relevance.min(), relevance.max()
            protected = np.flatnonzero(relevance - low >= self.task * (high - low))
        else:
            protected = most_attended(relevance, self._count(self.protect, 100 if several else 120, camera))
        return camera.start + np.setdiff1d(static, protected)

    @staticmethod
    def _count(asked: float | None, own: int, camera: CameraGrid) -> int:
        return scale_count(own if asked is None else asked, 256, camera.size)

    def _schedule(self, entropies: FloatArray) -> tuple[list[int], FloatArray]:
        """Get the exit layers, ascending, and every layer's share of the reusable tokens, (layers,)."""
        n_layers = len(entropies)
        if self.variant == "paper":
            return list(range(n_layers)), cumulative_schedule(entropies, self.gain)
        layers = sorted({scale_layers(layer, n_layers) for layer in EXIT_LAYERS} - {n_layers})
        return layers, damped_schedule(entropies, self.growth)


def patch_similarity(previous: UInt8Image, current: UInt8Image, camera: CameraGrid) -> FloatArray:
    """Compute the cosine similarity of every patch's raw values in two images, (rows·cols,)."""

    def patches(image: UInt8Image) -> FloatArray:
        height, width, channels = image.shape
        grid = image.reshape(camera.rows, height // camera.rows, camera.cols, width // camera.cols, channels)
        return grid.swapaxes(1, 2).reshape(camera.size, -1).astype(np.float32)

    one, other = patches(previous), patches(current)
    # A black patch has no direction: it counts as changed.
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    similarity: FloatArray = (one * other).sum(axis=1) / (norms + 1e-8)
    return similarity


def static_tokens(similarity: FloatArray, threshold: float, count: int) -> IntArray:
    """Pick the ``count`` most similar tokens among those that reach the threshold, most similar first."""
    order = np.argsort(-similarity, kind="stable")
    return order[similarity[order] >= threshold][:count]


def most_attended(relevance: FloatArray, count: int) -> IntArray:
    """Pick the ``count`` tokens with the highest relevance, highest first."""
    return np.argsort(-relevance, kind="stable")[:count]


def text_to_visual(attention: torch.Tensor, visual: slice) -> torch.Tensor:
    """Average the attention of the text rows to every visual token, (N,).

    The last rows of ``attention``, (rows, keys), are the text's. Being of the preceding frame, whose text may have
    another length than the current one, its keys tell how many: they are all tokens.
    """
    n_text = attention.shape[1] - visual.stop
    return attention[-n_text:, visual].mean(dim=0)


def mean_entropy(attention: torch.Tensor) -> torch.Tensor:
    """Compute the entropy of one layer's attention, (rows, keys), in nats, mean over the rows; a scalar."""
    return -(attention * (attention + 1e-10).log()).sum(dim=1).mean()


def damped_schedule(entropies: FloatArray, growth: float) -> FloatArray:
    """Compute the share of the reusable tokens that every layer may skip, as released; (layers,) → (layers,)."""
    shares: FloatArray = 1 - (entropies - entropies.min()) / (entropies.max() - entropies.min() + 1e-10)
    for i in range(1, shares.size):  # a step starts from the damped share of the layer before
        step = shares[i] - shares[i - 1]
        if step > 0:
            shares[i] = shares[i - 1] + growth * step
    return shares


def cumulative_schedule(entropies: FloatArray, gain: float) -> FloatArray:
    """Compute the share of the reusable tokens that every layer may skip, as in the paper; (layers,) → (layers,)."""
    before, after = entropies[:-1], entropies[1:]
    falls = np.cumsum((before - after) / np.maximum(before, 1e-10))
    shares: FloatArray = np.clip(gain * np.append(np.float32(0), falls), 0, 1)
    return shares


def exit_layers(
    n_visual: int, reusable: IntArray, layers: Iterable[int], shares: FloatArray, at_least: int
) -> IntArray:
    """Compute the exit layer of every visual token, (N,).

    The reusable tokens leave in their order at ``layers``, ascending, up to every layer's share of them, (layers of the
    model,); ``at_least`` so many leave at the first of ``layers`` in any case.
    """
    exits = np.full(n_visual, len(shares), dtype=np.int64)
    gone = 0
    for layer in layers:
        count = max(at_least, int(float(shares[layer]) * reusable.size))
        exits[reusable[gone:count]] = layer
        gone = max(gone, count)
    return exits
