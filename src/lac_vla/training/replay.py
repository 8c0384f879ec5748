"""Runs ``lac replay``: whole sessions of several policies over held-out recorded episodes, each on its own cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from lac_vla.datasets.lerobot import LeRobotDataset
from lac_vla.engine.budget import frames_of_age
from lac_vla.errors import InputError
from lac_vla.factory import make_policies
from lac_vla.files import locked, read_lines, read_object, write_object, write_whole, writing
from lac_vla.models import load_vla
from lac_vla.policies import CachePolicy, LACPolicy, paths_by_name
from lac_vla.provenance import provenance
from lac_vla.results.replay import Replay
from lac_vla.results.replay_log import Calls, EpisodeReplay
from lac_vla.training.checksum import checksum
from lac_vla.training.frames import GRIPPER
from lac_vla.training.replay_config import ReplayConfig
from lac_vla.training.replay_setup import check_policies, open_frames, training_notes
from lac_vla.training.robots import Robots, groups, side_by_side
from lac_vla.training.run_files import CONFIG, LOCK, append, check_settings
from lac_vla.training.store import META
from lac_vla.training.stored_model import StoredModel
from lac_vla.types import FloatArray, IntArray

FRAMES, FIGURES = "frames.jsonl", "replay.json"
CHANGEABLE = ("baseline", "contact", "device", "out", "store")
"""Settings that bear on no session; of the device nothing but the dtype, which is bound by itself."""
GRIPPER_LAST = "contact is not told: the recorded actions are not the 7 values, the gripper last, of the benchmarks"


@dataclass(frozen=True)
class Finished:
    """A run that is whole.

    Attributes:
        replay: Its figures.
        episodes: Its log.
        notes: What else is to be known of it.
    """

    replay: Replay
    episodes: Sequence[EpisodeReplay]
    notes: Sequence[str]


def replay(config: ReplayConfig) -> Finished:
    """Go through the episodes, or go on with it, and write ``replay.json`` to ``config.out``.

    Raises:
        InputError: If dataset, model, store and policies do not fit each other, or the folder holds another run.
        CheckpointError: If model or policy cannot be read.
    """
    if config.store is not None and not (config.store / META).is_file():
        raise InputError(f"{config.store} holds no stored embeddings: give the folder 'store' of a run of lac train")
    policies = make_policies(config.policies, config.model)
    adaptive = [name for name, policy in policies.items() if policy.adaptive]
    settings = _settings(config, policies)
    held = f"another process replays into {config.out}: give another --out"
    with writing(config.out, "--out"), locked(config.out / LOCK, held, ("store.lock",)):
        _check(config.out, settings)
        vla = load_vla(config.model, device=config.device, dtype="auto", unnorm_key=config.unnorm_key)
        vla.module.requires_grad_(False)
        settings |= {"model_weights": checksum(vla.module), "dtype": str(vla.dtype)}
        _check(config.out, settings)
        flow, side = check_policies(vla, policies)
        source = LeRobotDataset(config.dataset, {}, config.keys)
        proprio = any(isinstance(policy, LACPolicy) and policy.reads_state for policy in policies.values())
        store, episodes = open_frames(config, vla, source, flow, side, proprio=proprio)
        numbers = [store.numbers[episode] for episode in episodes]
        settings |= {"numbers": numbers, "recordings": _recordings(source, numbers)}
        _check(config.out, settings)
        write_object(config.out / CONFIG, settings)
        found = _sessions(StoredModel(vla, store, exact=True), policies, episodes, source, config)
        figures = Replay.of(found, config.baselines, store.layout.n_visual, config.contact, adaptive)
        notes = training_notes(policies, config, source, numbers)
        notes += [GRIPPER_LAST] if figures.contact_share is None else []
        content = {**figures.to_json(), "notes": notes, "settings": settings, "measured_with": provenance()}
        write_object(config.out / FIGURES, content)
    return Finished(figures, found, notes)


def _settings(config: ReplayConfig, policies: Mapping[str, CachePolicy]) -> dict[str, Any]:
    """Make plain data of what a run is bound to, but for model and recordings; only the names of folders are kept."""
    content = asdict(config)
    content |= content.pop("keys")
    content |= {name: [*map(paths_by_name, content[name])] for name in ("policies", "baseline")}
    content |= {name: content[name] and Path(content[name]).name for name in ("model", "dataset", "out", "store")}
    learned = {name: policy for name, policy in policies.items() if isinstance(policy, LACPolicy)}
    weights = {name: checksum(policy.networks) for name, policy in learned.items()}
    return {**content, "weights": weights, "shapes": {name: own.config.to_json() for name, own in learned.items()}}


def _check(out: Path, settings: Mapping[str, Any]) -> None:
    """Refuse a folder of anything but this run.

    Raises:
        InputError: If it holds another one, or something else.
    """
    path, advice = out / CONFIG, "give another --out"
    if path.is_file() and (missing := sorted({*settings} - {*read_object(path, advice)})):
        raise InputError(
            f"{out} holds something else than a run of lac replay, or one that an earlier version began: its {CONFIG} "
            f"says nothing of {missing}; {advice}"
        )
    check_settings(out, settings, CHANGEABLE, advice)


def _recordings(source: LeRobotDataset, numbers: Sequence[int]) -> str:
    """Name episodes by a checksum of what was recorded in them beside the pictures, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for episode in map(source.episode, numbers):
        digest.update(json.dumps([episode.instruction, len(episode)]).encode())
        digest.update(np.ascontiguousarray(episode.action).tobytes())
        digest.update(np.ascontiguousarray(episode.state).tobytes())
    return digest.hexdigest()[:16]


