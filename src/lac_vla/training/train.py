"""Runs ``lac train``: data, optimiser, checkpoints, exact resume, metrics; in one process or several."""

from __future__ import annotations

import io
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from lac_vla.engine.budget import frames_of_age
from lac_vla.errors import CheckpointError, InputError, LacError, MissingExtraError
from lac_vla.files import locked, read_object, write_object, write_whole, writing
from lac_vla.models import VLA, load_vla
from lac_vla.policies.lac import SUBFOLDER, LACPolicy
from lac_vla.provenance import provenance
from lac_vla.results.adaptivity import collapse_warning, shares_chosen
from lac_vla.results.regret import FOLDER, SETTINGS
from lac_vla.training.begin import check_states, divide, divide_episodes, first_policy, open_store, store_folder
from lac_vla.training.config import TrainConfig, describe
from lac_vla.training.costs import KeptCosts, RatioCosts, told
from lac_vla.training.lac import LACLoss, Temperatures, annealed, cosine
from lac_vla.training.regret import RegretConfig, check_measured, held_out_streams, measure
from lac_vla.training.run_files import CONFIG, LOCK, STATE, append, check_settings, load_state, open_log, save_state
from lac_vla.training.store import FrameStore
from lac_vla.training.tower import MixedTower
from lac_vla.types import IntArray

PICTURES = "saliency.npz"
CHANGEABLE = ("every", "tensorboard", "device", "store", "out", "oracle_frames", "oracle_noise")
"""Settings with which a run may be resumed."""
VALIDATION_WINDOWS = 32
STEERING, DAMPING = 0.02, 0.5
"""How λ follows a target ratio: by the distance, in units of 0.1, times these, log λ moves for good in a step, and is
shifted in it. Logits answer slowly: without the second, λ runs past what it looks for."""
FARTHEST = 2.0
"""The distance from which on the shift grows no more."""
CLIP = 1.0
ALONE = {3: "deltas", 4: "predictor"}
"""Stage → the network that it trains alone."""
UNMEASURED = "the time is up before all of the regret is measured: the same command goes on"

UNMEASURED_COSTS = "the time is up before all is measured of what ratios cost: the same command goes on"


