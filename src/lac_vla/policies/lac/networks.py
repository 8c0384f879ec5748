"""The two small networks of LAC (paper, eqs. 4-5): one scores every visual token, one chooses how many to reuse.

Both begin with a convolution as large and as wide-stepped as a patch, so that all further work is at the resolution of
the token grid: cheap enough for a CPU that also runs the model. Cameras share the weights; an offset tells them apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from lac_vla.policies.lac.config import LACConfig
from lac_vla.policies.lac.inputs import WORDS

HIDDEN = 64
"""Width of the predictor's read-out."""
AFFINE_GAIN = 10.0
"""The selector's scale and shift learn this much faster than a weight."""
SHIFT = -2.5
"""The shift that training begins with: the attention that stage I imitates is near 0 for most of a frame's tokens."""
LOGIT_LIMIT = 3.0
"""The predictor's logits stay within ± this: beyond, Gumbel-Softmax never samples another ratio, and its gradient,
and with it all learning, is gone."""

STATE_LIMIT = 5.0
"""Standardised proprioception is cut off at ± this: a state that training never saw says no more."""


class Trunk(nn.Module):
    """Images of all cameras → features at their token grids.

    Args:
        config: Sizes.
    """

    def __init__(self, config: LACConfig) -> None:
        super().__init__()
        width, side = config.width, config.patch_pixels
        self.stem = nn.Conv2d(config.channels, width, side, side)
        self.camera = nn.Parameter(torch.zeros(len(config.grids), width))
        self.text = nn.Linear(WORDS, width, bias=False) if config.language else None
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(config.depth))

    @property
    def convolutions(self) -> list[nn.Conv2d]:
        """The residual convolutions, in order."""
        return [block for block in self.blocks if isinstance(block, nn.Conv2d)]

    def forward(self, inputs: Sequence[torch.Tensor], words: torch.Tensor | None) -> list[torch.Tensor]:
        """Compute the features of every camera.

        Args:
            inputs: Per camera, (B, channels, rows · patch_pixels, cols · patch_pixels).
            words: Bags of words, (B, WORDS); read if the configuration says ``language``.

        Returns:
            Per camera, (B, width, rows, cols).
        """
        text = None
        if self.text is not None:
            if words is None:
                raise ValueError("a policy that reads the instruction was given none")
            text = self.text(words)[:, :, None, None]
        features = []
        for image, offset in zip(inputs, self.camera, strict=True):
            x = self.stem(image) + offset[:, None, None]
            x = F.gelu(x if text is None else x + text)
            for block in self.convolutions:
                x = x + F.gelu(block(x))
            features.append(x)
        return features


class Selector(nn.Module):
    """Cached Token Selector, eq. 4: S = f_sel(V), a saliency in [0, 1] for every visual token; high: recompute.

    Before the sigmoid the values are standardised over the frame's tokens, then scaled and shifted by two learned
    numbers. Their order, which is all that inference reads, stays; but they cannot all run into saturation together.

    Args:
        config: Sizes.
    """

    def __init__(self, config: LACConfig) -> None:
        super().__init__()
        self.trunk = Trunk(config)
        self.head = nn.Conv2d(config.width, 1, 1)
        self.scale = nn.Parameter(torch.ones(()) / AFFINE_GAIN)
        self.shift = nn.Parameter(torch.full((), SHIFT / AFFINE_GAIN))

    def forward(self, inputs: Sequence[torch.Tensor], words: torch.Tensor | None = None) -> torch.Tensor:
        """Score the tokens: inputs as in :meth:`Trunk.forward` → (B, N) in [0, 1]."""
        features = self.trunk(inputs, words)
        return self.standard(torch.cat([self.head(x).flatten(1) for x in features], dim=1))

    def standard(self, values: torch.Tensor) -> torch.Tensor:
        """Turn the head's values, (B, N), into saliency in [0, 1]."""
        standard = F.layer_norm(values, values.shape[1:])
        return (AFFINE_GAIN * (self.scale * standard + self.shift)).sigmoid()


class Predictor(nn.Module):
    """Cache Ratio Predictor, eq. 5: L = f_pred(V), logits over the candidate ratios R.

    Ours: it may read the proprioception, too, standardised by that of the frames trained on.

    Args:
        config: Sizes.

    Attributes:
        state_mean: Of every value of the proprioception, (S,).
        state_gain: One over its standard deviation, (S,); 0 of a value that never changed.
    """

    state_mean: torch.Tensor
    state_gain: torch.Tensor

    def __init__(self, config: LACConfig) -> None:
        super().__init__()
        self.trunk = Trunk(config)
        self.proprio = config.proprio
        if config.proprio:
            self.register_buffer("state_mean", torch.zeros(config.proprio))
            self.register_buffer("state_gain", torch.zeros(config.proprio))
        self.hidden = nn.Linear(2 * config.width * len(config.grids) + config.proprio, HIDDEN)
        self.head = nn.Linear(HIDDEN, len(config.ratios))
        self.forget()

    def forget(self) -> None:
        """Rate all ratios alike, as training begins: without a preference, and far from the logits' limits."""
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @property
    def standardised(self) -> bool:
        """It is true once it knows the proprioception's scale; and if it reads none."""
        return not self.proprio or bool(self.state_gain.any())

    def standardise(self, states: torch.Tensor) -> None:
        """Learn the proprioception's scale from that of the frames trained on, (F, S), in the robot's units."""
        deviation = states.std(dim=0, correction=0)
        moves = deviation > 1e-6 * (1 + states.abs().amax(dim=0))
        self.state_mean.copy_(states.mean(dim=0))
        self.state_gain.copy_(torch.where(moves, 1 / deviation.clamp(min=1e-12), 0.0))

    def forward(
        self, inputs: Sequence[torch.Tensor], words: torch.Tensor | None = None, states: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Rate the ratios: inputs as in :meth:`Trunk.forward`, states as in :meth:`read` → (B, C)."""
        features = self.trunk(inputs, words)
        pooled = [part for x in features for part in (x.mean(dim=(2, 3)), x.amax(dim=(2, 3)))]
        return self.read(torch.cat(pooled, dim=1), states)

    def read(self, pooled: torch.Tensor, states: torch.Tensor | None = None) -> torch.Tensor:
        """Read what is left of a frame's pictures, and the robot's state.

        Args:
            pooled: Mean and maximum of every camera's features, (B, 2 · width · cameras).
            states: Proprioception in the robot's units, (B, S); read if the configuration says ``proprio``.

        Returns:
            Logits, (B, C).
        """
        if self.proprio:
            if states is None:
                raise ValueError("a policy that reads the proprioception was given none")
            scaled = ((states - self.state_mean) * self.state_gain).clamp(-STATE_LIMIT, STATE_LIMIT)
            pooled = torch.cat([pooled, scaled], dim=1)
        logits: torch.Tensor = self.head(F.gelu(self.hidden(pooled)))
        return LOGIT_LIMIT * (logits / LOGIT_LIMIT).tanh()
