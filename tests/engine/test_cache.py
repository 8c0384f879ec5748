"""What the cache says about its slots is true: their age, and the pixels they were computed from."""

from __future__ import annotations

import numpy as np
import torch

from lac_vla import CachedVLA, Decision, Random, TokenLayout, random_vla
from lac_vla.engine.kv_cache import VisualKVCache, write
from tests.engine.scenes import frame


def test_every_slot_shows_the_pixels_of_the_frame_it_was_computed_in() -> None:
    backbone = random_vla("tiny")
    session = CachedVLA(backbone, Random(0.6), max_age=4).session(seed=2)
    pixels = []
    seen_ages = set()
    for i in range(10):
        session.act(frame(i))
        step = session.last_info
        assert step is not None
        pixels.append(step.pixels)
        reference = session._cache.reference
        for camera in step.layout.cameras:
            side = pixels[i][camera.name].shape[0] // camera.rows
            for token in range(camera.size):
                age = int(step.age[camera.start + token])
                row, col = divmod(token, camera.cols)
                patch = np.s_[row * side : (row + 1) * side, col * side : (col + 1) * side]
                assert (reference[camera.name][patch] == pixels[i - age][camera.name][patch]).all()
                seen_ages.add(age)
    assert seen_ages == {0, 1, 2, 3, 4}


def test_growing_keeps_the_visual_slots() -> None:
    cache = VisualKVCache(2, 1, 4, torch.float32, torch.device("cpu"))
    short = TokenLayout.of({"a": (2, 2)}, 1, 2)
    cache.begin(short, 0)
    rows = torch.randn(1, 7, 4)
    for layer in range(2):
        write(cache.keys[layer], 0, rows)
        write(cache.values[layer], torch.arange(7), -rows)
    image = {"a": np.zeros((4, 4, 3), np.uint8)}
    cache.commit(short, image, "go", Decision.dense(4, 2))
    cache.begin(TokenLayout.of({"a": (2, 2)}, 1, 9), 3)
    assert cache.keys.shape[2] == 17
    assert torch.equal(cache.keys[1, :, :7], rows)
    assert torch.equal(cache.values[0, :, :7], -rows)
    assert not cache.warm  # until the frame is committed


def test_the_position_embedding_is_computed_once_per_capacity() -> None:
    backbone = random_vla("tiny")
    session, tables = CachedVLA(backbone, Random(0.5)).session(), []
    for words in ("go", "go", "go to the plate and then come back to where you were", "go"):
        session.act(frame(len(tables), words))
        table = session._cache.rotary
        assert table is not None
        tables.append(table[0].data_ptr())
        with torch.inference_mode():
            expected = backbone.rotary(torch.arange(session._cache.keys.shape[2]))
        assert all(torch.equal(kept, new) for kept, new in zip(table, expected, strict=True))
    assert tables[0] == tables[1] != tables[2] == tables[3]


def test_the_sessions_memory_does_not_depend_on_the_callers_buffers() -> None:
    """A camera driver that writes every frame into the same buffer must not change what the cache remembers."""
    session = CachedVLA(random_vla("tiny"), Random(0.5)).session()
    first = frame(0)
    session.act(first)
    before = {camera: image.copy() for camera, image in session._cache.pixels.items()}
    for image in first.images.values():
        image[...] = 0
    assert all((session._cache.pixels[camera] == image).all() for camera, image in before.items())
