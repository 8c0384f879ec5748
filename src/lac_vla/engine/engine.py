"""The engine: runs the plans of any number of sessions of one model in one pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from threading import RLock
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from lac_vla.engine.cuda_graphs import CUDAGraphRunner
from lac_vla.engine.kv_cache import GradientKV, SlotCache
from lac_vla.engine.layers import Between, RunLayers, run_layers
from lac_vla.engine.options import EngineOptions
from lac_vla.engine.plan import FramePlan, FrameResult
from lac_vla.engine.prefill import AppendCursor, Cursor, PrefillCursor, SequenceState, run_packed
from lac_vla.engine.vision_graphs import GraphedVision
from lac_vla.errors import DeviceMemoryError, InputError, NonFiniteError
from lac_vla.models.heads.base import AppendRows, Decoding, HeadContext, RerunPrompt, Together, finite
from lac_vla.models.heads.guidance import recording
from lac_vla.models.protocols import DecoderStack, Rotary, SplitsStems, StaticVision
from lac_vla.models.vla import VLA
from lac_vla.timing import Stopwatch
from lac_vla.transfer import upload
from lac_vla.types import BoolArray, Decision, SkippedTokens

T = TypeVar("T")


@dataclass(eq=False)
class _Run:
    """One plan on its way through a run."""

    plan: FramePlan
    result: FrameResult
    clock: Stopwatch
    embeddings: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    suffix: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    decoding: Decoding | None = None
    rows: AppendRows | RerunPrompt | Together | None = None
    parts: Mapping[str, Any] = field(default_factory=dict)  # of the stem, which are not made again

    @property
    def sequence(self) -> SequenceState:
        """The prompt; it exists once the vision encoder is done."""
        if self.result.sequence is None:  # pragma: no cover - set before anything reads it
            raise RuntimeError("the frame was not encoded")
        return self.result.sequence


class Engine:
    """Runs one model on one device: vision stem, visual tokens, packed prefill, decoding rounds.

    Rows of several sessions are packed, so that a layer's weights are read once for all; attention and cache writes go
    sequence by sequence. The keys and values of all sessions lie in one pooled store.

    On a GPU it switches cuDNN's attention off, for the whole process: torch prefers it on an H100, and it prepares
    itself for every shape that a thread has not run; here any number of active rows is one.

    Args:
        model: The frozen model. Its weights may change in place.
        options: What is done beside caching.

    Attributes:
        model: As given.
        options: As given.
        store: Keys and values of all sessions.
        graphs: Replays CUDA graphs; ``None`` without the option ``cuda_graphs``.
        stage_events: Whether stages are timed on the GPU, see :class:`lac_vla.timing.Stopwatch`; it stays as it is set.

    Raises:
        InputError: If an option does not fit the model.
    """

    def __init__(self, model: VLA, options: EngineOptions | None = None) -> None:
        self.model, self.options = model, options or EngineOptions()
        if model.device.type == "cuda":
            torch.backends.cuda.enable_cudnn_sdp(False)
        if self.options.vision_kv_reuse and model.vision.kv_cache() is None:
            raise InputError(
                f"vision_kv_reuse needs a vision transformer, and {model.name} sees by convolutions: leave it out"
            )
        decoder = model.decoder
        self.store = SlotCache(model.n_layers, decoder.kv_heads, decoder.head_dim, decoder.dtype, decoder.device)
        self.graphs = CUDAGraphRunner(decoder.device) if self.options.cuda_graphs else None
        self._vision = model.vision
        if self.graphs is not None and isinstance(model.vision, StaticVision):
            tokens = [rows * cols for rows, cols in model.grids.values()]
            self._vision = GraphedVision(model.vision, self.graphs, tokens)
        self.stage_events = False
        vision = model.vision
        self._splits = vision if self.options.picture_reuse and isinstance(vision, SplitsStems) else None
        self._run_layers: RunLayers = run_layers if self.graphs is None else self.graphs
        self._rotary: dict[int, tuple[DecoderStack, Rotary]] = {}
        self._lock = RLock()

    @torch.inference_mode()
    def run(self, plans: Sequence[FramePlan], between: Between | None = None) -> list[FrameResult]:
        """Compute frames of several sessions, at most one of each.

        Args:
            plans: Made by sessions of this engine; each can be run once.
            between: Called before the vision stems, behind them, behind the embeddings, in the middle of every layer
                and behind it (a last layer without queries ends in its middle), and before every decoding round: it
                may run plans of other sessions, and does not raise. Never, unless the engine is ``interruptible``.

        Returns:
            What became of every plan, in order. If one session's frame fails, its result holds the error, and the
            others are computed all the same.

        Raises:
            InputError: If a plan is another engine's, was run before, or two are of one session. Nothing has been
                computed then.
        """
        self._check(plans)
        for plan in plans:
            plan.used = True
        clock = self.stopwatch()  # of all: every robot waits for the whole batch
        pause, run_layers = self._pieces(clock, between)
        runs = [_Run(plan, FrameResult(plan), clock) for plan in plans]
        with self._lock:
            before = 0 if self.graphs is None else self.graphs.eager_runs
            pause()
            stems = self._encode_stems(runs)
            pause()
            for run, stem, visual in zip(runs, stems, self._encode_together(runs, stems), strict=True):
                self._try(run, partial(self._open, stem=stem, visual=visual))
            pause()
            self._prefill(runs, clock, run_layers)
            self._decode(runs, clock, pause, run_layers)
            for run in runs:
                run.result.eager_runs = 0 if self.graphs is None else self.graphs.eager_runs - before
                if isinstance(run.result.error, NonFiniteError):
                    self.store.clear(run.plan.region)
                for stage, milliseconds in clock.stages.items():
                    run.plan.clock.stages[stage] += milliseconds
        return [run.result for run in runs]

    @property
    def interruptible(self) -> bool:
        """A run can be interrupted; not on a GPU, which is behind its host, nor if graphs overwrite its results."""
        return self.graphs is None and self.model.device.type == "cpu"

    def slots(self, plan: FramePlan) -> int:
        """Count the slots of the store that a plan needs, those that its session has among them."""
        needed = plan.prompt.layout.length + self.model.head.max_new_tokens
        if self.graphs is not None and needed >= plan.region.size:
            needed = self.graphs.size_for(needed)
        return needed

    def stopwatch(self) -> Stopwatch:
        """Make a clock for a frame."""
        return Stopwatch(self.model.device, events=self.stage_events)

    @torch.inference_mode()
    def append(self, sequences: Sequence[SequenceState], rows: Sequence[AppendRows]) -> list[torch.Tensor]:
        """Run rows behind sequences that a run has left open.

        Args:
            sequences: Of results.
            rows: Of each; all through the same stack.

        Returns:
            Their normalised last hidden states, each (n, width).
        """
        stack: DecoderStack = rows[0].stack or self.model.decoder
        with self._lock:
            cursors = [
                AppendCursor(stack, sequence, own, self._rotary_of(stack, sequence.region.size))
                for sequence, own in zip(sequences, rows, strict=True)
            ]
            embedded = [own.embeddings for own in rows]
            return run_packed(stack, cursors, embedded, self.store, self._run_layers)

    def _pieces(self, clock: Stopwatch, between: Between | None) -> tuple[Between, RunLayers]:
        """Make what is called between two pieces, and what runs layers so that it is called."""
        if between is None or not self.interruptible:
            return (lambda: None), self._run_layers

        def pause() -> None:
            with clock.pause():
                between()

        return pause, partial(run_layers, between=pause)

    def _check(self, plans: Sequence[FramePlan]) -> None:
        for plan in plans:
            if plan.engine is not self:
                raise InputError(
                    "this plan was made by a session of another engine: run it there, or make the session "
                    "by the same CachedVLA"
                )
            if plan.used:
                raise InputError("this plan was run before: make a new one by session.plan(frame)")
        if len({id(plan.region) for plan in plans}) != len(plans):
            raise InputError("two plans of one session in one run: commit the first before the second is made")

    def _try(self, run: _Run, work: Callable[[_Run], T]) -> T | None:
        """Do something for one session; what goes wrong is its own affair."""
        if run.result.error is not None:
            return None
        try:
            return work(run)
        except Exception as error:  # whatever it is, it goes to the session that asked
            run.result.error = _told(error)
            return None

    def _encode_stems(self, runs: Sequence[_Run]) -> list[Any]:
        """Run the vision stem of all frames at once; if that fails, one by one: the fault is one session's affair."""
        self._take_parts(runs)
        stems: dict[int, Any] = {}
        plans = [run.plan for run in runs if run.plan.vision_kv is None and not run.parts]
        if len(plans) > 1:
            with suppress(Exception), runs[0].clock.stage("tower"):
                made = self._vision.encode_stems([plan.frame for plan in plans], [plan.images for plan in plans])
                for plan in plans:
                    if isinstance(plan.decided, Future):
                        wait([plan.decided])
                stems = {id(plan): stem for plan, stem in zip(plans, made, strict=True)}
        every = [stems[id(run.plan)] if id(run.plan) in stems else self._try(run, self._encode_stem) for run in runs]
        for run, stem in zip(runs, every, strict=True):
            self._try(run, partial(self._keep_stem, stem=stem))
        return every

    def _take_parts(self, runs: Sequence[_Run]) -> None:
        """Choose which cameras are not encoded again: all of a frame, or some where the others alone cost less.

        They have no graph; and on an accelerator a pass of their own takes longer than a few more rows in the batch's.
        """
        seen = [run for run in runs if len(run.plan.stems) == len(self.model.grids)]
        alone = self.model.device.type == "cpu" or len(runs) - len(seen) == 1
        for run in runs if self._vision is self.model.vision and alone else seen:
            run.parts = run.plan.stems
            run.result.unchanged = tuple(run.parts)

    def _keep_stem(self, run: _Run, stem: Any) -> None:
        """Leave the cameras' parts of a stem to the next frame."""
        if self._splits is not None and run.plan.vision_kv is None:
            parts = dict(zip(self.model.grids, self._splits.split_stem(stem), strict=True))
            run.result.stems = {**parts, **run.plan.stems}

    def _encode_stem(self, run: _Run) -> Any:
        plan, parts = run.plan, dict(run.parts)
        try:
            with run.clock.stage("tower"):
                if self._splits is None or not parts:
                    return self._vision.encode_stem(plan.frame, plan.images, plan.vision_kv)
                new = {name: image for name, image in plan.images.items() if name not in parts}
                if new:
                    stem = self.model.vision.encode_stem(plan.frame, new)
                    seen = [name for name in self.model.grids if name in new]
                    parts |= zip(seen, self._splits.split_stem(stem), strict=True)
                return self._splits.join_stem([parts[name] for name in self.model.grids])
        finally:  # whatever happens, nothing of this frame goes on beside the next
            if isinstance(plan.decided, Future):
                with run.clock.stage("policy"):
                    wait([plan.decided])

    def _encode_together(self, runs: Sequence[_Run], stems: Sequence[Any]) -> list[torch.Tensor | None]:
        """Compute the visual tokens of all decisions at once; those for which there is none are done one by one.

        None is if something fails: the fault is one session's affair. Nor if every number of rows were a graph.
        """
        made: dict[int, torch.Tensor] = {}
        alike = [(run, stem) for run, stem in zip(runs, stems, strict=True) if run.plan.vision_kv is None]
        several = [(run, stem) for run, stem in alike if run.result.error is None]
        if len(several) > 1 and self.graphs is None and self.options.sparse_vision_head:
            with suppress(Exception):
                masks = [run.plan.decision()[0].exit_layer > 0 for run, _ in several]
                with runs[0].clock.stage("tower"):
                    features = self._vision.encode_tokens_of([stem for _, stem in several], masks)
                with runs[0].clock.stage("projector"):
                    tokens = torch.split(self._vision.project(torch.cat(features)), [len(own) for own in features])
                made = {id(run): own for (run, _), own in zip(several, tokens, strict=True)}
        return [made.get(id(run)) for run in runs]

    def _open(self, run: _Run, stem: Any, visual: torch.Tensor | None) -> None:
        """Make room in the store, and embed the rows that are computed; ``visual`` tokens may be there already."""
        plan, model = run.plan, self.model
        decision, _ = plan.decision()
        layout, clock = plan.prompt.layout, run.clock
        with clock.stage("bookkeeping"):
            plan.begin()
            self.store.reserve(plan.region, self.slots(plan))
            if decision.deltas is not None:
                reused = layout.visual.start + np.flatnonzero(decision.exit_layer == 0)
                self.store.add(plan.region, reused, decision.deltas)
        run.result.encoded = decision.exit_layer > 0
        if visual is None:
            visual, run.result.encoded = self._encode_tokens(run, stem, decision)
        with clock.stage("projector"):
            draft = None if plan.drafted is None else model.head.draft(plan.drafted)
            prefix, run.suffix = model.processor.embed(plan.prompt)
            suffix = model.head.first_suffix(run.suffix, plan.rng or np.random.default_rng(0))
            run.embeddings = torch.cat([prefix, visual, suffix] if draft is None else [prefix, visual, suffix, draft])
        sequence = run.result.sequence = SequenceState(
            layout,
            plan.region,
            decision,
            draft=0 if draft is None else len(draft),
            probe=plan.probe,
            refine=plan.refine,
            reads_hidden=model.head.reads == "hidden",
        )
        if run.embeddings.shape[0] != sequence.n_computed:
            raise InputError(f"{run.embeddings.shape[0]} embeddings for {sequence.n_computed} tokens to compute")

    def _encode_tokens(self, run: _Run, stem: Any, decision: Decision) -> tuple[torch.Tensor, BoolArray]:
        """Compute the visual tokens of a decision, (n, width); and tell which the vision encoder computed."""
        vision, plan, computed = self._vision, run.plan, decision.exit_layer > 0
        with run.clock.stage("tower"):
            partly = self.options.sparse_vision_head
            if plan.vision_kv is not None:
                partly = decision.skipped is SkippedTokens.REUSE
            features = vision.encode_tokens(stem, computed if partly else None, plan.vision_kv)
        with run.clock.stage("projector"):
            if not partly and not computed.all():
                features = features[upload(np.flatnonzero(computed), features.device)]
            return vision.project(features), computed if partly else np.ones_like(computed)

    def _prefill(self, runs: Sequence[_Run], clock: Stopwatch, run_layers: RunLayers) -> None:
        decoder = self.model.decoder
        alive = [run for run in runs if run.result.error is None]
        if not alive:
            return
        try:
            with clock.stage("prefill"):
                cursors = [
                    PrefillCursor(decoder, run.sequence, self._rotary_of(decoder, run.plan.region.size))
                    for run in alive
                ]
                embedded = [run.embeddings for run in alive]
                hidden = run_packed(decoder, cursors, embedded, self.store, run_layers)
                for run, rows in zip(alive, hidden, strict=True):
                    sequence, run.result.error = run.sequence, run.sequence.error
                    if run.result.error is None:
                        count = sequence.layout.n_suffix + sequence.draft if sequence.reads_hidden else 0
                        sequence.hidden = rows[len(rows) - count :]
        except Exception as error:  # of all of them
            self._fail(alive, error)

    def _decode(self, runs: Sequence[_Run], clock: Stopwatch, pause: Between, run_layers: RunLayers) -> None:
        """Advance all sessions round by round; those that are done leave."""
        with clock.stage("decode"):
            for run in runs:
                self._try(run, self._begin_decoding)
            while open_runs := [run for run in runs if run.rows is not None and run.result.error is None]:
                pause()
                asked, kind = open_runs[0].rows, _kind(open_runs[0])
                together = [run for run in open_runs if _kind(run) == kind]
                try:
                    if isinstance(asked, Together):
                        self._compute(asked.run, together)
                    else:
                        self._round(together, run_layers)
                except Exception as error:  # of all that were packed
                    self._fail(together, error)

    def _begin_decoding(self, run: _Run) -> None:
        plan, sequence = run.plan, run.sequence
        if plan.rng is None:
            return
        run.result.rng_state = plan.rng.bit_generator.state
        region, length = sequence.region, sequence.layout.length

        def slots(pool: torch.Tensor) -> torch.Tensor:
            return pool[:, region.start : region.start + length]

        context = HeadContext(
            frame=plan.frame,
            layout=sequence.layout,
            hidden=sequence.hidden,
            keys=lambda layer: slots(self.store.keys[layer]),
            values=lambda layer: slots(self.store.values[layer]),
            rng=plan.rng,
            drafted=plan.drafted if sequence.draft else None,
            rtc=plan.rtc,
        )
        run.decoding = self.model.head.decode(context)
        self._advance(run, None)

    def _compute(self, work: Callable[[Sequence[Any]], Sequence[Any]], runs: Sequence[_Run]) -> None:
        """Let the head's own networks compute what several sessions wait for."""
        given = [run.rows.given for run in runs if isinstance(run.rows, Together)]
        for run, made in zip(runs, work(given), strict=True):
            self._try(run, partial(self._advance, sent=made))

    def _round(self, runs: Sequence[_Run], run_layers: RunLayers) -> None:
        """Run what several heads yielded through one stack, and send them its last hidden states."""
        rows = runs[0].rows
        stack: DecoderStack = self.model.decoder
        if isinstance(rows, AppendRows):
            stack = rows.stack or stack
        prepared = [(run, self._try(run, partial(self._prepare, stack=stack))) for run in runs]
        ready = [(run, *rows) for run, rows in prepared if rows is not None]
        cursors, embedded = [cursor for _, cursor, _ in ready], [rows for *_, rows in ready]
        if _kind(runs[0]).gradient:
            with recording():
                hidden = run_packed(stack, cursors, embedded, GradientKV(self.store))
        else:
            hidden = run_packed(stack, cursors, embedded, self.store, run_layers)
        for (run, *_), own in zip(ready, hidden, strict=True):
            asked = own[-len(run.suffix) :] if isinstance(run.rows, RerunPrompt) else own
            self._try(run, partial(self._advance, sent=asked))

    def _prepare(self, run: _Run, stack: DecoderStack) -> tuple[Cursor, torch.Tensor]:
        """Plan the rows that a head yielded, and embed them."""
        sequence, rows, rotary = run.sequence, run.rows, self._rotary_of(stack, run.plan.region.size)
        if isinstance(rows, AppendRows):
            if rows.embeddings.requires_grad:  # a gradient passes through nothing that was made without
                with torch.inference_mode(False):
                    return AppendCursor(stack, sequence, rows, (rotary[0].clone(), rotary[1].clone())), rows.embeddings
            return AppendCursor(stack, sequence, rows, rotary), rows.embeddings
        if not isinstance(rows, RerunPrompt):  # pragma: no cover - those that are done have left
            raise RuntimeError("the head yielded no rows")
        before = run.embeddings[: len(run.embeddings) - len(run.suffix) - sequence.draft]
        embeddings = torch.cat([before, rows.edit(run.suffix)])
        return PrefillCursor(self.model.decoder, sequence.again(), rotary), embeddings

    def _advance(self, run: _Run, sent: Any) -> None:
        """Let a head go on until it yields something or answers."""
        if run.decoding is None:  # pragma: no cover - it was begun
            raise RuntimeError("decoding has not begun")
        run.rows = None
        try:
            run.rows = run.decoding.send(sent)
        except StopIteration as answer:
            action, run.result.metadata = answer.value
            action, rtc = finite(action), run.plan.rtc
            run.result.action = action if rtc is None else rtc.join(action, guided=self.model.head.guided)

    def _fail(self, runs: Sequence[_Run], error: Exception) -> None:
        for run in runs:
            run.result.error, run.rows = _told(error), None

    def _rotary_of(self, stack: DecoderStack, size: int) -> Rotary:
        """Get the position embedding of a stack from slot 0 on, for all slots of a session's region."""
        if id(stack) not in self._rotary or len(self._rotary[id(stack)][1][0]) < size:
            self._rotary[id(stack)] = stack, stack.rotary(torch.arange(size, device=self.model.device))
        return self._rotary[id(stack)][1]


