"""π0 and π0.5, loaded from checkpoints in LeRobot's layout, against outputs of LeRobot's own code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.models.conftest import GOLDENS, Arrays
from tests.models.pi0_checkpoint import CAMERAS, TASK, golden, observation, session_of, write

from lac_vla import VLA, Frame, Session, load_vla
from lac_vla.training.mixed import MixedOutput, mixed_forward
from lac_vla.types import TokenLayout

STEP = 3
"""The Euler step at time 0.7."""
FAMILIES = ("pi0", "pi05")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def arrays(family: str) -> Arrays:
    return golden(family)


@pytest.fixture(scope="module")
def vla(family: str, tmp_path_factory: pytest.TempPathFactory) -> VLA:
    return load_vla(write(tmp_path_factory.mktemp(family) / "tiny", family))


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


def chunk(session: Session) -> list[list[float]]:
    """The last answer in the model's units."""
    assert session.last_info is not None
    normalized: list[list[float]] = session.last_info.metadata["normalized"]
    return normalized


def test_state_and_prompt(vla: VLA, arrays: Arrays) -> None:
    """The first camera of the configuration comes first; the empty one is left out, and so is padding."""
    prompt = vla.processor.prompt(observation(arrays))
    assert prompt.state is not None
    np.testing.assert_array_equal(prompt.state, arrays["state_normalised"][0])
    ids = arrays["tokens"][0][arrays["token_mask"][0]].tolist()
    assert list(prompt.ids) == ids
    assert prompt.layout == TokenLayout.of({name: (4, 4) for name in CAMERAS}, 0, len(ids))


@pytest.mark.parametrize(("version", "told"), [("", None), ("_0_4_4", "padded")])
def test_prompts(vla: VLA, family: str, tmp_path: Path, arrays: Arrays, version: str, told: str | None) -> None:
    if version:
        if family == "pi0":
            pytest.skip("π0's prompt is the same in all versions")
        vla = load_vla(write(tmp_path / "tiny", family), state_prompt=told)
    prompts = json.loads((GOLDENS / family / f"prompts{version}.json").read_text())
    assert len(prompts) >= 4
    for prompt in prompts.values():
        assert list(vla.processor.prompt(observation(arrays, prompt["task"])).ids) == prompt["ids"]


def test_pixels(vla: VLA, arrays: Arrays) -> None:
    """A picture that is wide, and one that is square already; black above and below. Policies see the same, rounded."""
    frame = observation(arrays)
    for number, (name, image) in enumerate(vla.processor.images(frame).items()):
        expected = arrays["pixels"][number]
        close(vla.processor._letterbox(frame.images[name]), expected)  # type: ignore[attr-defined]
        assert np.abs(image.transpose(2, 0, 1) / 127.5 - 1 - expected).max() <= 0.5 / 127.5 + 1e-6
    assert not vla.processor.images(frame)["base_0_rgb"][:7].any()


@torch.inference_mode()
def test_vision_and_projector(vla: VLA, arrays: Arrays) -> None:
    close(vla.module.vision(torch.from_numpy(arrays["pixels"][:2])), arrays["vision"][:2])  # type: ignore[operator]
    close(vla.encode_image(observation(arrays)), arrays["projector"][:2].reshape(32, 32))


@torch.inference_mode()
def test_vision_over_its_own_cache(vla: VLA, arrays: Arrays) -> None:
    """All patches, then some over the kept keys and values of the others: of an unchanged picture the same."""
    frame, cache = observation(arrays), vla.vision.kv_cache()
    images = vla.processor.images(frame)
    whole = vla.vision.encode_tokens(vla.vision.encode_stem(frame, images))
    stem = vla.vision.encode_stem(frame, images, cache)
    torch.testing.assert_close(vla.vision.encode_tokens(stem, None, cache), whole)
    some = np.random.default_rng(0).random(32) < 0.4
    torch.testing.assert_close(vla.vision.encode_tokens(stem, some, cache), whole[torch.from_numpy(some)])
    one = np.arange(32) < 3
    assert vla.vision.encode_tokens(stem, one, cache).shape == (3, 48)  # of a camera, nothing


