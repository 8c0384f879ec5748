"""The diffusion process behind actions, and the two ways back from noise.

Sources: DDPM (Ho et al., 2020, arXiv 2006.11239), DDIM (Song et al., 2021, arXiv 2010.02502); the schedule and the
strided steps are those of improved diffusion (Nichol & Dhariwal, 2021, arXiv 2102.09672), which CogACT builds on.
CogACT's predictions are never clipped.

The schedulers of diffusers (``DDIMScheduler`` and ``DDPMScheduler``, ``squaredcos_cap_v2``, no clipping) draw the same
to 1e-5 where the number of steps divides 100; for others, e.g. 3 or 7, their stride is not the official one. They would
be a large dependency in the place of two loops, and keep the schedule in float32, which the official code does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from lac_vla.checks import check_fields
from lac_vla.errors import InputError
from lac_vla.models.heads.guidance import Guidance, recording


class Denoise(Protocol):
    """Noisy actions ``x`` and their step ``t`` → the noise in them, of the same shape."""

    def __call__(self, x: torch.Tensor, t: int) -> torch.Tensor: ...  # noqa: D102


Draw: TypeAlias = Callable[[], torch.Tensor]
"""New standard normal noise of the actions' shape."""

DIFFUSION_STEPS = 100
"""Number of steps that CogACT was trained with."""


@dataclass(frozen=True)
class Schedule:
    """The amount of noise at every step is Nichol & Dhariwal's squared cosine, eq. 17.

    Attributes:
        steps: Of the process.
    """

    steps: int = DIFFUSION_STEPS

    @cached_property
    def betas(self) -> npt.NDArray[np.float64]:
        """Variance that every step adds, (steps,); at most 0.999."""
        time = np.arange(self.steps + 1) / self.steps
        signal = np.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
        return np.asarray(np.minimum(1.0 - signal[1:] / signal[:-1], 0.999))

    @cached_property
    def alpha_bar(self) -> npt.NDArray[np.float64]:
        """Share of the signal's variance that is left after every step, (steps,)."""
        return np.cumprod(1.0 - self.betas)

    def noised(self, clean: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Add noise to clean actions, (B, horizon, action_dim): the forward process, DDPM's eq. 4.

        ``t`` are the steps, int64, (B,); the noise is standard normal, of the actions' shape.
        """
        left = torch.from_numpy(self.alpha_bar).to(clean.device)[t].view(-1, 1, 1)
        return left.sqrt().to(clean.dtype) * clean + (1.0 - left).sqrt().to(clean.dtype) * noise

    @cached_property
    def posterior_variance(self) -> npt.NDArray[np.float64]:
        """Variance of step t − 1 given steps t and 0, DDPM's eq. 7, (steps,)."""
        before = np.append(1.0, self.alpha_bar[:-1])
        return np.asarray(self.betas * (1.0 - before) / (1.0 - self.alpha_bar))


def strided(total: int, steps: int) -> range:
    """List the ``steps`` evenly spaced steps, 0 among them, that an accelerated sampler visits.

    Raises:
        InputError: If no stride gives just so many.
    """
    choices = (range(0, total, stride) for stride in range(1, total + 1))
    for choice in choices:
        if len(choice) == steps:
            return choice
    raise InputError(f"{steps} steps of {total}: no stride gives that number; try 5, 10, 20 or 25")


@dataclass(frozen=True)
class Sampling:
    """Settings of the sampler. The defaults are those of CogACT's evaluation in SIMPLER.

    Attributes:
        method: ``"ddim"``, deterministic given the first noise; or ``"ddpm"``, all steps, with new noise in each.
        steps: Steps of DDIM.
        guidance: Weight of the conditional against the unconditional prediction; 1 for no guidance.

    Raises:
        InputError: If a value makes no sense.
    """

    method: Literal["ddim", "ddpm"] = "ddim"
    steps: int = 10
    guidance: float = 1.5

    def __post_init__(self) -> None:
        """Check the values."""
        check_fields(self)
        if self.method not in ("ddim", "ddpm"):
            raise InputError(f"unknown sampler {self.method!r}: choose 'ddim' or 'ddpm'")
        if self.guidance < 1:
            raise InputError(f"guidance is {self.guidance}; give at least 1, which means none")
        strided(DIFFUSION_STEPS, self.steps)

    @property
    def visited(self) -> range:
        """The diffusion steps at which noise is predicted."""
        return strided(DIFFUSION_STEPS, self.steps if self.method == "ddim" else DIFFUSION_STEPS)


def ddim_step(x: torch.Tensor, noise: torch.Tensor, now: float, then: float, clip: float | None = None) -> torch.Tensor:
    """Go one step back from noise, DDIM's eq. 12 with η = 0.

    Args:
        x: Noisy actions.
        noise: The noise that is predicted in them.
        now: Share of the signal's variance in ``x``.
        then: That in the result.
        clip: Predicted clean actions are clipped to ± this; ``None`` for not.
    """
    clean = (x - math.sqrt(1.0 - now) * noise) / math.sqrt(now)
    if clip is not None:
        clean = clean.clamp(-clip, clip)
    return math.sqrt(then) * clean + math.sqrt(1.0 - then) * noise


def guided_ddim_step(
    x: torch.Tensor, denoise: Callable[[torch.Tensor], torch.Tensor], now: float, then: float, guide: Guidance
) -> torch.Tensor:
    """Go one step of DDIM towards a running chunk: an Euler step of the flow that the process is, in other scales.

    With signal a and noise s, x / (a + s) is the flow's state at the time τ = a / (a + s), and DDIM its Euler step; so
    the guidance of flows holds, and is scaled back.

    Args:
        x: Noisy actions.
        denoise: Noisy actions → the noise in them.
        now: Share of the signal's variance in ``x``.
        then: That in the result.
        guide: What they should agree with.
    """
    signal, rest, next_signal, next_rest = (math.sqrt(share) for share in (now, 1.0 - now, then, 1.0 - then))
    scale, next_scale = signal + rest, next_signal + next_rest
    with recording():
        noised = x.clone().requires_grad_()
        noise = denoise(noised)
        added = guide.correction((noised - rest * noise) / signal, noised, signal / scale)
    stride = next_signal / next_scale - signal / scale
    return ddim_step(x, noise.detach(), now, then) + stride * next_scale * scale * added


def ddim(denoise: Denoise, draw: Draw, schedule: Schedule, steps: int, guide: Guidance | None = None) -> torch.Tensor:
    """Sample by DDIM without new noise on the way (η = 0), towards a running chunk if there is one."""
    times = strided(schedule.steps, steps)
    x = draw()
    for index in reversed(range(steps)):
        now = float(schedule.alpha_bar[times[index]])
        then = float(schedule.alpha_bar[times[index - 1]]) if index else 1.0
        if guide is None:
            x = ddim_step(x, denoise(x, times[index]), now, then)
        else:
            x = guided_ddim_step(x, partial(denoise, t=times[index]), now, then, guide)
    return x


def ddpm(denoise: Denoise, draw: Draw, schedule: Schedule) -> torch.Tensor:
    """Sample by DDPM: every step, with the posterior's variance."""
    x = draw()
    for t in reversed(range(schedule.steps)):
        beta, now = float(schedule.betas[t]), float(schedule.alpha_bar[t])
        x = (x - beta / math.sqrt(1.0 - now) * denoise(x, t)) / math.sqrt(1.0 - beta)
        if t:
            x = x + math.sqrt(float(schedule.posterior_variance[t])) * draw()
    return x
