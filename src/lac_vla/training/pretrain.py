"""Trains the bundled VLAs by behaviour cloning: ``lac pretrain``.

Two phases, coarse to fine. In the coarse phase the decoder sees a regular quarter of the first camera's visual tokens
(at their own positions, at a random phase), which makes a step several times cheaper; in the fine phase it sees all.
What is loaded from another model can be held fixed at first, until the new head has learned to read it.
A run is resumable: it saves its whole state at every evaluation, and the model as ``load_vla`` reads it.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from lac_vla.errors import CheckpointError, InputError
from lac_vla.models import load_vla, save_vla
from lac_vla.models.prismatic.images import area
from lac_vla.models.prismatic.prompt import Encode, FileTokenizer, load_tokenizer, train_tokenizer
from lac_vla.provenance import provenance
from lac_vla.training.config import PretrainConfig, describe
from lac_vla.training.families import FAMILIES
from lac_vla.training.frames import GRIPPER, FrameBank, quantiles, shift_images
from lac_vla.training.objectives.base import Batch, Objective, Targets
from lac_vla.types import IntArray

STATISTICS_KEY = "libero"
"""Key of the bundled model's normalisation statistics."""
CARD = "lac.json"
"""Beside the weights: how the model was made, for the reports of evaluations."""


class Pretraining:
    """One run: data, model, optimiser and where it stands.

    Args:
        config: The run.
    """

    def __init__(self, config: PretrainConfig) -> None:
        self.config = config
        torch.manual_seed(config.seed)
        self.rng = np.random.default_rng(config.seed)
        self.noise_rng = torch.Generator().manual_seed(config.seed)
        family = FAMILIES[config.model]
        sizes = {camera.name: camera.image_size for camera in family.vlm.cameras}
        self.bank = FrameBank.load(config.dataset, sizes, area)
        dims = range(self.bank.action.shape[1])
        self.statistics: dict[str, Any] = {
            STATISTICS_KEY: {
                "action": quantiles(self.bank.action, [dim for dim in dims if dim != GRIPPER]),
                "proprio": quantiles(self.bank.state),
            }
        }
        self.objective = family.objective(self.statistics, config).to(config.device)
        self.start = start = config.start or family.start
        words = family.vlm.vocab_size - family.vlm.n_action_bins
        if start is None and config.frozen_samples:
            raise InputError("nothing is loaded that could be held fixed: give --start, or no --frozen-samples")
        if start is None:
            self.encode: Encode = FileTokenizer(train_tokenizer(self.bank.instructions, words))
            self.loaded: list[nn.Parameter] = []
        else:
            self.encode = load_tokenizer(start)
            self.loaded = take_weights(self.objective.model, start)
        self.horizon = family.horizon(config)
        self.average = AveragedModel(self.objective, multi_avg_fn=get_ema_multi_avg_fn(config.ema))  # type: ignore[no-untyped-call]
        old = {id(weight) for weight in self.loaded}
        new = [weight for weight in self.objective.parameters() if id(weight) not in old]
        groups = [{"params": weights} for weights in (new, self.loaded) if weights]
        self.optimiser = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay)
        self.seen = 0
        self._read: tuple[torch.Tensor, Targets] | None = None
        self._prepare()

    def _prepare(self) -> None:
        """Derive every frame's targets once."""
        bank, vla = self.bank, self.objective.backbone(self.encode)
        self.train_frames, self.held_frames = bank.split(self.config.held_out, self.config.seed)
        self.chunks = vla.normalize_actions(bank.chunks(self.horizon)).clip(-1, 1).astype(np.float32)
        self.proprio = vla.normalize_proprio(bank.state)
        hindsight, self.ahead = bank.hindsight()
        self.centre, self.scale = hindsight.mean(axis=(0, 1)), hindsight.std(axis=(0, 1))
        self.hindsight = (hindsight - self.centre) / self.scale
        prompts = [vla.prompt_ids(text)[1:] for text in bank.instructions]
        self.text_length = np.asarray([len(ids) for ids in prompts])
        self.text = np.zeros((len(prompts), self.text_length.max()), dtype=np.int64)
        for row, ids in zip(self.text, prompts, strict=True):
            row[: len(ids)] = ids
        self.text_of = bank.task[bank.episode]

    def batch(self, frames: IntArray, *, augment: bool) -> Batch:
        """Assemble frames; with ``augment``, shift and tint the images and disturb the proprioception."""
        bank, rng, count = self.bank, self.rng, len(frames)
        images, shifts = {}, {}
        for camera, stored in bank.images.items():
            chosen = stored[frames]
            limit = round(self.config.shift * chosen.shape[1]) if augment else 0
            moved = rng.integers(-limit, limit + 1, size=(count, 2))
            pixels = torch.from_numpy(shift_images(chosen, moved)).permute(0, 3, 1, 2).float() / 127.5 - 1
            if augment:
                gain, offset = rng.uniform(0.85, 1.15, (count, 3, 1, 1)), rng.uniform(-0.1, 0.1, (count, 1, 1, 1))
                pixels = pixels * torch.from_numpy(gain).float() + torch.from_numpy(offset).float()
                pixels = pixels + 0.02 * torch.randn(pixels.shape, generator=self.noise_rng)
            images[camera] = pixels.to(self.config.device)
            shifts[camera] = torch.from_numpy(moved)
        proprio = self.proprio[frames]
        if augment:
            proprio = proprio + rng.normal(0, self.config.proprio_noise, proprio.shape)
            proprio = proprio * (rng.random((count, 1)) >= self.config.proprio_dropout)
        task = self.text_of[frames]
        longest = self.text_length[task].max()
        return Batch(
            images=images,
            shifts=shifts,
            proprio=torch.from_numpy(np.asarray(proprio, dtype=np.float32)),
            text=torch.from_numpy(self.text[task, :longest]),
            text_length=torch.from_numpy(self.text_length[task]),
            targets=Targets(
                torch.from_numpy(self.chunks[frames]),
                torch.from_numpy(np.asarray(self.hindsight[frames], dtype=np.float32)),
                torch.from_numpy(self.ahead[frames].astype(np.float32)),
            ),
        )

    @torch.no_grad()
    def read_ahead(self) -> tuple[torch.Tensor, Targets]:
        """What a trunk that is held fixed reads in some augmented frames, and their targets.

        Its chance is its own: an interrupted run reads the same.
        """
        config = self.config
        chance, self.rng = self.rng, np.random.default_rng([config.seed, 1])
        noise, self.noise_rng = self.noise_rng, torch.Generator().manual_seed(config.seed + 1)
        chosen = self.rng.permutation(self.train_frames)[: config.frozen_frames]
        read, targets = [], []
        for frames in tqdm(np.array_split(chosen, math.ceil(len(chosen) / 64)), desc="reading frames", unit="batch"):
            batch = self.batch(frames, augment=True)
            with torch.autocast(config.device, dtype=torch.bfloat16):
                appended = self.objective.append(batch, 0.0, self.noise_rng)
                read.append(self.objective.read(batch, None, appended).float())
            targets.append(batch.targets)
        self.rng, self.noise_rng = chance, noise
        return torch.cat(read), Targets.join(targets)

    def lr_factor(self) -> float:
        """Warm up, hold, and go linearly to zero over the last fifth."""
        warm = min(1.0, (self.seen // self.config.batch + 1) / self.config.warmup)
        left = (self.config.samples - self.seen) / self.config.samples
        return warm * min(1.0, left / 0.2)

    def set_rates(self) -> None:
        """Give the optimiser this step's learning rates; what is held fixed wants no gradient."""
        config, factor = self.config, self.lr_factor()
        thawed = max(0, self.seen - config.frozen_samples)
        for group, share in zip(self.optimiser.param_groups, (1.0, config.start_lr), strict=False):
            group["lr"] = config.lr * share * factor
        if self.loaded:
            self.optimiser.param_groups[-1]["lr"] *= min(1.0, (thawed // config.batch + 1) / config.warmup)
        for weight in self.loaded:
            weight.requires_grad_(not self.frozen)

    @property
    def frozen(self) -> bool:
        """Whether the weights that were loaded stay as they are."""
        return self.seen < self.config.frozen_samples

    @property
    def coarse(self) -> bool:
        """Whether the run is in its coarse phase."""
        return self.seen < self.config.coarse_samples

    def step(self) -> dict[str, float]:
        """Show one batch.

        Raises:
            InputError: If the loss is not finite; the last saved state is untouched.
        """
        config = self.config
        self.set_rates()
        self.objective.train()
        with torch.autocast(config.device, dtype=torch.bfloat16):
            losses = self.show_read() if self.frozen else self.show_frames()
        total = torch.stack([losses[term] for term in self.objective.terms]).sum()
        if not torch.isfinite(total):
            raise InputError(
                f"the loss became {total.item()} after {self.seen} samples; the state of the last validation is kept: "
                "resume with a lower --lr"
            )
        self.optimiser.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.objective.parameters(), 1.0)
        self.optimiser.step()
        self.average.update_parameters(self.objective)
        self.seen += config.batch
        return {name: float(value.detach()) for name, value in losses.items()}

    def show_frames(self) -> dict[str, torch.Tensor]:
        """Losses of a batch of frames, drawn by chance."""
        frames = self.rng.choice(self.train_frames, size=self.config.batch)
        keep = (int(self.rng.integers(2)), int(self.rng.integers(2)), 2) if self.coarse else None
        losses: dict[str, torch.Tensor] = self.objective(
            self.batch(frames, augment=True), keep, self.seen / self.config.samples, self.noise_rng
        )
        return losses

    def show_read(self) -> dict[str, torch.Tensor]:
        """Losses of a batch of frames that the trunk has read ahead."""
        if self._read is None:
            self._read = self.read_ahead()
        read, targets = self._read
        rows = torch.from_numpy(self.rng.integers(len(read), size=self.config.batch))
        return self.objective.losses(read[rows], targets[rows], self.seen / self.config.samples, self.noise_rng)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Losses of the averaged weights on a fixed choice of held-out frames, without noise or augmentation."""
        chosen = np.random.default_rng(0).permutation(self.held_frames)[: 8 * self.config.batch]
        keep = (0, 0, 2) if self.coarse else None
        generator = torch.Generator().manual_seed(0)
        self.average.eval()
        rows = []
        for frames in np.array_split(chosen, max(1, len(chosen) // self.config.batch)):
            losses = self.average(self.batch(frames, augment=False), keep, None, generator)
            rows.append({name: float(value) for name, value in losses.items()})
        return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}

    def save(self) -> None:
        """Write the state to resume from, then the averaged model."""
        out = self.config.out
        state = {
            "seen": torch.tensor(self.seen),
            "objective": self.objective.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "noise_rng": self.noise_rng.get_state(),
            "rng": json.dumps(self.rng.bit_generator.state),
        }
        torch.save(state, out / "state.tmp")
        (out / "state.tmp").replace(out / "state.pt")
        average = cast(Objective, self.average.module)
        save_vla(average.backbone(self.encode), out / "model")
        (out / "model" / CARD).write_text(json.dumps(self.card(), indent=2) + "\n", encoding="utf-8")

    def card(self) -> dict[str, Any]:
        """How the model came about, as plain data."""
        model = self.objective.model
        return {
            "description": "small VLA trained by behaviour cloning of a scripted expert",
            "started_from": self.start and self.start.name,
            "parameters": sum(weight.numel() for weight in model.parameters()),
            "visual_tokens": self.objective.layout.n_visual,
            "episodes": len(self.bank.start),
            "frames": len(self.bank),
            "samples_shown": self.seen,
            "samples_planned": self.config.samples,
            "training": describe(self.config),
            "trained_with": provenance(),
        }

    def resume(self) -> None:
        """Go on from the saved state.

        Raises:
            CheckpointError: If it is of another model.
        """
        path = self.config.out / "state.pt"
        state = torch.load(path, weights_only=True, map_location=self.config.device)
        try:
            self.objective.load_state_dict(state["objective"])
            self.average.load_state_dict(state["average"])
            self.optimiser.load_state_dict(state["optimiser"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{path} is not a state of this run; give another --out: {error}") from error
        self.noise_rng.set_state(state["noise_rng"])
        self.rng.bit_generator.state = json.loads(state["rng"])
        self.seen = int(state["seen"])


def take_weights(model: nn.Module, folder: Path) -> list[nn.Parameter]:
    """Copy a checkpoint's weights into a model that has all of them, and perhaps more.

    Args:
        model: Its parameters of the same names are overwritten.
        folder: See :func:`lac_vla.models.load_vla`.

    Returns:
        The parameters that were overwritten.

    Raises:
        CheckpointError: If the checkpoint has a weight that the model has not, or of another shape.
    """
    weights = cast(Any, load_vla(folder)).model.state_dict()
    try:
        unknown = model.load_state_dict(weights, strict=False).unexpected_keys
    except RuntimeError as error:
        raise CheckpointError(f"{folder} does not fit the model: give another --start: {error}") from error
    if unknown:
        raise CheckpointError(f"{folder} is of another model, it has {unknown[0]}: give another --start")
    return [parameter for name, parameter in model.named_parameters() if name in weights]


def pretrain(config: PretrainConfig, *, max_seconds: float = math.inf) -> Path:
    """Train, or go on training, until all samples are shown or the time is up.

    Args:
        config: The run. Should ``config.out`` hold a state, it is resumed.
        max_seconds: Stop (resumably) after this time.

    Returns:
        Folder of the saved model.
    """
    config.out.mkdir(parents=True, exist_ok=True)
    run = Pretraining(config)
    if (config.out / "state.pt").exists():
        run.resume()
    (config.out / "config.json").write_text(json.dumps(describe(config), indent=2) + "\n", encoding="utf-8")
    start = time.monotonic()
    with (
        (config.out / "metrics.jsonl").open("a") as log,
        tqdm(total=config.samples, initial=run.seen, unit="frame", desc="pretraining") as bar,
    ):
        for metrics in _steps(run, start, max_seconds):
            metrics = {"samples": run.seen, "seconds": time.monotonic() - start, "coarse": run.coarse, **metrics}
            log.write(json.dumps(metrics) + "\n")
            log.flush()
            bar.set_postfix({key: f"{value:.3g}" for key, value in metrics.items() if isinstance(value, float)})
            bar.update(run.seen - bar.n)
    return config.out / "model"


def _steps(run: Pretraining, start: float, max_seconds: float) -> Iterator[dict[str, Any]]:
    """Train, yielding metrics every 50 steps and at every validation (which saves)."""
    recent: list[dict[str, float]] = []
    while run.seen < run.config.samples:
        recent.append(run.step())
        done = run.seen >= run.config.samples or time.monotonic() - start > max_seconds
        if len(recent) == 50 or done:
            yield {name: float(np.mean([row[name] for row in recent])) for name in recent[0]}
            recent = []
        if run.seen % run.config.every < run.config.batch or done:
            scores = run.validate()
            run.save()
            yield {f"held_out_{name}": value for name, value in scores.items()}
        if done:
            return
