"""Frames, policies and a tiny model that the engine's tests share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from threading import Lock

import numpy as np
import torch

from lac_vla import CachedVLA, random_vla
from lac_vla.policies import POLICIES, CachePolicy, LACConfig, LACPolicy, VLACache, cache_lowest
from lac_vla.types import AttentionProbe, Decision, Frame, PolicyInput, SkippedTokens, TokenLayout

STATIC = 0.98
"""Cosine similarity that most patches of neighbouring frames reach: they are noise, more than any camera's."""

SEEDING = Lock()
"""Torch's own chance is the process's: sessions that decide beside each other must not seed it at the same time."""
STATE_DIM = 8
TINY_GRIDS = {"agentview": (6, 6), "wrist": (4, 4)}


def frame(
    seed: int = 0, instruction: str = "pick up the bowl", cameras: tuple[str, ...] = ("agentview", "wrist")
) -> Frame:
    """Smooth random pictures and states: neighbouring seeds differ a little, not by a scene cut."""
    base, change = np.random.default_rng(7), np.random.default_rng(1000 + seed)
    images = {}
    for camera in cameras:
        picture = base.integers(60, 190, (64, 64, 3)) + change.integers(-25, 26, (64, 64, 3))
        images[camera] = picture.astype(np.uint8)
    return Frame(images, instruction, change.normal(size=STATE_DIM).astype(np.float32))


@dataclass(frozen=True)
class Staircase(CachePolicy):
    """Tokens leave the computation at a random layer (as in VLA-Cache's layer schedule)."""

    def decide(self, inputs: PolicyInput) -> Decision:
        depth = inputs.rng.integers(0, inputs.n_layers + 1, inputs.layout.n_visual)
        return Decision(depth.astype(np.int64), inputs.n_layers)


@dataclass(frozen=True)
class Pruner(CachePolicy):
    """Half of the tokens disappear after the first layer, the least attended ones (as in FastV)."""

    def probe(self, n_layers: int) -> AttentionProbe:
        return AttentionProbe((0,), "last")

    def decide(self, inputs: PolicyInput) -> Decision:
        return Decision(np.full(inputs.layout.n_visual, inputs.n_layers), inputs.n_layers, SkippedTokens.PRUNE)

    def refine(self, layout: TokenLayout, layer: int, attention: torch.Tensor, decision: Decision) -> Decision:
        lowest = cache_lowest(attention[-1, layout.visual].cpu().numpy(), 0.5)
        return Decision(np.where(lowest, layer + 1, decision.exit_layer), decision.n_layers, SkippedTokens.PRUNE)


@dataclass(frozen=True)
class Watcher(CachePolicy):
    """Reuses what the last frame's text attended to least (as VLA-Cache protects what it attends to most)."""

    def probe(self, n_layers: int) -> AttentionProbe:
        return AttentionProbe((1,), "suffix")

    def decide(self, inputs: PolicyInput) -> Decision:
        seen = (
            inputs.attention[1].mean(dim=0)[inputs.layout.visual].cpu().numpy()
            if inputs.attention
            else np.zeros(inputs.layout.n_visual)
        )
        return Decision.reuse(cache_lowest(seen, 0.5), inputs.n_layers)


@dataclass(frozen=True)
class UntrainedLAC(CachePolicy):
    """LAC with random weights, for whatever layout comes; its predictor has no preference, so the ratio is fixed."""

    inputs: str = "extended"
    language: bool = False

    @property
    def flow(self) -> str:
        return "dis"

    @property
    def macs(self) -> int:
        return self.policy(TINY_GRIDS).macs

    def policy(self, grids: Mapping[str, tuple[int, int]]) -> LACPolicy:
        config = LACConfig(grids=grids, inputs=self.inputs, language=self.language, recovery=0.2)
        with SEEDING:
            torch.manual_seed(0)
            return LACPolicy(config, ratio=0.7)

    def decide(self, inputs: PolicyInput) -> Decision:
        return self.policy(inputs.layout.grids).decide(inputs)


VARIANTS: dict[str, Callable[[], CachePolicy]] = {
    "lac": UntrainedLAC,
    "lac-paper": lambda: UntrainedLAC("paper", language=True),
    "staircase": Staircase,
    "pruner": Pruner,
    "watcher": Watcher,
    "vla-cache": lambda: VLACache(similarity=STATIC),
    "vla-cache-suffix": lambda: VLACache(similarity=STATIC, rows="suffix"),
    "vla-cache-paper": lambda: VLACache("paper", similarity=STATIC, gain=1000),  # random layers hardly differ
}
"""Policies that need other settings here than their own, and some that are made to reach the engine's corners."""
ALL_POLICIES: dict[str, Callable[[], CachePolicy]] = {**POLICIES, **VARIANTS}
"""The matrix: whatever is registered is in it."""
HESITANT = {"vla-cache-paper", "periodic"}
"""Those that reuse nothing in some frames: two random layers differ too little for a schedule of their entropies; or
that is the rule."""


def _prunes(make: Callable[[], CachePolicy]) -> bool:
    session = CachedVLA(random_vla("tiny", seed=3), make()).session()
    for i in range(2):
        session.act(frame(i))
    assert session.last_info is not None
    return session.last_info.decision.skipped is SkippedTokens.PRUNE


PRUNING = sorted(name for name, make in ALL_POLICIES.items() if _prunes(make))
REUSING = sorted(set(ALL_POLICIES) - set(PRUNING))
