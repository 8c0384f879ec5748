"""Plug-ins: policies, models and benchmarks that other packages add, by entry points or as ``module:name``.

A package announces them in its ``pyproject.toml``, e.g. ``[project.entry-points."lac_vla.policies"]``,
``blink = "my_package.blink:Blink"``. What no package announces is given as ``my_module:Blink``.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeAlias, get_type_hints

from lac_vla.checks import fits, shortened
from lac_vla.errors import InputError, did_you_mean

POLICIES, MODELS, BENCHMARKS = "lac_vla.policies", "lac_vla.models", "lac_vla.benchmarks"
"""Groups of entry points."""
Value: TypeAlias = float | bool | str
OBJECT = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def split_spec(text: str) -> tuple[str, dict[str, str]]:
    """Take ``name:option=value,option=value`` apart; a name may be ``module:name``.

    Returns:
        The name; option → value, as written.

    Raises:
        InputError: If the text cannot be read.
    """
    found = re.match(rf"({OBJECT.pattern})(?::|$)", text)
    name, rest = (found[1], text[found.end() :]) if found else text.partition(":")[::2]
    options: dict[str, str] = {}
    for item in filter(None, rest.split(",")):
        key, _, value = (part.strip() for part in item.partition("="))
        if not key or not value or key in options:
            raise InputError(f"cannot read {item!r} in {text!r}; write name:option=value,option=value")
        options[key] = value
    return name.strip(), options


def read_value(text: str) -> Value:
    """Read a value: a float if it reads as a number, a bool for ``true`` and ``false``, else the text."""
    if text in ("true", "false"):
        return text == "true"
    try:
        return float(text)
    except ValueError:
        return text


def announced(group: str) -> dict[str, EntryPoint]:
    """Find what installed packages announce in a group: name → entry point, not loaded yet."""
    return {point.name: point for point in entry_points(group=group)}


def find_plugin(group: str, name: str) -> Any:
    """Load a plug-in by the name that a package announces, or by ``module:name``.

    Returns:
        What it names; ``None`` if no package announces it, and it is no ``module:name``.

    Raises:
        InputError: If there is no such module, or nothing that can be called of that name in it.
    """
    if OBJECT.fullmatch(name):
        found = _load(name)
    elif (point := announced(group).get(name)) is not None:
        found = point.load()
    else:
        return None
    if not callable(found):
        raise InputError(f"{name!r} is a {type(found).__name__}; give a class or a function")
    return found


def _load(text: str) -> Any:
    """Load ``module:name``; the module may be a file of the current folder."""
    module, _, name = text.partition(":")
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # a module that this one needs
        raise InputError(
            f"{text!r}: there is no module {module!r}; give one that Python finds, or {module.split('.')[0]}.py here"
        ) from error
    if not hasattr(loaded, name):
        known = [key for key in vars(loaded) if not key.startswith("_")]
        raise InputError(f"{text!r}: {module} has no {name!r}{did_you_mean(name, known)}")
    return getattr(loaded, name)


def options_of(factory: Callable[..., Any], given: Collection[str] = ()) -> dict[str, inspect.Parameter]:
    """List the options of a factory by name, without those that are ``given`` to it in any case."""
    parameters = inspect.signature(factory).parameters
    return {name: each for name, each in parameters.items() if each.kind != each.VAR_KEYWORD and name not in given}


def make(what: str, factory: Callable[..., Any], options: Mapping[str, Any], **given: Any) -> Any:
    """Call a factory with options that a user wrote; they are compared with its signature first.

    Args:
        what: What it makes, for errors, e.g. ``policy 'motion'``.
        factory: A class or a function.
        options: Option → value, or its text.
        given: Arguments that are no options.

    Raises:
        InputError: If an option is unknown, missing, or of another type than the factory's annotation.
    """
    known = options_of(factory, given)
    for name in options:
        if name not in known:
            there = f"its options are {', '.join(known)}" if known else "it has none"
            raise InputError(f"{what} has no option {name!r}{did_you_mean(name, known)}; {there}")
    if missing := [name for name, each in known.items() if each.default is each.empty and name not in options]:
        raise InputError(
            f"{what} needs the option {missing[0]!r}: write {missing[0]}=VALUE behind its name and a colon"
        )
    kinds = _annotations(factory)
    read = {name: _fitting(what, name, value, kinds.get(name, Any)) for name, value in options.items()}
    return factory(**read, **given)


def _annotations(factory: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(factory.__init__ if inspect.isclass(factory) else factory)
    except Exception:  # names that exist for a type checker alone
        return {}


def _fitting(what: str, name: str, value: Any, kind: Any) -> Any:
    """Read a text as the annotation says; what is no text is taken as it is if it fits."""
    read = read_value(value) if isinstance(value, str) else value
    whole = int(read) if isinstance(read, float) and read.is_integer() else read
    for candidate in (read, whole, value):
        if fits(candidate, kind):
            return candidate
    expected = "a number" if fits(0.5, kind) else getattr(kind, "__name__", str(kind))
    raise InputError(f"{what}: {name} is {shortened(value)}; it must be {expected}")
