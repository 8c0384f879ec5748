"""Real-time chunking: against the paper's equations, written once more here, and what it leaves alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from tests.engine.scenes import frame

from lac_vla import VLA, CachedVLA, Session, make_policy, random_vla
from lac_vla.errors import InputError, NonFiniteError
from lac_vla.models.heads.sampler import Sampling, Schedule, strided
from lac_vla.running_chunk import RealTimeChunk
from lac_vla.training.mixed import mixed_forward
from lac_vla.types import FloatArray, Frame

FLOWS = ["pi0-tiny", "pi05-tiny", "smolvla-tiny"]
GUIDED = [*FLOWS, "cogact-tiny"]
CHUNKED = [*GUIDED, "oft-tiny"]
DELAY = 1


@pytest.fixture(scope="module")
def model() -> Callable[[str], VLA]:
    made: dict[str, VLA] = {}
    return lambda name: made.setdefault(name, random_vla(name, seed=3))


def session_of(vla: VLA, policy: str = "dense", seed: int = 5) -> Session:
    return CachedVLA(vla, make_policy(policy)).session(seed)


def seen(vla: VLA, number: int = 0) -> Frame:
    return frame(number, cameras=tuple(vla.processor.grids))


def left_over(vla: VLA, rows: int | None = None) -> FloatArray:
    """The end of a chunk of the model's own."""
    chunk = session_of(vla, seed=9).act(seen(vla, 4))
    return chunk[len(chunk) - (len(chunk) - 1 if rows is None else rows) :]


def drawn(session: Session) -> FloatArray:
    assert session.last_info is not None
    return np.asarray(session.last_info.metadata["normalized"], dtype=np.float32)


# ---- the paper's equations, in its own convention: τ runs from 0, noise, to 1, actions


def soft_mask(horizon: int, delay: int, end: int) -> list[float]:
    """Eq. 5, with end = H − s."""
    weights = []
    for i in range(horizon):
        c = (end - i) / (end - delay + 1)
        weights.append(1.0 if i < delay else c * (math.exp(c) - 1) / (math.e - 1) if i < end else 0.0)
    return weights


def guided_flow(
    velocity: Callable[[torch.Tensor, float], torch.Tensor],
    noise: torch.Tensor,
    times: list[float],
    target: torch.Tensor,
    weights: torch.Tensor,
    beta: float,
) -> torch.Tensor:
    """Algorithm 1's GuidedInference: Euler steps of eqs. 1 to 4 with the whole Jacobian. ``times`` end at 1."""
    x = noise
    for tau, then in pairwise(times):
        v = velocity(x, tau)

        def expect(x: torch.Tensor, tau: float = tau) -> torch.Tensor:
            return x + (1 - tau) * velocity(x, tau)

        expected = expect(x)
        jacobian = torch.autograd.functional.jacobian(expect, x).reshape(x.numel(), x.numel())
        row = ((target - expected) * weights).flatten() @ jacobian
        r2 = (1 - tau) ** 2 / (tau**2 + (1 - tau) ** 2)
        weight = min(beta, (1 - tau) / (tau * r2)) if tau else beta
        x = (x + (then - tau) * (v + weight * row.view_as(x))).detach()
    return x


