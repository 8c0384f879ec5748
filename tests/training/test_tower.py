"""A tower that reuses, in training: against the engine, against finite differences, and as a user trains with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.engine.scenes import frame
from tests.training.test_train import rows, short_run, write_dataset
from tests.training.worlds import SIDE, captured_hidden, losses_of, save_with_tokenizer, store_of

from lac_vla import VLA, CachedVLA, EngineOptions, InputError, LACPolicy, Random, load_vla, random_vla
from lac_vla.cli import main
from lac_vla.models.prismatic.presets import TINY
from lac_vla.models.prismatic.towers import ViTConfig
from lac_vla.policies.lac.inputs import resize
from lac_vla.training import precision
from lac_vla.training.config import TrainConfig
from lac_vla.training.lac import LACLoss, Temperatures
from lac_vla.training.store import FrameStore
from lac_vla.training.tower import MixedTower, VisionOutput
from lac_vla.training.train import train

CLOSE = {"rtol": 1e-4, "atol": 2e-5}
WARM = Temperatures(ratio=1.0, score=0.1)
DINO = ViTConfig(32, 4, 2, 48, registers=2, class_token=True, layer_scale=True)
SIGLIP = ViTConfig(24, 3, 2, 40)


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact comparisons need float32 products."""
    monkeypatch.setattr(precision, "AUTOCAST", False)


def tiny_vit() -> VLA:
    """Two cameras, each through two transformers."""
    cameras = tuple(replace(camera, image_size=56, tower=None) for camera in TINY.cameras)
    config = replace(TINY, vision_backbone_id="dinosiglip", vit_towers=(DINO, SIGLIP), cameras=cameras)
    vla = random_vla(config, seed=4)
    vla.module.requires_grad_(False)
    return vla


def tiny_mixed() -> VLA:
    """One camera through a transformer of its own, the other through a convolution."""
    tower = ViTConfig(24, 4, 2, 48, patch=8, registers=1, neck=24, mean=(0.4, 0.5, 0.6))
    cameras = (replace(TINY.cameras[0], tower=tower), TINY.cameras[1])
    vla = random_vla(replace(TINY, vision_backbone_id="towers", cameras=cameras), seed=4)
    vla.module.requires_grad_(False)
    return vla


MODELS = {"vit": tiny_vit, "vit+conv": tiny_mixed}


@pytest.fixture(params=MODELS)
def vla(request: pytest.FixtureRequest) -> VLA:
    return MODELS[request.param]()


def seen_store(vla: VLA, numbers: list[int]) -> FrameStore:
    """One episode of pictures that the model really sees; embeddings unrounded."""
    with torch.inference_mode():
        pixels = [vla.processor.images(frame(number)) for number in numbers]
        visual = np.stack([vla.encode_image(frame(number)).numpy() for number in numbers])
    images = {camera: np.stack([each[camera] for each in pixels]) for camera in pixels[0]}
    return replace(store_of(vla, 1, len(numbers)), visual=visual, tower_pixels=images)


def reusing(vla: VLA, store: FrameStore, reuse: bool = True, **options: object) -> LACLoss:
    losses = losses_of(vla, store, **options)  # type: ignore[arg-type]
    losses.tower = MixedTower(vla) if reuse else None
    return losses


@torch.inference_mode()
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_active_patches_are_those_of_the_engines_tower(vla: VLA, share: float) -> None:
    """Over several frames of two windows with decisions of their own: features, and what the next frame finds."""
    windows = [[0, 1, 2, 3], [9, 8, 7, 6]]
    stores = [seen_store(vla, window) for window in windows]
    caches = [vla.vision.kv_cache() for _ in windows]
    tower, rng, old = MixedTower(vla), np.random.default_rng(0), None
    n = stores[0].layout.n_visual
    for at in range(4):
        active = np.stack([rng.random(n) < (share if at else 1) for _ in windows])
        images = {
            name: torch.from_numpy(np.stack([store.tower_pixels[name][at] for store in stores]))
            for name in tower.cameras
        }
        visual = torch.from_numpy(np.stack([store.visual[at] for store in stores]))
        seen = tower.encode(images, visual, torch.from_numpy(active).float() if at else None, old)
        old = seen.slots
        for window, (numbers, cache) in enumerate(zip(windows, caches, strict=True)):
            vision, seen_by = vla.vision, frame(numbers[at])
            stem = vision.encode_stem(seen_by, vla.processor.images(seen_by), cache)
            expected = vision.project(vision.encode_tokens(stem, active[window], cache))
            torch.testing.assert_close(seen.visual[window][torch.from_numpy(active[window])], expected, **CLOSE)
            for slots, kept in zip(seen.slots.values(), in_order(cache), strict=True):
                for keys, values, (new_keys, new_values) in zip(slots.keys, slots.values, kept.blocks, strict=True):
                    patches = keys.shape[2]
                    torch.testing.assert_close(keys[window], new_keys[0, :, -patches:], **CLOSE)
                    torch.testing.assert_close(values[window], new_values[0, :, -patches:], **CLOSE)


