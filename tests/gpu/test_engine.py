"""The engine on a GPU: as on a CPU, in either precision, packed, in threads, in training, and when memory is short."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from lac_vla import VLA, CachedVLA, Dense, Random, Session, random_vla
from lac_vla.engine.engine import Engine
from lac_vla.engine.options import EngineOptions
from lac_vla.errors import DeviceMemoryError
from lac_vla.policies import CachePolicy
from lac_vla.training.mixed import mixed_forward
from lac_vla.transfer import upload
from tests.engine.scenes import ALL_POLICIES, REUSING, frame
from tests.gpu.devices import DEVICES, GPU, TINY
from tests.gpu.test_waiting import reads

CLOSE = {"rtol": 1e-3, "atol": 2e-4}
COARSE = 0.1
"""Most that an action in bfloat16 may differ from float32's on the mean, of values in about [-1, 1]."""
OPTIONS = ("none", "default", "default+async_policy+bucket=8+cuda_graphs")


def make(model: VLA, policy: CachePolicy, options: str = "default", seed: int = 5) -> Session:
    return CachedVLA(model, policy, options=EngineOptions.parse(options)).session(seed)


def normalized(session: Session) -> np.ndarray:
    assert session.last_info is not None
    return np.asarray(session.last_info.metadata["normalized"])


@pytest.mark.parametrize("device", [GPU])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", TINY)
def test_float32_is_the_cpus(name: str, options: str, device: str) -> None:
    here, there = (make(random_vla(name, seed=3, device=d), Random(0.5), options) for d in ("cpu", device))
    there.model.module.load_state_dict(here.model.module.state_dict())
    for seed in range(6):
        np.testing.assert_allclose(there.act(frame(seed)), here.act(frame(seed)), **CLOSE)


@pytest.mark.parametrize("device", [GPU])
@pytest.mark.parametrize("policy", ALL_POLICIES)
def test_every_policy_is_the_cpus(policy: str, device: str) -> None:
    here, there = (make(random_vla("tiny", seed=3, device=d), ALL_POLICIES[policy]()) for d in ("cpu", device))
    there.model.module.load_state_dict(here.model.module.state_dict())
    for seed in range(4):
        np.testing.assert_allclose(there.act(frame(seed)), here.act(frame(seed)), **CLOSE)
        assert here.last_info is not None
        assert there.last_info is not None
        assert (here.last_info.decision.exit_layer == there.last_info.decision.exit_layer).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", TINY)
def test_bfloat16_is_nearly_float32(name: str, options: str, device: str) -> None:
    """Of heads whose answers are continuous; a token may tip over."""
    fine = make(random_vla(name, seed=3, device=device), Random(0.5), options)
    coarse = make(random_vla(name, seed=3, device=device, dtype="bfloat16"), Random(0.5), options)
    coarse.model.module.load_state_dict(fine.model.module.state_dict())
    for seed in range(4):
        actions = fine.act(frame(seed)), coarse.act(frame(seed))
        assert np.isfinite(actions[1]).all()
        if name not in ("tiny", "mini"):
            assert np.abs(normalized(fine) - normalized(coarse)).mean() < COARSE


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", TINY)
def test_a_packed_batch_equals_its_sessions_alone(name: str, device: str) -> None:
    model = random_vla(name, seed=3, device=device)
    packed = Engine(model, EngineOptions.parse("default"))
    together = [Session(packed, Random(0.5), "none", 16, 1.0, seed) for seed in range(3)]
    alone = [make(model, Random(0.5), seed=seed) for seed in range(3)]
    for step in range(3):
        frames = [frame(10 * robot + step) for robot in range(3)]
        plans = [session.plan(observation) for session, observation in zip(together, frames, strict=True)]
        for session, plan, result in zip(together, plans, packed.run(plans), strict=True):
            session.commit(plan, result)
            assert result.action is not None
        for robot, session in enumerate(alone):
            expected = session.act(frames[robot])
            np.testing.assert_allclose(normalized(together[robot]), normalized(session), **CLOSE)
            assert expected.shape


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", ["default", "default+bucket=8+cuda_graphs"])
def test_two_sessions_in_threads(options: str, device: str) -> None:
    model = random_vla("tiny", seed=3, device=device)
    vla = CachedVLA(model, Random(0.5), options=EngineOptions.parse(options))
    alone = [make(model, Random(0.5), options, seed) for seed in (1, 2)]
    expected = [[session.act(frame(step)) for step in range(8)] for session in alone]

    def play(seed: int) -> list[Any]:
        session = vla.session(seed)
        return [session.act(frame(step)) for step in range(8)]

    with ThreadPoolExecutor(2) as threads:
        for found, wanted in zip(threads.map(play, (1, 2)), expected, strict=True):
            np.testing.assert_allclose(found, wanted, **CLOSE)