class Training:
    """Holds one run: what is trained, on what, and its progress.

    ``world`` is the number of processes that train together, and this one's rank.
    """

    def __init__(
        self,
        config: TrainConfig,
        vla: VLA,
        store: FrameStore,
        tower: MixedTower | None = None,
        world: tuple[int, int] = (1, 0),
    ) -> None:
        self.config, self.vla, self.store, self.world = config, vla, store, world
        torch.manual_seed(config.seed)
        self.policy = first_policy(config, vla, store.grids)
        self.losses = LACLoss(vla, store, self.policy, config.loss, tower)
        self.networks = self.policy.networks
        self.optimiser = torch.optim.AdamW(self.networks.parameters(), lr=config.lr, weight_decay=1e-4)
        self.step, self.lam, self.seconds, self.costs_name = 0, config.lam, 0.0, ""
        self.first, self.held_first = divide(config, store.start, store.stop)
        if not self.policy.predictor.standardised:
            shown = np.isin(self.losses.episode, divide_episodes(config, len(store.start))[0])
            self.policy.predictor.standardise(self.losses.load(store.state, np.flatnonzero(shown)))

    @property
    def stage(self) -> int:
        """Number the stage of the next step: 1 or 2; 3 for reused slots' changes alone, 4 for the predictor alone."""
        return 1 + sum(self.step >= int(end) for end in self._ends[:3])

    @property
    def _ends(self) -> IntArray:
        """The steps at which the stages end."""
        config = self.config
        return np.cumsum([config.stage1_steps, config.stage2_steps, config.delta_steps, config.predictor_steps])

    @property
    def temperatures(self) -> Temperatures:
        """Compute the temperatures of this step."""
        config = self.config
        progress = (self.step - config.stage1_steps) / max(1, config.stage2_steps)
        return Temperatures(annealed(config.tau_ratio, progress), annealed(config.tau_score, progress))

    def advance(self) -> dict[str, float]:
        """Take one step of whichever stage it is.

        All generators of a step are seeded by (seed, step, rank), so a resumed run draws what an unbroken one draws.

        Returns:
            Its metrics.

        Raises:
            InputError: If the loss is not finite; the last saved state is untouched.
        """
        config, (size, rank) = self.config, self.world
        rng = np.random.default_rng([config.seed, self.step, rank])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        stage = self.stage
        begin, end = [0, *self._ends][stage - 1 : stage + 1]
        for name, network in self.networks.items():
            network.requires_grad_(name == ALONE[stage] if stage in ALONE else name != "deltas")
        for group in self.optimiser.param_groups:
            group["lr"] = config.lr * cosine((self.step - begin) / (end - begin))
        self.networks.train()
        self.optimiser.zero_grad(set_to_none=True)
        if stage == 1:
            frames = rng.choice(self.first, config.stage1_batch) + config.stride
            loss = self.losses.alignment(frames)
            loss.backward()  # type: ignore[no-untyped-call]
            metrics = {"loss": float(loss.detach())}
        elif stage == 4:
            metrics = self._predict(rng)
        else:
            first, lam = rng.choice(self.first, config.batch), self.lam
            steering: dict[str, float] = {}
            if stage == 2 and config.target_ratio and not config.fixed_ratio:
                held = rng.choice(self.held_first, config.batch)
                steering["argmax_ratio"] = float(self.losses.ratios_chosen(held, config.window).mean())
                lam *= math.exp(DAMPING * float(np.clip(self._short(steering), -FARTHEST, FARTHEST)))
            metrics = self.losses.window(first, config.window, self.temperatures, generator, lam=lam, deltas=stage == 3)
            metrics |= {"lam": lam, **steering}
        if size > 1:
            metrics = self._mean(metrics)
        if not math.isfinite(metrics["loss"]):
            raise InputError(
                f"the loss became {metrics['loss']} at step {self.step}; the last saved state is kept: "
                "resume with a lower --lr"
            )
        if size > 1:
            self._average()
        metrics["gradient"] = float(nn.utils.clip_grad_norm_(self.networks.parameters(), CLIP))
        self.optimiser.step()
        if "argmax_ratio" in metrics:
            self.lam *= math.exp(STEERING * self._short(metrics))
        self.step += 1
        return metrics

    def _predict(self, rng: np.random.Generator) -> dict[str, float]:
        """Let the predictor learn what ratios cost, on frames of the episodes trained on."""
        config, costs, ratios = self.config, self.costs, np.array(self.policy.config.ratios)
        shown, _ = self._shown
        if self._begins:
            self.policy.predictor.forget()
            for weight in self.policy.predictor.parameters():
                self.optimiser.state.pop(weight, None)
            self.lam = costs.of(shown).price(ratios, config.target_ratio) if config.target_ratio else self.lam
        scale = float(costs.divergence[shown].mean() + self.lam * (1 - ratios.mean()))
        loss, chosen = costs.of(rng.choice(shown, config.stage1_batch)).loss(self.losses, self.lam, scale)
        loss.backward()  # type: ignore[no-untyped-call]
        metrics = {"loss": float(loss.detach()), "lam": self.lam}
        return {**metrics, "argmax_ratio": chosen} if config.target_ratio else metrics

    @cached_property
    def kept_costs(self) -> KeptCosts:
        """Find where it is kept what ratios cost under the policy that the predictor's own stage begins with."""
        losses = LACLoss(self.vla, self.store, self.policy, "distill", exact=True)
        return KeptCosts(losses, store_folder(self.config), "" if self._begins else self.costs_name)

    @property
    def _begins(self) -> bool:
        return self.step == int(self._ends[2])

    def measure_costs(self, max_seconds: float = math.inf) -> bool:
        """Measure what ratios cost, unless it is known; of several processes the one of rank 0 does.

        Args:
            max_seconds: Stop, resumably, after this time.

        Returns:
            Whether all is measured.

        Raises:
            InputError: If it was known when the stage began, and is not there any more, or not noted.
        """
        (size, rank), kept = self.world, self.kept_costs
        if not self._begins and not self.costs_name:
            raise InputError(
                f"{self.config.out} holds a run whose predictor's steps an earlier version began, without a note of "
                "what they learned from: begin anew with another --out"
            )
        if not self._begins and not kept.whole:
            raise InputError(
                f"{kept.folder} is gone, from which the predictor has learned so far: give the --store that the run "
                "was begun with, or begin anew in another --out"
            )
        if rank == 0 and not kept.whole:
            kept.measure(max_seconds)
        if size > 1:
            dist.barrier()
        self.costs_name = kept.name
        return kept.whole

    @cached_property
    def costs(self) -> RatioCosts:
        """Read what every candidate ratio costs; measured first if need be."""
        self.measure_costs()
        return self.kept_costs.read()

    @cached_property
    def _shown(self) -> tuple[IntArray, IntArray]:
        """Number the measured frames of the episodes that are trained on, and of those held out."""
        _, held = divide_episodes(self.config, len(self.store.start))
        out = np.isin(self.losses.episode[self.costs.frames], held)
        return np.flatnonzero(~out), np.flatnonzero(out)

    def _short(self, metrics: Mapping[str, float]) -> float:
        """Measure how far the ratio that inference chooses falls short of the target, in units of 0.1."""
        return (self.config.target_ratio - metrics["argmax_ratio"]) / 0.1

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Compute losses on held-out windows, with the decisions of inference (argmax, no noise)."""
        rng = np.random.default_rng(0)
        self.networks.eval()
        rows = []
        windows = rng.permutation(self.held_first)[:VALIDATION_WINDOWS]
        for first in np.array_split(windows, max(1, math.ceil(len(windows) / self.config.batch))):
            row = {}
            if self.stage > 1 or not self.config.stage2_steps:
                window = partial(
                    self.losses.window, first, self.config.window, self.temperatures, None, lam=self.lam, learn=False
                )
                row = window()
                row.pop("loss")
                if self.config.delta_steps:
                    row["task_deltas"] = window(deltas=True)["task"]
            row["alignment"] = float(self.losses.alignment(first + self.config.stride))
            rows.append(row)
        found = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
        if self.policy.ratio is None and "task" in found:
            found |= self._variety()
        if "costs" in vars(self):
            _, held = self._shown
            if len(held):
                found |= {f"costs_{name}": value for name, value in self.costs.of(held).compare(self.losses).items()}
        return {f"held_out_{name}": value for name, value in found.items()}

    def _variety(self) -> dict[str, float]:
        """Describe how the predictor varies its ratio over held-out episodes, as far as the shortest goes.

        Episodes too short for a window are left out.
        """
        held = np.unique(self.losses.episode[self.held_first])
        shortest = int((self.store.stop - self.store.start)[held].min())
        chosen = self.losses.ratios_chosen(self.store.start[held], 1 + (shortest - 1) // self.config.stride)
        ratios = self.policy.config.ratios
        shares = {ratio: float(torch.isclose(chosen, torch.tensor(ratio)).float().mean()) for ratio in ratios}
        deviation = float(chosen.std(dim=0, correction=0).mean())
        return {"deviation": deviation, **{f"share_{ratio:g}": share for ratio, share in shares.items()}}

    @torch.no_grad()
    def pictures(self, length: int = 6) -> dict[str, Any]:
        """Collect images, scores and masks of every camera over held-out frames a stride apart, and chosen ratios."""
        first = int(self.held_first[len(self.held_first) // 2])
        stride, stop = self.config.stride, int(self.store.stop[self.losses.episode[first]])
        count = min(length, (stop - 1 - first) // stride)
        frames: IntArray = first + stride * (1 + np.arange(count))
        shown = {
            name: torch.from_numpy(np.asarray(self.store.images[name][frames - stride])) for name in self.store.grids
        }
        reference = [image.to(self.vla.device) for image in shown.values()]
        age = [torch.zeros(count, *grid, device=self.vla.device) for grid in self.store.grids.values()]
        self.networks.eval()
        choice = self.losses.choose(frames, reference, age, self.temperatures, None)
        found: dict[str, Any] = {"ratio": 1 - choice.mask.mean(dim=1).cpu().numpy()}
        for camera in self.store.layout.cameras:
            shape = (count, camera.rows, camera.cols)
            found[f"image_{camera.name}"] = np.asarray(self.store.images[camera.name][frames])
            found[f"score_{camera.name}"] = choice.scores[:, camera.tokens].view(shape).cpu().numpy()
            found[f"mask_{camera.name}"] = choice.mask[:, camera.tokens].view(shape).cpu().numpy() > 0.5
        return found

    def save(self) -> None:
        """Write the policy and its pictures, then the state to resume from, which says that they are there."""
        self.save_policy()
        state = {
            "step": self.step,
            "lam": self.lam,
            "seconds": self.seconds,
            "costs": self.costs_name,
            "networks": self.networks.state_dict(),
            "optimiser": self.optimiser.state_dict(),
        }
        save_state(self.config.out, state)

    def save_policy(self) -> None:
        """Write the policy and its pictures."""
        out = self.config.out
        metadata = {
            "training": describe(self.config),
            "steps": self.step,
            "seconds": round(self.seconds),
            "lam": self.lam,
            "frames": len(self.store),
            "episodes": len(self.store.start),
            "trained_with": provenance(),
        }
        self.policy.save_pretrained(out / SUBFOLDER, about=metadata)
        pictures = io.BytesIO()
        np.savez_compressed(pictures, **self.pictures())
        write_whole(out / PICTURES, pictures.getvalue())

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from the saved state.

        Raises:
            CheckpointError: If it is of another run.
        """
        path = self.config.out / STATE
        try:
            self.networks.load_state_dict(state["networks"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.step, self.lam, self.seconds = int(state["step"]), float(state["lam"]), float(state["seconds"])
            self.costs_name = str(state.get("costs", ""))
        except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path} is damaged or not a state of this run; give another --out: {error}"
            ) from error

    def _mean(self, metrics: dict[str, float]) -> dict[str, float]:
        """Average metrics over all processes: all steer λ alike, and all stop where the loss of one has broken."""
        values = torch.tensor(list(metrics.values()), device=self.vla.device)
        dist.all_reduce(values)
        return dict(zip(metrics, (values / self.world[0]).tolist(), strict=True))

    def _average(self) -> None:
        """Make the gradient the mean over all processes. The networks are small: no overlap is worth its machinery."""
        for weight in (weight for weight in self.networks.parameters() if weight.requires_grad):
            grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            dist.all_reduce(grad)
            weight.grad = grad / self.world[0]


