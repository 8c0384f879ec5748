"""Messages in openpi's format: msgpack, with arrays as maps; read with strict limits, never unpickled.

The memory that a message can cost is bounded before it is spent: containers are counted while they are read, and an
array's bytes must be there before an array is made of them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from lac_vla.errors import InputError, MissingExtraError

try:
    import msgpack
except ModuleNotFoundError as error:
    raise MissingExtraError("serve", "Serving") from error

MAX_MESSAGE = 8 * 2**20
"""Bytes of a message; openpi's for LIBERO has 0.3 MB."""
REFUSED = "refused: "
"""So begins a text that answers a request that cannot be used; the session goes on. Behind any other it is over."""
MAX_TEXT = 64 * 2**10
"""Bytes of one text."""
MAX_ITEMS = 256
"""Entries of one map or list."""
MAX_CONTAINERS = 256
"""Maps and lists in one message."""
MAX_NESTING, MAX_DIMS, MAX_SIDE = 8, 4, 2**31
DTYPES = frozenset(["b1", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8"])
"""Kind and bytes of array elements, in either byte order."""

_MAPS = {bytes([first]) for first in (*range(0x80, 0x90), 0xDE, 0xDF)}
"""First bytes of maps."""
_ARRAY, _SCALAR = b"__ndarray__", b"__npgeneric__"
_SCALARS = (bool, int, float, str, bytes, np.generic, np.ndarray, type(None))


def pack(message: Mapping[str, Any]) -> bytes:
    """Write a message.

    Raises:
        InputError: If it holds something that the protocol cannot express.
    """
    try:
        return bytes(msgpack.packb(message, default=_from_numpy))
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"this message cannot be sent: {error}") from error


def unpack(data: bytes, limit: int = MAX_MESSAGE, wanted: Collection[str] | None = None) -> dict[str, Any]:
    """Read a message: a map whose keys are texts. Its arrays are the receiver's own, and can be written to.

    Args:
        data: The message's bytes.
        limit: Bytes that it may have.
        wanted: The keys that are read, or the ways to them through maps within the message, ``a/b``; all else may be
            anything, and is ``None``. By default everything is read.

    Raises:
        InputError: If it is too long, or no such message, or exceeds one of this module's limits.
    """
    if len(data) > limit:
        raise InputError(f"a message of {len(data)} bytes; at most {limit} are read: send smaller images")
    reader = _Reader()
    try:
        unpacker = msgpack.Unpacker(
            object_pairs_hook=reader.map,
            list_hook=reader.list,
            ext_hook=_refuse_extension,
            max_buffer_size=max(1, len(data)),
            max_str_len=MAX_TEXT,
            max_bin_len=limit,
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_ITEMS,
            max_ext_len=0,
        )
        unpacker.feed(data)
        message = unpacker.unpack() if wanted is None else _read_wanted(unpacker, data, wanted)
        if unpacker.tell() != len(data):
            raise ValueError("more than one message")
    except InputError:
        raise
    except Exception as error:  # msgpack's own errors are of many kinds
        raise InputError(f"not a message of openpi's protocol ({type(error).__name__}: {error!s:.200})") from error
    if type(message) is not dict:
        raise InputError(f"a message is a map; this is a {type(message).__name__}")
    _check(message, 1)
    return message


class _Reader:
    """Counts the containers of one message, and makes arrays of the maps that are meant to be some."""

    def __init__(self) -> None:
        self.containers = 0

    def map(self, pairs: list[tuple[Any, Any]]) -> Any:
        self._count()
        found = dict(pairs)
        if len(found) < len(pairs):
            raise InputError("a map has the same key twice")
        if _ARRAY in found:
            return _array(found)
        return _scalar(found) if _SCALAR in found else found

    def list(self, items: list[Any]) -> list[Any]:
        self._count()
        return items

    def _count(self) -> None:
        self.containers += 1
        if self.containers > MAX_CONTAINERS:
            raise InputError(f"a message has more than {MAX_CONTAINERS} maps and lists; send numbers as arrays")


def _read_wanted(unpacker: Any, data: bytes, wanted: Collection[str], way: str = "") -> dict[str, Any]:
    """Read the wanted values of a map, and skip all others, which costs no memory."""
    found: dict[str, Any] = {}
    count = unpacker.read_map_header()
    if count > MAX_ITEMS:
        raise InputError(f"a map has {count} keys; at most {MAX_ITEMS} are read")
    for _ in range(count):
        key = unpacker.unpack()
        if key in found if isinstance(key, str) else way == "":
            raise InputError("a map has the same key twice" if isinstance(key, str) else "a map's keys are texts")
        leads = isinstance(key, str) and any(path.startswith(f"{way}{key}/") for path in wanted)
        if isinstance(key, str) and way + key in wanted:
            found[key] = unpacker.unpack()
        elif leads and data[unpacker.tell() : unpacker.tell() + 1] in _MAPS:
            found[key] = _read_wanted(unpacker, data, wanted, f"{way}{key}/")
        else:
            unpacker.skip()
            if isinstance(key, str):
                found[key] = None
    return found


def _check(value: Any, depth: int) -> None:
    """Refuse what is nested too deeply, and keys and values that are none of the protocol's."""
    if isinstance(value, _SCALARS):
        return
    if depth > MAX_NESTING:
        raise InputError(f"a message is nested more than {MAX_NESTING} deep")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise InputError(f"a map has the key {key!r:.40}; keys are texts")
            _check(item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check(item, depth + 1)
    else:
        raise InputError(f"a message holds a {type(value).__name__}; send numbers, texts, arrays, maps and lists")


def _array(found: dict[Any, Any]) -> np.ndarray[Any, Any]:
    if set(found) != {_ARRAY, b"data", b"dtype", b"shape"} or found[_ARRAY] is not True:
        raise InputError("an array is a map of __ndarray__: true, data, dtype and shape")
    data, shape, dtype = found[b"data"], found[b"shape"], _dtype(found[b"dtype"])
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(type(n) is int and n >= 0 for n in shape):
        raise InputError(f"an array has the shape {shape!r:.60}; give at most {MAX_DIMS} sizes")
    if (
        not isinstance(data, bytes)
        or len(data) != math.prod(shape) * dtype.itemsize
        or max(shape, default=0) > MAX_SIDE
    ):
        raise InputError(f"an array of shape {shape} and type {dtype.str} does not have as many bytes as it should")
    return np.ndarray(shape, dtype, bytearray(data))


def _scalar(found: dict[Any, Any]) -> np.generic:
    value = found.get(b"data")
    if set(found) != {_SCALAR, b"data", b"dtype"} or not isinstance(value, bool | int | float):
        raise InputError("a numpy scalar is a map of __npgeneric__: true, data (a number) and dtype")
    dtype = _dtype(found[b"dtype"])
    try:
        if dtype.kind in "iu" and not (isinstance(value, int) and np.iinfo(dtype).min <= value <= np.iinfo(dtype).max):
            raise OverflowError
        with np.errstate(over="ignore"):
            scalar: np.generic = dtype.type(value)
    except OverflowError as error:
        raise InputError(f"a numpy scalar is {value}, which {dtype} does not hold") from error
    return scalar


def _dtype(text: object) -> np.dtype[Any]:
    if not isinstance(text, str) or text[:1] not in "|<>=" or text[1:] not in DTYPES:
        raise InputError(f"an array has the type {text!r:.40}; send one of {sorted(DTYPES)}, e.g. '|u1'")
    return np.dtype(text)


def _refuse_extension(code: int, data: bytes) -> Any:
    raise InputError(f"a message holds an extension of type {code}; there are none in this protocol")


def _from_numpy(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind not in "biuf":
        raise TypeError(f"arrays of {value.dtype} are not sent")
    if isinstance(value, np.ndarray):
        return {_ARRAY: True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    if isinstance(value, np.generic):
        return {_SCALAR: True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(f"a {type(value).__name__} cannot be sent")
