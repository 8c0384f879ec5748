"""Checks of values from outside: whole numbers, the fields of configurations, devices, types of weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from operator import index
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

from lac_vla.errors import InputError

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
LONGEST_AGE = 10_000
"""The largest maximum age, frames: many minutes, and what is kept per frame of age stays small."""


def check_whole(name: str, value: Any, low: int, high: int) -> None:
    """Refuse what is not a whole number from ``low`` to ``high``.

    Raises:
        InputError: If it is not.
    """
    try:
        fits = low <= index(value) <= high
    except TypeError:
        fits = False
    if not fits:
        raise InputError(f"{name} is {shortened(value)}; give a whole number, at least {low} and at most {high}")


def check_fields(config: Any, error: type[ValueError] = InputError) -> None:
    """Compare the fields of a dataclass with their annotations; numbers must be finite, texts writable as UTF-8.

    Raises:
        error: If a value is of another type.
    """
    kinds = get_type_hints(type(config))
    for field in fields(config):
        value = getattr(config, field.name)
        if not fits(value, kinds[field.name]):
            raise error(f"{type(config).__name__}: {field.name} is {shortened(value)}; it must be {field.type}")


def shortened(value: Any) -> str:
    """Write a value from outside, however long it is, in at most 80 characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, or lists in lists in lists
        text = "more than can be shown"
    return text if len(text) <= 80 else text[:79] + "…"


def is_text(value: Any) -> bool:
    """Tell whether a value is a text that can be written: one without lone surrogates."""
    return isinstance(value, str) and (value.isascii() or not any("\ud800" <= sign <= "\udfff" for sign in value))


def fits(value: Any, kind: Any) -> bool:
    """Tell whether a value is what an annotation says; numbers must be finite, texts writable as UTF-8."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin in (Union, UnionType):
        return any(fits(value, each) for each in inner)
    if origin is Literal:
        return any(type(value) is type(each) and value == each for each in inner)
    if origin is tuple:
        kinds = [inner[0]] * len(value) if isinstance(value, tuple) and inner[-1] is ... else inner
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(fits, value, kinds))
    if origin is Mapping or (isinstance(origin, type) and issubclass(origin, Mapping)):
        return isinstance(value, Mapping) and all(fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items())
    if kind in (int, float):
        whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
        return whole or (kind is float and isinstance(value, float) and math.isfinite(value))
    return is_text(value) if kind is str else isinstance(value, kind)


def check_device(device: torch.device | str, *, meta: bool = False) -> torch.device:
    """Find a device that models run on.

    Args:
        device: Its name.
        meta: Whether ``meta``, shapes without memory, is one.

    Raises:
        InputError: If there is no such device here, or models do not run on it.
    """
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"unknown device {device!r}: give cpu or cuda") from error
    if found.type == "cuda":
        if not torch.cuda.is_available():
            raise InputError("torch sees no CUDA device here: give cpu, or install a CUDA build of torch")
        if (found.index or 0) >= torch.cuda.device_count():
            raise InputError(f"there is no {found}: torch sees {torch.cuda.device_count()} CUDA device(s) here")
    elif (found.type != "cpu" or found.index) and not (meta and found.type == "meta"):
        raise InputError(f"models do not run on the device {str(device)!r}: give cpu or cuda")
    return torch.device("cpu") if found.type == "cpu" else found  # safetensors knows no cpu:0


def find_dtype(dtype: torch.dtype | str, device: torch.device) -> torch.dtype:
    """Find the type of weights by its name; ``"auto"`` for bfloat16 on a GPU and float32 elsewhere.

    Raises:
        InputError: If models do not compute in it.
    """
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    found = DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if found not in (*DTYPES.values(), torch.float64):
        raise InputError(f"dtype {dtype!r}: give 'auto', 'float32', 'bfloat16' or 'float16', or a torch.dtype")
    return found