def train(config: TrainConfig, *, max_seconds: float = math.inf) -> Path:
    """Train, or go on training, until all steps are done or the time is up.

    Under ``torchrun`` every process takes its own windows and its own GPU, and gradients are averaged.

    Args:
        config: The run. Should ``config.out`` hold a state, it is resumed.
        max_seconds: Stop (resumably) after this time.

    Returns:
        Folder of the saved policy.

    Raises:
        InputError: If dataset and model do not fit, the model has no tower that could reuse, the loss is not finite, or
            the folder cannot be written or is another process's.
    """
    begun_at = time.monotonic()
    size, rank = _join(config)
    with ExitStack() as stack:
        stack.enter_context(writing(config.out, "--out"))
        if rank == 0:
            _require_board(config)
            stack.enter_context(
                locked(
                    config.out / LOCK, f"another process trains in {config.out}: give another --out", ("store.lock",)
                )
            )
        state = load_state(config.out)
        if state is not None:  # without one, settings bind nothing
            check_settings(config.out, describe(config), CHANGEABLE)
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if config.device == "cuda" else config.device
        vla = load_vla(config.model, device=device, dtype="auto", unnorm_key=config.unnorm_key)
        vla.module.requires_grad_(False)
        if config.loss == "demo" and not vla.head.has_loss:
            raise InputError(f"{vla.name}'s head has no loss on recorded actions: train with --loss distill")
        tower = MixedTower(vla) if config.vision_kv_reuse else None
        if config.start is not None or config.proprio:
            first_policy(config, vla, vla.grids)  # what cannot be begun with is refused before anything is stored
        store = open_store(config, vla, () if tower is None else tower.cameras, rank)
        if config.proprio:
            check_states(store, store_folder(config))
        run = Training(config, vla, store, tower, (size, rank))
        if state is not None:
            run.resume(state)
        if rank == 0 and config.oracle_frames:
            trained = run.step == config.steps
            check_measured(config.out / FOLDER, _regret(run).settings(run.policy), () if trained else ("policy",))
        if rank == 0:  # nothing can be refused any more
            write_object(config.out / CONFIG, describe(config))
        _loop(run, rank, max_seconds)
        if rank == 0 and config.oracle_frames and run.step == config.steps:
            _measure(run, max_seconds - (time.monotonic() - begun_at))
    if size > 1:
        dist.destroy_process_group()
    return config.out / SUBFOLDER


