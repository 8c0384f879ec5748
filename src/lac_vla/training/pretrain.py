"""Trains the bundled VLAs by behaviour cloning: ``lac pretrain``.

Two phases, coarse to fine. In the coarse phase the decoder sees a regular quarter of the first camera's visual tokens
(at their own positions, at a random phase), which makes a step several times cheaper; in the fine phase it sees all.
Of ``mini-flow`` it is every second token of both cameras, and the tower computes their patches alone.
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

from lac_vla.errors import CheckpointError, InputError, LacError
from lac_vla.files import locked, read_object, write_object, writing
from lac_vla.models import Encode, random_vla, save_vla, untrained_vla
from lac_vla.models.tokenizer import FileTokenizer, load_tokenizer, train_tokenizer
from lac_vla.provenance import provenance
from lac_vla.training.batches import Demonstrations, Generators, statistics
from lac_vla.training.config import PretrainConfig, describe
from lac_vla.training.frames import FrameBank
from lac_vla.training.precision import autocast
from lac_vla.training.pretrain_losses.base import Batch, Keep, PretrainLoss, Targets
from lac_vla.training.pretrain_losses.tower import TowerLoss
from lac_vla.training.pretrain_losses.trunk import TrunkLoss
from lac_vla.training.recipes import RECIPES
from lac_vla.training.run_files import CONFIG, LOCK, STATE, append, load_state, open_log, save_state

SETTLING_FRAMES = 256
"""Frames that new weights beside loaded ones are adjusted to before training, where a loss does so."""
CARD = "lac.json"
"""The file beside the weights that says how the model was made, for the reports of evaluations."""


class Pretraining:
    """Holds one run: data, model, optimiser and progress."""

    def __init__(self, config: PretrainConfig) -> None:
        self.config = config
        torch.manual_seed(config.seed)
        self.random = Generators(config.seed)
        recipe = RECIPES[config.model]
        shape = random_vla(config.model, device="meta")
        self.start = start = config.start or recipe.start
        if start is None and config.frozen_samples:
            raise InputError("nothing is loaded that could be held fixed: give --start, or no --frozen-samples")
        encode: Encode | None = None if start is None else load_tokenizer(start)
        bank = FrameBank.load(config.dataset, *recipe.loss.pictures(shape), config.keys)
        if encode is None:
            trunk: Any = shape.module
            words = trunk.config.vocab_size - trunk.config.n_action_bins
            encode = FileTokenizer(train_tokenizer(bank.instructions, words))
        self.loss = recipe.loss(untrained_vla(config.model, statistics(bank, recipe.statistics), encode), config)
        self.loaded: list[nn.Parameter] = [] if start is None else self.loss.take_weights(start)
        self.data = Demonstrations(bank, self.loss, config)
        if start is not None:
            some = Generators(config.seed).rng.permutation(self.data.train)[:SETTLING_FRAMES]
            self.loss.settle(self.data.batch(some, None))
        self.average = AveragedModel(self.loss, multi_avg_fn=get_ema_multi_avg_fn(config.ema))  # type: ignore[no-untyped-call]
        old = {id(weight) for weight in self.loaded}
        new = [weight for weight in self.loss.parameters() if id(weight) not in old]
        groups = [{"params": weights} for weights in (new, self.loaded) if weights]
        self.optimiser = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay)
        self.seen = 0
        self._read: tuple[torch.Tensor, Targets] | None = None

    @torch.no_grad()
    def read_ahead(self, loss: TrunkLoss) -> tuple[torch.Tensor, Targets]:
        """Run a trunk that is held fixed over some augmented frames, for the head to read; also return their targets.

        It draws from generators of its own: an interrupted run reads the same.
        """
        config, random = self.config, Generators(self.config.seed + 1)
        chosen = random.rng.permutation(self.data.train)[: config.frozen_frames]
        read, targets = [], []
        for frames in tqdm(np.array_split(chosen, math.ceil(len(chosen) / 64)), desc="reading frames", unit="batch"):
            batch = self.data.batch(frames, random)
            with autocast(self.loss.vla.device):
                appended = loss.append(batch, 0.0, random.generator)
                read.append(loss.read(batch, None, appended).float())
            targets.append(batch.targets)
        return torch.cat(read), Targets.join(targets)

    def set_rates(self) -> None:
        """Warm up, hold, and go linearly to zero over the last fifth; what is held fixed wants no gradient."""
        config = self.config
        left = (config.samples - self.seen) / config.samples
        factor = min(1.0, (self.seen // config.batch + 1) / config.warmup) * min(1.0, left / 0.2)
        thawed = max(0, self.seen - config.frozen_samples)
        for group, share in zip(self.optimiser.param_groups, (1.0, config.start_lr), strict=False):
            group["lr"] = config.lr * share * factor
        if self.loaded:
            self.optimiser.param_groups[-1]["lr"] *= min(1.0, (thawed // config.batch + 1) / config.warmup)
        for weight in self.loaded:
            weight.requires_grad_(not self.frozen)

    @property
    def frozen(self) -> bool:
        """Tell if the weights that were loaded stay as they are."""
        return self.seen < self.config.frozen_samples

    @property
    def coarse(self) -> bool:
        """Tell if the run is in its coarse phase."""
        return self.seen < self.config.coarse_samples

    def step(self) -> dict[str, float]:
        """Show one batch.

        Raises:
            InputError: If the loss is not finite; the last saved state is untouched.
        """
        config = self.config
        self.set_rates()
        self.loss.train()
        with autocast(self.loss.vla.device):
            if self.frozen and isinstance(self.loss, TowerLoss):
                losses = self.loss.imitate(self.draw()[0])
            elif self.frozen and isinstance(self.loss, TrunkLoss):
                losses = self.show_read(self.loss)
            else:
                losses = self.loss(*self.draw(), self.seen / config.samples, self.random.generator)
        total = torch.stack([losses[term] for term in self.loss.terms if term in losses]).sum()
        if not torch.isfinite(total):
            raise InputError(
                f"the loss became {total.item()} after {self.seen} samples; the state of the last validation is kept: "
                "resume with a lower --lr"
            )
        self.optimiser.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.loss.parameters(), 1.0)
        self.optimiser.step()
        self.average.update_parameters(self.loss)
        self.seen += config.batch
        return {name: float(value.detach()) for name, value in losses.items()}

    def draw(self) -> tuple[Batch, Keep | None]:
        """Draw some frames, and what is shown of their tokens."""
        rng = self.random.rng
        frames = rng.choice(self.data.train, size=self.config.batch)
        keep = (int(rng.integers(2)), int(rng.integers(2)), 2) if self.coarse else None
        return self.data.batch(frames, self.random), keep

    def show_read(self, loss: TrunkLoss) -> dict[str, torch.Tensor]:
        """Compute the losses of a random batch of frames that the trunk has read ahead."""
        if self._read is None:
            self._read = self.read_ahead(loss)
        read, targets = self._read
        rows = torch.from_numpy(self.random.rng.integers(len(read), size=self.config.batch))
        return loss.losses(read[rows], targets[rows], self.seen / self.config.samples, self.random.generator)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Compute the averaged weights' losses on a fixed choice of held-out frames, without noise or augmentation."""
        chosen = np.random.default_rng(0).permutation(self.data.held_out)[: 8 * self.config.batch]
        keep = (0, 0, 2) if self.coarse else None
        generator = torch.Generator().manual_seed(0)
        self.average.eval()
        rows = []
        for frames in np.array_split(chosen, max(1, len(chosen) // self.config.batch)):
            losses = self.average(self.data.batch(frames, None), keep, None, generator)
            rows.append({name: float(value) for name, value in losses.items()})
        return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}

    def save(self) -> None:
        """Write the averaged model, then the state to resume from, which says that it is there."""
        self.save_model()
        state = {
            "seen": torch.tensor(self.seen),
            "objective": self.loss.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "noise_rng": self.random.generator.get_state(),
            "rng": json.dumps(self.random.rng.bit_generator.state),
        }
        save_state(self.config.out, state)

    def save_model(self) -> None:
        """Write the averaged model."""
        out = self.config.out
        average = cast(PretrainLoss, self.average.module)
        save_vla(average.vla, out / "model")
        write_object(out / "model" / CARD, self.card())

    def card(self) -> dict[str, Any]:
        """Describe how the model was made, as plain data."""
        model = self.loss.model
        return {
            "description": "small VLA trained by behaviour cloning of a scripted expert",
            "started_from": self.start and self.start.name,
            "parameters": sum(weight.numel() for weight in model.parameters()),
            "visual_tokens": self.loss.layout.n_visual,
            "episodes": len(self.data.bank.start),
            "frames": len(self.data.bank),
            "samples_shown": self.seen,
            "samples_planned": self.config.samples,
            "training": describe(self.config),
            "trained_with": provenance(),
        }

    def resume(self) -> None:
        """Go on from the saved state, if there is one.

        Raises:
            CheckpointError: If it is damaged, or of another model.
        """
        path, state = self.config.out / STATE, load_state(self.config.out)
        if state is None:
            return
        try:
            self.loss.load_state_dict(state["objective"])
            self.average.load_state_dict(state["average"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.random.generator.set_state(state["noise_rng"])
            self.random.rng.bit_generator.state = json.loads(state["rng"])
            self.seen = int(state["seen"])
        except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is not a state of this run; give another --out: {error}") from error


def pretrain(config: PretrainConfig, *, max_seconds: float = math.inf) -> Path:
    """Train, or go on training, until all samples are shown or the time is up.

    Args:
        config: The run. Should ``config.out`` hold a state, it is resumed.
        max_seconds: Stop (resumably) after this time.

    Returns:
        Folder of the saved model.
    """
    lock = locked(config.out / LOCK, f"another process trains in {config.out}: give another --out")
    with writing(config.out, "--out"), lock:
        run = Pretraining(config)
        run.resume()
        write_object(config.out / CONFIG, describe(config))
        _loop(run, max_seconds)
    return config.out / "model"


def _loop(run: Pretraining, max_seconds: float) -> None:
    config, start = run.config, time.monotonic()
    with (
        open_log(config.out, "samples", run.seen) as log,
        tqdm(total=config.samples, initial=run.seen, unit="frame", desc="pretraining") as bar,
    ):
        for metrics in _steps(run, start, max_seconds):
            metrics = {"samples": run.seen, "seconds": time.monotonic() - start, "coarse": run.coarse, **metrics}
            append(log, metrics)
            bar.set_postfix({key: f"{value:.3g}" for key, value in metrics.items() if isinstance(value, float)})
            bar.update(run.seen - bar.n)


def _steps(run: Pretraining, start: float, max_seconds: float) -> Iterator[dict[str, Any]]:
    """Train, yielding metrics every 50 steps and at every validation, which saves once they are noted."""
    recent: list[dict[str, float]] = []
    if run.seen >= run.config.samples and _samples_of_model(run.config.out) != run.seen:
        run.save_model()
    while run.seen < run.config.samples:
        recent.append(run.step())
        done = run.seen >= run.config.samples or time.monotonic() - start > max_seconds
        saves = run.seen % run.config.every < run.config.batch or done
        if len(recent) == 50 or saves:
            # A phase may have begun that has other losses than the one before.
            yield {name: float(np.mean([row[name] for row in recent if name in row])) for name in recent[-1]}
            recent = []
        if saves:
            yield {f"held_out_{name}": value for name, value in run.validate().items()}
            run.save()
        if done:
            return


def _samples_of_model(out: Path) -> Any:
    """Read after how many samples the saved model was written; ``None`` if there is none that can be read."""
    try:
        return read_object(out / "model" / CARD, "save it again").get("samples_shown")
    except LacError:
        return None
