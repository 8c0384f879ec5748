"""A policy as a short text, for command lines and configs: ``[label@]name[:option=value,option=value]``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from lac_vla.errors import InputError

Value: TypeAlias = float | bool | str

_LABEL = re.compile(r"[\w.+-]+")  # it becomes part of file names


@dataclass(frozen=True)
class PolicySpec:
    """A policy, its options and its label, as a short text gives them.

    Attributes:
        name: The policy, a key of :data:`lac_vla.policies.POLICIES`.
        options: Option → value, as written.
        label: What the method is called in tables; empty for a name made of the rest.
    """

    name: str
    options: Mapping[str, str] = field(default_factory=dict)
    label: str = ""

    @classmethod
    def parse(cls, text: str) -> PolicySpec:
        """Read ``dense``, ``motion:ratio=.7``, ``lac:path=outputs/my-lac`` or ``plain@lac:path=my-lac,recovery=0``.

        Raises:
            InputError: If the text cannot be read.
        """
        head, _, rest = text.partition(":")
        label, labelled, name = head.rpartition("@")
        if labelled and not _LABEL.fullmatch(label):
            raise InputError(f"cannot use {label!r} in {text!r} as a label: use letters, digits and any of . + - _")
        options: dict[str, str] = {}
        for item in filter(None, rest.split(",")):
            key, _, value = (part.strip() for part in item.partition("="))
            if not key or not value or key in options:
                raise InputError(f"cannot read {item!r} in policy {text!r}; write name:option=value,option=value")
            options[key] = value
        return cls(name.strip(), options, label)

    @property
    def values(self) -> dict[str, Value]:
        """Option → value: a float if it reads as a number, a bool for ``true`` and ``false``, else the text."""
        return {key: _value(text) for key, text in self.options.items()}

    @property
    def method(self) -> str:
        """The method's name in records and tables: the label, or e.g. ``motion-0.5``."""
        return self.label or "-".join([self.name, *map(paths_by_name, self.options.values())])


def paths_by_name(text: str) -> str:
    """Write a spec with the last names of its paths alone: results tell nothing about a machine's folders."""
    return re.sub(r"[^:=,]*[/\\]([^:=,/\\]+)[/\\]*", r"\1", text)


def _value(text: str) -> Value:
    if text in ("true", "false"):
        return text == "true"
    try:
        return float(text)
    except ValueError:
        return text
