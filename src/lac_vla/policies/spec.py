"""A policy as a short text, for command lines and configs: ``[label@]name[:option=value,option=value]``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from lac_vla.errors import InputError
from lac_vla.plugins import split_spec

_LABEL = re.compile(r"[\w.+-]+")  # it becomes part of file names


@dataclass(frozen=True)
class PolicySpec:
    """A policy, its options and its label, as a short text gives them.

    Attributes:
        name: The policy: a key of :data:`lac_vla.policies.POLICIES`, a plug-in's name, or ``module:Class``.
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
        label, labelled, spec = text.rpartition("@") if "@" in text.partition(":")[0] else ("", "", text)
        if labelled and not _LABEL.fullmatch(label):
            raise InputError(f"cannot use {label!r} in {text!r} as a label: use letters, digits and any of . + - _")
        name, options = split_spec(spec)
        return cls(name, options, label)

    @property
    def method(self) -> str:
        """The method's name in records and tables: the label, or e.g. ``motion-0.5``."""
        return self.label or "-".join([self.name.rpartition(":")[2], *map(paths_by_name, self.options.values())])


def paths_by_name(text: str) -> str:
    """Write a spec with the last names of its paths alone: results tell nothing about a machine's folders."""
    return re.sub(r"[^:=,]*[/\\]([^:=,/\\]+)[/\\]*", r"\1", text)