def _told(error: Exception) -> Exception:
    """Say of a full memory what can be done about it; leave every other error as it is."""
    if not isinstance(error, torch.OutOfMemoryError):
        return error
    told = DeviceMemoryError(
        "the GPU's memory is full, so there is no action. The next frame is computed in full; if it fails as well, run "
        f"fewer sessions at a time, a smaller batch or another dtype, or end what else is on the GPU ({error})"
    )
    told.__cause__ = error
    return told


class _Kind(NamedTuple):
    """Rows that are packed, or whatever else is computed together, are alike in all of this.

    Attributes:
        work: What computes it; ``None`` for rows.
        prompt: Whether they are whole prompts.
        stack: Identity of the stack that they run through.
        gradient: Identity of a run with a gradient, which is run alone; 0 without one.
    """

    work: Callable[[Sequence[Any]], Sequence[Any]] | None
    prompt: bool
    stack: int
    gradient: int


def _kind(run: _Run) -> _Kind:
    """Tell what can be packed, or computed together, with what a run waits for."""
    rows = run.rows
    if isinstance(rows, AppendRows):
        return _Kind(None, False, id(rows.stack), id(run) if rows.embeddings.requires_grad else 0)
    return _Kind(rows.run if isinstance(rows, Together) else None, isinstance(rows, RerunPrompt), id(None), 0)