def _regret(run: Training) -> RegretConfig:
    config, policy = run.config, run.policy
    max_age = frames_of_age(policy.config.max_age, config.stride)
    return RegretConfig(config.oracle_frames, config.oracle_noise, policy.recovery, max_age, config.seed)


def _measure(run: Training, max_seconds: float) -> None:
    """Compare the policy with oracles on the episodes held out."""
    config, store, policy, begun_at = run.config, run.store, run.policy, time.monotonic()
    if max_seconds <= 0:
        tqdm.write(UNMEASURED)
        return
    run.networks.eval()
    _, held = divide_episodes(config, len(store.start))
    folder, regret = config.out / FOLDER, _regret(run)
    settings = regret.settings(policy)
    check_measured(folder, settings)
    write_object(folder / SETTINGS, settings)
    streams = held_out_streams(run.vla, policy, config, [store.numbers[episode] for episode in held], folder)
    left = max_seconds - (time.monotonic() - begun_at)
    if not measure(streams, regret, folder, max_seconds=left):
        tqdm.write(UNMEASURED)


def _loop(run: Training, rank: int, max_seconds: float) -> None:
    config = run.config
    board = _board(run) if rank == 0 and config.tensorboard else None
    with (
        open_log(config.out, "step", run.step) if rank == 0 else Path(os.devnull).open("a", encoding="utf-8") as log,
        tqdm(total=config.steps, initial=run.step, unit="step", desc="training", disable=rank != 0) as bar,
    ):
        for metrics in _steps(run, rank, max_seconds):
            append(log, metrics)
            short = {key: value for key, value in metrics.items() if "_at_" not in key and "_share_" not in key}
            shown = {key: f"{value:.3g}" for key, value in short.items() if isinstance(value, float)}
            bar.set_postfix(shown)
            bar.update(run.step - bar.n)
            if board is not None:
                for name, value in metrics.items():
                    board.add_scalar(name, value, run.step)


