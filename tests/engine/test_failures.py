"""Whatever goes wrong in a frame: no number that is not finite reaches a robot, and the next frame is dense."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from lac_vla import CachedVLA, EngineOptions, InputError, Motion, Random, Session, random_vla
from lac_vla.errors import NonFiniteError
from lac_vla.models import FAMILIES, VLA
from lac_vla.models.heads.flow_matching import FlowMatchingHead
from lac_vla.models.oft.config import TINY_OFT
from lac_vla.policies import CachePolicy
from lac_vla.types import AttentionProbe, Decision, PolicyInput, SkippedTokens, TokenLayout
from tests.engine.scenes import frame

NAN = float("nan")
VALUES = [NAN, float("inf"), -float("inf")]
TINY = {name: family.tiny for name, family in FAMILIES.items()}


@pytest.fixture(params=sorted(TINY))
def model(request: pytest.FixtureRequest) -> VLA:
    """A tiny model of every family."""
    return random_vla(TINY[request.param], seed=3)


ACTIONS = {
    "cogact": "final_layer.linear.weight",
    "oft": "action_head.fc2.weight",
    "openvla": "lm_head",
    "pi0": "action_out_proj.weight",
    "pi05": "action_out_proj.weight",
    "smolvla": "action_out_proj.weight",
}
"""Family → the weight that its actions are read by."""
DECODER = ("language_model.", "text_model.", "prefix.")


def weight(model: VLA, part: str) -> torch.Tensor:
    """A weight of the projector (``projector``), of the decoder's first layer, or the one that actions are read by."""
    weights = dict(model.module.named_parameters())
    if part == "actions":
        names = [name for name in weights if ACTIONS[model.family] in name]
    elif part == "projector":
        names = [name for name in weights if name.startswith("projector.") or ".modality_projection." in name]
    else:
        names = [name for name in weights if part in name and any(stack in name for stack in DECODER)]
    return weights[names[0]]


def dense_reason(session: Session) -> str | None:
    assert session.last_info is not None
    return session.last_info.dense_reason


@pytest.mark.parametrize("options", ["none", "default", "exact+cuda_graphs", "default+bucket=4"])
@pytest.mark.parametrize("part", ["projector", "q_proj", "actions"])
@pytest.mark.parametrize("value", VALUES)
def test_a_broken_model_gives_no_action_and_a_mended_one_goes_on(
    model: VLA, value: float, part: str, options: str
) -> None:
    vla = CachedVLA(model, Random(0.5), options=EngineOptions.parse(options))
    session, untouched = vla.session(), vla.session()
    for one in (session, untouched):
        one.act(frame(0))
    broken, place = weight(model, part), (0, 0)
    good = broken[place].clone()
    with torch.no_grad():
        broken[place] = value
    for _ in range(2):
        with pytest.raises(NonFiniteError, match="no action: stop the robot"):
            session.act(frame(1))
    with torch.no_grad():
        broken[place] = good
    action = session.act(frame(1, "go"))  # a shorter prompt: what it does not use any more must not poison it
    assert dense_reason(session) == "first frame"
    alone = CachedVLA(model).session()
    alone._head_rng.bit_generator.state = session._head_rng_state
    np.testing.assert_allclose(action, alone.act(frame(1, "go")), atol=1e-5)
    session.act(frame(2, "go"))
    untouched.act(frame(1))
    assert dense_reason(session) is dense_reason(untouched) is None


def test_a_head_that_compares_what_is_not_finite_is_not_trusted() -> None:
    """CogACT's gripper is 0 or 1 whatever was drawn, and what is infinite would be clipped to full scale."""
    model = random_vla(TINY["cogact"], seed=3)
    bias = model.module.get_parameter("action_model.net.final_layer.linear.bias")
    for dim in (0, len(bias) - 1):
        for value in VALUES:
            before = bias.detach().clone()
            with torch.no_grad():
                bias[dim] = value
            with pytest.raises(NonFiniteError):
                CachedVLA(model).session().act(frame(0))
            with torch.no_grad():
                bias.copy_(before)


