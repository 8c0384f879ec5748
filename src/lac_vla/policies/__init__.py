"""Caching policies, one file each. ``make_policy("motion", ratio=0.5)`` builds one by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lac_vla import plugins
from lac_vla.errors import InputError, did_you_mean
from lac_vla.policies.base import CachePolicy, cache_lowest
from lac_vla.policies.dense import Dense
from lac_vla.policies.fastv import FastV
from lac_vla.policies.lac import LACConfig, LACPolicy
from lac_vla.policies.motion import Motion
from lac_vla.policies.periodic import Periodic
from lac_vla.policies.random import Random
from lac_vla.policies.sparse_vlm import SparseVLM
from lac_vla.policies.spec import PolicySpec, paths_by_name
from lac_vla.policies.vla_cache import VLACache

POLICIES: dict[str, Callable[..., CachePolicy]] = {
    "dense": Dense,
    "random": Random,
    "motion": Motion,
    "periodic": Periodic,
    "vla-cache": VLACache,
    "fastv": FastV,
    "sparsevlm": SparseVLM,
    "lac": LACPolicy.from_pretrained,
}
"""Name → factory; the keyword arguments are the policy's fields, and ``path`` of a trained one."""


def find_policy(name: str) -> Callable[..., CachePolicy]:
    """Find a policy's factory: one of :data:`POLICIES`, a plug-in (:mod:`lac_vla.plugins`), or ``module:Class``.

    Raises:
        InputError: If there is none of that name.
    """
    factory: Callable[..., CachePolicy] | None = POLICIES.get(name) or plugins.find_plugin(plugins.POLICIES, name)
    if factory is None:
        known = sorted({*POLICIES, *plugins.announced(plugins.POLICIES)})
        raise InputError(f"unknown policy {name!r}{did_you_mean(name, known)}; choose one of {known}, or module:Class")
    return factory


def make_policy(name: str, **options: Any) -> CachePolicy:
    """Build a policy by its name.

    Args:
        name: See :func:`find_policy`.
        **options: The policy's hyper-parameters.

    Raises:
        InputError: If the name or an option is unknown, or it makes no policy.
    """
    policy = plugins.make(f"policy {name!r}", find_policy(name), options)
    if not isinstance(policy, CachePolicy):
        raise InputError(f"policy {name!r} made a {type(policy).__name__}; it must be a CachePolicy")
    return policy


def build_policy(spec: PolicySpec) -> CachePolicy:
    """Build the policy of a spec.

    Raises:
        InputError: As :func:`make_policy` does.
    """
    return make_policy(spec.name, **spec.options)


__all__ = [
    "POLICIES",
    "CachePolicy",
    "Dense",
    "FastV",
    "LACConfig",
    "LACPolicy",
    "Motion",
    "Periodic",
    "PolicySpec",
    "Random",
    "SparseVLM",
    "VLACache",
    "build_policy",
    "cache_lowest",
    "find_policy",
    "make_policy",
    "paths_by_name",
]
