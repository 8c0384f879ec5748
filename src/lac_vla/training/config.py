"""The settings of a training run: of a policy (``lac train``), of a bundled VLA (``lac pretrain``)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from lac_vla.checks import check_device
from lac_vla.dataset_keys import DatasetKeys
from lac_vla.errors import InputError


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of ``lac pretrain``, which trains a small VLA on demonstrations.

    Attributes:
        dataset: LeRobot v3 dataset with the demonstrations, a folder or a hub id.
        out: Folder of the run: ``state.pt`` (to resume), ``metrics.jsonl``, ``model/`` (for ``load_vla``).
        model: Which one: ``mini`` (action tokens), ``mini-vit`` (the same, but a vision transformer sees the
            first camera), ``mini-cogact`` (the same trunk, CogACT's head), ``mini-oft`` (OpenVLA-OFT's attention and
            head), ``mini-widowx`` (that, for SIMPLER's WidowX: one camera, no proprioception; neither is bundled
            yet) or ``mini-flow`` (a small SmolVLA).
        start: Checkpoint whose weights the run starts from, as far as it has them; by default ``mini-flow``
            starts from the bundled ``mini-vit``, ``mini`` from random weights, all others from the bundled ``mini``.
        start_lr: Learning rate of these weights, as a share of ``lr``; not of a diffusion or chunk head's, which always
            learn at ``lr``.
        frozen_samples: Frames shown at first while these weights stay as they are: the new head alone is trained, or
            the new tower, which then imitates the old one.
        frozen_frames: How many frames that is, each shown several times: the trunk reads them once. Not of
            ``mini-flow``, whose prefix is run anew.
        coarse_samples: Frames shown in the coarse phase.
        fine_samples: Frames shown in the fine phase.
        batch: Frames a step.
        lr: Peak learning rate of AdamW; held, then taken linearly to zero over the last fifth of the run.
        weight_decay: Of AdamW.
        warmup: Steps to the peak.
        ema: Decay of the averaged weights, which are the ones saved.
        sigma: Width of the soft action targets at the start and at the end, in bins.
        noise: Share of teacher-forced action tokens replaced by random ones.
        shift: Augmentation: images move by up to this share of their side.
        proprio_noise: Standard deviation of the noise on the normalised proprioception.
        proprio_dropout: Share of the frames whose proprioception is blanked.
        chunk: Actions that the training-only chunk head predicts.
        draws: Noisings of every chunk of actions that a diffusion or flow-matching head learns from in a step.
        condition_dropout: Share of them that a diffusion head sees without a condition.
        held_out: Share of the episodes kept for validation.
        every: Samples between two validations (and saved states).
        seed: Of everything.
        keys: Names of what is read of the data set.
    """

    dataset: Path
    out: Path
    model: Literal["mini", "mini-vit", "mini-cogact", "mini-oft", "mini-widowx", "mini-flow"] = "mini"
    start: Path | None = None
    start_lr: float = 0.4
    frozen_samples: int = 0
    frozen_frames: int = 8192
    coarse_samples: int = 320_000
    fine_samples: int = 60_000
    batch: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: int = 300
    ema: float = 0.998
    sigma: tuple[float, float] = (6.0, 1.5)
    noise: float = 0.3
    shift: float = 0.03
    proprio_noise: float = 0.03
    proprio_dropout: float = 0.1
    chunk: int = 8
    draws: int = 8
    condition_dropout: float = 0.1
    held_out: float = 0.03
    every: int = 20_000
    seed: int = 0
    keys: Annotated[DatasetKeys, tyro.conf.arg(name="")] = field(default_factory=DatasetKeys)

    @property
    def samples(self) -> int:
        """Count the frames shown in all."""
        return self.coarse_samples + self.fine_samples