@pytest.mark.parametrize(
    ("head", "name"), [("discrete", "language_model.lm_head.weight"), ("diffusion", "action_head.fc2.bias")]
)
def test_chunks_of_what_is_not_finite_are_not_trusted(head: str, name: str) -> None:
    """A token is chosen whatever the scores are, and what is predicted of the clean chunk is clipped."""
    model = random_vla(replace(TINY_OFT, head=head, sampling_steps=2), seed=3)
    broken = model.module.get_parameter(name)
    for place in (0, len(broken) - 1):
        for value in VALUES:
            before = broken.detach().clone()
            with torch.no_grad():
                broken[place] = value
            with pytest.raises(NonFiniteError):
                CachedVLA(model).session().act(frame(0))
            with torch.no_grad():
                broken.copy_(before)
    assert np.isfinite(CachedVLA(model).session().act(frame(0))).all()


def test_an_action_beyond_float32_is_none(model: VLA) -> None:
    """Statistics that are finite may still make an action that float32 does not hold."""
    if isinstance(model.head, FlowMatchingHead):  # its units are float32
        huge = np.full(model.head.units.dim, 3e38, dtype=np.float32)
        model.head.units = replace(model.head.units, factor=huge, offset=huge)
    else:
        model.head.action_range.high[:] = 1e300  # type: ignore[attr-defined]
    with np.errstate(over="ignore"), pytest.raises(NonFiniteError):
        CachedVLA(model).session().act(frame(0))


def test_one_robots_broken_numbers_are_its_own(model: VLA, monkeypatch: pytest.MonkeyPatch) -> None:
    vla = CachedVLA(model, Random(0.5))
    sessions, alone = [vla.session() for _ in range(3)], CachedVLA(model, Random(0.5)).session()
    for one in (*sessions, alone):
        one.act(frame(0))
    plans = [session.plan(frame(1)) for session in sessions]
    encode = model.vision.encode_stem

    def broken(observation: Any, images: Any, kv_cache: Any = None) -> Any:
        stem = encode(observation, images, kv_cache)
        if observation is not plans[1].frame:
            return stem
        return stem * NAN if isinstance(stem, torch.Tensor) else [part * NAN for part in stem]

    monkeypatch.setattr(model.vision, "encode_stem", broken)
    monkeypatch.setattr(model.vision, "encode_stems", lambda frames, images: list(map(broken, frames, images)))
    results = vla.engine.run(plans)
    monkeypatch.undo()
    assert [type(result.error) for result in results] == [type(None), NonFiniteError, type(None)]
    expected = alone.act(frame(1))
    for robot in (0, 2):
        sessions[robot].commit(plans[robot], results[robot])
        np.testing.assert_allclose(results[robot].action, expected, atol=1e-5)
    with pytest.raises(NonFiniteError):
        sessions[1].commit(plans[1], results[1])
    sessions[1].act(frame(2))
    assert dense_reason(sessions[1]) == "first frame"


def test_a_shadow_that_is_not_finite_is_an_error(model: VLA) -> None:
    session = CachedVLA(model, Random(0.5)).session()
    session.act(frame(0))
    session.act(frame(1))
    with torch.no_grad():
        weight(model, "projector")[0, 0] = NAN
    with pytest.raises(NonFiniteError):
        session.shadow()
    with torch.no_grad():
        weight(model, "projector")[0, 0] = 0
    session.act(frame(2))
    assert dense_reason(session) == "first frame"


# Errors of policies.


@dataclass(frozen=True)
class Faulty(Random):
    """Fails where and how it is told."""

    how: list[Any] = None  # type: ignore[assignment]

    def probe(self, n_layers: int) -> AttentionProbe:
        return AttentionProbe((0,), "last")

    def decide(self, inputs: PolicyInput) -> Decision:
        if self.how[0] == "decide":
            raise self.how[1]
        return super().decide(inputs)

    def refine(self, layout: TokenLayout, layer: int, attention: torch.Tensor, decision: Decision) -> Decision:
        if self.how[0] == "refine":
            raise self.how[1]
        return decision


