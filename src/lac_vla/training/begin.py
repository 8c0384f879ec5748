"""Makes what a run of ``lac train`` begins with: a policy, the stored frames, and the division of the episodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812

from lac_vla.errors import InputError
from lac_vla.flow import policy_flow
from lac_vla.models import VLA
from lac_vla.policies.lac import LACConfig, LACPolicy, Predictor
from lac_vla.training.config import TrainConfig
from lac_vla.training.store import FrameStore, windows
from lac_vla.types import IntArray


class Division(Protocol):
    """Settings that divide episodes."""

    @property
    def held_out(self) -> float: ...  # noqa: D102
    @property
    def seed(self) -> int: ...  # noqa: D102


def first_policy(config: TrainConfig, vla: VLA, grids: Mapping[str, tuple[int, int]]) -> LACPolicy:
    """Make the policy that a run begins with; or that of ``--start``, on the same networks.

    Raises:
        InputError: If there is no such policy, or it was made with other settings.
    """
    decoder, told = vla.decoder, vla.processor.state_dim
    if config.proprio and told is None:
        raise InputError(f"{vla.name} takes no proprioception, which --proprio lets the predictor read: leave it out")
    shape = LACConfig(
        grids=dict(grids),
        ratios=config.ratios,
        inputs=config.inputs,
        flow=policy_flow(config.flow),
        language=config.language,
        ratio=config.fixed_ratio or None,
        recovery=config.recovery,
        width=config.width,
        depth=config.depth,
        patch_pixels=config.patch_pixels,
        proprio=told or 0 if config.proprio else 0,
        slots=(vla.n_layers, decoder.kv_heads, decoder.head_dim) if config.delta_steps else None,
    )
    if config.start is None:
        return LACPolicy(shape)
    return _continued(shape, LACPolicy.from_pretrained(config.start), anew=config.predictor_steps > 0)


def _continued(shape: LACConfig, start: LACPolicy, *, anew: bool) -> LACPolicy:
    """Begin with another policy's networks; a predictor that learns anew may have other candidates, and read more."""
    slots = start.config.slots if shape.slots is None else shape.slots
    more = ("ratios", *(() if start.config.proprio else ("proprio",))) if anew else ()
    free = ("slots", "grids", *more)
    own, other = shape.to_json(), start.config.to_json()
    different = sorted(name for name in own if name not in free and own[name] != other[name])
    if different:
        raise InputError(f"the policy of --start was made with other {different}: give its settings, too")
    start.check_layout(shape.grids)
    policy = LACPolicy(replace(shape, slots=slots), start.selector, _rating(shape, start))
    if policy.delta_network is not None and start.delta_network is not None and start.config.slots == slots:
        policy.delta_network = start.delta_network
    return policy


def _rating(shape: LACConfig, start: LACPolicy) -> Predictor:
    """Begin with another policy's predictor, which at first rates a new candidate a little below its lower neighbour.

    It chooses as before as long as the old candidates are among the new ones, whatever proprioception it is told.
    """
    known, before = start.config.ratios, start.predictor
    if (shape.ratios, shape.proprio) == (known, start.config.proprio):
        return before
    predictor, head = Predictor(shape), before.head
    weight = F.pad(before.hidden.weight.detach(), (0, shape.proprio - start.config.proprio))
    predictor.hidden.load_state_dict({"weight": weight, "bias": before.hidden.bias.detach()})
    predictor.trunk = before.trunk
    if start.config.proprio:
        predictor.state_mean, predictor.state_gain = before.state_mean, before.state_gain
    rows = np.searchsorted(known, shape.ratios, side="right") - 1
    new = torch.from_numpy(~np.isin(shape.ratios, known))
    bias = head.bias.detach()[rows] - 1e-3 * new
    predictor.head.load_state_dict({"weight": head.weight.detach()[rows], "bias": bias})
    return predictor


def divide(config: TrainConfig, start: IntArray, stop: IntArray) -> tuple[IntArray, IntArray]:
    """List the first frames of all windows: those that are trained on, and those of the episodes held out.

    Raises:
        InputError: If there are too few episodes, or none is long enough.
    """
    first, held_first = (
        windows(start, stop, part, config.window, config.stride) for part in divide_episodes(config, len(start))
    )
    return first, held_first


def divide_episodes(config: Division, count: int, advice: str = "use at least 2") -> tuple[IntArray, IntArray]:
    """Number the episodes that are trained on, and those held out.

    Raises:
        InputError: If there are too few, with this advice.
    """
    chosen = np.random.default_rng(config.seed).permutation(count)
    held = max(1, round(config.held_out * count))
    if held >= count:
        raise InputError(f"{count} episode(s) cannot be divided into training and validation: {advice}")
    return np.sort(chosen[held:]), np.sort(chosen[:held])


def store_folder(config: TrainConfig) -> Path:
    """Name the folder of the stored embeddings."""
    return config.store or config.out / "store"


def open_store(config: TrainConfig, vla: VLA, tower_cameras: Sequence[str], rank: int) -> FrameStore:
    """Store the frames' embeddings, or open what is stored; of several processes the one of rank 0 fills it.

    Raises:
        InputError: If dataset and model do not fit, or the episodes are too few or too short.
    """
    folder = store_folder(config)

    def build() -> FrameStore:
        return FrameStore.build(
            vla,
            config.dataset,
            folder,
            flow=config.flow,
            patch_pixels=config.patch_pixels,
            episodes=config.episodes,
            labels=config.loss == "demo",
            tower_cameras=tower_cameras,
            stride=config.stride,
            keys=config.keys,
            check=lambda start, stop: divide(config, start, stop),
        )

    if not dist.is_initialized():
        return build()
    store = build() if rank == 0 else None  # one process fills it, the others wait
    dist.barrier()
    return store or FrameStore.open(folder)


def check_states(store: FrameStore, folder: Path) -> None:
    """Refuse stored frames without the proprioception that a policy reads.

    Raises:
        InputError: If there is none.
    """
    if not store.state.size:
        raise InputError(
            f"{folder} holds no proprioception, as it was stored before that was kept: give another --store, and it is "
            "stored with the embeddings"
        )
