"""Several sessions in one run: every one gets what it would get alone, and none knows of the others."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pytest
import torch

from lac_vla import CachedVLA, Dense, Frame, InputError, Random, Session, random_vla
from lac_vla.engine.engine import Engine
from lac_vla.engine.options import EngineOptions
from lac_vla.engine.plan import FramePlan
from lac_vla.engine.step_info import StepInfo
from lac_vla.errors import NonFiniteError
from lac_vla.models import FAMILIES, VLA
from lac_vla.models.heads.base import Decoding, HeadContext
from lac_vla.models.heads.diffusion import DiffusionHead
from lac_vla.models.heads.sampler import Sampling
from lac_vla.models.heads.tokens import TokenHead
from lac_vla.policies import CachePolicy, LACPolicy
from lac_vla.session import plan_together
from lac_vla.types import AttentionProbe, Decision, FloatArray, TokenLayout
from tests.engine.scenes import ALL_POLICIES, TINY_GRIDS, Pruner, Staircase, UntrainedLAC, frame

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
TEXTS = ("pick up the bowl", "stop", "put the mug on the plate, then open the drawer and stop")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> VLA:
    family = FAMILIES[request.param]
    return random_vla(family.presets[family.tiny], seed=3)


def make(engine: Engine, policy: CachePolicy, seed: int = 0, max_age: int = 4) -> Session:
    return Session(engine, policy, policy.flow, max_age, 0.25, seed)


def observe(robot: int, step: int) -> Frame:
    """Robots see different pictures, are told different things, and are told another one in mid-episode."""
    return frame(10 * robot + step, TEXTS[(robot + step // 3) % len(TEXTS)])


def together(engine: Engine, sessions: Sequence[Session], frames: Sequence[Frame]) -> list[FloatArray]:
    plans = []
    for plan in plan_together(list(zip(sessions, frames, strict=True))):
        assert isinstance(plan, FramePlan)
        plans.append(plan)
    results = engine.run(plans)
    actions = []
    for session, plan, result in zip(sessions, plans, results, strict=True):
        session.commit(plan, result)
        assert result.action is not None
        actions.append(result.action)
    return actions


def same(one: StepInfo | None, other: StepInfo | None) -> None:
    """Everything but the time that it took."""
    assert one is not None
    assert other is not None
    assert (one.decision.exit_layer == other.decision.exit_layer).all()
    assert (one.age == other.age).all()
    assert (one.forced == other.forced).all()
    assert one.dense_reason == other.dense_reason
    assert one.decode_passes == other.decode_passes
    assert one.draft == other.draft
    assert one.metadata.get("tokens") == other.metadata.get("tokens")
    np.testing.assert_allclose(one.metadata["normalized"], other.metadata["normalized"], **CLOSE)


def assert_batch_equals_alone(
    model: VLA, policies: Sequence[Callable[[], CachePolicy]], options: str = "default", steps: int = 6
) -> None:
    """Robots join one after the other: some see their first frame while others reuse old slots."""
    packed = Engine(model, EngineOptions.parse(options))
    sessions = [make(packed, policy(), seed) for seed, policy in enumerate(policies)]
    alone = [make(Engine(model, packed.options), policy(), seed) for seed, policy in enumerate(policies)]
    for step in range(steps):
        there = [robot for robot in range(len(policies)) if step >= robot]
        frames = [observe(robot, step) for robot in there]
        actions = together(packed, [sessions[robot] for robot in there], frames)
        for robot, observation, action in zip(there, frames, actions, strict=True):
            np.testing.assert_allclose(action, alone[robot].act(observation), **CLOSE)
            same(sessions[robot].last_info, alone[robot].last_info)
            memory, other = sessions[robot].memory, alone[robot].memory
            assert memory.attention.keys() == other.attention.keys()
            for layer, attention in memory.attention.items():
                torch.testing.assert_close(attention, other.attention[layer], **CLOSE)
            torch.testing.assert_close(slots(sessions[robot]), slots(alone[robot]), **CLOSE)


def slots(session: Session) -> torch.Tensor:
    """Keys and values of the prompt, (2, layers, kv_heads, length, head_dim)."""
    layout, start, store = session.memory.layout, session._region.start, session.engine.store
    assert layout is not None
    own = slice(start, start + layout.length)
    return torch.stack([store.keys[:, :, own], store.values[:, :, own]])


def test_a_run_that_is_interrupted_by_others_changes_nothing(model: VLA) -> None:
    """Others see their first frames between its pieces: the store grows. All get what they get alone, to the bit."""
    engine = Engine(model)
    policies: list[CachePolicy] = [Pruner(), Staircase(), Random(0.5), Dense()]
    sessions = [make(engine, policy, seed) for seed, policy in enumerate(policies)]
    alone = [make(Engine(model), policy, seed) for seed, policy in enumerate(policies)]
    steps = [0] * len(sessions)

    def checked(robot: int, act: Callable[[Session, Frame], FloatArray]) -> None:
        observation = observe(robot, steps[robot])
        steps[robot] += 1
        np.testing.assert_array_equal(act(sessions[robot], observation), alone[robot].act(observation))
        assert torch.equal(slots(sessions[robot]), slots(alone[robot]))

    for _ in range(4):
        pieces, inside = 0, 0.0

        def between() -> None:
            nonlocal pieces, inside
            began = time.perf_counter()
            pieces += 1
            if pieces < 9 or pieces % 7 == 0:
                checked(1 + pieces % 3, Session.act)
            inside += time.perf_counter() - began

        def interrupted(session: Session, observation: Frame) -> FloatArray:
            plan = session.plan(observation)
            began = time.perf_counter()
            [result] = engine.run([plan], between)
            took = time.perf_counter() - began
            step = session.commit(plan, result)
            assert step.timings["model_call"] <= 1e3 * (took - inside) + 1e-6  # noqa: B023 - its own time alone
            assert result.action is not None
            return result.action

        checked(0, interrupted)
        assert pieces >= 3 + 2 * model.n_layers - 1
    assert min(steps) > 3


@pytest.mark.parametrize("name", ALL_POLICIES)
def test_a_batch_of_one_policy_equals_its_sessions_alone(model: VLA, name: str) -> None:
    assert_batch_equals_alone(model, [ALL_POLICIES[name]] * 3)


@pytest.mark.parametrize("options", ["none", "default", "exact", "draft+bucket=8", "draft+bucket=8+cuda_graphs"])
def test_a_batch_of_all_policies_equals_its_sessions_alone(model: VLA, options: str) -> None:
    """Reuse, pruning, probes and refinement in mid-forward, all in one run."""
    assert_batch_equals_alone(model, list(ALL_POLICIES.values()), options, steps=len(ALL_POLICIES) + 2)


def test_rows_of_all_sessions_go_through_a_layer_at_once(model: VLA, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, calls = Engine(model), []
    layer = model.decoder.layers[0]
    original = type(layer).qkv

    def counted(self: Any, hidden: torch.Tensor, *rest: Any) -> Any:
        if self is layer:
            calls.append(len(hidden))
        return original(self, hidden, *rest)

    monkeypatch.setattr(type(layer), "qkv", counted)
    sessions = [make(engine, Random(0.5), seed) for seed in range(4)]
    for step in range(3):
        calls.clear()
        together(engine, sessions, [observe(robot, step) for robot in range(4)])
        infos = [session.last_info for session in sessions]
        lengths = [info.layout.length - int(info.cached.sum()) + info.draft for info in infos if info is not None]
        assert calls[0] == sum(lengths)
        longest = max(len(info.decode_passes) for info in infos if info is not None)
        assert len(calls) == 1 + longest  # those that are done leave the round


def tiny(family: str) -> VLA:
    return random_vla(FAMILIES[family].presets[FAMILIES[family].tiny], seed=3)


@pytest.mark.parametrize("method", ["ddim", "ddpm"])
def test_chunks_of_all_sessions_are_drawn_at_once_each_with_its_own_noise(method: Literal["ddim", "ddpm"]) -> None:
    """Guided by the absence of a condition, both methods; one session joins late, so that its chance is elsewhere."""
    model = tiny("cogact")
    assert isinstance(model.head, DiffusionHead)
    model.head.sampling, sizes = Sampling(method, guidance=1.5), list[int]()
    first = model.head.model.net.blocks[0]
    packed, policy = Engine(model), Random(0.5)
    sessions, alone = ([make(engine, policy, seed) for seed in range(4)] for engine in (packed, Engine(model)))
    for step in range(2):
        there = range(3 + step)
        frames = [observe(robot, step) for robot in there]
        with first.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0]))):
            actions = together(packed, [sessions[robot] for robot in there], frames)
        assert sizes == [2 * len(there)] * len(model.head.sampling.visited)
        sizes.clear()
        for robot, observation, action in zip(there, frames, actions, strict=True):
            np.testing.assert_allclose(action, alone[robot].act(observation), **CLOSE)
            same(sessions[robot].last_info, alone[robot].last_info)


@pytest.mark.parametrize("options", ["none", "default"])
def test_tokens_of_all_sessions_are_picked_at_once(options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once behind the prefill, and once behind every pass, of those that are not done."""
    model, calls = tiny("openvla"), list[int]()
    assert isinstance(model.head, TokenHead)
    engine, logits = Engine(model, EngineOptions.parse(options)), model.head.logits

    def counted(hidden: torch.Tensor) -> torch.Tensor:
        calls.append(len(hidden))
        return logits(hidden)

    monkeypatch.setattr(model.head, "logits", counted)
    sessions = [make(engine, Random(0.5), seed) for seed in range(3)]
    for step in range(3):
        calls.clear()
        together(engine, sessions, [observe(robot, step) for robot in range(3)])
        infos = [session.last_info for session in sessions if session.last_info is not None]
        assert len(calls) == 1 + max(len(info.decode_passes) for info in infos)
        assert calls[0] == sum(1 + info.draft for info in infos)
        appended = [stop - start for info in infos for start, stop in info.decode_passes]
        assert sum(calls[1:]) == sum(appended)


