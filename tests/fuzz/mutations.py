"""Damage: to bytes, as disks and downloads do it, and to values, as other people's programs do."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np

HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 2**31, 2**63, -(2**63), 10**30, 0.0, 0.5, -1.5, 1e-300, 1e308),
    *(float("nan"), float("inf"), "", "4", "x" * 300, "\ud800", "../../x", "{a}", "\x00", [], [[]], {}, {"a": {}}),
    *([0], [1, 2, 3], ["a"], [None], [1e400], [[1, 2], [3]], [{}], {"": None}),
)


def damage(data: bytes, rng: np.random.Generator) -> bytes:
    """Change a file as damage does: bits flip, ends are lost, pieces are zeroed, repeated, exchanged or taken out."""
    found = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        size = len(found)
        at, other = (int(place) for place in rng.integers(0, max(1, size), 2))
        length = int(2 ** rng.uniform(0, 10))
        match rng.integers(7):
            case 0 if size:
                found[at] ^= 1 << int(rng.integers(8))
            case 1 if size:
                found[at] = int(rng.integers(256))
            case 2:
                del found[at:]
            case 3:
                found[at : at + length] = bytes(len(found[at : at + length]))
            case 4:
                found[at:at] = found[other : other + length]
            case 5:
                found[at : at + length] = found[other : other + length]
            case 6:
                del found[at : at + length]
    return bytes(found)


def change(value: Any, rng: np.random.Generator) -> Any:
    """Change one value somewhere within plain data: another takes its place, it goes, comes twice, or is wrapped."""
    value = copy.deepcopy(value)
    inner = value
    while True:
        keys = list(inner) if isinstance(inner, dict) else list(range(len(inner))) if isinstance(inner, list) else []
        if not keys:
            return HOSTILE[rng.integers(len(HOSTILE))]
        key = keys[rng.integers(len(keys))]
        if isinstance(inner[key], dict | list) and inner[key] and rng.random() < 0.8:
            inner = inner[key]
            continue
        match rng.integers(6):
            case 0:
                del inner[key]
            case 1:
                inner[key] = [inner[key]]
            case 2 if isinstance(inner, dict):
                inner[key] = inner[keys[rng.integers(len(keys))]]
            case _:
                inner[key] = HOSTILE[rng.integers(len(HOSTILE))]
        return value


def mutate(data: bytes, name: str, rng: np.random.Generator) -> bytes:
    """Damage a file of some name; JSON's values as often as its bytes."""
    if rng.random() < 0.6:
        lines = data.split(b"\n") if name.endswith(".jsonl") else [data]
        if name.endswith((".json", ".jsonl")) and lines:
            at = rng.integers(max(1, len(lines) - name.endswith(".jsonl")))
            lines[at] = json.dumps(change(json.loads(lines[at]), rng)).encode()
            return b"\n".join(lines)
    return damage(data, rng)
