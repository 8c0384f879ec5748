"""A diffusion head whose denoiser is the decoder: the noisy chunk stands in the prompt, and every step is a pass.

Source: OpenVLA-OFT (Kim et al., 2025, arXiv 2502.19645) and its released code; DDIM as in diffusers' ``DDIMScheduler``
(squared cosine, predicted actions clipped to ±1, leading steps).
"""

from __future__ import annotations

import math
from copy import deepcopy
from functools import partial

import numpy as np
import torch
from torch import nn

from lac_vla.errors import InputError
from lac_vla.models.heads.base import Decoding, HeadContext, LossContext, RerunPrompt
from lac_vla.models.heads.chunk import STOP_TOKENS, ChunkHead, ChunkMLP
from lac_vla.models.heads.sampler import Schedule, ddim_step
from lac_vla.models.heads.units import Range
from lac_vla.transfer import upload

CLIP = 1.0


class ChunkDiffusionHead(ChunkHead):
    """Draws a chunk of actions by DDIM, with a pass over the whole prompt for every step.

    Visual tokens that a policy reuses are reused in every step. The loss is the mean square error of the noise that is
    predicted in a chunk at a step drawn anew every time; or half of that between this prediction and the dense pass's.

    Args:
        model: Rows → the noise in the chunk.
        embed_noisy: Noisy values (n, 1) → placeholders' embeddings (n, width).
        horizon: Actions of a chunk.
        action_range: Units of the actions.
        schedule: Of the noise.
        steps: How many are taken.
        time_row: Row of the suffix that tells the step.

    Attributes:
        steps: As given; may be changed.
    """

    def __init__(
        self,
        model: ChunkMLP,
        embed_noisy: nn.Module,
        horizon: int,
        action_range: Range,
        schedule: Schedule,
        steps: int,
        time_row: int,
    ) -> None:
        super().__init__(horizon, model.action_dim, action_range)
        self.model, self.embed_noisy = model, embed_noisy
        self.schedule, self.steps, self._time_row = schedule, steps, time_row

    def first_suffix(self, suffix: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        """Put the first noise and step into the suffix; see :meth:`ActionHead.first_suffix`."""
        return self.put(suffix, self._draw(deepcopy(rng)), leading(self.schedule.steps, self.steps)[-1])

    def decode(self, context: HeadContext) -> Decoding:
        """Draw a chunk; see :meth:`ActionHead.decode`. Noise is drawn on the host: a seed means the same everywhere.

        Returns:
            The actions in the units of the data set, float32, (horizon, action_dim); and, as lists, the chunk in
            [-1, 1] (``normalized``).
        """
        times, left = leading(self.schedule.steps, self.steps), self.schedule.alpha_bar
        x, hidden = self._draw(context.rng), context.hidden
        for index in reversed(range(len(times))):
            noise = self.model(self.rows(hidden))
            x = ddim_step(x, noise, float(left[times[index]]), float(left[times[index - 1]]) if index else 1.0, CLIP)
            if index:
                hidden = yield RerunPrompt(partial(self.put, chunk=x, step=times[index - 1]))
        # Noise that is infinite is not lost when the clean chunk is clipped: the last step adds 0 · noise, NaN then.
        normalized = x.float().cpu().numpy()
        return self.unnormalize_actions(normalized), {"normalized": normalized.tolist()}

    def loss(
        self,
        context: LossContext,
        targets: torch.Tensor,
        generator: torch.Generator,
        teacher: LossContext | None = None,
    ) -> torch.Tensor:
        """Compute the noise's error, or the divergence from the teacher; see :meth:`ActionHead.loss`."""
        clean = targets.view(-1, *self.shape)
        steps = torch.randint(self.schedule.steps, (len(clean),), generator=generator)
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        noised = self.schedule.noised(clean, steps.to(clean.device), noise)

        def predict(read: LossContext) -> torch.Tensor:
            if read.rerun is None:
                raise InputError("the noise is predicted in passes of its own: this loss needs a context with rerun")
            hidden = read.rerun(lambda number, suffix: self.put(suffix, noised[number], int(steps[number])))
            predicted: torch.Tensor = self.model(hidden)
            return predicted.to(targets.dtype)

        share = 1.0
        if teacher is not None:
            share = 0.5
            with torch.no_grad():
                noise = predict(teacher)
        return share * (predict(context) - noise).square().flatten(1).mean(dim=1)

    def fingerprint(self) -> bytes:
        """Compute what the MLP makes of fixed rows; see :meth:`ActionHead.fingerprint`."""
        return self.model.fingerprint(self.n_rows)

    def put(self, suffix: torch.Tensor, chunk: torch.Tensor, step: int) -> torch.Tensor:
        """Put a noisy chunk, (horizon, A), and its step into an embedded suffix, (n_suffix, width)."""
        edited = suffix.clone()
        edited[self._time_row] = upload(time_embedding(step, suffix.shape[1]), suffix.device).to(suffix.dtype)
        edited[-self.n_rows - STOP_TOKENS : -STOP_TOKENS] = self.embed_noisy(chunk.reshape(-1, 1).to(suffix))
        return edited

    def _draw(self, rng: np.random.Generator) -> torch.Tensor:
        weight = self.model.fc2.weight
        return upload(rng.standard_normal(self.shape, dtype=np.float32), weight.device).to(weight.dtype)


def leading(total: int, steps: int) -> range:
    """List the steps that are visited, as diffusers' leading spacing does: 0 first, then every (total // steps)-th.

    Raises:
        InputError: If there are not so many steps.
    """
    if not 1 <= steps <= total:
        raise InputError(f"{steps} diffusion steps: the model was trained with {total}; give 1 to {total}")
    return range(0, steps * (total // steps), total // steps)


def time_embedding(step: int, width: int) -> torch.Tensor:
    """Embed a diffusion step by sines, then cosines, of geometric frequencies 1 … 1/10000, (width,)."""
    frequencies = torch.exp(torch.arange(width // 2) * (-math.log(10000.0) / (width // 2 - 1)))
    return torch.cat([(step * frequencies).sin(), (step * frequencies).cos()])