@pytest.mark.parametrize("options", ["default", "exact"])
@pytest.mark.parametrize("where", ["decide", "refine"])
@pytest.mark.parametrize("error", [RuntimeError("x"), InputError("x"), KeyboardInterrupt()])
def test_after_a_policys_error_the_next_frame_is_computed_in_full(
    model: VLA, where: str, error: BaseException, options: str
) -> None:
    policy = Faulty(0.5, ["", error])
    session = CachedVLA(model, policy, options=EngineOptions.parse(options)).session()
    session.act(frame(0))
    policy.how[0] = where
    with pytest.raises(type(error)):
        session.act(frame(1))
    policy.how[0] = ""
    session.act(frame(2))
    assert dense_reason(session) == "first frame"
    session.act(frame(3))
    assert dense_reason(session) is None


def test_after_ctrl_c_in_a_run_the_session_is_usable(model: VLA, monkeypatch: pytest.MonkeyPatch) -> None:
    vla = CachedVLA(model, Random(0.5))
    session = vla.session()
    session.act(frame(0))

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(vla.engine, "_prefill", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.act(frame(1))
    monkeypatch.undo()
    session.act(frame(2))
    assert dense_reason(session) == "first frame"


# What a policy may refine, and how old a slot may grow.


@dataclass(frozen=True)
class Refiner(CachePolicy):
    """Computes all first; then lets go of what ``rule`` says."""

    rule: Callable[[int, Decision], Decision]

    def probe(self, n_layers: int) -> AttentionProbe:
        return AttentionProbe((0,), "last")

    def decide(self, inputs: PolicyInput) -> Decision:
        return Decision.dense(inputs.layout.n_visual, inputs.n_layers)

    def refine(self, layout: TokenLayout, layer: int, attention: torch.Tensor, decision: Decision) -> Decision:
        return self.rule(layer, decision)


def _leaving(layer: int, decision: Decision) -> Decision:
    return Decision(np.full_like(decision.exit_layer, layer + 1), decision.n_layers)


@pytest.mark.parametrize(("max_age", "steps"), [(3, 1), (6, 2), (7, 2), (12, 4)])
def test_the_maximum_age_holds_for_what_a_policy_refines(model: VLA, max_age: int, steps: int) -> None:
    session = CachedVLA(model, Refiner(_leaving), max_age=max_age).session()
    session.steps_per_frame = steps
    oldest = []
    for seed in range(9):
        session.act(frame(seed))
        assert session.last_info is not None
        oldest.append(session.last_info.oldest_age)
    assert oldest == [0, 1, 2, 3, 0, 1, 2, 3, 0]


@pytest.mark.parametrize(
    "rule",
    [
        lambda layer, decision: Decision(np.zeros_like(decision.exit_layer), decision.n_layers),
        lambda layer, decision: Decision(decision.exit_layer, decision.n_layers, SkippedTokens.PRUNE),
    ],
)
def test_a_policy_refines_nothing_that_was_computed_before(model: VLA, rule: Callable[..., Decision]) -> None:
    session = CachedVLA(model, Refiner(rule)).session()
    session.act(frame(0))
    with pytest.raises(InputError, match="Refiner refined behind layer 0"):
        session.act(frame(1))


@pytest.mark.parametrize("max_age", [0, -1, NAN, float("inf"), 2.5, 10**9, 10**30, "3", None])
def test_the_maximum_age_is_a_whole_number(max_age: Any) -> None:
    with pytest.raises(InputError, match=r"max_age is .*; give a whole number"):
        CachedVLA(random_vla("tiny"), Motion(), max_age=max_age)


@pytest.mark.parametrize("name", ["max_age", "steps_per_frame"])
@pytest.mark.parametrize("value", [0, NAN, 0.5, "3", None])
def test_what_is_set_later_is_a_whole_number_too(name: str, value: Any) -> None:
    session = CachedVLA(random_vla("tiny"), Motion()).session()
    session.act(frame(0))
    setattr(session, name, value)
    with pytest.raises(InputError, match=rf"{name} is .*; give a whole number"):
        session.act(frame(1))
