"""What comes over the wire is a message within the limits or a clear error; nothing else can happen."""

from __future__ import annotations

import contextlib
import tracemalloc
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from lac_vla import InputError
from lac_vla.client.wire import MAX_CONTAINERS, MAX_ITEMS, MAX_NESTING, pack, unpack

ARRAY: dict[Any, Any] = {b"__ndarray__": True, b"data": bytes(6), b"dtype": "|u1", b"shape": [2, 3]}

kinds = st.one_of(
    arrays.boolean_dtypes(),
    arrays.integer_dtypes(endianness="?"),
    arrays.unsigned_integer_dtypes(endianness="?"),
    arrays.floating_dtypes(endianness="?", sizes=(16, 32, 64)),
)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=9)
    | st.binary(max_size=9)
    | arrays.arrays(kinds, arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=12,
)


def depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth, inner), default=0)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and (one == other or one != one)


@given(st.dictionaries(st.text(max_size=9), values, max_size=4))
def test_what_is_written_is_read(message: dict[str, Any]) -> None:
    if depth(message) > MAX_NESTING:
        with pytest.raises(InputError, match="nested"):
            unpack(pack(message))
    else:
        assert same(unpack(pack(message)), message)


def test_arrays_can_be_written_to_and_are_not_shared() -> None:
    data = pack({"a": np.arange(6, dtype=np.uint8).reshape(2, 3)})
    one, other = unpack(data)["a"], unpack(data)["a"]
    one[0, 0] = 9
    assert other[0, 0] == 0


def test_scalars_keep_their_type() -> None:
    read = unpack(pack({"x": np.float32(1.5), "n": np.int64(-3), "yes": np.bool_(True)}))
    assert [type(value) for value in read.values()] == [np.float32, np.int64, np.bool_]


@pytest.mark.parametrize("value", [np.array([object()]), np.zeros(2, complex), object(), {1, 2}, 2**65])
def test_what_cannot_be_sent(value: object) -> None:
    with pytest.raises(InputError, match="cannot be sent"):
        pack({"x": value})


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ([1, 2], "is a map"),
        (7, "is a map"),
        ({1: 2}, "protocol"),
        ({b"key": 2}, "keys are texts"),
        ({"x": nested(MAX_NESTING)}, "nested"),
        ({"x": nested(300)}, "nested|containers|maps"),
        ({"x": [1] * (MAX_ITEMS + 1)}, "protocol"),
        ({"x": "a" * 70_000}, "protocol"),
        ({"x": [[]] * 200, "y": [[]] * 200}, f"more than {MAX_CONTAINERS}"),
        ({"x": msgpack.ExtType(3, b"")}, "extension"),
        ({"x": msgpack.Timestamp(1, 0)}, "protocol|Timestamp|extension"),
        (ARRAY, "is a map"),
        ({"x": ARRAY | {b"dtype": "|O"}}, "type"),
        ({"x": ARRAY | {b"dtype": "<c8"}}, "type"),
        ({"x": ARRAY | {b"dtype": "|V6"}}, "type"),
        ({"x": ARRAY | {b"dtype": "u1,u1"}}, "type"),
        ({"x": ARRAY | {b"dtype": 3}}, "type"),
        ({"x": ARRAY | {b"shape": [2, 4]}}, "as many bytes"),
        ({"x": ARRAY | {b"shape": [-2, -3]}}, "shape"),
        ({"x": ARRAY | {b"shape": [True, 6]}}, "shape"),
        ({"x": ARRAY | {b"shape": 6}}, "shape"),
        ({"x": ARRAY | {b"shape": [1, 1, 1, 2, 3]}}, "shape"),
        ({"x": ARRAY | {b"shape": [2**62, 2**62, 0]}}, "as many bytes"),
        ({"x": ARRAY | {b"data": "text"}}, "as many bytes"),
        ({"x": ARRAY | {b"more": 1}}, "an array is a map"),
        ({"x": {b"__ndarray__": True}}, "an array is a map"),
        ({"x": {b"__npgeneric__": True, b"data": "x", b"dtype": "<f4"}}, "scalar"),
        ({"x": {b"__npgeneric__": True, b"data": -1, b"dtype": "|u1"}}, "scalar"),
    ],
)
def test_what_is_refused(message: Any, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        unpack(msgpack.packb(message))


def test_a_key_that_comes_twice_is_refused() -> None:
    with pytest.raises(InputError, match="twice"):
        unpack(b"\x82\xa1a\x01\xa1a\x02")


def test_size_is_checked_first() -> None:
    with pytest.raises(InputError, match="at most 10 are read"):
        unpack(bytes(11), limit=10)


@settings(max_examples=500)
@given(st.binary(max_size=200))
@example(b"\x81\xa1a" + b"\x91" * 5000)
@example(b"\x81\xa1a" + b"\xdd\xff\xff\xff\xff" * 20)
@example(b"\x81" * 3000)
def test_any_bytes_are_a_message_or_an_error(data: bytes) -> None:
    with contextlib.suppress(InputError):
        unpack(data)


@settings(max_examples=300)
@given(st.integers(0, 400), st.integers(0, 255), st.integers(0, 400))
def test_a_damaged_message_is_a_message_or_an_error(at: int, byte: int, length: int) -> None:
    data = bytearray(pack({"image": np.zeros((8, 8, 3), np.uint8), "prompt": "go", "n": np.float32(1)}))
    data[at % len(data)] = byte
    for version in (bytes(data), bytes(data[:length])):
        with contextlib.suppress(InputError):
            unpack(version)


@pytest.mark.parametrize(
    "bomb",
    [
        b"\x81\xa1a" + b"\xdc\x01\x00" * 500,  # lists that promise 256 entries, one in the other
        b"\x81\xa1a\xdd\x00\x80\x00\x00" + b"\x90" * 2**20,  # millions of empty lists
        b"\x81\xa1a\xdc\x01\x00" + (b"\xdc\x01\x00" + b"\x90" * 256) * 256,
        b"\x81\xa1a\xc6\xff\xff\xff\xff" + bytes(100),  # bytes that do not come
    ],
)
def test_a_bomb_costs_no_memory(bomb: bytes) -> None:
    tracemalloc.start()
    with pytest.raises(InputError):
        unpack(bomb)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * 2**20 + len(bomb)
