"""Makes what ``lac replay`` begins with: policies that can be replayed, stored frames, what is known of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lac_vla.datasets.lerobot import LeRobotDataset
from lac_vla.errors import InputError
from lac_vla.models import VLA
from lac_vla.policies import CachePolicy, LACPolicy
from lac_vla.policies.lac import LACConfig
from lac_vla.training.begin import check_states, divide_episodes
from lac_vla.training.replay_config import ReplayConfig
from lac_vla.training.store import FrameStore, spread
from lac_vla.types import IntArray, PolicyInput, SkippedTokens, TokenLayout

ALL = "give --held-out 1 for all of them, or a smaller share"
UNKNOWN = "whether it was trained on these episodes is not known"


def check_policies(vla: VLA, policies: Mapping[str, CachePolicy]) -> tuple[str, int]:
    """Refuse, before anything is computed, policies that cannot be replayed, or not beside each other.

    Returns:
        The optical flow that they read, and the pixels per token side that they see.
    """
    learned = {name: policy.config for name, policy in policies.items() if isinstance(policy, LACPolicy)}
    sides = {shape.patch_pixels for shape in learned.values()} or {LACConfig(vla.grids).patch_pixels}
    flows = {policy.flow for policy in policies.values()} - {"none"} or {"none"}
    if len(sides) > 1 or len(flows) > 1:
        raise InputError(
            f"these policies see pictures of {sorted(sides)} pixels per token side and the optical flows "
            f"{sorted(flows)}, of which frames are stored with one: replay them one after the other, each into its own "
            "--out"
        )
    [flow], [side] = flows, sides
    layout = TokenLayout.of(vla.grids, 0, 0)
    blank = {name: np.zeros((rows * side, cols * side, 3), np.uint8) for name, (rows, cols) in vla.grids.items()}
    still = {name: np.zeros((*image.shape[:2], 2), np.float32) for name, image in blank.items()}
    age, rng = np.zeros(layout.n_visual, np.int64), np.random.default_rng(0)
    inputs = PolicyInput(
        layout,
        vla.n_layers,
        "-",
        *(blank, blank, blank, {} if flow == "none" else still),
        age,
        rng,
        proprio=np.zeros(vla.processor.state_dim or 0, np.float32),
    )
    for name, policy in policies.items():
        policy.check_layout(vla.grids)
        policy.check_state(vla.processor.state_dim)
        what = "reads attention" if policy.probe(vla.n_layers) else "adds predicted changes" if policy.slot_macs else ""
        decision = None if what else policy.decide(inputs)
        if decision is not None and not _whole(decision.exit_layer, vla.n_layers, decision.skipped):
            what = "prunes tokens, or leaves them in mid-depth"
        if what:
            raise InputError(f"{name} {what}, which stored frames cannot show: leave it out, and see lac eval")
    return flow, side


def _whole(exit_layer: IntArray, layers: int, skipped: SkippedTokens) -> bool:
    """Tell whether every token is computed or reused in all layers."""
    return skipped is SkippedTokens.REUSE and bool(np.isin(exit_layer, (0, layers)).all())


def open_frames(
    config: ReplayConfig, vla: VLA, source: LeRobotDataset, flow: str, side: int, *, proprio: bool
) -> tuple[FrameStore, IntArray]:
    """Open the stored frames, or compute those of the episodes held out, whose numbers in the store are given, too."""
    stored = None if config.store is None else FrameStore.open(config.store)
    numbers = spread(len(source), config.episodes) if stored is None else list(stored.numbers)
    every = np.arange(len(numbers))
    held = every if config.held_out == 1 else divide_episodes(config, len(numbers), ALL)[1]
    wanted = [numbers[episode] for episode in held] if stored is None else numbers
    store = FrameStore.build(
        vla,
        config.dataset,
        config.store or config.out / "store",
        flow=flow,
        patch_pixels=side,
        episodes=wanted,
        stride=config.stride,
        keys=config.keys,
        check=lambda start, stop: _long_enough(stop - start, config.stride),
    )
    if proprio:
        check_states(store, config.store or config.out / "store")
    held = every[: len(held)] if stored is None else held
    return store, held[_long_enough((store.stop - store.start)[held], store.stride)]


def _long_enough(lengths: IntArray, stride: int) -> IntArray:
    """Number the episodes in which the model is called twice.

    Raises:
        InputError: If there is none.
    """
    long = np.flatnonzero(lengths > stride)
    if not long.size:
        raise InputError(f"no episode is longer than {stride} frames, so that nothing could be reused")
    return long


def training_notes(
    policies: Mapping[str, CachePolicy], config: ReplayConfig, source: LeRobotDataset, numbers: Sequence[int]
) -> list[str]:
    """Say which policies were trained on episodes that they are tried on, or that this is not known."""
    learned = {name: policy for name, policy in policies.items() if isinstance(policy, LACPolicy)}
    said: dict[str, list[str]] = {}
    for name, policy in learned.items():
        said.setdefault(_seen(policy.about, config, source, numbers), []).append(name)
    return [f"{', '.join(names)}: {what}" for what, names in said.items() if what]


def _seen(about: Mapping[str, Any], config: ReplayConfig, source: LeRobotDataset, numbers: Sequence[int]) -> str:
    """Say how many of these episodes a policy was trained on, by what is kept of its training; nothing for none.

    What it began with is not kept but for the name.
    """
    training = about.get("training")
    if not isinstance(training, dict) or training.get("dataset") != Path(config.dataset).name:
        return UNKNOWN
    try:
        chosen = spread(len(source), int(training["episodes"]))
        if sum(int(source.episodes[episode]["length"]) for episode in chosen) != about["frames"]:
            return f"trained on other recordings of this name: {UNKNOWN}"
        division = replace(config, held_out=training["held_out"], seed=training["seed"])
        shown = {chosen[episode] for episode in divide_episodes(division, len(chosen))[0]}
    except (KeyError, TypeError, ValueError):
        return UNKNOWN
    seen = len(shown & {*numbers})
    began = f"its --start may have been trained on {'more of ' if seen else ''}them" if training.get("start") else ""
    known = f"trained on {seen} of these {len(numbers)} episodes" if seen or began else ""
    return ", ".join(part for part in (known, began) if part)
