"""What the bundled VLA learns from a frame: its action tokens, and two helpers that exist in training only.

Token cross-entropy alone localises slowly on little data. Two read-outs of the last prompt token's hidden state make
the difference (they cost nothing at inference and are not part of the saved model): the next actions as a chunk, by
L1; and *hindsight*: where the hand is now, where it will close and where it will open again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from lac_vla.models.llama import LlamaDecoder
from lac_vla.models.prismatic.conv import Keep
from lac_vla.models.prismatic.model import PrismaticVLA
from lac_vla.types import TokenLayout

ACTION_DIMS = 7
HINDSIGHT_VALUES = 9  # three positions


@dataclass(frozen=True, eq=False)
class Batch:
    """Demonstration frames, ready for the model.

    Attributes:
        images: Camera → normalised pixels, float32, (B, 3, H, W).
        shifts: Camera → whole pixels by which its content was moved down and right, (B, 2).
        proprio: Normalised, (B, S).
        text: Prompt token ids behind the visual tokens, right-padded, (B, T).
        text_length: Their true lengths, (B,).
        action: Token id of every action dimension, (B, A).
        chunk: Next actions, normalised, (B, H, A).
        hindsight: Normalised positions, (B, 3, 3).
        ahead: Which of them count, (B, 3).
    """

    images: dict[str, torch.Tensor]
    shifts: dict[str, torch.Tensor]
    proprio: torch.Tensor
    text: torch.Tensor
    text_length: torch.Tensor
    action: torch.Tensor
    chunk: torch.Tensor
    hindsight: torch.Tensor
    ahead: torch.Tensor


class Objective(nn.Module):
    """The model with its training-only heads.

    Args:
        model: The VLA.
        chunk: Actions that the chunk head predicts.
    """

    def __init__(self, model: PrismaticVLA, chunk: int) -> None:
        super().__init__()
        self.model = model
        config = model.config
        width, self.dims = config.width, ACTION_DIMS
        self.chunk_head = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, chunk * self.dims))
        self.hindsight_head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, HINDSIGHT_VALUES))
        self.n_bins = config.n_action_bins - 1
        self.last_id = config.vocab_size - 1  # means bin 0; smaller ids mean higher bins
        self.layout = TokenLayout.of(model.vision_backbone.grids, n_prefix=1, n_suffix=0)

    def forward(
        self, batch: Batch, keep: Keep | None, sigma: float, noise: float, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """Losses of a batch.

        Args:
            batch: The frames.
            keep: Row offset, column offset and stride of the visual tokens kept of the first camera (coarse phase), at
                their own positions; ``None`` for all.
            sigma: Width of the soft targets, in bins.
            noise: Share of the teacher-forced action tokens replaced by chance.
            generator: Of that chance.

        Returns:
            Scalars ``tokens`` (nats), ``chunk``, ``hindsight`` (normalised L1), and ``action_error`` (mean distance of
            the most likely bin from the true one, in bins; no gradient).
        """
        model, size, dims = self.model, batch.action.shape[0], self.dims
        embed = model.language_model.get_input_embeddings()
        kept = {} if keep is None else {self.layout.cameras[0].name: keep}
        visual = model.projector(model.vision_backbone(batch.images, kept, batch.shifts))
        shown = batch.action
        if noise:
            chance = self.last_id - torch.randint(self.n_bins, shown.shape, generator=generator)
            shown = torch.where(torch.rand(shown.shape, generator=generator) < noise, chance, shown)
        # [BOS | visual | proprio | text | action tokens but the last | padding]: under a causal mask, padding behind
        # everything that counts changes nothing.
        ids = F.pad(batch.text, (0, dims - 1))
        ids = ids.scatter(1, batch.text_length[:, None] + torch.arange(dims - 1), shown[:, :-1])
        parts = [embed(torch.full((size, 1), model.config.bos_id)), visual]
        if model.proprio_projector is not None:
            parts.append(model.proprio_projector(batch.proprio)[:, None])
        parts.append(embed(ids))
        inputs = torch.cat(parts, dim=1)
        behind = inputs.shape[1] - 1 - visual.shape[1]
        hidden = self._decode(inputs, self._positions(keep, behind))
        first_text = inputs.shape[1] - ids.shape[1]
        rows = (first_text + batch.text_length - 1)[:, None] + torch.arange(dims)
        read = hidden[torch.arange(size)[:, None], rows]  # (B, A, width): the row before every action token

        bins = torch.arange(self.n_bins)
        truth = self.last_id - batch.action
        widths = torch.full((dims, 1), sigma)
        widths[-1] = 0.5  # the gripper knows open and closed only
        target = torch.softmax(-0.5 * ((bins - truth[..., None]) / widths) ** 2, dim=-1)
        logits = model.language_model.lm_head(read).float().log_softmax(dim=-1)[..., self.last_id - bins]
        prompt_end = read[:, 0].float()
        hindsight = (self.hindsight_head(prompt_end).float().view(size, 3, 3) - batch.hindsight).abs().mean(dim=-1)
        with torch.no_grad():
            error = (logits.argmax(dim=-1) - truth).abs().float().mean()
        return {
            "tokens": -(target * logits).sum(dim=-1).mean(),
            "chunk": (self.chunk_head(prompt_end).float().view_as(batch.chunk) - batch.chunk).abs().mean(),
            "hindsight": (hindsight * batch.ahead).sum() / batch.ahead.sum().clamp(min=1),
            "action_error": error,
        }

    def _positions(self, keep: Keep | None, behind: int) -> torch.Tensor:
        """Sequence positions of the tokens shown, of which ``behind`` follow the visual ones."""
        shown = []
        for index, camera in enumerate(self.layout.cameras):
            grid = torch.arange(camera.size).view(camera.rows, camera.cols) + camera.start
            if keep is not None and index == 0:
                grid = grid[keep[0] :: keep[2], keep[1] :: keep[2]]
            shown.append(grid.flatten() + 1)
        return torch.cat([torch.zeros(1, dtype=torch.long), *shown, torch.arange(behind) + 1 + self.layout.n_visual])

    def _decode(self, inputs: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The causal decoder over whole sequences, (B, length, width) → same."""
        decoder = LlamaDecoder(self.model.language_model)
        rotary = decoder.rotary(positions)
        grouped = decoder.shape.kv_width != decoder.shape.width
        hidden = inputs
        for layer in decoder.layers:
            query, key, value = layer.qkv(hidden, rotary)
            # In float32: on a CPU the backward pass of attention is several times slower in bfloat16.
            with torch.autocast(hidden.device.type, enabled=False):
                attended = F.scaled_dot_product_attention(
                    query.float(), key.float(), value.float(), is_causal=True, enable_gqa=grouped
                )
            hidden = layer.finish(hidden, attended)
        return decoder.norm(hidden)
