"""The cost of a frame in multiply-accumulates (MACs), FLOPs = 2 × MACs; and the memory that a process needed.

The decoder is counted analytically, as in the paper's equations 13-14, from the decision that was really taken: every
row of a layer pays 2D² + 2D·D_kv for its projections, 3DM for the gated feed-forward network (three matrices, where
the paper's formula has two) and 2·D·slots for attention, which counts the masked half of a causal square too. In the
last layer only the suffix pays all that; the other rows leave their keys and values, 2D·D_kv, and are done, unless the
layer was run in full: stock transformers does so, and a policy that probes all of its rows makes us do so. Attention
that a policy probes is computed aside, beside the kernel that computes the model: D·slots per probed row. Towers,
projectors and heads (what turns hidden states into the action: the output matrix for tokens; all steps of a diffusion
head, guidance included) are counted by torch's own counter, once; so is RAFT's optical flow. DIS, the other flow, has
no matrix products and counts as 0: what it takes shows in the time of the stage ``flow`` alone.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lac_vla.engine.step_info import StepInfo
from lac_vla.models.heads.base import AppendRows, HeadContext, alone
from lac_vla.models.protocols import DecoderShape, SplitsStems
from lac_vla.models.vla import VLA
from lac_vla.types import AttentionProbe, BoolArray, Decision, Frame, SkippedTokens, TokenLayout


def layer_macs(shape: DecoderShape, rows: int, slots: int, n_queries: int | None = None) -> int:
    """Count the MACs of one block for ``rows`` rows, ``n_queries`` of which (all by default) see ``slots`` slots."""
    weights = 2 * shape.width * shape.queries + 3 * shape.width * shape.ffn
    n_queries = rows if n_queries is None else n_queries
    return rows * 2 * shape.width * shape.kv_width + n_queries * (weights + 2 * shape.queries * slots)


def prefill_macs(
    shape: DecoderShape, layout: TokenLayout, decision: Decision, draft: int = 0, *, n_queries: int | None = None
) -> int:
    """Count the MACs of a prompt under a decision.

    ``draft`` tokens ride along behind it; ``n_queries`` of its rows have queries in the last layer, ``None``: all.
    """
    total = 0
    for index in range(shape.layers):
        computed, slots = _rows_and_slots(layout, decision, index)
        total += layer_macs(shape, computed + draft, slots + draft, n_queries if index == shape.layers - 1 else None)
    return total


def probe_macs(shape: DecoderShape, layout: TokenLayout, decision: Decision, probe: AttentionProbe | None) -> int:
    """Count the MACs of attention computed aside for a policy: probed rows × slots × width, per probed layer."""
    if probe is None:
        return 0
    total = 0
    for index in probe.layers:
        computed, slots = _rows_and_slots(layout, decision, index)
        rows = {"last": 1, "suffix": layout.n_suffix, "all": computed}[probe.rows]
        total += rows * slots * shape.queries
    return total


def decode_macs(shape: DecoderShape, layout: TokenLayout, decision: Decision, passes: Sequence[tuple[int, int]]) -> int:
    """Count the MACs of the layers for the decoding passes behind a prompt of which a decision was computed.

    A pass is its first and one-past-last appended token.
    """
    total = 0
    for index in range(shape.layers):
        _, slots = _rows_and_slots(layout, decision, index)
        for start, stop in passes:
            cross = index in shape.cross
            total += layer_macs(shape, stop - start, slots if cross else slots + stop)
            total -= 2 * shape.width * shape.kv_width * (stop - start) if cross else 0
    return total


def _rows_and_slots(layout: TokenLayout, decision: Decision, layer: int) -> tuple[int, int]:
    """Count the rows computed in a layer, and the slots that exist there."""
    rows = layout.n_prefix + layout.n_suffix + int(np.count_nonzero(decision.exit_layer > layer))
    return rows, layout.length if decision.skipped is SkippedTokens.REUSE else rows


def count_macs(work: Callable[[], Any]) -> int:
    """Count the MACs of anything, by torch's operator counter.

    Attention runs in matrix products meanwhile: there are kernels that the counter does not know, the CPU's for one.
    """
    with FlopCounterMode(display=False) as counter, torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):
        work()
    return int(counter.get_total_flops()) // 2


@dataclass(frozen=True)
class CostModel:
    """Counts a model's MACs per frame.

    Attributes:
        decoder: Sizes of its decoder.
        tower: MACs of the vision tower per frame, whatever the decision.
        stems: Camera → MACs of the tower that are saved where its picture is unchanged.
        tokens: Camera → MACs of its tower per visual token whose features are computed.
        projector: MACs of the projector per visual token.
        head: MACs from a hidden state to the action, or to one of its tokens; the decoder's layers left out.
    """

    decoder: DecoderShape
    tower: int
    stems: Mapping[str, int]
    tokens: Mapping[str, int]
    projector: int
    head: int

    @classmethod
    def of(cls, model: VLA, frame: Frame, *, vision_kv_reuse: bool = False) -> CostModel:
        """Measure the parts whose cost is proportional to a number of tokens, on one frame.

        Any observation that the model takes will do. With ``vision_kv_reuse`` the tower computes the active tokens
        alone, see :class:`lac_vla.engine.options.EngineOptions`.
        """
        processor, vision, head = model.processor, model.vision, model.head
        images, prompt = processor.images(frame), processor.prompt(frame)
        kv_cache = vision.kv_cache() if vision_kv_reuse else None

        made: dict[str, Any] = {}

        def stem() -> None:
            made["stem"] = vision.encode_stem(frame, images, kv_cache)

        def tower(token_mask: BoolArray | None) -> None:
            made["features"] = vision.encode_tokens(made["stem"], token_mask, kv_cache)

        whatever = count_macs(stem)
        every = count_macs(partial(tower, None))
        with torch.inference_mode():
            features, (_, hidden) = made["features"], processor.embed(prompt)
        n, cameras = len(features), prompt.layout.cameras
        tokens = {}
        for camera in cameras:  # what is saved where of its tokens the first alone is computed
            computed = np.ones(n, dtype=np.bool_)
            computed[camera.tokens] = np.arange(camera.size) == 0
            saved = every - count_macs(partial(tower, computed))
            tokens[camera.name] = saved // max(1, camera.size - 1)
        always = whatever + every - sum(camera.size * tokens[camera.name] for camera in cameras)
        stems = {}
        if isinstance(vision, SplitsStems) and kv_cache is None:
            for name, image in images.items():
                stems[name] = count_macs(partial(vision.encode_stem, frame, {name: image}))
        projector = count_macs(lambda: vision.project(features)) // n
        shape = (model.decoder.kv_heads, prompt.layout.length, model.decoder.head_dim)

        def cached(layer: int) -> torch.Tensor:
            return hidden.new_zeros(shape)

        def decode() -> None:  # over rows of any content
            read = hidden if head.reads == "hidden" else hidden[:0]
            context = HeadContext(frame, prompt.layout, read, cached, cached, np.random.default_rng(0))
            decoding, sent = alone(head.decode(context)), None
            with suppress(StopIteration):
                while True:
                    rows = next(decoding) if sent is None else decoding.send(sent)
                    sent = rows.embeddings if isinstance(rows, AppendRows) else rows.edit(hidden)

        with torch.inference_mode():
            decode()  # what a head computes once for all frames does not count
        decoded = count_macs(decode)
        return cls(model.decoder.shape, always, stems, tokens, projector, decoded // (1 + head.n_forced))

    def step(self, step: StepInfo) -> dict[str, int]:
        """Count by stage what a session did with a frame.

        Returns:
            ``flow``, ``policy`` (its networks and what it probed), ``tower``, ``projector``, ``prefill``, ``decode``,
            ``head``.
        """
        layout, decision = step.layout, step.decision
        encoded = np.ones(layout.n_visual, dtype=np.bool_) if step.encoded is None else step.encoded
        features = sum(self.tokens[camera.name] * int(encoded[camera.tokens].sum()) for camera in layout.cameras)
        read = 1 + step.draft + sum(stop - start for start, stop in step.decode_passes)
        return {
            "flow": step.flow_macs,
            "policy": step.policy_macs + probe_macs(self.decoder, layout, decision, step.probe),
            "tower": self.tower + features - sum(self.stems.get(camera, 0) for camera in step.unchanged),
            "projector": self.projector * int(np.count_nonzero(decision.exit_layer)),
            "prefill": prefill_macs(self.decoder, layout, decision, step.draft, n_queries=step.n_queries),
            "decode": decode_macs(self.decoder, layout, decision, step.decode_passes)
            + (step.prompt_passes - 1) * prefill_macs(self.decoder, layout, decision, n_queries=layout.n_suffix)
            + sum(decode_macs(shape, layout, decision, [(a, b)]) for shape, a, b in step.stack_passes),
            "head": self.head * read,
        }


def one_by_one(n_tokens: int) -> tuple[tuple[int, int], ...]:
    """List the passes of greedy decoding: the first token comes from the prompt's own last row."""
    return tuple((i, i + 1) for i in range(n_tokens - 1))


def peak_memory_mb(device: torch.device) -> float:
    """Measure the largest memory so far, of the accelerator's allocator or of this process, in MB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3
