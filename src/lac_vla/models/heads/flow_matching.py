"""Flow matching: a chunk of actions is drawn from noise by following a learned velocity, in a few Euler steps.

Source: π0 (Black et al., 2024, arXiv 2410.24164), after Lipman et al., 2022, arXiv 2210.02747.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Generator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812

from lac_vla.checks import check_fields
from lac_vla.errors import CheckpointError, InputError
from lac_vla.models.heads.base import ActionHead, AppendRows, Decoding, HeadContext, LossContext
from lac_vla.models.heads.guidance import Guidance, constant, recording
from lac_vla.models.heads.units import check_units
from lac_vla.models.lerobot_layout import Units
from lac_vla.transfer import upload
from lac_vla.types import FloatArray, Frame

DRAWS = 2
"""Noisings of every chunk in the loss; an expert is small beside its prefix."""
LARGEST = 2**16
"""Actions, values and steps that a head may have at most."""
DEVIATIONS = 4.0
"""Action values beyond as many standard deviations count as outside the statistics' range."""
TIME_POWER, TIME_SCALE, TIME_OFFSET = 1.5, 0.999, 0.001
"""Times of training are scale · x + offset with x of a Beta(power, 1) distribution."""

Velocity: TypeAlias = Generator[AppendRows, torch.Tensor, torch.Tensor]
"""Yields rows, is sent their normalised last hidden states; returns velocities, float32, (horizon, width)."""


@dataclass(frozen=True)
class FlowConfig:
    """A flow-matching head.

    Attributes:
        horizon: Actions of a chunk.
        width: Values of an action as the model takes them; those of the robot come first, zeros behind.
        steps: Euler steps.
        min_period: Shortest period of the time embedding.
        max_period: Longest.

    Raises:
        CheckpointError: If a number is not positive, or so large that no frame would end.
    """

    horizon: int
    width: int = 32
    steps: int = 10
    min_period: float = 0.004
    max_period: float = 4.0

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_fields(self, CheckpointError)
        sizes = (self.horizon, self.width, self.steps)
        if min(sizes) < 1 or max(sizes) > LARGEST or not 0 < self.min_period < self.max_period:
            raise CheckpointError(f"a flow-matching head cannot have {self}")

    @property
    def times(self) -> tuple[float, ...]:
        """The times at which an Euler step looks at the velocity: 1, 1 − 1/steps, …."""
        return tuple(1.0 + step * (-1.0 / self.steps) for step in range(self.steps))