@dataclass(frozen=True)
class TrainConfig:
    """Settings of ``lac train``, which trains a LAC policy beside a frozen VLA in two stages.

    Attributes:
        model: Name of a bundled model, checkpoint folder, hub id, or plug-in.
        dataset: LeRobot v3 dataset, a folder or a hub id: demonstrations, or (with ``--loss distill``) plain
            observation logs.
        out: Folder of the run: ``state.pt`` (to resume), ``metrics.jsonl``, ``policy/`` (for ``--policies lac:path=``).
        loss: Task loss of stage II. ``distill``: divergence from the dense pass of the same model; ``demo``: the
            model's native loss on the recorded actions.
        lam: λ, the weight of the reward for a high expected cache ratio (eq. 7).
        target_ratio: If > 0, λ is steered so that the ratio that inference chooses, the likeliest, settles here in the
            mean over held-out frames; ``lam`` is where it begins. Ours.
        stage1_steps: Steps of stage I, attention alignment; 0 leaves it out.
        stage2_steps: Steps of stage II, joint training on windows.
        delta_steps: Steps that follow, on windows as in stage II: a third network learns how the keys and values of
            reused slots change, everything else frozen. ``--policies lac:deltas=true`` adds what it predicts. Ours.
        predictor_steps: Steps that follow, for the ratio predictor alone, everything else frozen: it learns what every
            candidate ratio costs, the divergence measured once on the cache that the policy's own decisions leave plus
            λ for the active tokens; then the likeliest ratio is the cheapest. ``--target-ratio`` steers λ. Ours.
        start: Policy whose networks the run starts from, its folder; 0 steps of a stage keep them as they are.
        stage1_batch: Frames a step in stage I.
        batch: Windows a step in stage II.
        window: T, frames; the first is dense, the others inherit the policy's own mixed cache.
        stride: Frames from each of them to the next: give the ``--actions-per-call`` of the evaluation.
        lr: Peak learning rate of AdamW, in both stages; it falls to a tenth along a cosine.
        tau_ratio: Gumbel-Softmax temperature τ at the start and the end of stage II (eq. 9).
        tau_score: Threshold sigmoid temperature τ_s at the start and the end of stage II (eq. 11).
        ratios: R, the candidate cache ratios, ascending from 0. Give finer ones at the top to let the predictor vary
            where reuse is high: 0 0.5 0.7 0.8 0.85 0.9 0.93 0.95 0.97 0.98, with a target below the largest.
        fixed_ratio: Train the selector alone at this cache ratio; 0 trains the predictor too.
        inputs: ``paper``: [image; flow]. ``extended``: also the change against every slot's own pixels, and its age.
        flow: Optical flow: ``dis``, ``raft_small`` or ``none``.
        language: Let both networks read the instruction.
        proprio: Let the ratio predictor read the proprioception, too, of a model that takes it, standardised. With
            ``--predictor-steps``, a policy of ``--start`` need not have read it. Ours.
        vision_kv_reuse: Train for the option ``vision_kv_reuse``: in the windows of stage II the vision transformers,
            too, reuse what the policy's own decisions left. The store then also holds what they see.
        recovery: Chance of a cached token to be recomputed at inference.
        width: Channels of the networks.
        depth: Residual convolutions of the networks.
        patch_pixels: Pixels per token side that the networks see.
        episodes: How many episodes to use, evenly spread; 0 for all.
        held_out: Share of them kept for validation.
        store: Folder of the stored embeddings; by default ``<out>/store``. Runs may share one.
        every: Steps between two validations (and saved states).
        oracle_frames: Held-out frames on which the trained policy is then compared with oracles, see
            ``docs/adaptivity.md``; 0 for none. Some seconds each. Ours.
        oracle_noise: Standard deviation of a camera's noise, in grey levels, on the pictures there: an oracle chooses
            under one draw of it and is scored under another. 0 for the pictures as they are: it then profits from luck.
        unnorm_key: Statistics key of the checkpoint, if it has several.
        tensorboard: Also write TensorBoard's event files, if it is installed.
        seed: Of everything.
        device: ``cpu`` or ``cuda``; under ``torchrun`` every process takes its own.
        keys: Names of what is read of the data set.
    """

    model: str
    dataset: Path
    out: Path
    loss: Literal["distill", "demo"] = "distill"
    lam: float = 0.1
    target_ratio: float = 0.0
    stage1_steps: int = 100
    stage2_steps: int = 160
    delta_steps: int = 0
    predictor_steps: int = 0
    start: Path | None = None
    stage1_batch: int = 32
    batch: int = 8
    window: int = 6
    stride: int = 1
    lr: float = 1e-3
    tau_ratio: tuple[float, float] = (1.0, 0.5)
    tau_score: tuple[float, float] = (0.1, 0.05)
    ratios: tuple[float, ...] = (0.0, 0.25, 0.5, 0.7, 0.8, 0.9)
    fixed_ratio: float = 0.0
    inputs: Literal["extended", "paper"] = "extended"
    flow: str = "dis"
    language: bool = False
    proprio: bool = False
    vision_kv_reuse: bool = False
    recovery: float = 0.05
    width: int = 32
    depth: int = 2
    patch_pixels: int = 4
    episodes: int = 0
    held_out: float = 0.1
    store: Path | None = None
    every: int = 50
    oracle_frames: int = 0
    oracle_noise: float = 2.0
    unnorm_key: str | None = None
    tensorboard: bool = False
    seed: int = 0
    device: str = "cpu"
    keys: Annotated[DatasetKeys, tyro.conf.arg(name="")] = field(default_factory=DatasetKeys)

    def __post_init__(self) -> None:
        if self.window < 2:
            raise InputError(f"window is {self.window}; caching is learned from at least 2 consecutive frames")
        if (
            min(self.stage1_batch, self.batch, self.every, self.stride) < 1
            or min(self.stage1_steps, self.stage2_steps, self.delta_steps, self.predictor_steps) < 0
        ):
            raise InputError("batches, --every and --stride must be at least 1, steps at least 0")
        if self.lam < 0:
            raise InputError(f"lam is {self.lam}; give at least 0")
        if not 0 <= self.target_ratio < 1:
            raise InputError(f"target_ratio is {self.target_ratio}; give a share of the tokens, e.g. 0.85; 0 for none")
        if not 0 <= self.fixed_ratio <= 1:
            raise InputError(f"fixed_ratio is {self.fixed_ratio}; give a share of the tokens, e.g. 0.8; 0 for none")
        if not 0 < self.held_out < 1:
            raise InputError(f"held_out is {self.held_out}; give a share of the episodes between 0 and 1")
        if min(*self.tau_ratio, *self.tau_score) <= 0:
            raise InputError("temperatures must be above 0")
        if self.oracle_frames < 0 or not 0 <= self.oracle_noise <= 255:
            raise InputError("--oracle-frames must be at least 0, --oracle-noise lie in 0..255 grey levels")
        if self.oracle_frames and self.vision_kv_reuse:
            raise InputError("oracles are tried on towers that look at everything: leave out --vision-kv-reuse")
        if self.predictor_steps and (self.fixed_ratio or self.vision_kv_reuse):
            raise InputError(
                "--predictor-steps train the ratio predictor, on towers that look at everything: leave out "
                "--fixed-ratio and --vision-kv-reuse"
            )
        check_device(self.device)

    @property
    def steps(self) -> int:
        """Count the steps of all stages."""
        return self.stage1_steps + self.stage2_steps + self.delta_steps + self.predictor_steps


def describe(config: PretrainConfig | TrainConfig) -> dict[str, Any]:
    """Turn a configuration into plain data; only the names of folders are kept."""
    content = asdict(config)
    content |= content.pop("keys")
    return {key: value.name if isinstance(value, Path) else value for key, value in content.items()}