def in_order(cache):  # type: ignore[no-untyped-def]
    """What the engine's transformers remember: camera by camera."""
    kept = [cache.images[key] for key in sorted(cache.images, key=lambda key: key[::-1])]
    return [image for image in kept if image.blocks]


@torch.inference_mode()
def test_tower_and_decoder_equal_a_session(vla: VLA) -> None:
    """Invariant 4 with the option ``vision_kv_reuse``: hidden states of all rows that a task reads."""
    numbers = [0, 1, 2, 3]
    store = seen_store(vla, numbers)
    losses = reusing(vla, store)
    session = CachedVLA(vla, Random(0.6), options=EngineOptions(vision_kv_reuse=True)).session(seed=2)
    old = seen = None
    for at, number in enumerate(numbers):
        with captured_hidden(session) as captured:
            session.act(frame(number))
        expected = captured[0][-vla.head.max_new_tokens :]
        assert session.last_info is not None
        store.targets[at] = session.last_info.metadata["tokens"]
        active = session.last_info.decision.active
        assert active.all() == (at == 0)
        mask = torch.from_numpy(active)[None].float() if at else None
        seen = losses._encode(losses.tower, np.array([at]), mask, seen)
        result = losses.decode(np.array([at]), mask=mask, old=old, vision=seen)
        torch.testing.assert_close(result.hidden[0], expected, **CLOSE)
        old = result.store.slots
    fresh = losses.decode(np.array([3]), mask=mask, old=old)
    assert not torch.allclose(fresh.hidden, result.hidden, atol=1e-4)


def slopes(loss: Callable[[torch.Tensor], torch.Tensor], mask: torch.Tensor, tokens: list[int], step: float) -> Any:
    """∂L/∂M of some tokens, by differentiation and by finite differences."""
    leaf = mask.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(leaf), leaf)
    finite = []
    for token in tokens:
        aside = torch.zeros_like(mask)
        aside[0, token] = step
        with torch.no_grad():
            finite.append(float(loss(mask + aside) - loss(mask - aside)) / (2 * step))
    return grad[0, tokens].numpy(), np.array(finite)


def test_mask_gradient_is_the_first_order_value_of_refreshing_in_tower_and_decoder(vla: VLA) -> None:
    """∂L/∂M against finite differences, L a fixed projection; a part of it is owed to the tower alone."""
    vla.module.double()
    store = seen_store(vla, [0, 6])
    losses = reusing(vla, store)
    with torch.no_grad():
        dense = losses.decode(np.array([0, 1]))
        old = dense.store.slots.of(slice(1))
        before = losses._encode(losses.tower, np.array([0]))
    rng = np.random.default_rng(0)
    mask = torch.from_numpy(rng.random((1, store.layout.n_visual)))
    features, hidden = (torch.from_numpy(rng.normal(size=part.shape)) for part in (before.visual, dense.hidden[1:]))

    def see(values: torch.Tensor) -> VisionOutput:
        return losses._encode(losses.tower, np.array([1]), values, before)

    def decoded(values: torch.Tensor, seen: VisionOutput) -> torch.Tensor:
        return (losses.decode(np.array([1]), mask=values, old=old, vision=seen).hidden * hidden).sum()

    tokens = [0, 7, 20]
    exact, finite = slopes(lambda values: (see(values).visual * features).sum(), mask, tokens, 1e-4)
    np.testing.assert_allclose(exact, finite, rtol=1e-6)
    both, finite = slopes(lambda values: decoded(values, see(values)), mask, tokens, 1e-4)
    np.testing.assert_allclose(both, finite, rtol=1e-5)
    given = replace(see(mask), visual=see(mask).visual.detach())
    decoder, _ = slopes(lambda values: decoded(values, given), mask, tokens, 1e-3)
    assert np.linalg.norm(both - decoder) > 0.2 * np.linalg.norm(both)


@torch.inference_mode()
def test_a_window_is_what_a_session_with_the_option_goes_through(vla: VLA) -> None:
    """The task loss without chance is the divergence that the losses's own policy causes in a session."""
    numbers = [0, 3, 6, 9]
    store = seen_store(vla, numbers)
    for camera in store.layout.cameras:
        shape = (camera.rows, camera.cols, SIDE)
        pixels = [resize(vla.processor.images(frame(number))[camera.name], *shape) for number in numbers]
        store.images[camera.name][:] = np.stack(pixels)
    losses = reusing(vla, store, ratio=0.6, recovery=0.0, flow="none")
    session = CachedVLA(vla, losses.policy, options=EngineOptions(vision_kv_reuse=True)).session()
    with captured_hidden(session) as captured:
        for at, number in enumerate(numbers):
            session.act(frame(number))
            assert session.last_info is not None
            store.targets[at] = session.last_info.metadata["tokens"]
    hidden = torch.stack([rows[-vla.head.max_new_tokens :] for rows in captured[1:]])
    dense, targets = losses.decode(np.arange(1, 4)).context(), torch.from_numpy(store.targets[1:])
    expected = vla.head.loss(replace(dense, hidden=hidden), targets, torch.Generator(), dense).mean()
    task = losses.window(np.array([0]), 4, WARM, None, lam=0.0, learn=False)["task"]
    assert task == pytest.approx(float(expected), rel=1e-3)
    assert task > 1e-4


