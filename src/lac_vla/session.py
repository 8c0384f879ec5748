"""The session of one robot in one episode: it plans frames, an engine runs them, and it remembers what they left."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import cv2
import numpy as np
import torch

from lac_vla.checks import LONGEST_AGE, check_whole
from lac_vla.engine.budget import cap_to_budget, frames_of_age, pad_to_bucket
from lac_vla.engine.deciding import PreparedFrame, decide_together
from lac_vla.engine.engine import Engine
from lac_vla.engine.frame_memory import FrameMemory, OutdatedPlanError
from lac_vla.engine.kv_cache import Region
from lac_vla.engine.plan import FramePlan, FrameResult
from lac_vla.engine.step_info import StepInfo
from lac_vla.engine.work import Work, work_alone
from lac_vla.errors import InputError
from lac_vla.flow import estimate, flow_macs, make_flow
from lac_vla.models.vla import VLA
from lac_vla.policies import CachePolicy
from lac_vla.running_chunk import RealTimeChunk
from lac_vla.timing import Stopwatch
from lac_vla.types import (
    BoolArray,
    Decision,
    FloatArray,
    Frame,
    PolicyInput,
    SkippedTokens,
    TokenLayout,
    UInt8Image,
)


class Session:
    """The state of one robot in one episode. Make it with :meth:`lac_vla.factory.CachedVLA.session`.

    :meth:`act` answers one frame. A server of many robots takes it apart: ``plan`` on the host, one ``Engine.run`` for
    the plans of all, ``commit`` for each.

    Args:
        engine: Runs the model.
        policy: Decides which visual tokens are computed.
        flow: Name of the optical flow; ``"none"`` for none.
        max_age: No slot is reused once it is this many control steps old, but once in any case; see
            ``steps_per_frame``.
        scene_cut: Mean absolute pixel change between adjacent frames, in 0..1, from which on nothing is reused.
        seed: Of the session's generators.

    Attributes:
        engine: As given.
        policy: As given.
        memory: What is remembered of the last frames.
        last_info: Report of the last frame; ``None`` before the first.
        token_budget: At most as many visual tokens are computed in a frame, as far as the maximum age allows; ``None``
            for as many as the policy wants. Frames that reuse nothing are not limited, nor is less than one bucket. It
            stays over a reset.
        steps_per_frame: Control steps from one frame to the next: more than one where several actions of a chunk are
            executed before the model is asked again. It stays over a reset.
        force_dense: If set, every frame is dense and this text is reported as the reason; ``None`` for what the policy
            decides.
    """

    def __init__(
        self, engine: Engine, policy: CachePolicy, flow: str, max_age: int, scene_cut: float, seed: int = 0
    ) -> None:
        self.engine, self.policy, self.seed = engine, policy, seed
        self.max_age, self.scene_cut = max_age, scene_cut
        self.memory = FrameMemory()
        self.last_info: StepInfo | None = None
        self.token_budget: int | None = None
        self.steps_per_frame = 1
        self.force_dense: str | None = None
        self._flow = make_flow(flow)
        self._region = Region()
        weakref.finalize(self, engine.store.abandoned.append, self._region).atexit = False
        self._vision_kv = self.model.vision.kv_cache() if engine.options.vision_kv_reuse else None
        self._policy_executor = ThreadPoolExecutor(1, "decision") if engine.options.async_policy else None
        self._frame: Frame | None = None
        self._rtc: RealTimeChunk | None = None
        self._shapes: Mapping[str, tuple[int, int]] | None = None
        self._open: FramePlan | None = None
        self._rng, self._head_rng = _generators(seed)
        self._head_rng_state: Mapping[str, object] = self._head_rng.bit_generator.state

    @property
    def model(self) -> VLA:
        """The model that the engine runs."""
        return self.engine.model

    @property
    def max_frames(self) -> int:
        """Age in frames from which on no slot is reused: the same time however often the model is asked.

        Raises:
            InputError: If ``max_age`` or ``steps_per_frame`` was set to something else than a whole number.
        """
        check_whole("max_age", self.max_age, 1, LONGEST_AGE)
        check_whole("steps_per_frame", self.steps_per_frame, 1, LONGEST_AGE)
        return frames_of_age(self.max_age, self.steps_per_frame)

    @property
    def slots(self) -> int:
        """Slots of the engine's store that it holds."""
        return self._region.size

    @property
    def nbytes(self) -> int:
        """Memory of the cached keys and values, of the last pictures, and of what the tower made of them, in bytes.

        The pictures count where ``picture_reuse`` keeps them.
        """
        cached = self._region.size * self.engine.store.bytes_per_slot + self.memory.nbytes
        return cached + (0 if self._vision_kv is None else self._vision_kv.nbytes)

    def reset(self, seed: int | None = None) -> None:
        """Begin a new episode: forget every slot, and start chance anew.

        Args:
            seed: A new seed; ``None`` keeps the session's own, so that every episode draws the same.
        """
        self.seed = self.seed if seed is None else seed
        self.memory.begin()
        self._shapes = self._open = None
        self._rng, self._head_rng = _generators(self.seed)
        self._frame = self._rtc = self.last_info = self.force_dense = None

    def release(self) -> None:
        """Give the memory of keys and values back: the next frame is computed in full. Chance goes on as it was."""
        self._open = None
        self.memory.begin()
        self.memory.attention, self.memory.stems = {}, {}
        self.engine.store.release(self._region)
        self._region.start = self._region.size = 0
        self._vision_kv = None if self._vision_kv is None else self.model.vision.kv_cache()

    def act(self, frame: Frame, rtc: RealTimeChunk | None = None) -> FloatArray:
        """Answer an observation with an action.

        Args:
            frame: The observation. Its pictures are copied before anything else reads them.
            rtc: For a model that answers in chunks, while one is running: what is left of it. The answer goes on with
                it, by real-time chunking where the head draws chunks from noise, by blending elsewhere.

        Returns:
            The action in the robot's own units, float32; its shape is the head's.

        Raises:
            InputError: If the frame does not fit the model or this episode, or the running chunk not the model. Nothing
                has changed then. Whatever else goes wrong on the way: the next frame is computed in full.
        """
        plan = self.plan(frame, rtc)
        with self._dense_after_errors():
            self.commit(plan, *self.engine.run([plan]))
        return self._action

    @contextmanager
    def _dense_after_errors(self) -> Iterator[None]:
        """Give the open plan and the cache up if anything goes wrong: the next frame is computed in full."""
        try:
            yield
        except BaseException:  # Ctrl-C as well
            self._open = None
            self.memory.begin()
            raise

    def plan(self, frame: Frame, rtc: RealTimeChunk | None = None) -> FramePlan:
        """Plan a frame on the host: checks, optical flow, the policy's decision within maximum age and budget.

        Args:
            frame: The observation.
            rtc: See :meth:`act`.

        Returns:
            For :meth:`Engine.run`, once; the session then wants its result by :meth:`commit`.

        Raises:
            InputError: If the frame does not fit the model or this episode; or if a plan was made and its result not
                committed, which is given up.
        """
        return self.decide(self.prepare(frame, rtc))

    def prepare(self, frame: Frame, rtc: RealTimeChunk | None = None) -> PreparedFrame:
        """Do the first half of :meth:`plan`, whose arguments it takes: all but the decision.

        Raises:
            InputError: As :meth:`plan` does.
        """
        self._check(frame)
        if rtc is not None:
            self.model.head.check_rtc(rtc)
        clock = self.engine.stopwatch()
        processor, options = self.model.processor, self.engine.options
        with clock.stage("preprocess"):
            frame = self.memory.copied(frame)
            images = processor.images(frame)
            prompt = processor.prompt(frame)
        with clock.stage("bookkeeping"):
            dense_reason = self._dense_reason(frame, prompt.layout, images)
            drafts = options.draft and self.model.decoder.causal  # else the prompt itself would see the guess
            drafted = self.last_info.metadata if drafts and self.last_info is not None else None
        prepared = PreparedFrame(self.policy, frame, images, prompt, clock, dense_reason, drafted, rtc)
        if dense_reason is None and self._policy_executor is None:
            with self._dense_after_errors():
                prepared.inputs = self._inputs(prepared, clock)
        return prepared

    def decide(self, prepared: PreparedFrame) -> FramePlan:
        """Do the second half of :meth:`plan`: ask the policy, unless it has decided already, and plan.

        Args:
            prepared: From :meth:`prepare`, and nothing else was done since.
        """
        prompt, dense_reason, clock = prepared.prompt, prepared.dense_reason, prepared.clock
        n_layers = self.model.n_layers
        decided: tuple[Decision, BoolArray] | Future[tuple[Decision, BoolArray]]
        if dense_reason is not None:
            n_visual = prompt.layout.n_visual
            forced = replace(Decision.dense(n_visual, n_layers), nominal_ratio=None)  # the policy aims at nothing
            decided = forced, np.zeros(n_visual, dtype=np.bool_)
        elif self._policy_executor is not None:
            decided = self._policy_executor.submit(self._decide, prepared, Stopwatch(torch.device("cpu")))
        else:
            with self._dense_after_errors():
                decided = self._decide(prepared, clock)
        self._open = FramePlan(
            engine=self.engine,
            frame=prepared.frame,
            images=prepared.images,
            prompt=prompt,
            region=self._region,
            vision_kv=self._vision_kv,
            begin=partial(self.memory.begin, self.memory.version),
            clock=clock,
            decided=decided,
            dense_reason=dense_reason,
            probe=self.policy.probe(n_layers),
            refine=partial(self._refine, prompt.layout) if dense_reason is None else None,
            drafted=prepared.drafted,
            rtc=prepared.rtc,
            rng=self._head_rng,
            stems=self._unchanged(prepared.frame),
        )
        return self._open

    def commit(self, plan: FramePlan, result: FrameResult) -> StepInfo:
        """Take up what an engine made of the open plan.

        Args:
            plan: From :meth:`plan`.
            result: What ``Engine.run`` returned for it.

        Returns:
            The report of the frame, which is ``last_info`` now; ``result.action`` is the answer.

        Raises:
            InputError: If this is not the open plan of this session, or the result is another plan's.
            Exception: What went wrong in the run, if anything did; the next frame is computed in full.
        """
        if plan is not self._open or result.plan is not plan:
            raise InputError("this is not the open plan of this session and its result: commit what was planned last")
        self._open = None
        sequence, action = result.sequence, result.action
        if isinstance(result.error, OutdatedPlanError):
            raise result.error
        if result.error is not None:
            with self._dense_after_errors():
                raise result.error
        if sequence is None or action is None:
            raise InputError("this plan was not run to its end: give it to engine.run() first")
        decision, (_, forced) = sequence.decision, plan.decision()
        dense, memory = plan.dense_reason, self.memory
        reused = int(np.count_nonzero(decision.exit_layer == 0))
        with plan.clock.stage("bookkeeping"):
            memory.commit(sequence.layout, plan.images, plan.frame.instruction, decision, sequence.attention)
            memory.keep_stems(plan.frame, result.stems)
            self._shapes, self._frame, self._rtc = plan.frame.shapes, plan.frame, plan.rtc
            self._head_rng_state, self._action = result.rng_state, action
        self.last_info = StepInfo(
            layout=sequence.layout,
            decision=decision if decision.deltas is None else replace(decision, deltas=None),  # added; they are large
            forced=forced,
            age=np.zeros_like(memory.age) if decision.skipped is SkippedTokens.PRUNE else memory.age.copy(),
            dense_reason=dense,
            stages=plan.clock.stages,
            metadata=result.metadata,
            pixels=plan.images,
            flow_macs=0 if dense or self._flow is None else flow_macs(self._flow, plan.images),
            policy_macs=0 if dense else self.policy.macs + self.policy.slot_macs * reused,
            probe=plan.probe,
            draft=sequence.draft,
            n_queries=sequence.n_queries,
            decode_passes=tuple(sequence.decode_passes),
            stack_passes=tuple((stack.shape, start, stop) for stack, start, stop in sequence.stack_passes),
            prompt_passes=sequence.prompt_passes,
            unchanged=result.unchanged,
            encoded=result.encoded,
            eager_runs=result.eager_runs,
        )
        return self.last_info

    def refresh(self, count: int) -> int:
        """Compute the stalest slots anew from the last frame, so that the next one starts fresher.

        For the time between two frames. Chance is not drawn, and ``last_info`` stays what it was.

        Args:
            count: How many slots at most.

        Returns:
            How many.
        """
        return work_alone(self.engine, self.refreshing(count))

    def refreshing(self, count: int) -> Work[int]:
        """Do :meth:`refresh` as work that can go together with that of other sessions."""
        memory = self.memory
        if self.last_info is None or not memory.warm or self.last_info.decision.skipped is not SkippedTokens.REUSE:
            return 0
        stalest = np.argsort(-memory.age, kind="stable")[: max(0, count)]
        tokens = np.zeros(memory.age.size, dtype=np.bool_)
        tokens[stalest] = memory.age[stalest] > 0
        if tokens.any():
            yield from self._recompute(tokens)
        return int(tokens.sum())

    def shadow(self) -> FloatArray | None:
        """Compute the action that the model without a cache gives to the last frame, with the same chance.

        Afterwards all slots are fresh.

        Returns:
            The action, as :meth:`act` gives it; ``None`` if there is no last frame.
        """
        return work_alone(self.engine, self.shadowing())

    def shadowing(self) -> Work[FloatArray | None]:
        """Do :meth:`shadow` as work that can go together with that of other sessions."""
        if self.last_info is None or self._frame is None or not self.memory.warm:
            return None
        rng = np.random.default_rng()
        rng.bit_generator.state = self._head_rng_state
        return (yield from self._recompute(np.ones(self.memory.age.size, dtype=np.bool_), rng))

    def _recompute(self, tokens: BoolArray, rng: np.random.Generator | None = None) -> Work[FloatArray | None]:
        """Compute ``tokens`` (bool, (N,)) of the last frame once more; the other slots stay what they are."""
        memory, frame = self.memory, self._frame
        if frame is None or memory.layout is None:
            raise InputError("there is no frame to compute again: call session.act() first")
        decision, pixels, attention = Decision.reuse(~tokens, self.model.n_layers), memory.pixels, memory.attention
        plan = FramePlan(
            engine=self.engine,
            frame=frame,
            images=pixels,
            prompt=self.model.processor.prompt(frame),
            region=self._region,
            vision_kv=self._vision_kv,
            begin=partial(memory.begin, memory.version),
            clock=self.engine.stopwatch(),
            decided=(decision, np.zeros_like(tokens)),
            rtc=self._rtc,
            rng=rng,
            stems=self._unchanged(frame),
        )
        with self._dense_after_errors():
            result = yield plan
            if result.error is not None:
                raise result.error
        memory.commit(memory.layout, pixels, frame.instruction, decision, attention, elapsed=0)
        return result.action

    def _unchanged(self, frame: Frame) -> dict[str, Any]:
        """Find the vision stems that need not be computed again."""
        return self.memory.unchanged(frame) if self._vision_kv is None else {}

    def _check(self, frame: Frame) -> None:
        if self._open is not None:
            self._open = None
            raise InputError(
                "a frame was planned and not committed, and is given up now: run its plan and call session.commit() "
                "before you plan the next one"
            )
        if self._shapes is not None and frame.shapes != self._shapes:
            raise InputError(
                f"the cameras changed in mid-episode from {dict(self._shapes)} to {frame.shapes} (height, width); "
                "call session.reset() if this is a new episode"
            )

    def _dense_reason(self, frame: Frame, layout: TokenLayout, images: Mapping[str, UInt8Image]) -> str | None:
        """Tell why nothing of the cache may be reused; ``None`` if it may."""
        memory = self.memory
        if not memory.warm or memory.layout is None:
            return "first frame"
        if self.force_dense is not None:
            return self.force_dense
        if not self.model.decoder.causal and frame.instruction != memory.instruction:
            return "new instruction"
        for camera, image in images.items():
            if cv2.norm(image, memory.pixels[camera], cv2.NORM_L1) / image.size / 255 > self.scene_cut:
                return "scene cut"
        return None

    @torch.inference_mode()
    def _inputs(self, prepared: PreparedFrame, clock: Stopwatch) -> PolicyInput:
        """Collect what the policy decides by."""
        memory, images = self.memory, prepared.images
        with clock.stage("flow"):
            flow = estimate(self._flow, memory.pixels, images) if self._flow is not None else {}
        return PolicyInput(
            layout=prepared.prompt.layout,
            n_layers=self.model.n_layers,
            instruction=prepared.frame.instruction,
            pixels=images,
            previous=memory.pixels,
            reference=memory.reference,
            flow=flow,
            age=memory.age,
            rng=self._rng,
            attention=memory.attention,
            proprio=prepared.frame.proprio,
        )

    @torch.inference_mode()
    def _decide(self, prepared: PreparedFrame, clock: Stopwatch) -> tuple[Decision, BoolArray]:
        """Make the policy's decision, held to the maximum age; and list the tokens where that overruled it."""
        memory, layout, n_layers = self.memory, prepared.prompt.layout, self.model.n_layers
        inputs = self._inputs(prepared, clock) if prepared.inputs is None else prepared.inputs
        with clock.stage("policy"):
            decision = self.policy.decide(inputs) if prepared.decision is None else prepared.decision
            if decision.exit_layer.shape != (layout.n_visual,) or decision.n_layers != n_layers:
                raise InputError(
                    f"{type(self.policy).__name__} decided about {decision.exit_layer.shape[0]} tokens in "
                    f"{decision.n_layers} layers; the model has {layout.n_visual} in {n_layers}"
                )
            forced = np.zeros(layout.n_visual, dtype=np.bool_)
            if decision.skipped is SkippedTokens.REUSE:
                forced = (memory.age >= self.max_frames) & ~decision.active
                if forced.any():
                    decision = decision.with_active(forced)
            bucket = self.engine.options.bucket
            if self.token_budget is not None and decision.skipped is SkippedTokens.REUSE:
                # what is padded to a bucket below stays within the budget
                budget = max(bucket, self.token_budget - self.token_budget % bucket)
                wanted, decision = decision.active, cap_to_budget(budget, decision, inputs, self.max_frames)
                forced = decision.active & (forced | ~wanted)
            decision = pad_to_bucket(decision, memory.age, bucket)
            reused = decision.exit_layer == 0
            if decision.skipped is SkippedTokens.REUSE and reused.any():
                decision = replace(decision, deltas=self.policy.deltas(inputs, reused))
        return decision, forced

    def _refine(self, layout: TokenLayout, layer: int, attention: torch.Tensor, decision: Decision) -> Decision:
        """Let the policy refine its decision in mid-forward; what has reached the maximum age stays computed."""
        refined, before = self.policy.refine(layout, layer, attention, decision), decision.exit_layer
        changed = refined.exit_layer != before
        if (
            refined.skipped is not decision.skipped
            or (changed & ((before <= layer) | (refined.exit_layer <= layer))).any()
        ):
            raise InputError(
                f"{type(self.policy).__name__} refined behind layer {layer} what was computed up to there: it may only "
                "choose the exit layers, from the next one on, of tokens that are still computed"
            )
        if refined.skipped is SkippedTokens.REUSE:
            refined = refined.with_active(self.memory.age >= self.max_frames)
        return refined


