"""``lac policies`` and ``lac models``: what there is, with its options.

Without postponed annotations: tyro reads them.
"""

import inspect
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tyro

from lac_vla import plugins
from lac_vla.bundled import BUNDLED
from lac_vla.cli.docs import items, plain, summary
from lac_vla.errors import LacError
from lac_vla.models import FAMILIES
from lac_vla.policies import POLICIES, LACPolicy, find_policy


def policies(name: tyro.conf.Positional[str] = "") -> None:
    """List the caching policies, with the options that stand behind their names: motion:ratio=0.7,keep=wrist.

    Args:
        name: Only this one: a policy's name, or module:Class.
    """
    names = [name] if name else [*POLICIES, *sorted(plugins.announced(plugins.POLICIES))]
    for each in names:
        print("\n".join(_policy(each, find_policy) if name else _careful(_policy, each, find_policy)))
    if not name:
        print("\nlac alone is the policy that comes with the model; module:Class is one of your own.")


def models() -> None:
    """List the models: bundled, with random weights, of known families, and plug-ins."""
    print("bundled (--model NAME):")
    for name, folder in BUNDLED.items():
        print("\n".join(_wrapped(_about(folder), f"  {name:<14}", " " * 16)))
    print("\nread from a folder or the hub (--model FOLDER, --model owner/name), by model_type")
    print("in config.json; presets of random weights (--random-weights NAME):")
    for name, family in FAMILIES.items():
        print("\n".join(_wrapped(", ".join(family.presets), f"  {name:<14}", " " * 16)))
    found = sorted(plugins.announced(plugins.MODELS))
    print("\nplug-ins (--model NAME:option=value); module:function is one of your own:")
    for name in found:
        print("\n".join(_careful(_model, name, plugins.find_plugin)))
    if not found:
        print("  none is installed")


def _careful(entry: Callable[..., Iterator[str]], name: str, *find: Any) -> list[str]:
    """List a plug-in, or what is wrong with it: one that is broken hides no other."""
    try:
        return list(entry(name, *find))
    except (LacError, ImportError, AttributeError) as error:
        return [f"{name}: cannot be loaded: {error}"]


def _policy(name: str, find: Callable[[str], Any]) -> Iterator[str]:
    factory = find(name)
    yield from _entry(name, LACPolicy if name == "lac" else factory, factory)


def _model(name: str, find: Callable[[str, str], Any]) -> Iterator[str]:
    factory = find(plugins.MODELS, name)
    yield from _entry(name, factory, factory, ("device", "dtype"))


def _entry(name: str, told: Any, factory: Any, given: tuple[str, ...] = ()) -> Iterator[str]:
    """Write a name, what it is, and its options with their defaults."""
    yield from _wrapped(summary(told.__doc__), f"{name:<10} ", " " * 11)
    texts = items(factory.__doc__) | items(told.__doc__)
    for option, parameter in plugins.options_of(factory, given).items():
        default = "" if parameter.default is inspect.Parameter.empty else f"={parameter.default}"
        text = texts.get(option, "")
        yield from _wrapped(f"{option}{default}  {text}", " " * 11, " " * 15)


def _wrapped(text: str, first: str, indent: str) -> list[str]:
    lines = textwrap.wrap(text, 80, initial_indent=first, subsequent_indent=indent, break_long_words=False)
    return lines or [first.rstrip()]  # nothing is said of it, and it is there all the same


def _about(folder: Path) -> str:
    """Return the first sentence of a bundled model's card."""
    _, _, text = (folder / "README.md").read_text(encoding="utf-8").partition("\n# ")
    return plain(text.split("\n\n")[1]).split(". ")[0] + "."
