"""SmolVLA, loaded from a checkpoint in LeRobot's layout, against outputs of LeRobot's own code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.models.conftest import Arrays
from tests.models.smolvla_checkpoint import TASK, golden, observation, session_of, write

from lac_vla import VLA, Session, load_vla
from lac_vla.policies import CachePolicy
from lac_vla.training.mixed import MixedOutput, mixed_forward
from lac_vla.types import Decision, Frame, PolicyInput, SkippedTokens, TokenLayout

STEP = 3
"""The Euler step at time 0.7."""


@pytest.fixture(scope="module")
def arrays() -> Arrays:
    return golden()


@pytest.fixture(scope="module")
def vla(tmp_path_factory: pytest.TempPathFactory) -> VLA:
    return load_vla(write(tmp_path_factory.mktemp("smolvla") / "tiny"))


def close(found: Any, expected: np.ndarray[Any, Any], bound: float = 1e-5) -> None:
    """The largest difference is at most ``bound`` of the largest value."""
    found = found.detach().numpy() if isinstance(found, torch.Tensor) else np.asarray(found)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= bound * np.abs(expected).max()


def cached(session: Session) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of the prompt, per layer."""
    layout, store = session.memory.layout, session.engine.store
    assert layout is not None
    own = slice(session._region.start, session._region.start + layout.length)
    return [
        (keys[:, own].clone(), values[:, own].clone()) for keys, values in zip(store.keys, store.values, strict=True)
    ]


def test_state_and_prompt(vla: VLA, arrays: Arrays) -> None:
    prompt = vla.processor.prompt(observation(arrays))
    assert prompt.state is not None
    close(prompt.state, arrays["state_normalised"][0])
    assert list(prompt.ids) == arrays["tokens"][0].tolist()
    assert prompt.layout == TokenLayout.of({"camera1": (4, 4), "camera2": (4, 4)}, 0, 9 + 1)
    assert vla.processor.prompt(observation(arrays, f"{TASK}\n")).ids == prompt.ids


def test_pixels(vla: VLA, arrays: Arrays) -> None:
    """A picture that is wide, and one that is high: black on top, and on the left."""
    frame = observation(arrays)
    for number, (name, image) in enumerate(vla.processor.images(frame).items()):
        expected = arrays["pixels"][number]
        close(vla.processor.picture(frame.images[name]), expected)  # type: ignore[attr-defined]
        assert np.abs(image.transpose(2, 0, 1) / 127.5 - 1 - expected).max() <= 0.5 / 127.5 + 1e-6
        assert not (image[: 128 - 96] if name == "camera1" else image[:, : 128 - 85]).any()


@torch.inference_mode()
def test_vision_and_connector(vla: VLA, arrays: Arrays) -> None:
    close(vla.module.vision(torch.from_numpy(arrays["pixels"][:2])), arrays["vision"][:2])  # type: ignore[operator]
    tokens = vla.encode_image(observation(arrays))
    close(tokens / 48**0.5, arrays["connector"][:2].reshape(32, 48))


@torch.inference_mode()
def test_prefix_embeddings(vla: VLA, arrays: Arrays) -> None:
    frame = observation(arrays)
    prefix, suffix = vla.processor.embed(vla.processor.prompt(frame))
    rows = arrays["prefix_pad_mask"]
    close(torch.cat([prefix, vla.encode_image(frame), suffix]), arrays["prefix_embeddings"][rows])
    assert arrays["prefix_positions"][rows].tolist() == list(range(42))


def test_keys_values_and_chunk(vla: VLA, arrays: Arrays) -> None:
    session, rows = session_of(vla, arrays), arrays["prefix_pad_mask"]
    action = session.act(observation(arrays))
    for layer, (keys, values) in enumerate(cached(session)):
        close(keys, arrays[f"prefix_key_{layer}"][:, rows])
        close(values, arrays[f"prefix_value_{layer}"][:, rows])
    assert session.last_info is not None
    close(session.last_info.metadata["normalized"], arrays["chunk_normalised"])
    close(session.last_info.metadata["normalized"], arrays["maxlen_chunk_normalised"])
    close(action, arrays["chunk"])
    close(action[:3], arrays["select_action_first_3"])


def test_euler_steps_and_velocity(vla: VLA, arrays: Arrays, monkeypatch: pytest.MonkeyPatch) -> None:
    head: Any = vla.head
    steps, found = [], {}
    velocity = head.velocity

    def spy(shared: Any, noised: torch.Tensor, step: int) -> Any:
        steps.append(noised)
        if step == 0:
            noise = torch.from_numpy(arrays["noise"][0])
            request = next(velocity(shared, noise, STEP))
            found["suffix"] = request.embeddings
            found["velocity"] = yield from velocity(shared, noise, STEP)
        return (yield from velocity(shared, noised, step))

    monkeypatch.setattr(head, "velocity", spy)
    session_of(vla, arrays).act(observation(arrays))
    close(torch.stack(steps), arrays["euler"][:-1])
    close(found["suffix"], arrays["suffix_embeddings"])
    close(found["velocity"], arrays["velocity"])


@pytest.mark.parametrize(
    ("variant", "config"),
    [
        ("self_attn", {"attention_mode": "self_attn"}),
        ("cross_only", {"self_attn_every_n_layers": -1}),
        ("all_vlm_layers", {"num_vlm_layers": -1}),
        ("resize_64", {"resize_imgs_with_padding": [64, 64]}),
        ("prefix_length_96", {"prefix_length": 96}),
        ("maxlen", {"pad_language_to": "max_length"}),
    ],
)
def test_variants(tmp_path: Path, arrays: Arrays, variant: str, config: dict[str, Any]) -> None:
    shapes = variant if variant in ("self_attn", "cross_only", "all_vlm_layers") else None
    session = session_of(load_vla(write(tmp_path / "tiny", shapes, **config)), arrays)
    session.act(observation(arrays))
    assert session.last_info is not None
    expected = arrays["maxlen_chunk_normalised" if variant == "maxlen" else f"variant_{variant}"]
    close(session.last_info.metadata["normalized"], expected)