def test_what_a_head_computes_together_fails_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("cogact")
    engine = Engine(model)
    sessions = [make(engine, Random(0.5), seed) for seed in range(2)]
    plans = [session.plan(observe(robot, 0)) for robot, session in enumerate(sessions)]
    with monkeypatch.context() as patch:
        patch.setattr(DiffusionHead, "_sample", lambda *_: 1 / 0)
        results = engine.run(plans)
    for session, plan, result in zip(sessions, plans, results, strict=True):
        with pytest.raises(ZeroDivisionError):
            session.commit(plan, result)
        usable(session, dense="first frame")


def test_a_chunk_that_is_not_finite_fails_for_its_session_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("cogact")
    engine, draw, seen = Engine(model), DiffusionHead._sample, []
    sessions, other = [make(engine, Random(0.5), seed) for seed in range(3)], make(Engine(model), Random(0.5), 2)
    plans = [session.plan(observe(robot, 0)) for robot, session in enumerate(sessions)]

    def broken(self: DiffusionHead, given: Any) -> list[torch.Tensor]:
        seen.append(len(given))
        features = [feature * torch.nan if at == 1 else feature for at, (feature, _) in enumerate(given)]
        return list(draw(self, [(feature, noise) for feature, (_, noise) in zip(features, given, strict=True)]))

    with monkeypatch.context() as patch:
        patch.setattr(DiffusionHead, "_sample", broken)
        results = engine.run(plans)
    assert seen == [3], "the broken feature was drawn together with the others"
    assert [type(result.error) for result in results] == [type(None), NonFiniteError, type(None)]
    np.testing.assert_allclose(results[2].action, other.act(observe(2, 0)), **CLOSE)


