"""A policy beside a frozen VLA, loaded by name: what every command starts from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from lac_vla.bundled import BUNDLED, find_model
from lac_vla.checks import LONGEST_AGE, check_whole
from lac_vla.engine.engine import Engine
from lac_vla.engine.options import EngineOptions
from lac_vla.errors import InputError
from lac_vla.flow import make_flow
from lac_vla.flow.raft import downloaded
from lac_vla.hub import find_folder
from lac_vla.models import VLA, is_plugin, load_vla
from lac_vla.models.float8 import store_in_float8
from lac_vla.policies import CachePolicy, Dense, PolicySpec, build_policy
from lac_vla.policies.lac import POLICY_FILES, SUBFOLDER
from lac_vla.session import Session


@dataclass(frozen=True)
class ModelOptions:
    """Options with which a model is loaded and run, the same in every command.

    Attributes:
        device: ``cpu`` or ``cuda``.
        dtype: Of the weights in memory: ``auto`` (bfloat16 on a GPU, float32 elsewhere), ``float32``, ``bfloat16`` or
            ``float16``.
        float8: Store the matrices of all decoder layers in float8, half of bfloat16's memory; see
            :mod:`lac_vla.models.float8`.
        unnorm_key: Statistics key of the checkpoint, if it has several.
        image_pipeline: The model's image geometry, if not its own: ``libero`` for OpenVLA's LIBERO evaluation,
            ``lerobot-0.4`` for a π0 or π0.5 that was trained with LeRobot 0.4 and pictures that are not square.
        platform: Robot that the checkpoint is for, where it does not say so: ``libero``, ``aloha`` or ``bridge`` for
            OpenVLA-OFT's.
        tokenizer: Folder or hub id of the tokenizer, where the checkpoint holds none (LeRobot's do not).
        state_prompt: How π0.5's prompt tells the state: ``given``, ``padded`` (LeRobot 0.4) or ``none`` (openpi's
            LIBERO model).
        relative_actions: How many leading values of π0's or π0.5's actions are relative to the state, if the
            checkpoint does not say so: 6 for openpi's π0 for LIBERO.
        flow: Optical flow of all policies that read it: ``dis``, ``raft_small:FILE`` or ``none``; by default each
            has the one that it was made for.
        max_age: No slot is reused once it is this old, control steps.
        options: Engine options beside caching, of all methods, dense included: ``default``, ``none``, ``exact``,
            ``draft+async_policy``, …
        seed: Of every session.
        threads: CPU threads of torch per process; 0 leaves it to torch.

    Raises:
        InputError: If an option makes no sense.
    """

    device: str = "cpu"
    dtype: str = "auto"
    float8: bool = False
    unnorm_key: str | None = None
    image_pipeline: str | None = None
    platform: str | None = None
    tokenizer: str | None = None
    state_prompt: str | None = None
    relative_actions: int | None = None
    flow: str | None = None
    max_age: int = 16
    options: str = "default"
    seed: int = 0
    threads: int = 0

    def __post_init__(self) -> None:
        EngineOptions.parse(self.options)
        check_whole("max_age", self.max_age, 1, LONGEST_AGE)
        if self.flow is not None:
            make_flow(self.flow)
        if self.threads < 0 or self.seed < 0:
            raise InputError("threads and seed must be at least 0")


@dataclass(frozen=True)
class CachedVLA:
    """A model and a caching policy: stateless, shared by any number of sessions, which share one engine.

    Attributes:
        model: The frozen model.
        policy: What decides which visual tokens are recomputed.
        flow: Optical flow for a policy that reads it, by name; ``None`` for the one that it was made for.
        max_age: No slot is reused once it is this many control steps old, ≥ 1; see :class:`Session`.
        scene_cut: Mean absolute pixel change between adjacent frames, in 0..1, from which on nothing is reused.
        options: What else is done to be fast.

    Raises:
        InputError: If a setting makes no sense, or the policy was made for another token layout.
        CheckpointError: If the flow has weights, and they cannot be read.
    """

    model: VLA
    policy: CachePolicy = field(default_factory=Dense)
    flow: str | None = None
    max_age: int = 16
    scene_cut: float = 0.25
    options: EngineOptions = field(default_factory=EngineOptions)

    def __post_init__(self) -> None:
        check_whole("max_age", self.max_age, 1, LONGEST_AGE)
        if not 0 < self.scene_cut <= 1:
            raise InputError(f"scene_cut is {self.scene_cut}; give a mean absolute pixel change in (0, 1]")
        self.policy.check_layout(self.model.grids)
        self.policy.check_state(self.model.processor.state_dim)
        decoder = self.model.decoder
        self.policy.check_slots(self.model.n_layers, decoder.kv_heads, decoder.head_dim)
        if self.flow is None and self.policy.flow == "raft_small" and not downloaded().is_file():
            raise InputError(
                "the policy was made for the flow raft_small, whose weights are not here: give flow raft_small:FILE, "
                "or raft_small to download them"
            )
        make_flow(self.flow or self.policy.flow)
        _ = self.engine  # an option that does not fit the model is refused here

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        policy: str = "lac",
        options: ModelOptions | None = None,
        *,
        cameras: Sequence[str] | None = None,
    ) -> CachedVLA:
        """Load a checkpoint and a policy beside it; see :func:`load_methods` for the arguments."""
        [vla] = load_methods(model, (policy,), options, cameras=cameras).values()
        return vla

    @cached_property
    def engine(self) -> Engine:
        """The engine of all its sessions."""
        return Engine(self.model, self.options)

    @property
    def flow_used(self) -> str:
        """Name of the estimator in its sessions; ``"none"`` for a policy that reads no flow, whatever ``flow`` says."""
        return "none" if self.policy.flow == "none" else self.flow or self.policy.flow

    def session(self, seed: int = 0) -> Session:
        """Start with one robot.

        Args:
            seed: Of everything that this session leaves to chance.
        """
        return Session(self.engine, self.policy, self.flow_used, self.max_age, self.scene_cut, seed)


def method_name(spec: str) -> str:
    """``motion:ratio=0.5`` → ``motion-0.5``; ``lac:path=outputs/full,recovery=0`` → ``lac-full-0``; or the label."""
    return PolicySpec.parse(spec).method


def resolve_policy(spec: str, model: str | None) -> CachePolicy:
    """Make the policy of a spec; ``lac`` without a path is the one that comes with the model.

    Args:
        spec: See :class:`PolicySpec`.
        model: See :func:`load_methods`; ``None`` if there is no checkpoint.

    Raises:
        InputError: If the spec cannot be read, or the model comes without a policy.
        CheckpointError: If there is no such model, or the policy cannot be read.
    """
    parsed = PolicySpec.parse(spec)
    if parsed.name == "lac" and "path" not in parsed.options:
        folder = None
        if model is not None and not is_plugin(model):
            folder = find_folder(find_model(model), POLICY_FILES, BUNDLED) / SUBFOLDER
        if folder is None or not folder.is_dir():
            raise InputError(
                f"{spec!r}: the model comes without a policy; train one (lac train) and give it as lac:path=FOLDER, or "
                "choose others, e.g. dense motion:ratio=0.5"
            )
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
        model: Checkpoint folder, name of a bundled model, hub id, or plug-in; see :func:`lac_vla.models.load_vla`.
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
        model,
        device=options.device,
        dtype=options.dtype,
        cameras=cameras,
        unnorm_key=options.unnorm_key,
        image_pipeline=options.image_pipeline,
        platform=options.platform,
        tokenizer=options.tokenizer,
        state_prompt=options.state_prompt,
        relative_actions=options.relative_actions,
    )
    if options.float8:
        store_in_float8(loaded)
    engine_options = EngineOptions.parse(options.options)
    return {
        name: CachedVLA(loaded, policy, flow=options.flow, max_age=options.max_age, options=engine_options)
        for name, policy in policies.items()
    }