@torch.inference_mode()
def test_prefix_embeddings(vla: VLA, arrays: Arrays) -> None:
    frame = observation(arrays)
    prefix, suffix = vla.processor.embed(vla.processor.prompt(frame))
    rows = arrays["prefix_pad_mask"]
    close(torch.cat([prefix, vla.encode_image(frame), suffix]), arrays["prefix_embeddings"][rows])
    assert arrays["prefix_positions"][rows].tolist() == list(range(rows.sum()))


def test_keys_values_and_chunk(vla: VLA, arrays: Arrays) -> None:
    session, rows = session_of(vla, arrays), arrays["prefix_pad_mask"]
    action = session.act(observation(arrays))
    for layer, (keys, values) in enumerate(cached(session)):
        close(keys, arrays[f"prefix_key_{layer}"][:, rows])
        close(values, arrays[f"prefix_value_{layer}"][:, rows])
    close(chunk(session), arrays["chunk_normalised"])
    close(action, arrays["chunk"])
    assert vla.horizon == len(action)


def test_euler_steps_and_velocity(vla: VLA, family: str, arrays: Arrays, monkeypatch: pytest.MonkeyPatch) -> None:
    head: Any = vla.head
    steps, found = [], {}
    velocity, begin = head.velocity, head.begin

    def spy(shared: Any, noised: torch.Tensor, step: int) -> Any:
        steps.append(noised)
        if step == 1:  # π0's state stands in its place by now
            noise = torch.from_numpy(arrays["noise"][0])
            found["rows"] = next(velocity(shared, noise, STEP)).embeddings
            found["velocity"] = yield from velocity(shared, noise, STEP)
        return (yield from velocity(shared, noised, step))

    def spy_begin(context: Any) -> Any:
        shared = begin(context)
        found["state"] = shared[1]
        return shared

    monkeypatch.setattr(head, "velocity", spy)
    monkeypatch.setattr(head, "begin", spy_begin)
    session_of(vla, arrays).act(observation(arrays))
    close(torch.stack(steps), arrays["euler"][:-1])
    close(found["velocity"], arrays["velocity"])
    rows = found["rows"] if family == "pi05" else torch.cat([found["state"], found["rows"]])
    close(rows, arrays["suffix_embeddings"])
    if family == "pi05":
        close(head._embed_time(torch.from_numpy(arrays["time"]))[0], arrays["time_condition"])


CHANGED: dict[str, Callable[[Arrays], Frame]] = {
    "image": lambda arrays: observation(arrays, image_base=arrays["changed_image_base"]),
    "state": lambda arrays: observation(arrays, state=arrays["changed_state"]),
    "instruction": lambda arrays: observation(arrays, TASK.replace("bowl", "plate")),
}


@pytest.mark.parametrize("what", CHANGED)
def test_what_changes_with_an_input(vla: VLA, arrays: Arrays, what: str) -> None:
    """Keys, values and chunk; and what does not change at all, to the bit: a slot that may be reused exactly."""
    session, frame = session_of(vla, arrays), CHANGED[what](arrays)
    session.act(observation(arrays))
    before = cached(session)
    session.act(frame)
    mask = arrays[f"changed_{what}_token_mask"][0]
    assert list(vla.processor.prompt(frame).ids) == arrays[f"changed_{what}_tokens"][0][mask].tolist()
    rows = np.concatenate([arrays["prefix_pad_mask"][: -len(mask)], mask])
    shared = np.concatenate([arrays["prefix_pad_mask"][: -len(mask)], mask & arrays["token_mask"][0]])
    for layer, (keys, values) in enumerate(cached(session)):
        close(keys, arrays[f"changed_{what}_key_{layer}"][:, rows])
        close(values, arrays[f"changed_{what}_value_{layer}"][:, rows])
        n = int(shared.sum())
        old_keys, old_values = before[layer]
        same = ((keys[:, :n] == old_keys[:, :n]) & (values[:, :n] == old_values[:, :n])).all(dim=2).all(dim=0)
        assert (same.numpy() == ~arrays[f"changed_{what}_kv_rows"][layer][shared]).all()
    close(chunk(session), arrays[f"changed_{what}_chunk_normalised"])