@pytest.mark.parametrize("part", ["policy", "stem", "tokens", "head", "refine"])
def test_what_fails_for_one_session_fails_for_it_alone(model: VLA, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken: list[bool] = []

    @dataclass(frozen=True)
    class Faulty(Random):
        def probe(self, n_layers: int) -> AttentionProbe | None:
            return AttentionProbe((0,), "last") if part == "refine" else None

        def refine(self, layout: TokenLayout, layer: int, attention: torch.Tensor, decision: Decision) -> Decision:
            raise RuntimeError("broken")

        def decide(self, inputs: Any) -> Decision:
            if part == "policy" and broken:
                raise RuntimeError("broken")
            return super().decide(inputs)

    options = EngineOptions.parse("default+async_policy" if part == "policy" else "default")
    packed = Engine(model, options)
    sessions = [make(packed, policy, 1) for policy in (Random(0.5), Faulty(0.5), Staircase())]
    alone = [make(Engine(model), policy, 1) for policy in (Random(0.5), Dense(), Staircase())]
    for step in range(2 if part == "policy" else 1):
        frames = [observe(robot, step) for robot in range(3)]
        together(packed, sessions, frames)
        for session, observation in zip(alone, frames, strict=True):
            session.act(observation)
    frames = [observe(robot, 2) for robot in range(3)]
    broken.append(True)
    plans = [session.plan(observation) for session, observation in zip(sessions, frames, strict=True)]
    with monkeypatch.context() as patch:
        _break(part, plans[1], model, patch)
        results = packed.run(plans)
    broken.clear()
    with pytest.raises(RuntimeError, match="broken"):
        sessions[1].commit(plans[1], results[1])
    for robot in (0, 2):
        sessions[robot].commit(plans[robot], results[robot])
        expected = alone[robot].act(frames[robot])
        np.testing.assert_allclose(results[robot].action, expected, **CLOSE)
        same(sessions[robot].last_info, alone[robot].last_info)
    if part == "refine":
        return  # it fails in every frame that is not dense
    # the session is usable: what was touched is not built upon
    sessions[1].act(observe(1, 3))
    assert sessions[1].last_info is not None
    assert sessions[1].last_info.dense_reason == "first frame"


def _break(part: str, plan: Any, model: VLA, patch: pytest.MonkeyPatch) -> None:
    """Make a part of the model fail for one plan."""
    vision, head = type(model.vision), type(model.head)
    stem, several, tokens, decode = vision.encode_stem, vision.encode_stems, vision.encode_tokens, head.decode
    tokens_of = vision.encode_tokens_of
    stems: list[Any] = []

    def encode_stem(self: Any, frame: Frame, *rest: Any) -> Any:
        made = stem(self, frame, *rest)
        if frame is plan.frame:
            stems.append(made)
            if part == "stem":
                raise RuntimeError("broken")
        return made

    def encode_stems(self: Any, frames: Sequence[Frame], images: Any) -> Any:
        made = several(self, frames, images)
        stems.extend(own for frame, own in zip(frames, made, strict=True) if frame is plan.frame)
        if part == "stem":
            raise RuntimeError("broken")
        return made

    def encode_tokens(self: Any, made: Any, *rest: Any) -> Any:
        if part == "tokens" and any(made is own for own in stems):
            raise RuntimeError("broken")
        return tokens(self, made, *rest)

    def encode_tokens_of(self: Any, several: Sequence[Any], masks: Any) -> Any:
        if part == "tokens" and any(made is own for own in stems for made in several):
            raise RuntimeError("broken")
        return tokens_of(self, several, masks)

    def decode_broken(self: Any, context: HeadContext) -> Decoding:
        if part == "head" and context.frame is plan.frame:
            raise RuntimeError("broken")
        return decode(self, context)

    patch.setattr(vision, "encode_stem", encode_stem)
    patch.setattr(vision, "encode_stems", encode_stems)
    patch.setattr(vision, "encode_tokens", encode_tokens)
    patch.setattr(vision, "encode_tokens_of", encode_tokens_of)
    patch.setattr(head, "decode", decode_broken)


def test_what_fails_for_all_is_said_to_all(model: VLA, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model)
    sessions = [make(engine, Random(0.5), seed) for seed in range(2)]
    together(engine, sessions, [observe(0, 0), observe(1, 0)])
    plans = [session.plan(observe(robot, 1)) for robot, session in enumerate(sessions)]
    with monkeypatch.context() as patch:
        patch.setattr(type(model.decoder.layers[1]), "finish", lambda *_: 1 / 0)
        results = engine.run(plans)
    for session, plan, result in zip(sessions, plans, results, strict=True):
        with pytest.raises(ZeroDivisionError):
            session.commit(plan, result)
        session.act(observe(0, 2))
        assert session.last_info is not None
        assert session.last_info.dense_reason == "first frame"


# Bad input.


@pytest.fixture
def vla() -> CachedVLA:
    return CachedVLA(random_vla("tiny", seed=3), Random(0.5))


def usable(session: Session, *, dense: str | None) -> None:
    session.act(frame(3))
    assert session.last_info is not None
    assert session.last_info.dense_reason == dense


def test_a_plan_of_another_model_is_refused(vla: CachedVLA) -> None:
    session = vla.session()
    session.act(frame(0))
    plan = session.plan(frame(1))
    with pytest.raises(InputError, match="another engine"):
        Engine(vla.model).run([plan])
    [result] = vla.engine.run([plan])  # nothing has happened to it
    session.commit(plan, result)
    usable(session, dense=None)


def test_a_session_planned_twice_gives_the_first_plan_up(vla: CachedVLA) -> None:
    session = vla.session()
    session.act(frame(0))
    plan = session.plan(frame(1))
    with pytest.raises(InputError, match="not committed"):
        session.plan(frame(2))
    [result] = vla.engine.run([plan])
    with pytest.raises(InputError, match="not the open plan"):
        session.commit(plan, result)
    usable(session, dense="first frame")  # its slots were written, and never committed


def test_a_plan_that_was_never_run_leaves_the_cache(vla: CachedVLA) -> None:
    session = vla.session()
    session.act(frame(0))
    session.plan(frame(1))
    with pytest.raises(InputError, match="given up"):
        session.act(frame(2))
    usable(session, dense=None)


@pytest.mark.parametrize("change", ["another frame", "refresh", "reset"])
def test_a_plan_whose_session_has_gone_on_is_refused(vla: CachedVLA, change: str) -> None:
    """Its decision was made for slots that are others now."""
    session = vla.session()
    session.act(frame(0))
    session.act(frame(1))
    plan = session.plan(frame(2))
    if change == "refresh":
        assert session.refresh(4) == 4
    elif change == "reset":
        session.reset()
        session.act(frame(3))
    else:
        with pytest.raises(InputError, match="given up"):
            session.plan(frame(3))
        session.act(frame(3))
    [result] = vla.engine.run([plan])
    assert isinstance(result.error, InputError)
    assert "has gone on" in str(result.error)
    if change == "refresh":
        with pytest.raises(InputError, match="has gone on"):
            session.commit(plan, result)
    before = slots(session).clone()
    usable(session, dense=None)  # nothing was touched
    assert session.last_info is not None
    kept = session.last_info.cached
    visual = slice(1, 1 + kept.size)
    assert torch.equal(slots(session)[..., visual, :][..., kept, :], before[..., visual, :][..., kept, :])


def test_two_plans_of_one_session_in_one_run(vla: CachedVLA) -> None:
    session, other = vla.session(), vla.session()
    session.act(frame(0))
    plan, good = session.plan(frame(1)), other.plan(frame(1))
    with pytest.raises(InputError, match="two plans of one session"):
        vla.engine.run([plan, good, plan])
    results = vla.engine.run([plan, good])
    session.commit(plan, results[0])
    other.commit(good, results[1])
    usable(session, dense=None)


def test_a_plan_is_run_once(vla: CachedVLA) -> None:
    session = vla.session()
    plan = session.plan(frame(0))
    [result] = vla.engine.run([plan])
    with pytest.raises(InputError, match="run before"):
        vla.engine.run([plan])
    session.commit(plan, result)
    with pytest.raises(InputError, match="not the open plan"):
        session.commit(plan, result)
    usable(session, dense=None)


def test_a_result_belongs_to_its_plan(vla: CachedVLA) -> None:
    one, other = vla.session(), vla.session()
    mine, theirs = one.plan(frame(0)), other.plan(frame(1))
    results = vla.engine.run([mine, theirs])
    with pytest.raises(InputError, match="not the open plan"):
        one.commit(mine, results[1])
    one.commit(mine, results[0])
    other.commit(theirs, results[1])


def test_a_reset_gives_an_open_plan_up(vla: CachedVLA) -> None:
    session = vla.session()
    plan = session.plan(frame(0))
    [result] = vla.engine.run([plan])
    session.reset()
    with pytest.raises(InputError, match="not the open plan"):
        session.commit(plan, result)
    usable(session, dense="first frame")


def test_an_empty_run_is_no_error(vla: CachedVLA) -> None:
    assert vla.engine.run([]) == []


def test_refresh_and_shadow_between_others_frames(vla: CachedVLA) -> None:
    """What one session does between frames leaves the others' slots alone."""
    one, other, reference = vla.session(1), vla.session(2), CachedVLA(vla.model, Pruner()).session(2)
    other = make(vla.engine, Pruner(), 2)
    for step in range(4):
        one.act(frame(step))
        one.refresh(5)
        np.testing.assert_allclose(other.act(frame(step)), reference.act(frame(step)), **CLOSE)
        one.shadow()


def test_a_replaced_head_runs_over_the_same_engine_parts(vla: CachedVLA) -> None:
    """Two models that share weights are two models: each has an engine of its own."""
    again = CachedVLA(replace(vla.model, name="other"), Random(0.5))
    session = again.session()
    session.act(frame(0))
    with pytest.raises(InputError, match="another engine"):
        vla.engine.run([session.plan(frame(1))])


@pytest.mark.parametrize("broken", [False, True])
def test_stems_and_decisions_of_robots_with_one_learned_policy(broken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are computed at once for all; where that fails, one by one, with the same chance."""
    model, policy, calls = random_vla("tiny", seed=3), UntrainedLAC().policy(TINY_GRIDS), Counter[str]()
    packed = Engine(model)

    def counted(kind: type, name: str) -> None:
        whole = getattr(kind, name)

        def call(own: object, *arguments: Any) -> Any:
            calls[name] += len(arguments[0]) > 1
            answer = whole(own, *arguments)
            if broken and len(arguments[0]) > 1:
                raise RuntimeError("broken")
            return answer

        monkeypatch.setattr(kind, name, call)

    counted(type(model.vision), "encode_stems")
    counted(LACPolicy, "decide_together")
    sessions = [make(packed, policy, seed) for seed in range(4)]
    alone = [make(Engine(model, packed.options), policy, seed) for seed in range(4)]
    for step in range(4):
        frames = [frame(10 * robot + step) for robot in range(4)]
        actions = together(packed, sessions, frames)
        for mine, theirs, observation, action in zip(sessions, alone, frames, actions, strict=True):
            np.testing.assert_allclose(action, theirs.act(observation), **CLOSE)
            same(mine.last_info, theirs.last_info)
    assert calls == {"encode_stems": 4, "decide_together": 3}