@pytest.mark.parametrize("device", DEVICES)
def test_uploads_arrive_whole(device: str) -> None:
    """Pinned memory is lent again as soon as a copy is done, and no sooner."""
    rng = np.random.default_rng(0)
    sent = [rng.integers(0, 255, 100_000, dtype=np.uint8) for _ in range(64)]
    arrived = [upload(values.copy(), torch.device(device)) for values in sent]
    for values, tensor in zip(sent, arrived, strict=True):
        np.testing.assert_array_equal(tensor.cpu().numpy(), values)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Raise wherever torch would wait for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", [GPU])
@pytest.mark.parametrize("options", ["none", "default+bucket=8+cuda_graphs"])
@pytest.mark.parametrize("name", TINY)
def test_nothing_waits_before_the_head_reads(
    name: str, options: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the prefill's end; ``test_waiting`` counts what the heads read."""
    session = make(random_vla(name, seed=3, device=device), Random(0.5), options)
    for seed in range(4):
        session.act(frame(seed))
    engine, decode = session.engine, Engine._decode

    def decode_freely(*arguments: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")
        decode(*arguments)

    monkeypatch.setattr(Engine, "_decode", decode_freely)
    for seed in range(4, 8):
        plan = session.plan(frame(seed))
        with no_waiting():
            results = engine.run([plan])
        session.commit(plan, results[0])


@pytest.mark.parametrize("device", [GPU])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", TINY)
def test_the_gpu_is_waited_for_when_the_action_is_read(name: str, options: str, device: str) -> None:
    session = make(random_vla(name, seed=3, device=device), Random(0.5), options)
    for seed in range(4):
        session.act(frame(seed))
    for seed in range(4, 8):
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                session.act(frame(seed))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits = [str(warning.message) for warning in caught if "synchronizing" in str(warning.message)]
        assert len(waits) == reads(session), waits


@pytest.mark.parametrize("device", DEVICES)
def test_the_stages_of_a_frame_are_all_of_its_time(device: str) -> None:
    session = make(random_vla("mini", seed=3, device=device), Random(0.5))
    session.engine.stage_events = True
    shares = []
    for seed in range(8):
        began = time.perf_counter()
        session.act(frame(seed))
        took = 1e3 * (time.perf_counter() - began)
        assert session.last_info is not None
        assert min(session.last_info.stages[stage] for stage in ("tower", "prefill", "decode")) > 0
        shares.append(sum(session.last_info.stages.values()) / took)
    assert 0.5 < np.median(shares) < 1.1


def mask_gradient(name: str, device: str) -> torch.Tensor:
    """Gradient of the head's loss with respect to the mask, (1, N)."""
    model, generator = random_vla(name, seed=3), torch.Generator().manual_seed(0)
    model.module.requires_grad_(False).to(device)
    head, layout, rng = model.head, model.processor.prompt(frame(0)).layout, np.random.default_rng(0)
    embeddings = torch.randn(2, layout.length + head.n_forced, model.decoder.shape.width, generator=generator)
    mask = torch.rand(1, layout.n_visual, generator=generator).to(device).requires_grad_()
    targets = head.targets(rng.uniform(-1, 1, (1, 7)).astype(np.float32))
    targets = head.with_states(targets, np.zeros((1, model.processor.state_dim or 0), np.float32))
    lengths = torch.tensor([layout.length], device=device)
    forward = partial(mixed_forward, model, layout=layout, lengths=lengths, n_rows=head.n_rows, n_before=head.n_before)
    before, now = embeddings.to(device)[:, None]
    with torch.no_grad():
        old = forward(before).store.slots
    context = forward(now, mask=mask, old=old).context()
    head.loss(context, torch.from_numpy(targets).to(device), torch.Generator().manual_seed(0)).sum().backward()
    assert mask.grad is not None
    return mask.grad.cpu()


@pytest.mark.parametrize("device", [GPU])
@pytest.mark.parametrize("name", TINY)
def test_a_training_step_is_the_cpus(name: str, device: str) -> None:
    """The loss's gradient reaches the mask through mixed keys and values."""
    here = mask_gradient(name, "cpu")
    assert here.abs().max() > 0
    torch.testing.assert_close(mask_gradient(name, device), here, rtol=1e-2, atol=1e-4 * float(here.abs().max()))


@pytest.mark.parametrize("name", TINY)
def test_the_step_that_a_gpu_is_held_to(name: str) -> None:
    """A mask that changes along its gradient changes the loss: what the GPU's is compared with is no zero."""
    gradient = mask_gradient(name, "cpu")
    assert torch.isfinite(gradient).all()
    assert (gradient != 0).float().mean() > 0.5


# Memory.


@pytest.mark.parametrize("part", ["store", "prefill"])
def test_a_full_memory_is_told_and_the_session_lives(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same on every device: what torch raises is all that differs."""
    model = random_vla("tiny", seed=3)
    session, other = make(model, Random(0.5)), make(model, Dense())
    if part == "prefill":
        session.act(frame(0))
    keys = session.engine.store.keys

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with monkeypatch.context() as patch:
        if part == "store":
            zeros, calls = torch.Tensor.new_zeros, []

            def second(*arguments: Any, **options: Any) -> Any:
                calls.append(1)
                return full() if len(calls) == 2 else zeros(*arguments, **options)

            patch.setattr(torch.Tensor, "new_zeros", second)
        else:
            patch.setattr(type(model.decoder.layers[1]), "finish", full)
        with pytest.raises(DeviceMemoryError, match=r"memory is full.*fewer sessions.*2\.00 GiB"):
            session.act(frame(1))
    assert session.engine.store.keys is keys
    assert session.engine.store.values.shape == keys.shape
    np.testing.assert_allclose(session.act(frame(2)), other.act(frame(2)), **CLOSE)
    assert session.last_info is not None
    assert session.last_info.dense_reason == "first frame"


@pytest.mark.parametrize("device", [GPU])
def test_a_full_gpu_is_told_and_the_session_lives(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    session = make(random_vla("tiny", seed=3, device=device), Random(0.5))
    session.act(frame(0))
    with monkeypatch.context() as patch:
        patch.setattr(session.model.head, "max_new_tokens", 10**10)  # slots that no GPU has
        with pytest.raises(DeviceMemoryError, match="memory is full"):
            session.act(frame(1))
    assert np.isfinite(session.act(frame(2))).all()
    assert session.last_info is not None
    assert session.last_info.dense_reason == "first frame"


@pytest.mark.parametrize("name", REUSING)
@pytest.mark.parametrize("device", [GPU])
def test_captured_graphs_equal_the_plain_loop_of_every_policy(name: str, device: str) -> None:
    tiny = random_vla("tiny", seed=3, device=device)
    plain, static = (make(tiny, ALL_POLICIES[name](), f"draft+bucket=8{text}") for text in ("", "+cuda_graphs"))
    for seed in (*range(8), *range(8)):
        np.testing.assert_allclose(static.act(frame(seed)), plain.act(frame(seed)), **CLOSE)
    assert static.engine.graphs is not None
    assert static.engine.graphs.captured > 0