def _sessions(
    model: StoredModel,
    policies: Mapping[str, CachePolicy],
    episodes: IntArray,
    source: LeRobotDataset,
    config: ReplayConfig,
) -> list[EpisodeReplay]:
    """Go through all episodes, those in the log left out, and write them there; in the order of the data set."""
    store, log = model.store, config.out / FRAMES
    found = {episode.episode: episode for episode in (read_frames(log) if log.exists() else ())}
    numbers = [store.numbers[episode] for episode in episodes]
    left = [group for group in groups(store, episodes) if any(store.numbers[e] not in found for e in group)]
    again = {store.numbers[episode] for group in left for episode in group}  # a group is gone through as a whole
    found = {number: episode for number, episode in found.items() if number not in again}
    write_whole(log, "".join(json.dumps(episode.to_json()) + "\n" for episode in found.values()))
    events = _gripper([source.episode(number).action for number in numbers])
    total = int((store.stop - store.start)[episodes].sum())
    done = sum(store.stride * (1 + len(episode.frames)) for episode in found.values())
    with (
        log.open("a", encoding="utf-8") as file,
        tqdm(total=total, initial=done, desc="replaying", unit="frame") as bar,
    ):
        for group in left:
            for episode, methods in zip(group, _gone_through(model, policies, group, config, bar), strict=True):
                number, length = store.numbers[episode], int((store.stop - store.start)[episode])
                gripper = None if events is None else events[numbers.index(number)]
                frames = [*range(store.stride, length, store.stride)]
                found[number] = EpisodeReplay(number, frames, gripper, methods)
                append(file, found[number].to_json())
    return [found[number] for number in numbers]


@torch.no_grad()
def _gone_through(
    model: StoredModel, policies: Mapping[str, CachePolicy], episodes: IntArray, config: ReplayConfig, bar: Any
) -> list[dict[str, Calls]]:
    """Go through some episodes side by side, with every policy, and tell what each did."""
    store, head = model.store, model.vla.head
    robots = {name: Robots(model, episodes, config.seed) for name in policies}
    oldest, cameras = frames_of_age(config.max_age, store.stride), store.layout.cameras
    noted: list[dict[str, Calls]] = [
        {name: Calls([], [], [], {camera.name: [] for camera in cameras}) for name in policies} for _ in episodes
    ]
    bar.update(len(episodes) * store.stride)
    for rows, frames in side_by_side(store, episodes):
        dense, targets = model.decode(frames).context(), model.load(store.targets, frames)
        for name, policy in policies.items():
            own = robots[name]
            own.keep(rows)
            inputs = own.inputs(frames)
            decisions = policy.decide_together(inputs) or [policy.decide(each) for each in inputs]
            chosen = torch.from_numpy(np.stack([decision.active for decision in decisions])).to(model.device)
            active = chosen | (own.ages >= oldest)
            mixed = own.commit(frames, active)
            loss = head.loss(mixed.context(), targets, torch.Generator().manual_seed(0), dense).float().cpu().numpy()
            if not np.isfinite(loss).all():
                raise InputError(f"the answers of {name} are not finite: is the model in too low a precision?")
            computed = active.cpu().numpy()
            for row, decision, divergence, tokens in zip(rows, decisions, loss, computed, strict=True):
                calls = noted[row][name]
                calls.divergence.append(float(divergence))
                calls.active.append(float(tokens.mean()))
                calls.nominal.append(decision.nominal_ratio)
                for camera in cameras:
                    calls.reuse[camera.name].append(1 - float(tokens[camera.tokens].mean()))
        bar.update(len(frames) * store.stride)
    return noted


def _gripper(actions: Sequence[FloatArray]) -> list[list[int]] | None:
    """List the frames of every episode at which the gripper is told otherwise; ``None`` if it is not known where."""
    if {action.shape[1] for action in actions} != {GRIPPER + 1}:
        return None
    values = [action[:, GRIPPER] for action in actions]
    middle = (min(map(np.min, values)) + max(map(np.max, values))) / 2
    return [(1 + np.flatnonzero(np.diff(own > middle))).tolist() for own in values]


def read_frames(path: Path) -> list[EpisodeReplay]:
    """Read the log of a run.

    Raises:
        InputError: If it is damaged.
    """
    return [episode for _, episode in read_lines(path, "lac replay", EpisodeReplay.from_json)]