def test_a_changed_picture_leaves_the_other_cameras_features(vla: VLA, arrays: Arrays) -> None:
    with torch.inference_mode():
        before, after = vla.encode_image(observation(arrays)), vla.encode_image(CHANGED["image"](arrays))
    changed = (before != after).any(dim=1).numpy().reshape(2, 16)
    assert (changed == arrays["changed_image_vision_patches"][:2]).all()


def test_lerobot_0_4(family: str, tmp_path: Path, arrays: Arrays) -> None:
    """Its own keys, where the embedding is the output's; its letterbox; and the prompt that it pads."""
    told = "padded" if family == "pi05" else None
    folder = write(tmp_path / "tiny", family, "_0_4_4")
    vla = load_vla(folder, image_pipeline="lerobot-0.4", state_prompt=told)
    expected, frame = golden(family, "_0_4_4"), observation(arrays)
    for number, name in enumerate(CAMERAS):
        close(vla.processor._letterbox(frame.images[name]), expected["pixels"][number])  # type: ignore[attr-defined]
    assert expected["pixels"][0].min() == pytest.approx(-3)
    session, rows = session_of(vla, arrays), expected["prefix_pad_mask"]
    assert list(vla.processor.prompt(frame).ids) == expected["tokens"][0][expected["token_mask"][0]].tolist()
    action = session.act(frame)
    with torch.inference_mode():
        tokens, (_, suffix) = vla.encode_image(frame), vla.processor.embed(vla.processor.prompt(frame))
    close(torch.cat([tokens, suffix]), expected["prefix_embeddings"][rows])
    close(chunk(session), expected["chunk_normalised"])
    close(action, expected["chunk"])
    newest = session_of(load_vla(folder), arrays)
    newest.act(frame)
    assert np.abs(np.asarray(chunk(newest)) - expected["chunk_normalised"]).max() > 0.05


def passed(vla: VLA, frames: list[Frame]) -> MixedOutput:
    """Training's dense pass over prompts that may differ in length; padding holds large numbers."""
    prompts = [vla.processor.prompt(frame) for frame in frames]
    parts = [torch.cat([vla.encode_image(f), vla.processor.embed(p)[1]]) for f, p in zip(frames, prompts, strict=True)]
    length = max(len(part) for part in parts)
    rows = torch.stack([torch.cat([part, part.new_full((length - len(part), 32), 50.0)]) for part in parts])
    return mixed_forward(vla, rows, prompts[0].layout, torch.tensor([len(part) for part in parts]))


@torch.no_grad()
def test_training_loss(vla: VLA, family: str, arrays: Arrays) -> None:
    """The official joint pass, and ours over keys and values: square error of every value; alone and in a batch."""
    noise, actions = (torch.from_numpy(arrays[name]) for name in ("noise", "train_actions"))
    time = torch.from_numpy(arrays["time"])
    noised, wanted = time * noise + (1 - time) * actions, noise - actions
    frames = [
        observation(arrays),
        observation(arrays, "put the black bowl on the plate, then stop", state=-arrays["state"]),
    ]
    head: Any = vla.head
    for given in (frames[:1], frames, frames[::-1]):
        context, n = passed(vla, given).context(), len(given)
        proprio = np.stack([frame.proprio for frame in given if frame.proprio is not None])
        states, times = torch.from_numpy(head.with_states(np.zeros((n, 0), np.float32), proprio)), time.repeat(n)
        times[[frame is not frames[0] for frame in given]] = 0.3
        velocity = head.train_velocity(context, states, noised.expand(n, -1, -1), times)
        close((velocity[given.index(frames[0])] - wanted[0]).square(), arrays["train_loss"])