def time_embedding(times: torch.Tensor, width: int, min_period: float, max_period: float) -> torch.Tensor:
    """Embed times as sines and cosines of geometrically spaced periods; computed in float64.

    Args:
        times: (...), rounded to float32 before.
        width: Of the embedding, even.
        min_period: Shortest period.
        max_period: Longest.

    Returns:
        float32, (..., width): the sines, then the cosines.
    """
    share = torch.linspace(0.0, 1.0, width // 2, dtype=torch.float64, device=times.device)
    period = min_period * (max_period / min_period) ** share
    angle = times.float().double()[..., None] * (1.0 / period * 2 * math.pi)
    return torch.cat([angle.sin(), angle.cos()], dim=-1).float()


def add_noise(clean: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw what a velocity is learned from, for chunks of normalised actions, (B, horizon, width).

    Returns:
        Times, (B,); the chunks with as much noise in them, and the velocities there, as ``clean``.
    """
    uniform = torch.rand(len(clean), generator=generator).to(clean)
    times = uniform ** (1 / TIME_POWER) * TIME_SCALE + TIME_OFFSET
    noise = torch.randn(clean.shape, generator=generator).to(clean)
    share = times[:, None, None]
    return times, share * noise + (1 - share) * clean, noise - clean


class FlowMatchingHead(ActionHead):
    """Answers with a chunk of actions, drawn by Euler steps from noise at time 1 to actions at time 0.

    Its loss is the mean square error of the velocity (noise − actions) at random times between the two; or half of that
    between its velocity and the dense pass's, the Kullback-Leibler divergence between Gaussians of unit variance around
    the two, in nats per value.

    Args:
        config: Its shape.
        units: Units of the actions.

    Attributes:
        config: As given.
        units: As given.

    Raises:
        CheckpointError: If the robot's actions have more values than the model's.
    """

    reads: ClassVar[Literal["hidden", "kv"]] = "kv"
    guided: ClassVar[bool] = True

    def __init__(self, config: FlowConfig, units: Units) -> None:
        if units.dim > config.width:
            raise CheckpointError(f"actions of {units.dim} values, a head of {config.width}")
        self.config, self.units = config, units
        self.horizon = self.max_new_tokens = config.horizon
        self.action_dim = units.dim

    @property
    @abstractmethod
    def like(self) -> torch.Tensor:
        """Any weight of the head: noise is drawn for its device."""

    @abstractmethod
    def begin(self, context: HeadContext) -> Any:
        """Compute what all steps of a frame share; for :meth:`velocity`."""

    @abstractmethod
    def velocity(self, shared: Any, noised: torch.Tensor, step: int) -> Velocity:
        """Compute the velocity at one Euler step.

        Args:
            shared: From :meth:`begin`.
            noised: The chunk so far, float32, (horizon, width).
            step: Number of the step.
        """

    @abstractmethod
    def train_velocity(
        self, context: LossContext, states: torch.Tensor, noised: torch.Tensor, times: torch.Tensor
    ) -> torch.Tensor:
        """Compute velocities behind a batch of prompts.

        Args:
            context: What may be read.
            states: What :meth:`with_states` put before the targets, (B, n).
            noised: (B, horizon, width).
            times: (B,).

        Returns:
            float32, (B, horizon, width).
        """

    def decode(self, context: HeadContext) -> Decoding:
        """Draw a chunk; see :meth:`ActionHead.decode`. Noise is drawn on the host: a seed means the same everywhere.

        Returns:
            The actions in the robot's own units, float32, (horizon, action_dim); and, as lists, the chunk in the
            model's (``normalized``).
        """
        shape = self.config.horizon, self.config.width
        noise = context.rng.standard_normal(shape, dtype=np.float32)
        chunk = upload(noise, self.like.device)
        guide, rtc = None, context.rtc
        with nullcontext() if rtc is None else constant():
            if rtc is not None and len(rtc.prev_chunk_left_over):
                left = self.normalized_actions(rtc.padded(self.horizon), context.frame)
                guide = Guidance.of(rtc, left, chunk)
            shared = self.begin(context)
        for step in range(self.config.steps):
            if guide is None:
                velocity = yield from self.velocity(shared, chunk, step)
            else:
                velocity = yield from self._guided_velocity(shared, chunk, step, guide)
            chunk = chunk + (-1.0 / self.config.steps) * velocity
        normalized = chunk[:, : self.units.dim].cpu().numpy()
        return self.robot_actions(normalized, context.frame), {"normalized": normalized.tolist()}

    def _guided_velocity(self, shared: Any, chunk: torch.Tensor, step: int, guide: Guidance) -> Velocity:
        """Compute the velocity that a running chunk guides; its sign is that of noise − actions."""
        time = self.config.times[step]
        with recording():
            noised = chunk.clone().requires_grad_()
            run = self.velocity(shared, noised, step)
            rows = next(run)
        while True:
            hidden = yield rows
            with recording():
                try:
                    rows = run.send(hidden)
                except StopIteration as done:
                    velocity: torch.Tensor = done.value
                    return velocity.detach() - guide.correction(noised - time * velocity, noised, 1.0 - time)

    def normalized_actions(self, actions: FloatArray, frame: Frame) -> FloatArray:
        """Map a chunk in the robot's own units to the model's, (horizon, action_dim): the way back."""
        return self.units.normalize(actions)

    def robot_actions(self, normalized: FloatArray, frame: Frame) -> FloatArray:
        """Map a chunk to the robot's own units, (horizon, action_dim)."""
        return self.units.unnormalize(normalized)

    def targets(self, actions: FloatArray) -> npt.NDArray[np.float32]:
        """Flatten normalised chunks, float32, (T, horizon · action_dim); behind the episode's end its last goes on."""
        return self.normalized(self.chunks(actions))

    def chunks(self, actions: FloatArray) -> FloatArray:
        """Cut an episode's actions into chunks, (T, horizon, action_dim).

        Raises:
            InputError: If they are of another number of values.
        """
        horizon, dim = self.config.horizon, self.units.dim
        chunks = actions
        if actions.ndim == 2:
            at = np.minimum(np.arange(len(actions))[:, None] + np.arange(horizon), len(actions) - 1)
            chunks = actions[at]
        if chunks.ndim != 3 or chunks.shape[1:] != (horizon, dim):
            raise InputError(
                f"the dataset's actions have shape {actions.shape}; the model's are chunks of {horizon} × {dim} values"
            )
        return chunks

    def normalized(self, chunks: FloatArray) -> npt.NDArray[np.float32]:
        """Map chunks to the model's units, and flatten them, (T, horizon · action_dim).

        Raises:
            InputError: If they mostly lie outside the statistics' range, or are not finite.
        """
        rows = self.units.normalize(chunks).reshape(len(chunks), -1)
        if not np.isfinite(rows).all():
            raise InputError("the dataset's actions hold NaN or infinity, or the statistics are another data set's")
        check_units(rows / (DEVIATIONS if self.units.centred else 1.0), np.ones(rows.shape[1], dtype=np.bool_))
        return rows

    def loss(
        self,
        context: LossContext,
        targets: torch.Tensor,
        generator: torch.Generator,
        teacher: LossContext | None = None,
    ) -> torch.Tensor:
        """Compute the velocity's error, or the divergence from the teacher, mean over values and noisings."""
        config, dim = self.config, self.units.dim
        n_values = config.horizon * dim
        precise = torch.promote_types(self.like.dtype, torch.float32)
        n_states = targets.shape[1] - n_values
        states, clean = targets[:, :n_states].to(precise), targets[:, n_states:].to(precise)
        clean = F.pad(clean.view(-1, config.horizon, dim), (0, config.width - dim))
        total = torch.zeros_like(clean[:, 0, 0])
        for _ in range(DRAWS):
            times, noised, wanted = add_noise(clean, generator)
            if teacher is not None:
                with torch.no_grad():
                    wanted = self.train_velocity(teacher, states, noised, times)
            error = self.train_velocity(context, states, noised, times) - wanted
            total = total + error[..., :dim].square().mean(dim=(1, 2)) / DRAWS
        return total if teacher is None else 0.5 * total
