"""What every command starts from: a model and policies, loaded by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lac_vla.bundled import find_model
from lac_vla.engine.options import EngineOptions
from lac_vla.errors import InputError
from lac_vla.flow import make_flow
from lac_vla.models import load_vla
from lac_vla.policies import CachePolicy, PolicySpec, build_policy
from lac_vla.policies.lac import SUBFOLDER
from lac_vla.session import CachedVLA


@dataclass(frozen=True)
class ModelOptions:
    """How a model is loaded and run; the same options in every command.

    Attributes:
        device: ``cpu`` or ``cuda``.
        dtype: Of the weights in memory: ``auto`` (bfloat16 on a GPU, float32 elsewhere), ``float32``, ``bfloat16`` or
            ``float16``.
        unnorm_key: Statistics key of the checkpoint, if it has several.
        image_pipeline: The model's image geometry, if not its own: ``libero`` for OpenVLA's LIBERO evaluation.
        flow: Optical flow of all policies that read it: ``dis``, ``raft_small:FILE`` or ``none``; by default each
            has the one that it was made for.
        max_age: No slot is reused once it is this old, frames.
        options: Engine options beside caching, of all methods, dense included: ``default``, ``none``, ``exact``,
            ``draft+async_policy``, …
        seed: Of every session.
        threads: CPU threads of torch per process; 0 leaves it to torch.

    Raises:
        InputError: If an option makes no sense.
    """

    device: str = "cpu"
    dtype: str = "auto"
    unnorm_key: str | None = None
    image_pipeline: str | None = None
    flow: str | None = None
    max_age: int = 16
    options: str = "default"
    seed: int = 0
    threads: int = 0

    def __post_init__(self) -> None:
        EngineOptions.parse(self.options)
        if self.flow is not None:
            make_flow(self.flow)
        if self.threads < 0 or self.seed < 0:
            raise InputError("threads and seed must be at least 0")


def method_name(spec: str) -> str:
    """``motion:ratio=0.5`` → ``motion-0.5``; ``lac:path=outputs/full,recovery=0`` → ``lac-full-0``; or the label."""
    return PolicySpec.parse(spec).method


def resolve_policy(spec: str, model: str | None) -> CachePolicy:
    """Make the policy of a spec; ``lac`` without a path is the one that comes with the model.

    Args:
        spec: See :class:`PolicySpec`.
        model: Checkpoint folder, bundled name or hub id; ``None`` if there is no checkpoint.

    Raises:
        InputError: If the spec cannot be read, or the model comes without a policy.
    """
    parsed = PolicySpec.parse(spec)
    if parsed.name == "lac" and "path" not in parsed.options:
        folder = None if model is None else Path(find_model(model)) / SUBFOLDER
        if folder is None or not folder.is_dir():
            raise InputError(f"{spec!r}: the model comes without a policy; give its folder as lac:path=FOLDER")
        parsed = replace(parsed, options={**parsed.options, "path": str(folder)})
    return build_policy(parsed)


def make_policies(specs: Sequence[str], model: str | None) -> dict[str, CachePolicy]:
    """Make the policies of a run, by the names that its records and tables call them.

    Raises:
        InputError: As :func:`resolve_policy` does, or if two of them have the same name.
    """
    policies: dict[str, CachePolicy] = {}
    for spec in specs:
        name = method_name(spec)
        if name in policies:
            raise InputError(f"two policies are called {name!r}; name one of them otherwise, e.g. other@{spec}")
        policies[name] = resolve_policy(spec, model)
    return policies


def load_methods(
    model: str,
    specs: Sequence[str],
    options: ModelOptions | None = None,
    *,
    cameras: Sequence[str] | None = None,
) -> dict[str, CachedVLA]:
    """Load a checkpoint once, and put every policy of a run beside it.

    Args:
        model: Checkpoint folder, name of a bundled model, or hub id.
        specs: See :func:`make_policies`.
        options: How it is loaded and run.
        cameras: Names of the cameras in ``Frame.images``, in the model's order; ``None`` for its own names.

    Returns:
        Method name → model and policy.

    Raises:
        InputError: As :func:`make_policies` does, or if a setting does not fit the model.
        CheckpointError: If the model cannot be loaded.
    """
    options = options or ModelOptions()
    policies = make_policies(specs, model)
    if options.threads:
        torch.set_num_threads(options.threads)
    loaded = load_vla(
        find_model(model),
        device=options.device,
        dtype=options.dtype,
        cameras=cameras,
        unnorm_key=options.unnorm_key,
        image_pipeline=options.image_pipeline,
    )
    engine_options = EngineOptions.parse(options.options)
    return {
        name: CachedVLA(loaded, policy, flow=options.flow, max_age=options.max_age, options=engine_options)
        for name, policy in policies.items()
    }


def load_cached_vla(
    model: str,
    policy: str = "lac",
    options: ModelOptions | None = None,
    *,
    cameras: Sequence[str] | None = None,
) -> CachedVLA:
    """Load a checkpoint and one policy beside it; see :func:`load_methods`."""
    [vla] = load_methods(model, (policy,), options, cameras=cameras).values()
    return vla
