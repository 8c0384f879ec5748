"""A policy beside a frozen VLA, and the session that runs them on one robot."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import cv2
import numpy as np
import torch

from lac_vla.engine.budget import cap_to_budget, pad_to_bucket
from lac_vla.engine.cuda_graphs import ROOM, Graphs
from lac_vla.engine.kv_cache import VisualKVCache
from lac_vla.engine.options import EngineOptions
from lac_vla.engine.prefill import Prompt, extend, partial_prefill, run_layers
from lac_vla.engine.step_info import StepInfo
from lac_vla.errors import InputError
from lac_vla.flow import estimate, flow_macs, make_flow
from lac_vla.models.base import Backbone
from lac_vla.policies import CachePolicy, Dense
from lac_vla.timing import Stopwatch
from lac_vla.types import BoolArray, Decision, FloatArray, Frame, PolicyInput, SkippedTokens, TokenLayout, UInt8Image


@dataclass(frozen=True)
class CachedVLA:
    """A backbone and a caching policy: stateless, shared by any number of sessions.

    Attributes:
        model: The frozen model.
        policy: What decides which visual tokens are recomputed.
        flow: Optical flow for a policy that reads it, by name; ``None`` for the one that it was made for.
        max_age: No slot is reused once it is this many frames old, ≥ 1.
        scene_cut: Mean absolute pixel change between adjacent frames, in 0..1, from which on nothing is reused.
        options: What else is done to be fast.

    Raises:
        InputError: If a setting makes no sense, or the policy was made for another token layout.
        CheckpointError: If the flow has weights, and they cannot be read.
    """

    model: Backbone
    policy: CachePolicy = field(default_factory=Dense)
    flow: str | None = None
    max_age: int = 16
    scene_cut: float = 0.25
    options: EngineOptions = field(default_factory=EngineOptions)

    def __post_init__(self) -> None:
        if self.max_age < 1:
            raise InputError(f"max_age is {self.max_age}; a slot must be allowed to grow at least 1 frame old")
        if not 0 < self.scene_cut <= 1:
            raise InputError(f"scene_cut is {self.scene_cut}; give a mean absolute pixel change in (0, 1]")
        self.policy.check_layout(self.model.grids)
        make_flow(self.flow or self.policy.flow)
        if self.options.vision_kv_reuse and self.model.tower_memory() is None:
            raise InputError(
                f"vision_kv_reuse needs a vision transformer, and {self.model.name} sees by convolutions: leave it out"
            )

    @property
    def flow_used(self) -> str:
        """Name of the estimator in its sessions; ``"none"`` for a policy that reads no flow, whatever ``flow`` says."""
        return "none" if self.policy.flow == "none" else self.flow or self.policy.flow

    def session(self, seed: int = 0) -> Session:
        """Start with one robot.

        Args:
            seed: Of everything that this session leaves to chance.
        """
        return Session(self, seed)


class Session:
    """The state of one robot in one episode: it owns the cache. Make it with :meth:`CachedVLA.session`.

    Args:
        vla: Backbone and policy.
        seed: Of the session's generator.

    Attributes:
        last_info: What the last call of :meth:`act` did.
        token_budget: At most as many visual tokens are computed in a frame, as far as the maximum age allows; ``None``
            for as many as the policy wants. Frames that reuse nothing are not limited, nor is less than one bucket. It
            stays over a reset.
        force_dense: Why the next frames are to be computed in full; ``None`` for what the policy decides.
    """

    def __init__(self, vla: CachedVLA, seed: int = 0) -> None:
        self.vla = vla
        self.seed = seed
        self.last_info: StepInfo | None = None
        self.token_budget: int | None = None
        self.force_dense: str | None = None
        self._frame: Frame | None = None
        backbone = vla.model
        self._cache = VisualKVCache(
            len(backbone.layers), backbone.kv_heads, backbone.head_dim, backbone.dtype, backbone.device
        )
        self._flow = make_flow(vla.flow_used)
        self._shapes: Mapping[str, tuple[int, int]] | None = None
        self._rng, self._noise = _generators(seed)
        self._noise_before = self._noise.bit_generator.state
        self._tower = backbone.tower_memory() if vla.options.vision_kv_reuse else None
        self._aside = ThreadPoolExecutor(1, "decision") if vla.options.async_policy else None
        self._graphs = Graphs(len(backbone.layers)) if vla.options.cuda_graphs else None

    def reset(self, seed: int | None = None) -> None:
        """Begin a new episode: forget every slot, and start chance anew.

        Args:
            seed: A new seed; ``None`` keeps the session's own, so that every episode draws the same.
        """
        self.seed = self.seed if seed is None else seed
        self._cache.drop()
        self._shapes = None
        self._rng, self._noise = _generators(self.seed)
        self._frame = self.last_info = self.force_dense = None

    @property
    def nbytes(self) -> int:
        """Memory of the cached keys and values, in bytes."""
        return self._cache.nbytes + (0 if self._tower is None else self._tower.nbytes)

    @torch.inference_mode()
    def act(self, frame: Frame) -> FloatArray:
        """Answer an observation with an action.

        Args:
            frame: The observation.

        Returns:
            The action in the robot's own units, float32; its shape is the backbone's.

        Raises:
            InputError: If the frame does not fit the model or this episode. Nothing has changed then. Whatever else
                goes wrong on the way: the next frame is computed in full.
        """
        backbone, policy, cache, options = self.vla.model, self.vla.policy, self._cache, self.vla.options
        clock = Stopwatch(backbone.device)
        with clock.stage("preprocess"):
            self._check(frame)
            pixels = backbone.pixels(frame)
            layout = backbone.layout(frame)
            prefix, suffix = backbone.prefix(frame), backbone.suffix(frame)
        with clock.stage("bookkeeping"):
            dense_reason = self._cold(frame, layout, pixels)
            drafts = options.draft and backbone.causal  # else the prompt itself would see the guess
            last = self.last_info.metadata if drafts and self.last_info is not None else None
            draft = None if last is None else backbone.draft(last)
        glance, decision, forced = self._look_and_decide(frame, layout, pixels, dense_reason, clock)
        with clock.stage("bookkeeping"):
            cache.begin(layout, backbone.max_new_tokens, 0 if self._graphs is None else ROOM)
            run = run_layers if self._graphs is None else self._graphs
            fallbacks = 0 if self._graphs is None else self._graphs.eager_runs
        visual, seen = self._visual(glance, decision, clock)
        with clock.stage("projector"):
            embeddings = torch.cat([prefix, visual, suffix] if draft is None else [prefix, visual, suffix, draft])
        with clock.stage("prefill"):
            watch = policy.probe(len(backbone.layers))
            prompt = partial_prefill(
                backbone,
                cache,
                layout,
                decision,
                embeddings,
                watch,
                partial(policy.refine, layout) if dense_reason is None else None,
                draft=0 if draft is None else len(draft),
                run=run,
            )
        with clock.stage("decode"):
            append = partial(extend, backbone, cache, prompt, run=run)
            drafted = None if draft is None else last
            self._noise_before = self._noise.bit_generator.state
            action, info = backbone.act(frame, prompt.hidden, append, self._noise, drafted)
        with clock.stage("bookkeeping"):
            cache.commit(layout, pixels, frame.instruction, prompt.decision)
            self._shapes, self._frame = frame.shapes, frame
        self.last_info = StepInfo(
            layout=layout,
            decision=prompt.decision,
            forced=forced,
            age=np.zeros_like(cache.age) if prompt.decision.skipped is SkippedTokens.PRUNE else cache.age.copy(),
            dense_reason=dense_reason,
            stages=clock.stages,
            metadata=info,
            pixels=pixels,
            flow_macs=0 if dense_reason or self._flow is None else flow_macs(self._flow, pixels),
            policy_macs=0 if dense_reason else policy.macs,
            probe=watch,
            draft=prompt.draft,
            full_last_layer=prompt.whole,
            decode_passes=tuple(prompt.passes),
            encoded=seen,
            eager_runs=0 if self._graphs is None else self._graphs.eager_runs - fallbacks,
        )
        return action

    @torch.inference_mode()
    def refresh(self, count: int) -> int:
        """Compute the stalest slots anew from the last frame, so that the next one starts fresher.

        For the time between two frames. Chance is not drawn, and ``last_info`` stays what it was.

        Args:
            count: How many slots at most.

        Returns:
            How many.
        """
        cache = self._cache
        if self.last_info is None or not cache.warm or self.last_info.decision.skipped is not SkippedTokens.REUSE:
            return 0
        stalest = np.argsort(-cache.age, kind="stable")[: max(0, count)]
        tokens = np.zeros(cache.age.size, dtype=np.bool_)
        tokens[stalest] = cache.age[stalest] > 0
        if tokens.any():
            self._again(tokens)
        return int(tokens.sum())

    @torch.inference_mode()
    def shadow(self) -> FloatArray | None:
        """The action that the model without a cache gives to the last frame, with the same chance; leaves it all fresh.

        Returns:
            The action, as :meth:`act` gives it; ``None`` if there is no last frame.
        """
        if self.last_info is None or self._frame is None or not self._cache.warm:
            return None
        prompt = self._again(np.ones(self._cache.age.size, dtype=np.bool_))
        noise = np.random.default_rng()
        noise.bit_generator.state = self._noise_before
        return self.vla.model.act(
            self._frame, prompt.hidden, partial(extend, self.vla.model, self._cache, prompt), noise
        )[0]

    def _again(self, tokens: BoolArray) -> Prompt:
        """Compute ``tokens`` (bool, (N,)) of the last frame once more; the other slots stay what they are."""
        backbone, cache, frame, layout = self.vla.model, self._cache, self._frame, self._cache.layout
        if frame is None or layout is None:
            raise InputError("there is no frame to compute again: call session.act() first")
        decision, pixels, attention = Decision.reuse(~tokens, len(backbone.layers)), cache.pixels, cache.attention
        cache.begin(layout, backbone.max_new_tokens)
        visual, _ = self._visual(backbone.look(pixels, self._tower), decision, Stopwatch(backbone.device))
        embeddings = torch.cat([backbone.prefix(frame), visual, backbone.suffix(frame)])
        prompt = partial_prefill(backbone, cache, layout, decision, embeddings)
        cache.commit(layout, pixels, frame.instruction, decision, elapsed=0)
        cache.attention = attention
        return prompt

    def _visual(self, glance: Any, decision: Decision, clock: Stopwatch) -> tuple[torch.Tensor, BoolArray]:
        """Embeddings of the visual tokens that are computed, (n, width); and the tokens that the tower computed."""
        backbone, computed = self.vla.model, decision.exit_layer > 0
        with clock.stage("tower"):
            partly = (
                self.vla.options.sparse_vision_head if self._tower is None else decision.skipped is SkippedTokens.REUSE
            )
            features = backbone.features(glance, computed if partly else None, self._tower)
        with clock.stage("projector"):
            if not partly and not computed.all():
                features = features[torch.from_numpy(computed).to(backbone.device)]
            return backbone.project(features), computed if partly else np.ones_like(computed)

    def _look_and_decide(
        self,
        frame: Frame,
        layout: TokenLayout,
        pixels: Mapping[str, UInt8Image],
        dense_reason: str | None,
        clock: Stopwatch,
    ) -> tuple[Any, Decision, BoolArray]:
        """What the tower sees at a glance, and the decision: one after the other, or at the same time.

        If at the same time, the stage ``policy`` is the time for which the tower had to wait.
        """
        backbone = self.vla.model
        if self._aside is None or dense_reason is not None:
            decision, forced = self._decide(frame, layout, pixels, dense_reason, clock)
            with clock.stage("tower"):
                return backbone.look(pixels, self._tower), decision, forced
        pending = self._aside.submit(self._decide, frame, layout, pixels, None, Stopwatch(torch.device("cpu")))
        try:
            with clock.stage("tower"):
                glance = backbone.look(pixels, self._tower)
        finally:  # whatever happens, nothing of this frame goes on beside the next
            with clock.stage("policy"):
                decision, forced = pending.result()
        return glance, decision, forced

    def _check(self, frame: Frame) -> None:
        if self._shapes is not None and frame.shapes != self._shapes:
            raise InputError(
                f"the cameras changed in mid-episode from {dict(self._shapes)} to {frame.shapes} (height, width); "
                "call session.reset() if this is a new episode"
            )

    def _cold(self, frame: Frame, layout: TokenLayout, pixels: Mapping[str, UInt8Image]) -> str | None:
        """Why nothing of the cache may be reused, or ``None`` if it may."""
        cache = self._cache
        if not cache.warm or cache.layout is None:
            return "first frame"
        if cache.layout.grids != layout.grids:
            return "other cameras"
        if self.force_dense is not None:
            return self.force_dense
        if not self.vla.model.causal and frame.instruction != cache.instruction:
            return "new instruction"
        for camera, image in pixels.items():
            if cv2.absdiff(image, cache.pixels[camera]).mean() / 255 > self.vla.scene_cut:
                return "scene cut"
        return None

    @torch.inference_mode()
    def _decide(
        self,
        frame: Frame,
        layout: TokenLayout,
        pixels: Mapping[str, UInt8Image],
        dense_reason: str | None,
        clock: Stopwatch,
    ) -> tuple[Decision, BoolArray]:
        """The policy's decision, held to the maximum age; and the tokens where that overruled it."""
        cache, n_layers = self._cache, len(self.vla.model.layers)
        if dense_reason is not None:
            return Decision.dense(layout.n_visual, n_layers), np.zeros(layout.n_visual, dtype=np.bool_)
        with clock.stage("flow"):
            flow = estimate(self._flow, cache.pixels, pixels) if self._flow is not None else {}
        with clock.stage("policy"):
            inputs = PolicyInput(
                layout=layout,
                n_layers=n_layers,
                instruction=frame.instruction,
                pixels=pixels,
                previous=cache.pixels,
                reference=cache.reference,
                flow=flow,
                age=cache.age,
                rng=self._rng,
                attention=cache.attention,
            )
            decision = self.vla.policy.decide(inputs)
            if decision.exit_layer.shape != (layout.n_visual,) or decision.n_layers != n_layers:
                raise InputError(
                    f"{type(self.vla.policy).__name__} decided about {decision.exit_layer.shape[0]} tokens in "
                    f"{decision.n_layers} layers; the model has {layout.n_visual} in {n_layers}"
                )
            forced = np.zeros(layout.n_visual, dtype=np.bool_)
            if decision.skipped is SkippedTokens.REUSE:
                forced = (cache.age >= self.vla.max_age) & ~decision.active
                if forced.any():
                    decision = decision.with_active(forced)
            bucket = self.vla.options.bucket
            if self.token_budget is not None and decision.skipped is SkippedTokens.REUSE:
                whole = max(
                    bucket, self.token_budget - self.token_budget % bucket
                )  # what is rounded up below stays within the limit
                wanted, decision = decision.active, cap_to_budget(whole, decision, inputs, self.vla.max_age)
                forced = decision.active & (forced | ~wanted)
            decision = pad_to_bucket(decision, cache.age, bucket)
        return decision, forced


def _generators(seed: int) -> tuple[np.random.Generator, np.random.Generator]:
    """The policy's chance and the action head's: apart, so that every policy meets the same noise, frame by frame."""
    return np.random.default_rng(seed), action_noise(seed)


def action_noise(seed: int) -> np.random.Generator:
    """Chance of the action head in a session of this seed."""
    return np.random.default_rng((seed, 1))