@pytest.mark.parametrize("beta", [0.5, 5.0])
@pytest.mark.parametrize("name", FLOWS)
def test_flow_heads_follow_the_paper(model: Callable[[str], VLA], name: str, beta: float) -> None:
    """The velocity is the training pass's, another way through the same weights."""
    vla = model(name)
    head: Any = vla.head
    config, dim, at = head.config, head.units.dim, seen(vla, 1)
    left = left_over(vla, 3)
    session = session_of(vla)
    session.act(at, RealTimeChunk(left, DELAY, max_guidance_weight=beta))

    with torch.no_grad():
        prompt = vla.processor.prompt(at)
        prefix, suffix = vla.processor.embed(prompt)
        rows = torch.cat([prefix, vla.encode_image(at), suffix])[None]
        context = mixed_forward(vla, rows, prompt.layout, torch.tensor([rows.shape[1]])).context()
    assert at.proprio is not None
    states = torch.from_numpy(head.with_states(np.zeros((1, 0), np.float32), at.proprio[None]))

    def velocity(x: torch.Tensor, tau: float) -> torch.Tensor:
        towards_noise: torch.Tensor = head.train_velocity(context, states, x[None], torch.tensor([1 - tau]))[0]
        return -towards_noise

    target, weights = torch.zeros(config.horizon, config.width), torch.zeros(config.horizon, config.width)
    target[:3, :dim] = torch.from_numpy(head.units.normalize(left))
    weights[:, :dim] = torch.tensor(soft_mask(config.horizon, DELAY, 3))[:, None]
    noise = torch.from_numpy(drawing(session_of(vla), (config.horizon, config.width)))
    times = [step / config.steps for step in range(config.steps + 1)]
    expected = guided_flow(velocity, noise, times, target, weights, beta)[:, :dim].numpy()
    np.testing.assert_allclose(drawn(session), expected, rtol=2e-3, atol=2e-4)
    assert np.abs(expected - drawn_without(vla, at)).max() > 0.05


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_diffusion_follows_the_paper_as_the_flow_that_it_is(model: Callable[[str], VLA], guidance: float) -> None:
    vla = model("cogact-tiny")
    head: Any = vla.head
    before = head.sampling
    head.sampling = replace(before, guidance=guidance)
    try:
        session, at = session_of(vla), seen(vla, 1)
        left = left_over(vla, 6)
        session.act(at, RealTimeChunk(left, DELAY))
        found = drawn(session)
    finally:
        head.sampling = before
    feature = feature_of(vla, at)
    steps, bars = list(reversed(strided(100, before.steps))), Schedule().alpha_bar
    signals = [(float(bars[t]) ** 0.5, (1 - float(bars[t])) ** 0.5) for t in steps]
    net = head.model.net

    def velocity(x: torch.Tensor, tau: float) -> torch.Tensor:
        """The flow x / (a + s) at τ = a / (a + s) has the velocity actions − noise."""
        [index] = [i for i, (a, s) in enumerate(signals) if math.isclose(a / (a + s), tau)]
        (a, s), t = signals[index], torch.tensor([steps[index]])
        noisy = x[None] * (a + s)
        absent = net(noisy, t, net.z_embedder.uncondition.expand(1, 1, -1))
        noise = absent + guidance * (net(noisy, t, feature) - absent)
        return ((noisy - s * noise) / a - noise)[0]

    target, weights = torch.zeros(head.horizon, head.action_dim), torch.zeros(head.horizon, head.action_dim)
    target[:6] = torch.from_numpy(head.normalize_actions(left))
    weights[:] = torch.tensor(soft_mask(head.horizon, DELAY, 6))[:, None]
    noise = torch.from_numpy(drawing(session_of(vla), (1, head.horizon, head.action_dim)))[0]
    times = [a / (a + s) for a, s in signals] + [1.0]
    a, s = signals[0]
    expected = guided_flow(velocity, noise / (a + s), times, target, weights, 5.0)
    normalized = expected.clamp(-1, 1).numpy()
    np.testing.assert_allclose(found[:, :-1], normalized[:, :-1], rtol=2e-3, atol=5e-4)


def feature_of(vla: VLA, at: Frame) -> torch.Tensor:
    """What the diffusion head reads."""
    head: Any = vla.head
    features: list[torch.Tensor] = []
    decode = head.decode

    def spy(context: Any) -> Any:
        features.append(context.hidden[-1:][None].float().clone())
        return decode(context)

    head.decode = spy
    try:
        session_of(vla).act(at)
    finally:
        del head.decode
    with torch.inference_mode(False):
        return features[0].clone()