def _steps(run: Training, rank: int, max_seconds: float) -> Iterator[dict[str, Any]]:
    """Train, yielding metrics every 10 steps and at every validation, which saves once they are noted."""
    before, start = run.seconds, time.monotonic()
    recent: list[dict[str, float]] = []
    if rank == 0 and run.step == run.config.steps and _steps_of_policy(run.config.out) != run.step:
        run.save_policy()
    while run.step < run.config.steps:
        stage, temperatures = run.stage, run.temperatures
        if stage == 4 and not run.measure_costs(max_seconds - (time.monotonic() - start)):
            if rank == 0:
                tqdm.write(UNMEASURED_COSTS)
                run.seconds = before + time.monotonic() - start
                run.save()
            return
        recent.append(run.advance())
        run.seconds = before + time.monotonic() - start
        done = run.step == run.config.steps or time.monotonic() - start > max_seconds
        saves = run.step % run.config.every == 0 or run.stage != stage or done
        if run.step % 10 == 0 or saves:
            means = {name: float(np.mean([row[name] for row in recent])) for name in recent[0]}
            note = {"step": run.step, "stage": stage, "seconds": round(run.seconds, 1)}
            if stage == 2:
                note |= {"tau_ratio": temperatures.ratio, "tau_score": temperatures.score}
            yield {**note, **means}
            recent = []
        if rank == 0 and saves:
            found = run.validate()
            yield {"step": run.step, "stage": stage, "seconds": round(run.seconds, 1), **found}
            run.save()
            if run.step == run.config.steps and (warning := collapse_warning(shares_chosen(found))):
                tqdm.write(f"warning: {warning}")
            if run.step == run.config.steps and (found_costs := told(found)):
                tqdm.write(found_costs)
        if done:
            return


def _steps_of_policy(out: Path) -> int | None:
    """Read after how many steps the saved policy was written; ``None`` if there is none that can be read."""
    try:
        LACPolicy.from_pretrained(out / SUBFOLDER)
        about = read_object(out / SUBFOLDER / "config.json", "save it again").get("about")
    except LacError:
        return None
    return about.get("steps") if isinstance(about, dict) else None


def _join(config: TrainConfig) -> tuple[int, int]:
    """Read the number of processes and this one's rank, as ``torchrun`` set them, and meet the others."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        dist.init_process_group("nccl" if config.device == "cuda" else "gloo")
    return size, int(os.environ.get("RANK", "0"))


def _require_board(config: TrainConfig) -> Any:
    if not config.tensorboard:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise MissingExtraError("tensorboard", "TensorBoard's event files") from error
    return SummaryWriter


def _board(run: Training) -> Any:
    """Open the event files; those of steps that come again are superseded."""
    return _require_board(run.config)(str(run.config.out / "tensorboard"), purge_step=run.step + 1)
