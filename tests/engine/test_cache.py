"""What the cache says about its slots is true: their age, and their pixels; and regions of one pool stay apart."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lac_vla import CachedVLA, Random, random_vla
from lac_vla.engine.kv_cache import Region, SlotCache
from lac_vla.engine.layers import Segment
from tests.engine.scenes import frame


def test_every_slot_shows_the_pixels_of_the_frame_it_was_computed_in() -> None:
    session = CachedVLA(random_vla("tiny"), Random(0.6), max_age=4).session(seed=2)
    pixels = []
    seen_ages = set()
    for i in range(10):
        session.act(frame(i))
        step = session.last_info
        assert step is not None
        pixels.append(step.pixels)
        reference = session.memory.reference
        for camera in step.layout.cameras:
            side = pixels[i][camera.name].shape[0] // camera.rows
            for token in range(camera.size):
                age = int(step.age[camera.start + token])
                row, col = divmod(token, camera.cols)
                patch = (slice(row * side, (row + 1) * side), slice(col * side, (col + 1) * side))
                assert (reference[camera.name][patch] == pixels[i - age][camera.name][patch]).all()
                seen_ages.add(age)
    assert seen_ages == {0, 1, 2, 3, 4}


def cache(layers: int = 2) -> SlotCache:
    return SlotCache(layers, 1, 4, torch.float32, torch.device("cpu"))


def fill(store: SlotCache, region: Region, value: float) -> None:
    rows = torch.full((1, region.size, 4), value)
    for layer in range(len(store.keys)):
        store.update(layer, Segment(region.size, region.start, region.size, region.start, region.size), rows, -rows)


def held(store: SlotCache, region: Region) -> list[float]:
    own = slice(region.start, region.start + region.size)
    assert torch.equal(store.keys[:, :, own], -store.values[:, :, own])
    return store.keys[0, 0, own, 0].tolist()


@pytest.mark.parametrize("scattered", [False, True])
def test_rows_are_written_into_their_slots_and_seen_with_the_others(scattered: bool) -> None:
    store, other, region = cache(), Region(), Region()
    store.reserve(other, 3)
    store.reserve(region, 6)
    fill(store, other, 9)
    fill(store, region, 1)
    rows = torch.full((1, 2, 4), 5.0)
    places = torch.tensor([4, 6]) if scattered else 4
    slots = torch.tensor([0, 1, 3]) if scattered else None
    keys, values = store.update(1, Segment(2, places, 5, 3, 6, slots), rows, -rows)
    assert keys[0, :, 0].tolist() == ([1, 5, 5] if scattered else [1, 5, 5, 1, 1])
    assert torch.equal(values, -keys)
    assert held(store, other) == [9, 9, 9]


def test_a_growing_region_keeps_its_slots_and_zeroes_the_new_ones() -> None:
    store, one, other = cache(), Region(), Region()
    store.reserve(one, 2)
    fill(store, one, 1)
    store.reserve(one, 3)  # at the end of the pool: it grows in place
    assert (one.start, held(store, one)) == (0, [1, 1, 0])
    store.reserve(other, 2)
    fill(store, other, 2)
    store.reserve(one, 5)  # it has to move
    assert held(store, one) == [1, 1, 0, 0, 0]
    assert held(store, other) == [2, 2]
    third = Region()
    store.reserve(third, 3)  # into the hole that was left
    assert (third.start, store.keys.shape[2]) == (0, 10)
    assert held(store, third) == [0, 0, 0]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 20)), max_size=60))
def test_regions_never_overlap_and_never_change_each_other(steps: list[tuple[int, int]]) -> None:
    """Sessions come, grow and go in any order; what each wrote stays, and no slot is lost."""
    store, regions, values = cache(1), [Region() for _ in range(5)], [0.0] * 5
    for number, (which, size) in enumerate(steps, start=1):
        region = regions[which]
        if region.size and size > 15:
            store.release(region)
            regions[which] = Region()
        else:
            store.reserve(region, size)
            values[which] = float(number)
            fill(store, region, values[which])
        alive = [(own, value) for own, value in zip(regions, values, strict=True) if own.size]
        for own, value in alive:
            assert held(store, own) == [value] * own.size
        free = sum(hole.size for hole in store._free)
        assert free + sum(own.size for own, _ in alive) == store.keys.shape[2]


def test_a_session_that_is_gone_leaves_its_region() -> None:
    vla = CachedVLA(random_vla("tiny"), Random(0.5))
    for i in range(4):
        session = vla.session()
        session.act(frame(i))
        size = vla.engine.store.keys.shape[2]
        assert size == session._region.size
        del session
        gc.collect()


def test_the_position_embedding_is_computed_once_per_capacity() -> None:
    vla = random_vla("tiny")
    session, tables = CachedVLA(vla, Random(0.5)).session(), []
    for words in ("go", "go", "go to the plate and then come back to where you were", "go"):
        session.act(frame(len(tables), words))
        table = session.engine._rotary[id(vla.decoder)][1]
        tables.append(table[0].data_ptr())
        with torch.inference_mode():
            expected = vla.decoder.rotary(torch.arange(len(table[0])))
        assert len(table[0]) >= session._region.size
        assert all(torch.equal(kept, new) for kept, new in zip(table, expected, strict=True))
    assert tables[0] == tables[1] != tables[2] == tables[3]


def test_the_sessions_memory_does_not_depend_on_the_callers_buffers() -> None:
    """A camera driver that writes every frame into the same buffer must not change what the cache remembers."""
    session = CachedVLA(random_vla("tiny"), Random(0.5)).session()
    first = frame(0)
    session.act(first)
    before = {camera: image.copy() for camera, image in session.memory.pixels.items()}
    for image in first.images.values():
        image[...] = 0
    assert all((session.memory.pixels[camera] == image).all() for camera, image in before.items())