def plan_together(
    frames: Sequence[tuple[Session, Frame]], rtc: Sequence[RealTimeChunk | None] | None = None
) -> list[FramePlan | Exception]:
    """Plan a frame of each of several sessions, see :meth:`Session.plan`; policies decide at once if they can.

    Returns:
        The plans; and what went wrong where there is none.
    """
    prepared: list[PreparedFrame | Exception] = []
    for (session, frame), running in zip(frames, rtc or [None] * len(frames), strict=True):
        try:
            prepared.append(session.prepare(frame, running))
        except Exception as error:  # of this session alone
            prepared.append(error)
    decide_together([each for each in prepared if isinstance(each, PreparedFrame)])
    plans: list[FramePlan | Exception] = []
    for (session, _), each in zip(frames, prepared, strict=True):
        try:
            plans.append(each if isinstance(each, Exception) else session.decide(each))
        except Exception as error:  # of this session alone
            plans.append(error)
    return plans


def _generators(seed: int) -> tuple[np.random.Generator, np.random.Generator]:
    """Make the policy's chance and the head's: apart, so that every policy meets the same noise, frame by frame."""
    return np.random.default_rng(seed), head_rng(seed)


def head_rng(seed: int) -> np.random.Generator:
    """Make the chance of the action head in a session of this seed."""
    return np.random.default_rng((seed, 1))
