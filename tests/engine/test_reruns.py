"""A head that runs its prompt again: every pass is what the reference computes, alone and packed with others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from lac_vla import VLA, CachedVLA, Dense, Random, random_vla
from lac_vla.cost import CostModel
from lac_vla.engine.engine import Engine
from lac_vla.models.heads.base import HeadContext, RerunPrompt
from lac_vla.models.oft.config import TINY_OFT
from lac_vla.policies import CachePolicy
from tests.engine.reference import ReferenceDecoder
from tests.engine.scenes import ALL_POLICIES, frame
from tests.engine.test_batches import CLOSE, assert_batch_equals_alone, make, observe

STEPS = 3


@pytest.fixture(scope="module")
def model() -> VLA:
    return random_vla(replace(TINY_OFT, head="diffusion", diffusion_steps=9, sampling_steps=STEPS), seed=3)


@pytest.mark.parametrize("name", ALL_POLICIES)
def test_every_pass_equals_the_reference(model: VLA, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Visual tokens that are not computed are old ones in every pass; what is computed is new in every pass."""
    session = CachedVLA(model, ALL_POLICIES[name]()).session(seed=5)
    language = model.module.language_model
    expected = ReferenceDecoder(
        dict(language.state_dict()), 4, 2, sees=lambda length: torch.ones(length, length).bool()
    )
    head: Any = model.head
    suffixes: list[torch.Tensor] = []
    hidden: list[torch.Tensor] = []
    put, rows = head.put, head.rows
    monkeypatch.setattr(head, "put", lambda *args, **kwargs: suffixes.append(put(*args, **kwargs)) or suffixes[-1])
    monkeypatch.setattr(head, "rows", lambda states: hidden.append(states) or rows(states))
    for number in range(3):
        suffixes.clear()
        hidden.clear()
        observation = frame(number)
        session.act(observation)
        info = session.last_info
        assert info is not None
        assert info.prompt_passes == len(suffixes) == len(hidden) == STEPS
        with torch.inference_mode():
            prefix, _ = model.processor.embed(model.processor.prompt(observation))
            visual = model.encode_image(observation)
        for suffix, states in zip(suffixes, hidden, strict=True):
            embeddings = torch.cat([prefix, visual, suffix])
            truth = expected.run(embeddings, info.layout.n_prefix, info.decision)[info.layout.suffix.start :]
            torch.testing.assert_close(states.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", ["default", "draft+bucket=8+cuda_graphs"])
def test_a_batch_of_all_policies_equals_its_sessions_alone(model: VLA, options: str) -> None:
    """In double precision: a step back from noise multiplies the rounding of the pass before it."""
    policies: list[Callable[[], CachePolicy]] = list(ALL_POLICIES.values())
    precise = random_vla(model.config, seed=3, dtype=torch.float64)
    assert_batch_equals_alone(precise, policies, options, steps=len(ALL_POLICIES) + 2)


def test_what_fails_for_one_session_fails_for_it_alone(model: VLA, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model)
    sessions = [make(engine, Random(0.5), seed) for seed in range(2)]
    alone = make(Engine(model), Random(0.5), 0)
    for robot, session in enumerate(sessions):
        session.act(observe(robot, 0))
    alone.act(observe(0, 0))
    plans = [session.plan(observe(robot, 1)) for robot, session in enumerate(sessions)]
    decode = type(model.head).decode

    def broken(self: Any, context: HeadContext) -> Any:
        if context.frame is not plans[1].frame:
            return (yield from decode(self, context))
        yield RerunPrompt(lambda suffix: 1 / 0)  # type: ignore[arg-type,return-value]

    with monkeypatch.context() as patch:
        patch.setattr(type(model.head), "decode", broken)
        results = engine.run(plans)
    sessions[0].commit(plans[0], results[0])
    np.testing.assert_allclose(results[0].action, alone.act(observe(0, 1)), **CLOSE)
    with pytest.raises(ZeroDivisionError):
        sessions[1].commit(plans[1], results[1])
    sessions[1].act(observe(1, 2))
    assert sessions[1].last_info is not None
    assert sessions[1].last_info.dense_reason == "first frame"


def test_passes_are_counted(model: VLA) -> None:
    """Every pass over the prompt costs what the first does."""
    session = CachedVLA(model, Dense()).session()
    session.act(frame(0))
    info = session.last_info
    assert info is not None
    counted = CostModel.of(model, frame(0)).step(info)
    assert counted["decode"] == (STEPS - 1) * counted["prefill"]
    one = replace(model.config, sampling_steps=1)
    other = random_vla(one, seed=3)
    shorter = CachedVLA(other).session()
    shorter.act(frame(0))
    assert shorter.last_info is not None
    alone = CostModel.of(other, frame(0)).step(shorter.last_info)
    assert alone["decode"] == 0
    assert counted["head"] > 2 * alone["head"]


def test_between_frames_nothing_is_drawn(model: VLA) -> None:
    """Refreshing slots needs no noise of the session's; the dense answer is drawn with that of the last frame."""
    session, undisturbed = (CachedVLA(model, Random(0.5)).session(seed=1) for _ in range(2))
    for _ in range(3):
        np.testing.assert_allclose(session.act(frame(0)), undisturbed.act(frame(0)), atol=0.5)
        session.refresh(10)
    draws = [partial(each._head_rng.standard_normal, 4) for each in (session, undisturbed)]
    np.testing.assert_array_equal(draws[0](), draws[1]())
    dense = CachedVLA(model, Dense()).session(seed=1)
    for _ in range(3):
        truth = dense.act(frame(0))
    shadow = session.shadow()
    assert shadow is not None
    np.testing.assert_allclose(shadow, truth, rtol=1e-4, atol=1e-5)
