"""What a pretraining run depends on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class PretrainConfig:
    """What a pretraining run depends on.

    Attributes:
        dataset: LeRobot dataset with the demonstrations.
        out: Folder of the run: ``state.pt`` (to resume), ``metrics.jsonl``, ``model/`` (for ``load_vla``).
        coarse_samples: Frames shown in the coarse phase.
        fine_samples: Frames shown in the fine phase.
        batch: Frames a step.
        lr: Peak learning rate of AdamW; held, then taken linearly to zero over the last fifth of the run.
        weight_decay: Of AdamW.
        warmup: Steps to the peak.
        ema: Decay of the averaged weights, which are the ones saved.
        sigma: Width of the soft action targets at the start and at the end, in bins.
        noise: Share of teacher-forced action tokens replaced by chance.
        shift: Augmentation: images move by up to this share of their side.
        proprio_noise: Standard deviation of the noise on the normalised proprioception.
        proprio_dropout: Share of the frames whose proprioception is blanked.
        chunk: Actions that the training-only chunk head predicts.
        held_out: Share of the episodes kept for validation.
        every: Samples between two validations (and saved states).
        seed: Of everything.
        device: ``cpu`` or ``cuda``.
    """

    dataset: Path
    out: Path
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
    held_out: float = 0.03
    every: int = 20_000
    seed: int = 0
    device: str = "cpu"

    @property
    def samples(self) -> int:
        """Frames shown in all."""
        return self.coarse_samples + self.fine_samples


def describe(config: PretrainConfig) -> dict[str, Any]:
    """A configuration as plain data; of folders only the names."""
    return {key: value.name if isinstance(value, Path) else value for key, value in asdict(config).items()}