def drawing(session: Session, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """The noise that a session draws first."""
    return session._head_rng.standard_normal(shape, dtype=np.float32)


def drawn_without(vla: VLA, at: Frame) -> FloatArray:
    session = session_of(vla)
    session.act(at)
    return drawn(session)


# ---- invariants


@pytest.mark.parametrize("policy", ["dense", "motion", "fastv"])
@pytest.mark.parametrize("name", CHUNKED)
def test_nothing_left_over_changes_nothing(model: Callable[[str], VLA], name: str, policy: str) -> None:
    vla = model(name)
    nothing = RealTimeChunk(np.zeros((0, 7), np.float32))
    one, other = session_of(vla, policy), session_of(vla, policy)
    for number in range(3):
        np.testing.assert_array_equal(one.act(seen(vla, number)), other.act(seen(vla, number), nothing))
        assert np.array_equal(drawn(one), drawn(other))


@pytest.mark.parametrize("policy", ["dense", "motion", "fastv", "random"])
@pytest.mark.parametrize("name", GUIDED)
def test_frozen_actions_run_and_the_more_weight_the_closer(model: Callable[[str], VLA], name: str, policy: str) -> None:
    vla = model(name)
    left = left_over(vla)
    head: Any = vla.head
    scale = head.units.normalize if name in FLOWS else head.normalize_actions
    target = np.clip(scale(left), -1, 1) if name == "cogact-tiny" else scale(left)
    errors = []
    for beta in (1e-6, 0.3, 1.0, 3.0):
        session = session_of(vla, policy)
        session.act(seen(vla))
        answer = session.act(seen(vla, 1), RealTimeChunk(left, 2, max_guidance_weight=beta))
        np.testing.assert_array_equal(answer[:2], left[:2])
        assert np.isfinite(answer).all()
        errors.append(np.abs(drawn(session)[:2, :6] - target[:2, :6]).mean())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.75 * errors[0]


@pytest.mark.parametrize("name", GUIDED)
def test_a_guided_frame_leaves_cache_and_chance_as_any_other(model: Callable[[str], VLA], name: str) -> None:
    vla = model(name)
    one, other = session_of(vla, "motion"), session_of(vla, "motion")
    for session, rtc in ((one, None), (other, RealTimeChunk(left_over(vla), 1))):
        session.act(seen(vla))
        session.act(seen(vla, 1), rtc)
    np.testing.assert_array_equal(one.act(seen(vla, 2)), other.act(seen(vla, 2)))
    assert one.last_info is not None
    assert other.last_info is not None
    assert np.array_equal(one.last_info.age, other.last_info.age)


@pytest.mark.parametrize("name", ["pi0-tiny", "cogact-tiny"])
def test_a_batch_answers_as_each_alone(model: Callable[[str], VLA], name: str) -> None:
    vla = model(name)
    made = CachedVLA(vla, make_policy("dense"))
    rtcs = [RealTimeChunk(left_over(vla), 1), None, RealTimeChunk(left_over(vla, 2), 2)]
    alone = [made.session(k).act(seen(vla, k), rtc) for k, rtc in enumerate(rtcs)]
    sessions = [made.session(k) for k in range(3)]
    results = made.engine.run([s.plan(seen(vla, k), rtcs[k]) for k, s in enumerate(sessions)])
    for answer, result in zip(alone, results, strict=True):
        assert result.action is not None
        np.testing.assert_allclose(result.action, answer, rtol=1e-4, atol=1e-4)


def test_a_chunk_that_nothing_can_guide_is_blended(model: Callable[[str], VLA]) -> None:
    vla = model("oft-tiny")
    horizon = vla.horizon
    plain = session_of(vla).act(seen(vla))
    left = np.full((horizon, 7), 3.0, np.float32)
    blended = session_of(vla).act(seen(vla), RealTimeChunk(left, 1, prefix_attention_schedule="linear"))
    shares = [1.0, *((horizon - i) / horizon for i in range(1, horizon))]
    for i, share in enumerate(shares):
        np.testing.assert_allclose(blended[i], share * left[i] + (1 - share) * plain[i], rtol=1e-5)


@pytest.mark.parametrize("name", ["pi0-tiny", "cogact-tiny"])
def test_what_is_not_finite_is_refused_and_the_next_frame_is_dense(model: Callable[[str], VLA], name: str) -> None:
    vla = model(name)
    session = session_of(vla)
    session.act(seen(vla))
    huge = np.full((vla.horizon, 7), 1e38, np.float32)
    with pytest.raises(NonFiniteError, match="stop the robot"):
        session.act(seen(vla, 1), RealTimeChunk(huge, 1, max_guidance_weight=1e30))
    assert np.isfinite(session.act(seen(vla, 1))).all()


def test_the_shadow_pass_goes_on_with_the_same_chunk(model: Callable[[str], VLA]) -> None:
    vla = model("pi0-tiny")
    session = session_of(vla)
    answer = session.act(seen(vla), RealTimeChunk(left_over(vla), 1))
    shadow = session.shadow()
    assert shadow is not None
    np.testing.assert_allclose(shadow, answer, rtol=1e-4, atol=1e-4)


# ---- the contract


@pytest.mark.parametrize("schedule", ["zeros", "ones", "linear", "exp"])
def test_schedules(schedule: Any) -> None:
    """LeRobot's names: frozen ones weigh 1, the others ever less, and those beyond the execution horizon nothing."""
    rtc = partial(RealTimeChunk, np.zeros((8, 7), np.float32), 2, prefix_attention_schedule=schedule)
    weights = rtc().weights(10)
    c = [(8 - i) / 7 for i in range(2, 8)]
    behind = {"zeros": [0] * 6, "ones": [1] * 6, "linear": c, "exp": soft_mask(8, 2, 8)[2:]}[schedule]
    np.testing.assert_allclose(weights, [1, 1, *behind, 0, 0], rtol=1e-6)
    assert not rtc(execution_horizon=4).weights(10)[4:].any()


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"inference_delay": 4}, "takes 4 control steps .* only 3 actions of the running chunk are left"),
        ({"inference_delay": -1}, "whole number of control steps"),
        ({"inference_delay": 1.5}, "whole number of control steps"),
        ({"prev_chunk_left_over": np.full((3, 7), np.nan)}, "NaN"),
        ({"prev_chunk_left_over": np.zeros(7)}, "one action a row"),
        ({"prev_chunk_left_over": "left"}, "one action a row"),
        ({"execution_horizon": 0}, "execution_horizon"),
        ({"execution_horizon": 1, "inference_delay": 2}, "execution_horizon"),
        ({"max_guidance_weight": 0}, "max_guidance_weight"),
        ({"max_guidance_weight": float("inf")}, "max_guidance_weight"),
        ({"prefix_attention_schedule": "cosine"}, "choose one of zeros, ones, linear, exp"),
    ],
)
def test_a_chunk_that_makes_no_sense_is_refused(wrong: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        RealTimeChunk(**({"prev_chunk_left_over": np.zeros((3, 7), np.float32)} | wrong))


def test_a_chunk_of_another_model_is_refused_before_anything_changes(model: Callable[[str], VLA]) -> None:
    vla = model("pi0-tiny")
    horizon = vla.horizon
    one, other = session_of(vla, "motion"), session_of(vla, "motion")
    for session in (one, other):
        session.act(seen(vla))
    for shape, delay, complaint in (
        ((horizon + 1, 7), 0, "the model's chunks are"),
        ((2, 6), 0, "the model's chunks are"),
        ((horizon, 7), horizon, "nothing of it would be left to execute"),
    ):
        with pytest.raises(InputError, match=complaint):
            one.act(seen(vla, 1), RealTimeChunk(np.zeros(shape, np.float32), delay))
    np.testing.assert_array_equal(one.act(seen(vla, 1)), other.act(seen(vla, 1)))
    assert one.last_info is not None
    assert one.last_info.dense_reason is None
    single = model("tiny")
    with pytest.raises(InputError, match="single actions"):
        session_of(single).act(seen(single), RealTimeChunk(np.zeros((1, 7), np.float32)))


def test_ddpm_is_not_guided(model: Callable[[str], VLA]) -> None:
    vla = model("cogact-tiny")
    head: Any = vla.head
    before, head.sampling = head.sampling, Sampling("ddpm")
    try:
        with pytest.raises(InputError, match="choose the sampler 'ddim'"):
            session_of(vla).act(seen(vla), RealTimeChunk(np.zeros((2, 7), np.float32)))
    finally:
        head.sampling = before
