"""A diffusion head: draws a chunk of actions, given one hidden state.

Source: CogACT (Li et al., 2024, arXiv 2411.19650) and its released code.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lac_vla.errors import CheckpointError, InputError
from lac_vla.models.heads.base import ActionHead, Decoding, HeadContext, LossContext, Together, finite
from lac_vla.models.heads.dit import DiT, DiTConfig
from lac_vla.models.heads.guidance import Guidance, constant
from lac_vla.models.heads.sampler import Draw, Sampling, Schedule, ddim, ddpm
from lac_vla.models.heads.units import SLACK, Range, check_units, chunks_of
from lac_vla.running_chunk import RealTimeChunk
from lac_vla.transfer import upload
from lac_vla.types import FloatArray

SCHEDULE = Schedule()
GRIPPER_THRESHOLD = 0.5
"""Normalised gripper values from here on mean 1, open; below it 0, closed. Source: CogACT's released decoding."""
DRAWS = 8
"""Noisings of every chunk in the loss; the head is small beside the decoder."""


class DiffusionModel(nn.Module):
    """Draws a chunk of normalised actions, given a feature.

    Attributes:
        net: Predicts noise.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.net = DiT(config)

    def sample(self, z: torch.Tensor, sampling: Sampling, draw: Draw, guide: Guidance | None = None) -> torch.Tensor:
        """Draw a chunk, (B, horizon, action_dim), normalised and not clipped, for every feature, (B, 1, condition).

        With classifier-free guidance: Ho & Salimans, 2022, arXiv 2207.12598. ``draw`` makes noise of the actions'
        shape. What does not change from step to step is embedded once. ``guide`` draws DDIM towards a running chunk.
        """
        size, guided = len(z), sampling.guidance > 1
        if guided:  # both predictions in one batch
            z = torch.cat([z, self.net.z_embedder.uncondition.expand(size, 1, -1)])
        feature = self.net.z_embedder(z)
        visited = sampling.visited
        steps = dict(
            zip(
                visited,
                self.net.t_embedder(torch.arange(visited.start, visited.stop, visited.step, device=z.device)),
                strict=True,
            )
        )

        def denoise(x: torch.Tensor, t: int) -> torch.Tensor:
            predicted = self.net.denoise(torch.cat([x, x]) if guided else x, feature + steps[t])
            given, absent = predicted[:size], predicted[-size:]
            return absent + sampling.guidance * (given - absent)

        if sampling.method == "ddpm":
            return ddpm(denoise, draw, SCHEDULE)
        return ddim(denoise, draw, SCHEDULE, sampling.steps, guide)


class DiffusionHead(ActionHead):
    """Answers with a chunk of actions, drawn from the prompt's last hidden state.

    Its loss is the mean square error of the predicted noise; or half of that between its prediction and the dense
    pass's, the Kullback-Leibler divergence between Gaussians of unit variance around the two, in nats per value. Both
    look at chunks to which noise was added, at steps drawn anew every time; classifier-free guidance is left out.

    Args:
        model: The network; in float32 whatever the decoder's dtype, as in CogACT's evaluation: it is small, and its
            many steps would add up their roundings.
        config: Its shape.
        action_range: Units of the actions.
        sampling: How chunks are drawn; may be replaced.
        gripper: What closed and open are in the data set's units, where the statistics leave the gripper unscaled.

    Raises:
        CheckpointError: If the statistics are of another number of values than the head's actions.
    """

    def __init__(
        self,
        model: DiffusionModel,
        config: DiTConfig,
        action_range: Range,
        sampling: Sampling,
        gripper: tuple[float, float],
    ) -> None:
        if action_range.dim != config.action_dim:
            raise CheckpointError(
                f"statistics of {action_range.dim} action values, an action head of {config.action_dim}"
            )
        self.model, self.action_range, self.sampling = model, action_range, sampling
        self.horizon = config.horizon
        self.action_dim = config.action_dim
        self._shape, self._gripper = (config.horizon, config.action_dim), gripper

    guided: ClassVar[bool] = True

    @property
    def _like(self) -> torch.Tensor:
        return self.model.net.positional_embedding

    def decode(self, context: HeadContext) -> Decoding:
        """Draw a chunk; see :meth:`ActionHead.decode`. Noise is drawn on the host: a seed means the same everywhere.

        Chunks of several sessions are drawn together, one that a running chunk guides by itself: it has a gradient.

        Returns:
            The actions in the units of the data set, float32, (horizon, action_dim), the gripper closed or open; and,
            as lists, the chunk in [-1, 1] (``normalized``).
        """
        rng, like, rtc, guide = context.rng, self._like, context.rtc, None

        def draw() -> torch.Tensor:
            noise = rng.standard_normal((1, *self._shape), dtype=np.float32)
            return upload(noise, like.device).to(like.dtype)

        with nullcontext() if rtc is None else constant():
            if rtc is not None and len(rtc.prev_chunk_left_over):
                left = self.normalize_actions(rtc.padded(self.horizon)).astype(np.float32)
                guide = Guidance.of(rtc, left, like.new_empty(1, *self._shape))
            feature = context.hidden[-1:][None].to(like.dtype, copy=rtc is not None)
            if guide is not None:
                drawn = self.model.sample(feature, self.sampling, draw, guide)
        if guide is None:
            drawn = yield Together(self._sample, (feature, draw))
        normalized = np.clip(finite(drawn[0].float().cpu().numpy()), -1.0, 1.0)
        normalized[:, -1] = normalized[:, -1] >= GRIPPER_THRESHOLD
        return self.unnormalize_actions(normalized).astype(np.float32), {"normalized": normalized.tolist()}

    def _sample(self, given: Sequence[tuple[torch.Tensor, Draw]]) -> Sequence[torch.Tensor]:
        """Draw a chunk for every feature, (1, 1, condition), each with its own noise, (1, horizon, action_dim)."""

        def draw() -> torch.Tensor:
            return torch.cat([own() for _, own in given])

        return torch.split(self.model.sample(torch.cat([feature for feature, _ in given]), self.sampling, draw), 1)

    def check_rtc(self, rtc: RealTimeChunk) -> None:
        """Check a running chunk; see :meth:`ActionHead.check_rtc`."""
        super().check_rtc(rtc)
        if self.sampling.method != "ddim":
            raise InputError("a running chunk guides DDIM, not DDPM: choose the sampler 'ddim' for real-time chunking")

    def unnormalize_actions(self, normalized: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Scale what the head draws, [-1, 1], the gripper 0 closed .. 1 open, to units of the data set, (..., A)."""
        actions = self.action_range.unnormalize(normalized)
        if not self.action_range.mask[-1]:
            closed, opened = self._gripper
            actions[..., -1] = closed + (opened - closed) * actions[..., -1]
        return actions

    def normalize_actions(self, actions: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Scale units of the data set to what the head draws, not clipped, (..., A)."""
        normalized = self.action_range.normalize(actions)
        if not self.action_range.mask[-1]:
            closed, opened = self._gripper
            normalized[..., -1] = (normalized[..., -1] - closed) / (opened - closed)
        return normalized

    def targets(self, actions: FloatArray) -> npt.NDArray[np.float32]:
        """Flatten normalised chunks, float32, (T, horizon · A); behind the episode's end its last action goes on."""
        chunks = chunks_of(actions, *self._shape)
        normalized = self.normalize_actions(chunks)
        mask = self.action_range.mask
        check_units(normalized, mask)
        gripper = normalized[..., -1]
        if not mask[-1] and np.abs(gripper - 0.5).max() > 0.5 + SLACK:
            closed, opened = self._gripper
            raise InputError(
                f"the dataset's gripper runs from {actions[..., -1].min():g} to {actions[..., -1].max():g}; the "
                f"model's from {closed:g}, closed, to {opened:g}, open: convert it first"
            )
        return normalized.reshape(len(chunks), -1).clip(-1, 1).astype(np.float32)

    def loss(
        self,
        context: LossContext,
        targets: torch.Tensor,
        generator: torch.Generator,
        teacher: LossContext | None = None,
    ) -> torch.Tensor:
        """Compute the noise's error, or the divergence from the teacher, mean over values and noisings."""
        clean = targets.to(self._like.dtype).view(-1, *self._shape).repeat_interleave(DRAWS, dim=0)
        steps = torch.randint(SCHEDULE.steps, (len(clean),), generator=generator).to(clean.device)
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        noised = SCHEDULE.noised(clean, steps, noise)

        def predict(hidden: torch.Tensor) -> torch.Tensor:
            predicted: torch.Tensor = self.model.net(noised, steps, hidden.to(noised.dtype).repeat_interleave(DRAWS, 0))
            return predicted

        share = 1.0
        if teacher is not None:
            share = 0.5
            with torch.no_grad():
                noise = predict(teacher.hidden)
        return share * (predict(context.hidden) - noise).square().view(len(targets), -1).mean(dim=1)

    def fingerprint(self) -> bytes:
        """Compute what the head predicts for fixed input; see :meth:`ActionHead.fingerprint`."""
        like = self._like
        chunk = torch.linspace(-1, 1, int(np.prod(self._shape)), device=like.device, dtype=like.dtype)
        condition = self.model.net.z_embedder.linear.in_features
        feature = torch.linspace(-1, 1, condition, device=like.device, dtype=like.dtype)
        with torch.no_grad():
            answer = self.model.net(
                chunk.view(1, *self._shape), torch.zeros(1, device=like.device), feature.view(1, 1, -1)
            )
        return bytes(answer.float().cpu().numpy().tobytes())