def test_a_window_sees_what_the_option_costs(vla: VLA) -> None:
    """At one ratio the loss is another with the tower's reuse, in validation too; where all is active there is none."""
    store = seen_store(vla, [0, 3, 6, 9])
    chance = torch.Generator()
    tasks = {}
    for reuse in (False, True):
        for ratio in (0.0, 0.6):
            losses = reusing(vla, store, reuse, ratio=ratio)
            for generator in (chance.manual_seed(0), None):
                result = losses.window(np.array([0]), 4, WARM, generator, lam=0.0, learn=False)
                tasks[reuse, ratio, generator is None] = result["task"]
    for validation in (False, True):
        assert tasks[True, 0.0, validation] == pytest.approx(0, abs=1e-7)
        assert tasks[True, 0.6, validation] != pytest.approx(tasks[False, 0.6, validation], rel=0.02)


def test_both_networks_learn_through_the_tower(vla: VLA) -> None:
    store = seen_store(vla, [0, 3, 6, 9])
    grads = []
    for reuse in (False, True):
        losses = reusing(vla, store, reuse)
        torch.nn.init.normal_(losses.policy.predictor.head.weight)
        losses.window(np.array([0]), 4, WARM, torch.Generator().manual_seed(0), lam=0.0)
        grads.append([net.head.weight.grad.clone() for net in (losses.policy.selector, losses.policy.predictor)])
    for without, with_tower in zip(*grads, strict=True):
        assert with_tower.abs().sum() > 0
        assert not torch.allclose(without, with_tower, rtol=1e-2)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "demos")


@pytest.fixture
def config(vla: VLA, dataset: Path, tmp_path: Path) -> TrainConfig:
    short = short_run(save_with_tokenizer(vla, tmp_path / "vla"), dataset, tmp_path / "run")
    return replace(short, stage1_steps=1, stage2_steps=3, recovery=0.0, vision_kv_reuse=True)


def test_the_command_trains_a_policy_for_the_option(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "train",
        "--model",
        config.model,
        "--dataset",
        str(config.dataset),
        "--out",
        str(config.out),
        "--vision-kv-reuse",
    ]
    words += ["--stage1-steps", "1", "--stage2-steps", "2", "--stage1-batch", "4", "--batch", "2", "--window", "3"]
    main([*words, "--held-out", "0.25", "--width", "8"])
    assert str(config.out / "policy") in capsys.readouterr().out.replace("\n", "")
    about = json.loads((config.out / "policy" / "config.json").read_text())["about"]
    assert about["training"]["vision_kv_reuse"] is True
    assert all(np.isfinite(list(row.values())).all() for row in rows(config.out))
    session = CachedVLA(
        load_vla(config.model), LACPolicy.from_pretrained(config.out), options=EngineOptions(vision_kv_reuse=True)
    ).session()
    for number in range(3):
        session.act(frame(number))
    assert session.last_info is not None
    assert session.last_info.dense_reason is None


def test_resume_equals_an_unbroken_run(config: TrainConfig, tmp_path: Path) -> None:
    train(config)
    broken = replace(config, out=tmp_path / "broken", store=config.out / "store")
    for _ in range(5):
        train(broken, max_seconds=0.0)
    whole, pieced = ((out / "policy" / "policy.safetensors").read_bytes() for out in (config.out, broken.out))
    assert whole == pieced


def test_the_store_holds_what_the_tower_sees(config: TrainConfig, vla: VLA, tmp_path: Path) -> None:
    from lac_vla.datasets import LeRobotDataset

    train(config)
    store = FrameStore.open(config.out / "store")
    episode = LeRobotDataset(config.dataset).episode(1)
    images = {camera: episode.images[camera][4] for camera in episode.images}
    expected = vla.processor.images(replace(frame(0), images=images))
    assert tuple(store.tower_pixels) == MixedTower(vla).cameras
    for camera, pixels in store.tower_pixels.items():
        assert np.array_equal(pixels[int(store.start[1]) + 4], expected[camera])
    # What is stored for the tower need not be read ...
    train(replace(config, out=tmp_path / "without", store=config.out / "store", vision_kv_reuse=False))
    # ... and what is not there is asked for.
    train(replace(config, out=tmp_path / "plain", vision_kv_reuse=False))
    assert not FrameStore.open(tmp_path / "plain" / "store").tower_pixels
    with pytest.raises(InputError, match=r"no pixels of the cameras .*another --store"):
        train(replace(config, out=tmp_path / "asking", store=tmp_path / "plain" / "store"))


def test_convolutions_are_refused_before_anything_is_computed(config: TrainConfig, tmp_path: Path) -> None:
    model = save_with_tokenizer(random_vla("tiny"), tmp_path / "conv")
    with pytest.raises(InputError, match=r"vision_kv_reuse needs a vision transformer.*convolutions"):
        train(replace(config, model=str(model)))
    assert not config.out.exists()
