"""Within a frame nobody waits for the GPU before the action is read."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lac_vla import CachedVLA, Random, random_vla
from lac_vla.bench.stock import torchs_attention
from lac_vla.engine.engine import Engine
from lac_vla.engine.options import EngineOptions
from lac_vla.session import Session
from tests.engine.scenes import ALL_POLICIES, frame
from tests.gpu.devices import TINY
from tests.gpu.pretend import DEVICE, pretended_gpu, to_pretended_gpu

OPTIONS = ("none", "default", "default+vision_kv_reuse", "default+vision_kv_reuse+bucket=8+cuda_graphs")
WARM = 3
"""Frames before those that are watched: constants are copied in the first."""
LOOKING = [name for name, make in ALL_POLICIES.items() if make().probe(2) is not None]
"""Policies that look at attention, which is the device's."""


def reads(session: Session) -> int:
    """Count the reads of a frame: the action, in every pass that may have been the last."""
    info = session.last_info
    assert info is not None
    return 1 + (len(info.decode_passes) if info.draft else 0)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", TINY)
def test_the_action_is_all_that_is_read(name: str, options: str) -> None:
    here = random_vla(name, seed=3)
    if "vision_kv_reuse" in options and here.vision.kv_cache() is None:
        options = options.replace("+vision_kv_reuse", "")
    plain = CachedVLA(here, Random(0.5), options=EngineOptions.parse(options)).session(seed=2)
    expected = [plain.act(frame(seed)) for seed in range(WARM + 1)]
    with pretended_gpu() as gpu:
        vla = CachedVLA(to_pretended_gpu(here), Random(0.5), options=EngineOptions.parse(options))
        session = vla.session(seed=2)
        if session.engine.graphs is not None:
            session.engine.graphs.make_graph = None
        for seed in range(WARM + 1):
            gpu.reads.clear()
            gpu.waits.clear()
            np.testing.assert_allclose(session.act(frame(seed)), expected[seed], atol=1e-3)
            if seed >= WARM:
                assert gpu.waits == []
                assert len(gpu.reads) == reads(session), gpu.reads
    assert session.engine.store.keys.device.type == "cuda"


@pytest.mark.parametrize("policy", LOOKING)
def test_attention_is_looked_at_on_the_device(policy: str) -> None:
    """The answers are a CPU's, and nothing but reading it waits."""
    here, options = random_vla("tiny", seed=3), EngineOptions.parse("default+bucket=8+cuda_graphs")
    plain = CachedVLA(here, ALL_POLICIES[policy](), options=options).session(seed=2)
    expected = [plain.act(frame(seed)) for seed in range(3)]
    with pretended_gpu() as gpu:
        session = CachedVLA(to_pretended_gpu(here), ALL_POLICIES[policy](), options=options).session(seed=2)
        session.engine.graphs.make_graph = None  # type: ignore[union-attr]
        for seed in range(3):
            gpu.waits.clear()
            np.testing.assert_allclose(session.act(frame(seed)), expected[seed], atol=1e-3)
            assert seed == 0 or gpu.waits == []


def test_cudnn_prepares_no_attention_but_the_stock_models() -> None:
    """Torch chooses it on the newest GPUs, and it takes long over every shape that is new."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    with pretended_gpu():
        Engine(to_pretended_gpu(random_vla("tiny", seed=3)))
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    with torchs_attention():
        assert torch.backends.cuda.cudnn_sdp_enabled()
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_what_waits_is_seen() -> None:
    with pretended_gpu() as gpu:
        there = torch.ones(3).pin_memory().to(DEVICE, non_blocking=True)
        assert (gpu.reads, gpu.waits) == ([], [])
        bool(there[0] > 0)
        there.tolist()
        assert len(gpu.reads) == 2
        for wait in (
            lambda: torch.ones(3).to(DEVICE),
            lambda: there[there > 0],
            lambda: there.nonzero(),
            lambda: there[torch.tensor([0, 1])],
        ):
            gpu.waits.clear()
            wait()
            assert gpu.waits
