"""LeRobot's batches become the frames that they were made of. LeRobot itself is in test_lerobot.py."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.serving.conftest import KEYS, observation

from lac_vla import VLA, CachedVLA, InputError, MissingExtraError, Motion, random_vla
from lac_vla.lerobot.bridge import Bridge, frame_of, own_action_steps, running_chunk
from lac_vla.lerobot.self_check import fault
from lac_vla.models.cogact.config import TINY_COGACT
from lac_vla.policies import FastV
from lac_vla.running_chunk import RealTimeChunk
from lac_vla.session import Session

CAMERAS = {"agentview": "observation.images.agentview", "wrist": "observation.images.image2"}


def floats(image: np.ndarray[Any, Any]) -> torch.Tensor:
    """As LeRobot makes them: (1, 3, H, W), float32, divided by 255."""
    tensor = torch.from_numpy(image)[None].permute(0, 3, 1, 2).contiguous().type(torch.float32)
    tensor /= 255
    return tensor


def batch(seed: int = 0, **change: Any) -> dict[str, Any]:
    frame = KEYS.frame(observation(seed))
    images = {CAMERAS[camera]: floats(image) for camera, image in frame.images.items()}
    return images | {"observation.state": torch.zeros(1, 8), "task": ["pick up the bowl"]} | change


@pytest.fixture(scope="module")
def backbone() -> VLA:
    return random_vla("tiny")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8])
def test_every_pixel_value_survives(dtype: torch.dtype) -> None:
    image = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    tensor = floats(image).to(dtype) if dtype.is_floating_point else torch.from_numpy(image).permute(2, 0, 1)[None]
    frame = frame_of({"x": tensor, "task": "go"}, {"top": "x"})
    np.testing.assert_array_equal(frame.images["top"], image)
    assert frame.proprio is None


def test_actions_are_the_sessions(backbone: VLA) -> None:
    vla = CachedVLA(backbone, Motion(0.5))
    bridge, session = Bridge(vla, {"wrist": CAMERAS["wrist"]}), vla.session()
    for seed in range(3):
        np.testing.assert_array_equal(bridge.act(batch(seed)), [session.act(KEYS.frame(observation(seed)))])
        assert bridge.last_info is not None
        assert bridge.last_info.dense_reason == (None if seed else "first frame")
    bridge.reset()
    bridge.act(batch(3))
    assert bridge.last_info is not None
    assert bridge.last_info.dense_reason == "first frame"


def test_a_chunk_is_executed_before_the_model_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_vla(TINY_COGACT, seed=1)
    monkeypatch.setattr(type(model), "horizon", 16, raising=False)
    vla = CachedVLA(model, Motion(0.5))
    bridge, session = Bridge(vla, CAMERAS, seed=3, n_action_steps=4), vla.session(3)
    chunks = [session.act(KEYS.frame(observation(seed))) for seed in (0, 4)]
    actions = [bridge.next_action(batch(seed)) for seed in range(6)]
    np.testing.assert_array_equal(actions, [*chunks[0][:4], *chunks[1][:2]])
    bridge.reset()
    session.reset()
    [first, *_] = session.act(KEYS.frame(observation(9)))  # what was left of the chunk is dropped
    np.testing.assert_array_equal(bridge.next_action(batch(9)), first)
    for wrong in (0, 17):
        with pytest.raises(InputError, match=f"n_action_steps is {wrong}; give 1 to 16"):
            Bridge(vla, CAMERAS, n_action_steps=wrong)


def test_a_checkpoint_of_lerobot_says_how_many_actions_are_executed() -> None:
    assert own_action_steps("mini-flow") == 10
    assert own_action_steps("mini") == own_action_steps("module:model") == 1


def test_a_running_chunk_is_gone_on_with() -> None:
    vla = CachedVLA(random_vla("smolvla-tiny"), Motion(0.5))
    bridge, session = Bridge(vla, CAMERAS), vla.session()
    assert bridge.supports_rtc
    assert not Bridge(CachedVLA(random_vla("tiny"))).supports_rtc
    chunk = torch.from_numpy(bridge.act(batch(0)))
    session.act(KEYS.frame(observation(0)))
    filled = torch.cat([chunk[2:], torch.zeros(2, 7)])  # as LeRobot fills up
    rtc = running_chunk(filled[None], 9, bridge.horizon, None)  # as LeRobot overestimates
    assert rtc is not None
    assert rtc.inference_delay == len(chunk) - 2
    expected = session.act(KEYS.frame(observation(1)), RealTimeChunk(chunk[2:].numpy(), len(chunk) - 2))
    np.testing.assert_array_equal(bridge.act(batch(1), rtc), expected)
    assert running_chunk(torch.zeros(2, 7), 1, bridge.horizon, None) is None
    with pytest.raises(InputError, match="give the actions of one robot"):
        running_chunk(torch.zeros(2, 3, 7), 1, bridge.horizon, None)


@pytest.mark.parametrize(("horizon", "left"), [(4, 2), (3, 4), (10, 4)])
def test_zeros_are_no_actions_where_lerobot_may_have_filled_up_with_them(horizon: int, left: int) -> None:
    settings = SimpleNamespace(execution_horizon=horizon, max_guidance_weight=5.0, prefix_attention_schedule="exp")
    rtc = running_chunk(torch.cat([torch.ones(2, 7), torch.zeros(2, 7)]), 3, 8, settings)
    assert rtc is not None
    assert (len(rtc.prev_chunk_left_over), rtc.inference_delay) == (left, min(3, left))


@pytest.mark.parametrize("options", ["none", "default+vision_kv_reuse"])
def test_the_first_observation_is_checked_and_changes_nothing(options: str) -> None:
    from lac_vla.engine.options import EngineOptions

    vla = CachedVLA(random_vla("smolvla-tiny"), Motion(0.5), options=EngineOptions.parse(options))
    checked, plain = Bridge(vla, CAMERAS, self_check=True), Bridge(vla, CAMERAS)
    for seed in range(3):
        np.testing.assert_array_equal(checked.act(batch(seed)), plain.act(batch(seed)))
    assert checked.fault is None
    assert checked.last_info is not None
    assert checked.last_info.ratio > 0
    assert fault(CachedVLA(vla.model, FastV(0.5)), KEYS.frame(observation(0)), 0) is None


def test_a_camera_that_writes_during_the_check_is_no_fault_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    vla, seen = CachedVLA(random_vla("smolvla-tiny"), Motion(0.5)), KEYS.frame(observation(0))
    act = Session.act

    def meanwhile(session: Session, frame: Any) -> Any:
        answer = act(session, frame)
        for image in seen.images.values():
            image += 1
        return answer

    monkeypatch.setattr(Session, "act", meanwhile)
    assert fault(vla, seen, 0) is None


@pytest.mark.parametrize("breaks", ["first", "reuse", "raises"])
def test_an_engine_that_answers_otherwise_is_not_used(
    breaks: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    vla = CachedVLA(random_vla("smolvla-tiny"), Motion(0.5))
    run = vla.engine.run

    def wrong(plans: Any) -> Any:
        results = run(plans)
        for result in results:
            if breaks == "raises":
                raise RuntimeError("no such kernel")
            if breaks == "first" or result.plan.dense_reason is None:
                result.action = result.action + 0.1
        return results

    monkeypatch.setattr(vla.engine, "run", wrong)
    bridge, dense = Bridge(vla, CAMERAS, seed=2, self_check=True), CachedVLA(vla.model).session(2)
    for seed in range(3):
        np.testing.assert_allclose(bridge.act(batch(seed)), dense.act(KEYS.frame(observation(seed))), atol=1e-5)
    assert bridge.fault is not None
    assert ("with reuse" if breaks == "reuse" else "computed in full") in bridge.fault
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    bridge.reset()
    bridge.act(batch(1))
    assert bridge.last_info is not None
    assert bridge.last_info.ratio == 0


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"task": ["a", "b"]}, "one robot"),
        ({"task": None}, "one robot"),
        ({"task": [" "]}, "instruction is empty"),
        ({"observation.state": torch.zeros(2, 8)}, "of 2 robots"),
        ({"observation.state": torch.zeros(8)}, "2 dimensions"),
        ({"observation.state": torch.full((1, 8), torch.nan)}, "NaN"),
        ({CAMERAS["wrist"]: torch.zeros(2, 3, 8, 8)}, "batch size of 1"),
        ({CAMERAS["wrist"]: torch.zeros(3, 8, 8)}, "4 dimensions"),
        ({CAMERAS["wrist"]: np.zeros((1, 3, 8, 8))}, "give a tensor"),
        ({CAMERAS["wrist"]: torch.zeros(1, 8, 8, 3)}, "3×H×W"),
        ({CAMERAS["wrist"]: torch.full((1, 3, 8, 8), -1.0)}, "not normalised"),
        ({CAMERAS["wrist"]: torch.full((1, 3, 8, 8), 255.0)}, "not normalised"),
        ({CAMERAS["wrist"]: torch.full((1, 3, 8, 8), torch.nan)}, "not normalised"),
        ({CAMERAS["wrist"]: torch.zeros(1, 3, 8, 8, dtype=torch.int64)}, "uint8"),
    ],
)
def test_batches_that_cannot_be_used_change_nothing(backbone: VLA, change: dict[str, Any], complaint: str) -> None:
    bridge = Bridge(CachedVLA(backbone, Motion(0.5)), CAMERAS)
    bridge.act(batch(0))
    with pytest.raises(InputError, match=complaint):
        bridge.act(batch(1, **change))
    bridge.act(batch(1))
    assert bridge.last_info is not None
    assert bridge.last_info.dense_reason is None


def test_cameras_are_named(backbone: VLA) -> None:
    vla = CachedVLA(backbone)
    assert Bridge(vla).cameras["wrist"] == "observation.images.wrist"
    with pytest.raises(InputError, match=r"no \['observation.images.wrist'\], its images are .*image2"):
        Bridge(vla).act(batch())
    with pytest.raises(InputError, match="no camera \\['hand'\\]"):
        Bridge(vla, {"hand": "observation.images.hand"})


def test_a_missing_lerobot_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lerobot", None)
    for name in ("configuration", "modeling", "processor"):
        monkeypatch.delitem(sys.modules, f"lac_vla.lerobot.{name}_lac_vla", raising=False)
    for name in ("configuration", "modeling", "processor"):
        with pytest.raises(MissingExtraError, match=r'pip install "lac-vla\[lerobot\]"'):
            importlib.import_module(f"lac_vla.lerobot.{name}_lac_vla")