@pytest.mark.parametrize("what", ["image", "state", "instruction"])
def test_what_changes_with_an_input(vla: VLA, arrays: Arrays, what: str) -> None:
    """Keys, values and chunk; and what does not change at all, to the bit: a slot that may be reused exactly."""
    changed: dict[str, Callable[[], Frame]] = {
        "image": lambda: observation(arrays, camera1=arrays["changed_image_camera1"]),
        "state": lambda: observation(arrays, state=arrays["changed_state"]),
        "instruction": lambda: observation(arrays, "pick up the black plate"),
    }
    session, rows = session_of(vla, arrays), arrays["prefix_pad_mask"]
    session.act(observation(arrays))
    before = cached(session)
    session.act(changed[what]())
    assert list(vla.processor.prompt(changed[what]()).ids) == arrays[f"changed_{what}_tokens"][0].tolist()
    for layer, (keys, values) in enumerate(cached(session)):
        close(keys, arrays[f"changed_{what}_key_{layer}"][:, rows])
        close(values, arrays[f"changed_{what}_value_{layer}"][:, rows])
        same = ((keys == before[layer][0]) & (values == before[layer][1])).all(dim=2).all(dim=0).numpy()
        assert (same == ~arrays[f"changed_{what}_kv_rows"][layer][rows]).all()
    assert session.last_info is not None
    close(session.last_info.metadata["normalized"], arrays[f"changed_{what}_chunk_normalised"])
    assert session.last_info.dense_reason is not None or what != "instruction"


def passed(vla: VLA, frames: list[Frame]) -> MixedOutput:
    """Training's dense pass over prompts that may differ in length; padding holds large numbers."""
    with torch.no_grad():
        prompts = [vla.processor.prompt(frame) for frame in frames]
        parts = [
            torch.cat([vla.encode_image(f), vla.processor.embed(p)[1]]) for f, p in zip(frames, prompts, strict=True)
        ]
        length = max(len(part) for part in parts)
        rows = torch.stack([torch.cat([part, part.new_full((length - len(part), 48), 50.0)]) for part in parts])
        lengths = torch.tensor([len(part) for part in parts])
        return mixed_forward(vla, rows, prompts[0].layout, lengths)


@torch.no_grad()
def test_training_loss(vla: VLA, arrays: Arrays) -> None:
    """The official joint pass, and ours over keys and values: square error of every value; alone and in a batch."""
    noise, actions = (torch.from_numpy(arrays[name]) for name in ("noise", "train_actions"))
    time = torch.from_numpy(arrays["time"])
    noised, wanted = time * noise + (1 - time) * actions, noise - actions
    frames = [observation(arrays), observation(arrays, "put the black bowl on the plate, then stop")]
    head: Any = vla.head
    for given in (frames[:1], frames, frames[::-1]):
        context, n = passed(vla, given).context(), len(given)
        states = torch.zeros(n, 0)
        velocity = head.train_velocity(context, states, noised.expand(n, -1, -1), time.expand(n))
        close((velocity[given.index(frames[0])] - wanted[0]).square(), arrays["train_loss"])


def test_cross_attention_is_projected_once_in_a_frame(
    vla: VLA, arrays: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    head: Any = vla.head
    layer, calls = head._expert.cross_layers[1], []
    project = type(layer).project

    def counted(self: Any, keys: torch.Tensor, values: torch.Tensor) -> Any:
        calls.append(self)
        return project(self, keys, values)

    monkeypatch.setattr(type(layer), "project", counted)
    session = session_of(vla, arrays)
    session.act(observation(arrays))
    assert len(calls) == 2  # layers 1 and 3, ten steps
    assert session.last_info is not None
    assert len(session.last_info.stack_passes) == 10
    assert session.last_info.n_queries == 0  # the prefix's last layer leaves keys and values alone


@dataclass(frozen=True)
class PruneHalf(CachePolicy):
    """Every other visual token disappears behind the second layer."""

    def decide(self, inputs: PolicyInput) -> Decision:
        exit_layer = np.where(np.arange(inputs.layout.n_visual) % 2, 2, inputs.n_layers).astype(np.int64)
        return Decision(exit_layer, inputs.n_layers, SkippedTokens.PRUNE)


@torch.inference_mode()
def test_cross_attention_does_not_see_what_was_pruned(vla: VLA, arrays: Arrays) -> None:
    """The content of a slot that is gone does not matter, in no layer; that of another one does."""
    session = session_of(vla, arrays)
    session.policy = PruneHalf()
    frame, answers = observation(arrays), []
    session.act(frame)
    assert session.memory.layout is not None
    gone = session._region.start + np.arange(1, session.memory.layout.n_visual, 2)
    for filler in (0.0, 3.0):
        for part in (session.engine.store.keys, session.engine.store.values):
            part[2:, :, gone] = filler
        answers.append(session.act(frame))
        assert session.last_info is not None
        assert session.last_info.ratio == 0.25
    np.testing.assert_array_equal(*answers)
    project = vla.head._expert.project  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            vla.head._expert,
            "project",
            lambda keys, values: {  # type: ignore[attr-defined]
                layer: (pair[0].clone().index_fill_(1, torch.tensor([0]), 3.0), pair[1])
                for layer, pair in project(keys, values).items()
            },
        )
        assert np.abs(session.act(frame) - answers[0]).max() > 1e-4
