"""The methods of a run: policies by the names that its records and tables call them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lac_vla.errors import InputError
from lac_vla.levers import Levers
from lac_vla.models import load_vla
from lac_vla.policies import CachePolicy, PolicySpec, build_policy
from lac_vla.policies.lac import SUBFOLDER
from lac_vla.vla import CachedVLA


def method_name(spec: str) -> str:
    """``motion:ratio=0.5`` → ``motion-0.5``; ``lac:path=outputs/full,recovery=0`` → ``lac-full-0``; or the label."""
    return PolicySpec.parse(spec).method


def resolve(spec: str, model: str | None) -> CachePolicy:
    """Make the policy of a spec; ``lac`` without a path is the one that comes with the model.

    Args:
        spec: See :class:`PolicySpec`.
        model: Checkpoint folder or hub id; ``None`` if there is no checkpoint.

    Raises:
        InputError: If the spec cannot be read, or the model comes without a policy.
    """
    parsed = PolicySpec.parse(spec)
    if parsed.name == "lac" and "path" not in parsed.options:
        folder = None if model is None else Path(model) / SUBFOLDER
        if folder is None or not folder.is_dir():
            raise InputError(f"{spec!r}: the model comes without a policy; give its folder as lac:path=FOLDER")
        parsed = replace(parsed, options={**parsed.options, "path": str(folder)})
    return build_policy(parsed)


def make_methods(specs: Sequence[str], model: str | None) -> dict[str, CachePolicy]:
    """Make the policies of a run, by name.

    Raises:
        InputError: As :func:`resolve` does, or if two of them have the same name.
    """
    methods: dict[str, CachePolicy] = {}
    for spec in specs:
        name = method_name(spec)
        if name in methods:
            raise InputError(f"two policies are called {name!r}; name one of them otherwise, e.g. other@{spec}")
        methods[name] = resolve(spec, model)
    return methods


def load_methods(
    specs: Sequence[str],
    model: str,
    *,
    device: str = "cpu",
    cameras: Sequence[str] | None = None,
    unnorm_key: str | None = None,
    image_pipeline: str | None = None,
    flow: str | None = None,
    max_age: int = 16,
    levers: str = "default",
) -> dict[str, CachedVLA]:
    """Load a checkpoint once, and put every policy of a run beside it.

    Args:
        specs: See :func:`make_methods`.
        model: Checkpoint folder or hub id.
        device: See :func:`lac_vla.models.load_vla`, as for the next three.
        cameras: Names of the cameras in ``Frame.images``.
        unnorm_key: Statistics key of the checkpoint.
        image_pipeline: The model's image geometry, if not its own.
        flow: See :class:`lac_vla.vla.CachedVLA`, as for the next one.
        max_age: No slot is reused once it is this old, frames.
        levers: See :meth:`lac_vla.levers.Levers.parse`.

    Returns:
        By method.

    Raises:
        InputError: As :func:`make_methods` does, or if a setting does not fit the model.
        CheckpointError: If the model cannot be loaded.
    """
    policies, chosen = make_methods(specs, model), Levers.parse(levers)
    backbone = load_vla(
        model,
        device=device,
        dtype="auto",
        cameras=cameras,
        unnorm_key=unnorm_key,
        image_pipeline=image_pipeline,
    )
    return {
        name: CachedVLA(backbone, policy, flow=flow, max_age=max_age, levers=chosen)
        for name, policy in policies.items()
    }
