"""Malformed messages: a robot's request is read, or refused by the project's error; memory and time are bounded."""

from __future__ import annotations

import resource
import time
from typing import Any

import msgpack
import numpy as np
import pytest

from lac_vla import Frame, InputError
from lac_vla.client.observation import ObservationKeys
from lac_vla.client.wire import pack, unpack
from tests.fuzz.mutations import HOSTILE, damage

FEW, MANY = 3_000, 100_000
KEYS = ObservationKeys({"agentview": "observation/image", "wrist": "observation/wrist_image"})
REQUEST = {
    **dict.fromkeys(KEYS.cameras.values(), np.zeros((8, 8, 3), np.uint8)),
    "observation/state": np.zeros(8, np.float32),
    "prompt": "pick up the bowl",
    "reset": True,
    "episode_id": 3,
}
GROWTH = 64 * 2**10
"""KiB."""


def malformed(rng: np.random.Generator) -> bytes:
    """A request whose values were exchanged, whose arrays lie, or whose bytes are damaged."""
    plain: dict[Any, Any] = msgpack.unpackb(pack(REQUEST), strict_map_key=False)
    key = [*plain][rng.integers(len(plain))]
    hostile = HOSTILE[rng.integers(len(HOSTILE))]
    match rng.integers(4):
        case 0:
            plain[key] = hostile
        case 1 if isinstance(plain[key], dict):
            inner = [*plain[key]][rng.integers(len(plain[key]))]
            plain[key][inner] = hostile
        case 2:
            plain = {"observation": {name.rpartition("/")[2]: value for name, value in plain.items()}, key: hostile}
    try:
        data = msgpack.packb(plain, unicode_errors="surrogatepass")
    except (OverflowError, TypeError, ValueError):  # numbers that msgpack does not hold
        data = msgpack.packb({str(hostile)[:90]: 1}, unicode_errors="surrogatepass")
    return damage(data, rng) if rng.random() < 0.5 else bytes(data)


def try_malformed(count: int, seed: int) -> tuple[int, int]:
    """Read so many, and count those that were taken and refused."""
    before, taken, slowest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0, 0.0
    longest = 0
    for number in range(count):
        data = malformed(np.random.default_rng([seed, number]))
        began = time.perf_counter()
        try:
            request = unpack(data, wanted=KEYS.wanted)
            assert isinstance(KEYS.frame(request), Frame)
            taken += 1
        except InputError as error:
            longest = max(longest, len(str(error)))
        except Exception as error:
            raise AssertionError(f"number {number} of seed {seed}: {type(error).__name__}") from error
        slowest = max(slowest, time.perf_counter() - began)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GROWTH
    assert slowest < 5
    assert longest < 1000
    return taken, count - taken


def test_some_malformed_messages() -> None:
    taken, refused = try_malformed(FEW, seed=1)
    assert taken
    assert refused


@pytest.mark.slow
def test_many_malformed_messages() -> None:
    try_malformed(MANY, seed=2)
