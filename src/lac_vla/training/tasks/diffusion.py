"""CogACT's diffusion head as a task."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from lac_vla.errors import InputError
from lac_vla.models import CogACTBackbone
from lac_vla.models.cogact.model import SCHEDULE
from lac_vla.training.tasks.base import SLACK, check_units
from lac_vla.types import FloatArray

DRAWS = 8
"""Noisings of every chunk; the head is small beside the decoder."""


class DiffusionTask:
    """Error of the predicted noise, or how far the prediction is from that of the dense pass.

    Both losses look at chunks to which noise was added, at steps drawn anew every time. ``demo`` is the head's own
    loss, the mean square error. ``distill`` is the Kullback-Leibler divergence between Gaussians of unit variance
    around the two predictions, in nats per value; the classifier-free guidance of inference is left out.

    Args:
        model: The backbone.
    """

    n_rows = 1

    def __init__(self, model: CogACTBackbone) -> None:
        self.model, self.net = model, model.model.action_model.net
        self.shape = (model.config.head.horizon, model.config.head.action_dim)

    def targets(self, actions: FloatArray) -> npt.NDArray[np.float32]:
        """See :meth:`Task.targets`: normalised chunks, flattened; behind the episode's end its last action goes on."""
        horizon, dim = self.shape
        chunks = actions
        if actions.ndim == 2:
            steps = np.minimum(np.arange(len(actions))[:, None] + np.arange(horizon), len(actions) - 1)
            chunks = actions[steps]
        if chunks.ndim != 3 or chunks.shape[1:] != self.shape:
            raise InputError(
                f"the dataset's actions have shape {actions.shape}; the model's are chunks of {horizon} × {dim} values"
            )
        normalized = self.model.normalize_actions(chunks)
        mask = self.model.action_range.mask
        check_units(normalized, mask)
        gripper = normalized[..., -1]
        if not mask[-1] and np.abs(gripper - 0.5).max() > 0.5 + SLACK:
            closed, opened = self.model.config.gripper
            raise InputError(
                f"the dataset's gripper runs from {actions[..., -1].min():g} to {actions[..., -1].max():g}; the "
                f"model's from {closed:g}, closed, to {opened:g}, open: convert it first"
            )
        return normalized.reshape(len(chunks), -1).clip(-1, 1).astype(np.float32)

    def continuation(self, targets: torch.Tensor) -> torch.Tensor:
        """See :meth:`Task.continuation`: the prompt is all."""
        return targets.new_zeros(len(targets), 0, self.model.shape.width)

    def demo(self, hidden: torch.Tensor, targets: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """See :meth:`Task.demo`: mean over values and noisings."""
        noised, steps, noise = self._noised(targets, generator)
        return self._mean_square(self._predict(hidden, noised, steps) - noise, len(targets))

    def distill(
        self, hidden: torch.Tensor, dense: torch.Tensor, targets: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """See :meth:`Task.distill`: mean over values and noisings."""
        noised, steps, _ = self._noised(targets, generator)
        with torch.no_grad():
            truth = self._predict(dense, noised, steps)
        return 0.5 * self._mean_square(self._predict(hidden, noised, steps) - truth, len(targets))

    def fingerprint(self) -> bytes:
        """See :meth:`Task.fingerprint`: what the head predicts for fixed input."""
        like = self.net.positional_embedding
        chunk = torch.linspace(-1, 1, int(np.prod(self.shape)), device=like.device, dtype=like.dtype)
        feature = torch.linspace(-1, 1, self.model.shape.width, device=like.device, dtype=like.dtype)
        with torch.no_grad():
            answer = self.net(chunk.view(1, *self.shape), torch.zeros(1, device=like.device), feature.view(1, 1, -1))
        return bytes(answer.float().cpu().numpy().tobytes())

    def _noised(
        self, targets: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Noisy chunks (B · draws, horizon, A), their steps, and the noise; drawn on the host, the same everywhere."""
        clean = targets.to(self.net.positional_embedding.dtype).view(-1, *self.shape).repeat_interleave(DRAWS, dim=0)
        steps = torch.randint(SCHEDULE.steps, (len(clean),), generator=generator).to(clean.device)
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        return SCHEDULE.noised(clean, steps, noise), steps, noise

    def _predict(self, hidden: torch.Tensor, noised: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        predicted: torch.Tensor = self.net(noised, steps, hidden.to(noised.dtype).repeat_interleave(DRAWS, dim=0))
        return predicted

    def _mean_square(self, error: torch.Tensor, size: int) -> torch.Tensor:
        return error.square().view(size, -1).mean(dim=1)
