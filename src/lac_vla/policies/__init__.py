"""Caching policies, one file each. ``make_policy("motion", ratio=0.5)`` builds one by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lac_vla.errors import InputError
from lac_vla.policies.base import CachePolicy, cache_lowest
from lac_vla.policies.dense import Dense
from lac_vla.policies.motion import Motion
from lac_vla.policies.random import Random

POLICIES: dict[str, Callable[..., CachePolicy]] = {"dense": Dense, "random": Random, "motion": Motion}
"""Name → factory; the keyword arguments are the policy's fields."""


def make_policy(name: str, **options: Any) -> CachePolicy:
    """Build a policy by its name.

    Args:
        name: A key of :data:`POLICIES`.
        **options: The policy's hyper-parameters.

    Raises:
        InputError: If the name or an option is unknown.
    """
    if name not in POLICIES:
        raise InputError(f"unknown policy {name!r}; choose one of {sorted(POLICIES)}")
    try:
        return POLICIES[name](**options)
    except TypeError as error:
        raise InputError(f"policy {name!r} does not take {sorted(options)}: {error}") from error


def parse_policy(spec: str) -> CachePolicy:
    """Build a policy from a short text: ``dense``, ``motion``, ``motion:ratio=0.7``, ``random:ratio=.5``.

    Raises:
        InputError: If the text cannot be read.
    """
    name, _, rest = spec.partition(":")
    options: dict[str, float] = {}
    for item in filter(None, rest.split(",")):
        key, separator, value = item.partition("=")
        try:
            options[key.strip()] = float(value)
        except ValueError:
            separator = ""
        if not separator:
            raise InputError(f"cannot read {item!r} in policy {spec!r}; write name:option=number,option=number")
    return make_policy(name, **options)


__all__ = ["POLICIES", "CachePolicy", "Dense", "Motion", "Random", "cache_lowest", "make_policy", "parse_policy"]
