"""The base of all caching policies: a frozen set of hyper-parameters, and a pure function of its inputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch

from lac_vla.errors import InputError
from lac_vla.types import AttentionProbe, BoolArray, Decision, FloatArray, PolicyInput, TokenLayout


class CachePolicy(ABC):
    """Decides, frame by frame, which visual tokens are computed and which are reused or pruned.

    A policy holds no state of a session: all that it may depend on is in the inputs, ``inputs.rng`` for randomness.
    The engine never asks it about the first frame, and raises its decision to the session's maximum age.
    """

    @property
    def flow(self) -> str:
        """The estimator of ``inputs.flow`` that it was made for, a key of :data:`lac_vla.flow.FLOWS`.

        A policy of ``"none"`` reads no flow, and no session spends time on any.
        """
        return "none"

    @property
    def adaptive(self) -> bool:
        """It is true if the policy chooses the ratio for every frame, by what it sees; a rule's ratio is set."""
        return False

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the policy's own networks per decision; 0 for a rule."""
        return 0

    def probe(self, n_layers: int) -> AttentionProbe | None:
        """Name attention to compute aside, for the next frame's :attr:`PolicyInput.attention` and for :meth:`refine`.

        Args:
            n_layers: Number of the model's decoder layers.
        """
        return None

    def check_layout(self, grids: Mapping[str, tuple[int, int]]) -> None:  # noqa: B027 - most policies take any layout
        """Refuse a model whose visual tokens are not those that this policy was made for.

        Args:
            grids: Camera → (rows, cols) of its tokens, in token order.

        Raises:
            InputError: If it was made for another layout.
        """

    def check_state(self, values: int | None) -> None:  # noqa: B027 - most policies read no state
        """Refuse a model that is told less, or more, of the robot's state than this policy reads.

        Args:
            values: Of the proprioception that the model takes; ``None`` for none.

        Raises:
            InputError: If they are others.
        """

    @abstractmethod
    def decide(self, inputs: PolicyInput) -> Decision:
        """Decide about a frame before its forward pass."""

    @property
    def slot_macs(self) -> int:
        """Multiply-accumulates of :meth:`deltas` per reused token; 0 of a policy that predicts no changes."""
        return 0

    def check_slots(self, layers: int, heads: int, width: int) -> None:  # noqa: B027 - most policies change no slot
        """Refuse a model whose slots are not those that :meth:`deltas` predicts changes of.

        Args:
            layers: Decoder layers.
            heads: Heads of keys and values.
            width: Of a head.

        Raises:
            InputError: If they are others.
        """

    def deltas(self, inputs: PolicyInput, reused: BoolArray) -> torch.Tensor | None:
        """Predict how the keys and values of reused tokens have changed since the preceding frame.

        Args:
            inputs: What was decided by.
            reused: Tokens that are reused in every layer, bool, (N,).

        Returns:
            What is added to their keys and values, (2, layers, heads, reused tokens, width); ``None`` for nothing.
        """
        return None

    def decide_together(self, inputs: Sequence[PolicyInput]) -> list[Decision] | None:
        """Decide about frames of several sessions at once, exactly as :meth:`decide` does one by one.

        Returns:
            A decision for each; ``None`` for a policy that is no faster so. Chance is drawn only once all else is done.
        """
        return None

    def refine(self, layout: TokenLayout, layer: int, attention: torch.Tensor, decision: Decision) -> Decision:
        """Change the decision in mid-forward, after a probed layer.

        Args:
            layout: Where the tokens are.
            layer: The layer just computed.
            attention: Its probed attention, mean over heads, (rows, keys). Keys are all slots of the prompt, less the
                visual tokens that are pruned so far.
            decision: The decision so far.

        Returns:
            A decision that differs at most in the exit layers, at least ``layer + 1``, of tokens still computed.
        """
        return decision


def check_ratio(ratio: float) -> None:
    """Refuse a cache ratio outside [0, 1]."""
    if not 0.0 <= ratio <= 1.0:
        raise InputError(f"a cache ratio is the share of tokens reused, in 0..1; got {ratio}")


def cache_lowest(scores: npt.NDArray[np.floating[Any]], ratio: float) -> BoolArray:
    """Cache the ``floor(N·ratio + ½)`` tokens with the lowest scores; ties go to the lower index.

    Args:
        scores: How much every token wants to be recomputed, (N,).
        ratio: Share of the tokens to cache, in [0, 1].

    Returns:
        bool, (N,): the cached tokens.
    """
    count = int(np.floor(scores.size * ratio + 0.5))
    cached = np.zeros(scores.size, dtype=np.bool_)
    cached[np.argsort(scores, kind="stable")[:count]] = True
    return cached


def pixel_change(inputs: PolicyInput) -> FloatArray:
    """Compute every token's mean absolute pixel change since its slot was computed, in 0..1, (N,)."""
    change = {
        camera: cv2.absdiff(image, inputs.reference[camera]).sum(axis=2, dtype=np.float32) / (3 * 255)
        for camera, image in inputs.pixels.items()
    }
    return inputs.layout.patch_mean(change)


def scale_count(released: float, of: int, size: int) -> int:
    """Scale a number of tokens published for ``of`` tokens to ``size``: ``floor(released·size/of + ½)``."""
    return int(np.floor(released * size / of + 0.5))


def scale_layers(released: int, n_layers: int, of: int = 32) -> int:
    """Scale a number of layers published for a decoder of ``of`` layers to ``n_layers``, rounded up.

    Rounded up, so that what a method computes in full first, to look at its attention, is at least one layer.
    """
    return -(-released * n_layers // of)
