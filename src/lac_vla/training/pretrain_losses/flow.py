"""A flow-matching expert learns velocities behind a prefix that is run once for several noisings of a chunk.

Source: π0 (Black et al., 2024, arXiv 2410.24164); SmolVLA (Shukor et al., 2025, arXiv 2506.01844).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from lac_vla.engine.layers import Segment, run_layers
from lac_vla.errors import InputError
from lac_vla.models import VLA
from lac_vla.models.heads.base import AppendRows, LossContext
from lac_vla.models.heads.flow_matching import FlowMatchingHead, add_noise
from lac_vla.models.siglip import as_uint8, token_patches
from lac_vla.models.tokenizer import SPECIALS
from lac_vla.training.config import PretrainConfig
from lac_vla.training.mixed import AppendedKV, LayerKV, MixedKV, visible_slots
from lac_vla.training.pretrain_losses.base import Batch, Keep, PretrainLoss
from lac_vla.training.pretrain_losses.transplant import fit_linear, from_mini_vit
from lac_vla.types import FloatArray, TokenLayout, UInt8Image


class FlowLoss(PretrainLoss):
    """Has the losses ``velocity`` (mean square), ``chunk``, ``hindsight``; the helpers read the state's hidden state.

    When it validates, also ``sampled``: mean distance of a drawn chunk from the recorded one, in standard deviations.
    """

    terms = ("velocity", "chunk", "hindsight")

    def __init__(self, vla: VLA, run: PretrainConfig) -> None:
        super().__init__(vla, run.chunk)
        if not isinstance(vla.head, FlowMatchingHead) or not hasattr(vla.module, "connector"):
            raise InputError(f"{vla.name} has no connector of patches, or does not draw its actions by flow matching")
        self.config: Any = vla.config
        self.head, self.draws = vla.head, run.draws
        self.layout = TokenLayout.of(vla.grids, n_prefix=0, n_suffix=0)
        self._project: Callable[[torch.Tensor], torch.Tensor] | None = None

    @staticmethod
    def pictures(vla: VLA) -> tuple[Mapping[str, int], Callable[[UInt8Image, int], UInt8Image]]:
        """See :meth:`PretrainLoss.pictures`; what the tower sees is rounded."""
        processor, config = cast(Any, vla.processor), cast(Any, vla.config)
        sizes = dict.fromkeys(vla.grids, config.vision.pixels)
        return sizes, lambda image, size: as_uint8(processor.picture(image))

    def text_ids(self, instruction: str) -> Sequence[int]:
        """See :meth:`PretrainLoss.text_ids`."""
        return cast(Sequence[int], cast(Any, self.vla.processor).prompt_ids(instruction))

    def normalize_actions(self, chunks: FloatArray) -> FloatArray:
        """See :meth:`PretrainLoss.normalize_actions`."""
        return self.head.units.normalize(chunks)

    def _known(self, start: nn.Module) -> dict[str, torch.Tensor]:
        """Take all of a model of its own kind; or tower and language model of one with a tower per camera."""
        if hasattr(start, "connector"):
            return dict(start.state_dict())
        weights, self._project = from_mini_vit(start, next(iter(self.vla.grids)), self.config.text.vocab_size)
        fitted = "model.vlm_with_expert.vlm.model.connector.modality_projection.proj.weight"
        return {**weights, fitted: self.model.connector.weight.detach()}

    @torch.no_grad()
    def settle(self, batch: Batch) -> None:
        """Let the connector give what the old model's projector gave, on average over a token's patches.

        The state stands where the end of the prompt stood, and begins as that.
        """
        if self._project is None:
            return
        end = torch.tensor(SPECIALS.index("<out>"))
        self.model.linear("state_proj").bias.copy_(self.model.text.embed_tokens(end) * self.config.text.width**0.5)
        camera = next(iter(self.vla.grids))
        patches = token_patches(self.config.vision.side, self.config.shuffle)
        features = self.model.vision(batch.images[camera])[:, patches].flatten(2).flatten(0, 1)
        targets = self._project(batch.images[camera])[:, patches].mean(dim=2).flatten(0, 1)
        self.model.connector.weight.copy_(fit_linear(features, targets).T / self.config.text.width**0.5)

    def forward(
        self, batch: Batch, keep: Keep | None, progress: float | None, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """See :meth:`PretrainLoss.forward`.

        Of every camera's tokens ``keep`` shows every second one, as on a draughtboard whose first square is at its row
        and column; the tower computes their patches alone.
        """
        state, context = self.read(batch, keep)
        chunk = batch.targets.chunk[:, : self.head.horizon]
        losses = {"velocity": self._velocity_loss(context, chunk, generator), **self.helpers(state, batch.targets)}
        if progress is None:
            losses["sampled"] = self._sampled_error(context, chunk, generator)
        return losses

    def read(self, batch: Batch, keep: Keep | None) -> tuple[torch.Tensor, LossContext]:
        """Run tower and prefix: the state's normalised last hidden states, float32, (B, width), and the rest."""
        visual, places = self._look(batch.images, keep)
        decoder, model, size = self.vla.decoder, self.model, len(batch.text)
        table = model.text.embed_tokens
        # [visual | text | state | padding]: the state stands right behind its own text.
        text = nn.functional.pad(batch.text, (0, 1))
        behind = table(text) * self.config.text.width**0.5
        proprio = nn.functional.pad(batch.proprio, (0, self.config.state_width - self.config.state_dim))
        state = model.linear("state_proj")(proprio)
        at = torch.arange(text.shape[1]) == batch.text_length[:, None]
        behind = torch.where(at[..., None], state[:, None].to(behind.dtype), behind)
        inputs = torch.cat([visual.to(behind.dtype), behind], dim=1)
        positions = torch.cat([places, self.layout.n_visual + torch.arange(text.shape[1])])
        lengths = self.layout.n_visual + batch.text_length + 1
        slots = positions.expand(size, -1)
        visible = visible_slots(decoder, self.layout, lengths, slots, slots, slots < lengths[:, None])[:, None]
        n_queries, length = text.shape[1], inputs.shape[1]
        segment = Segment(length, 0, length, mask=visible, n_queries=n_queries, final_mask=visible[..., -n_queries:, :])
        store = MixedKV(slice(0, 0), keep=True)
        hidden = run_layers(decoder.layers, inputs, decoder.rotary(positions), [segment], store).hidden
        kv, run = store.sequence, partial(self._append, store.sequence, lengths, slots)
        context = LossContext(self.layout, hidden[:, :0], kv.keys.__getitem__, kv.values.__getitem__, lengths, run)
        return decoder.norm(hidden)[torch.arange(size), batch.text_length].float(), context

    def _look(self, images: dict[str, torch.Tensor], keep: Keep | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the tokens shown, (B, tokens, width), and their places among all, int64."""
        side, cameras = self.config.side, [images[name] for name in self.vla.grids]
        shown = torch.arange(side * side)
        if keep is not None:
            shown = shown[(shown // side + shown % side) % 2 == (keep[0] + keep[1]) % 2]
        patches = token_patches(self.config.vision.side, self.config.shuffle)[shown]
        tower = self.model.vision
        features = tower.encode(tower.embed(torch.cat(cameras)), rows=patches.flatten())
        tokens = self.model.connector(features.unflatten(1, patches.shape).flatten(2)) * self.config.text.width**0.5
        places = torch.cat([shown + camera.start for camera in self.layout.cameras])
        return torch.cat(tokens.chunk(len(cameras)), dim=1), places

    def _append(self, prompts: LayerKV, lengths: torch.Tensor, slots: torch.Tensor, rows: AppendRows) -> torch.Tensor:
        """Run several chunks behind every prompt, (B · draws, n, width) → the same; they do not see each other."""
        stack, (size, n_rows) = rows.stack or self.vla.decoder, rows.embeddings.shape[:2]
        draws = size // len(lengths)
        own = lengths[:, None] + torch.arange(n_rows)
        real = torch.cat([slots < lengths[:, None], torch.ones_like(own, dtype=torch.bool)], dim=1)
        visible = visible_slots(stack, self.layout, lengths, own, torch.cat([slots, own], dim=1), real)
        before, among = visible[..., : slots.shape[1]], visible[..., slots.shape[1] :]
        apart = torch.eye(draws, dtype=torch.bool)[:, None, :, None]
        among = (among[:, None, :, None] & apart).flatten(3).flatten(1, 2)
        mask = torch.cat([before.repeat(1, draws, 1), among], dim=2)[:, None]
        cos, sin = (part.view(*own.shape, -1)[:, None].repeat(1, 1, draws, 1) for part in stack.rotary(own.flatten()))
        length, count = slots.shape[1], draws * n_rows
        segment = Segment(count, length, length + count, mask=mask, cross=rows.cross, cross_mask=mask[..., :length])
        hidden = rows.embeddings.view(len(lengths), count, -1)
        out = run_layers(stack.layers, hidden, (cos, sin), [segment], AppendedKV(prompts))
        return stack.norm(out.hidden).view(size, n_rows, -1)

    def _velocity_loss(self, context: LossContext, chunk: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        clean = self._padded(chunk).repeat_interleave(self.draws, dim=0)
        times, noised, wanted = add_noise(clean, generator)
        velocity = self.head.train_velocity(context, clean[:, 0, :0], noised, times)
        return (velocity.float() - wanted)[..., : chunk.shape[2]].square().mean()

    def _sampled_error(self, context: LossContext, chunk: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        drawn = torch.randn(self._padded(chunk).shape, generator=generator)
        for time in self.head.config.times:
            times = torch.full((len(chunk),), time)
            drawn = drawn - self.head.train_velocity(context, chunk[:, 0, :0], drawn, times) / self.head.config.steps
        return (drawn[..., : chunk.shape[2]] - chunk).abs().mean()

    def _padded(self, chunk: torch.Tensor) -> torch.Tensor:
        return nn.functional.pad(chunk, (0, self.head.config.width - chunk.shape[2]))
