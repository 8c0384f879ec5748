"""The help: plain text in the terminal's width, an example first, then what most need, then all the rest."""

from __future__ import annotations

import inspect
import shutil
import textwrap
import types
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from lac_vla.cli.docs import items, preamble
from lac_vla.cli.verbs import GROUPS, VERBS

WORDS = {"str": "TEXT", "int": "N", "float": "X", "Path": "PATH"}


@dataclass(frozen=True)
class Option:
    """An option of a verb.

    Attributes:
        name: Of its field.
        kind: Its annotation, without marks.
        default: Its value if it is not given; ``MISSING`` if it must be.
        text: What it means.
        positional: Whether it is given without its name.
    """

    name: str
    kind: Any
    default: Any
    text: str
    positional: bool = False

    @property
    def flag(self) -> str:
        """Write it as one types it."""
        return self.name if self.positional else f"--{self.name.replace('_', '-')}"

    @property
    def required(self) -> bool:
        """True if it must be given."""
        return self.default is MISSING

    @property
    def value(self) -> str:
        """Write what stands behind it, e.g. ``PATH``; nothing behind a switch."""
        return "" if self.kind is bool else _value(self.kind)

    @property
    def shown_default(self) -> str:
        """Write what it is if it is not given; nothing where the text has to say it."""
        if self.required:
            return "required" if not self.positional else ""
        if self.default in (None, (), "", False):
            return ""
        parts = self.default if isinstance(self.default, tuple) else (self.default,)
        return "default: " + " ".join(f"{part:g}" if isinstance(part, float) else str(part) for part in parts)


def options_of(function: Callable[..., Any]) -> list[Option]:
    """List the options of a verb's function, those of its settings included."""
    texts = items(function.__doc__)
    found: list[Option] = []
    for name, parameter in inspect.signature(function).parameters.items():
        default = MISSING if parameter.default is parameter.empty else parameter.default
        found += _options(name, parameter.annotation, default, texts.get(name, ""))
    return found


def _options(name: str, kind: Any, default: Any, text: str) -> Iterator[Option]:
    marks: tuple[Any, ...] = ()
    if get_origin(kind) is Annotated:
        kind, *rest = get_args(kind)
        marks = tuple(rest)
    if not is_dataclass(kind) or not isinstance(kind, type):
        yield Option(name, kind, default, text, any("positional" in repr(mark).lower() for mark in marks))
        return
    hints, texts = get_type_hints(kind, include_extras=True), _texts(kind)
    for field in fields(kind):
        value = field.default if field.default_factory is MISSING else field.default_factory()
        yield from _options(field.name, hints[field.name], value, texts.get(field.name, ""))


def _texts(kind: type) -> dict[str, str]:
    """Read what a class, and those it inherits, say of their fields."""
    return {name: text for base in reversed(kind.__mro__) for name, text in items(base.__doc__).items()}


def option_names(function: Callable[..., Any]) -> list[str]:
    """List all options as one types them."""
    named = [option for option in options_of(function) if not option.positional]
    return [flag for option in named for flag in (option.flag, *_negated(option))]


def _negated(option: Option) -> list[str]:
    return [f"--no-{option.flag[2:]}"] if option.kind is bool else []


def _value(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _value(inner[0])
    if origin is Literal:
        return "|".join(map(str, inner))
    if origin in (Union, types.UnionType):
        return _value(next(each for each in inner if each is not type(None)))
    if origin is tuple:
        return f"{_value(inner[0])} …" if inner[-1] is ... else " ".join(map(_value, inner))
    return WORDS.get(getattr(kind, "__name__", ""), "VALUE")


def overview() -> str:
    """Write the help of ``lac`` itself."""
    lines = [
        "usage: lac VERB [options]",
        "",
        *_wrapped("Visual token caching for Vision-Language-Action policies.", ""),
    ]
    for group in GROUPS:
        lines += ["", f"{group}:"]
        for name, verb in VERBS.items():
            if verb.group == group:
                lines += _wrapped(verb.summary, " " * 13, f"  {name:<11}")
    lines += [
        "",
        *_wrapped("lac VERB --help explains a verb; lac --version tells the version. Start with: lac demo", ""),
    ]
    return "\n".join(lines)


def verb_help(name: str, function: Callable[..., Any]) -> str:
    """Write the help of a verb."""
    verb, options = VERBS[name], options_of(function)
    needed = [option for option in options if option.required or option.positional]
    call = [option.flag.upper() if option.positional else f"{option.flag} {option.value}" for option in needed]
    lines = _wrapped(" ".join(["lac", name, *call, "[options]"]), " " * 11, "usage: ")
    for paragraph in preamble(function.__doc__):
        lines += ["", *_wrapped(paragraph, "")]
    lines += ["", "example:", f"  {verb.example}"]
    basic = [option for option in options if option.required or option.positional or option.name in verb.basic]
    for title, part in (("options", basic), ("advanced options", [each for each in options if each not in basic])):
        if part:
            lines += ["", f"{title}:"]
        for option in part:
            flag = ", ".join([option.flag, *_negated(option)])
            tail = f" ({option.shown_default})" if option.shown_default else ""
            lines += [f"  {flag} {option.value}".rstrip(), *_wrapped(f"{option.text}{tail}", " " * 6, " " * 6)]
    return "\n".join(lines)


def _wrapped(text: str, indent: str, first: str = "") -> list[str]:
    width = min(100, max(40, shutil.get_terminal_size((80, 24)).columns))
    return textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
