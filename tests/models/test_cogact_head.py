"""CogACT's action head, samplers and ensemble: against outputs of the official code, and against their definitions."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lac_vla.errors import CheckpointError, InputError
from lac_vla.evaluation.ensemble import AdaptiveEnsemble
from lac_vla.models.heads.diffusion import DiffusionModel
from lac_vla.models.heads.dit import DIT, DiTConfig
from lac_vla.models.heads.sampler import Sampling, Schedule, ddim, ddpm, strided

GOLDENS = Path(__file__).parents[1] / "goldens"

Arrays = dict[str, np.ndarray[Any, Any]]


@pytest.fixture(scope="module")
def expected() -> Arrays:
    with np.load(GOLDENS / "cogact_action_golden.npz") as data:
        return dict(data)


@pytest.fixture(scope="module")
def head(fill_head: Callable[..., torch.Tensor]) -> DiffusionModel:
    """The golden head; its embedding of past actions, which no output depends on, is left out."""
    head = DiffusionModel(DiTConfig(64, 3, 4))
    keys = json.loads((GOLDENS / "cogact_action_keys.json").read_text())
    weights = {key: fill_head(key, shape) for key, shape in keys.items() if "history_embedder" not in key}
    head.load_state_dict(weights)
    return head.eval()


def counting(noise: torch.Tensor) -> tuple[Any, list[int]]:
    """A source of noise, and how often it was asked."""
    asked: list[int] = []

    def draw() -> torch.Tensor:
        asked.append(1)
        return noise

    return draw, asked


@torch.inference_mode()
def test_predicted_noise_is_the_official_one(head: DiffusionModel, expected: Arrays) -> None:
    x, t, z = (torch.from_numpy(expected[name]) for name in ("noise", "t", "z"))
    np.testing.assert_allclose(head.net(x, t, z).numpy(), expected["eps"], rtol=1e-5, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("steps", [5, 10])
@pytest.mark.parametrize(("guidance", "name"), [(1.5, "cfg"), (1.0, "nocfg")])
def test_ddim_samples_are_the_official_ones(
    head: DiffusionModel, expected: Arrays, steps: int, guidance: float, name: str
) -> None:
    draw, asked = counting(torch.from_numpy(expected["noise"]))
    drawn = head.sample(torch.from_numpy(expected["z"]), Sampling(steps=steps, guidance=guidance), draw)
    # Values up to 25 pass 10 times through the network: 1e-5 of the largest.
    largest = np.abs(expected[f"ddim{steps}_{name}"]).max()
    np.testing.assert_allclose(drawn.numpy(), expected[f"ddim{steps}_{name}"], rtol=0, atol=1e-5 * largest)
    assert len(asked) == 1


def test_schedule_is_the_official_one(expected: Arrays) -> None:
    schedule = Schedule(100)
    np.testing.assert_allclose(schedule.betas, expected["betas"], rtol=1e-12)
    np.testing.assert_allclose(schedule.posterior_variance, expected["posterior_variance"], rtol=1e-12)
    for steps in (5, 10):
        assert list(strided(100, steps)) == expected[f"ddim{steps}_timesteps"].tolist()


def test_ensemble_is_the_official_one(expected: Arrays) -> None:
    ensemble = AdaptiveEnsemble(horizon=3, alpha=0.1)
    for _ in range(2):
        actions = [ensemble(chunk) for chunk in expected["ensemble_in"]]
        np.testing.assert_allclose(actions, expected["ensemble_out"], rtol=1e-6, atol=1e-7)
        ensemble.reset()


@pytest.mark.parametrize("method", ["ddim", "ddpm"])
def test_sampler_that_is_told_the_noise_finds_the_data(method: str) -> None:
    schedule = Schedule()
    data = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)

    def draw() -> torch.Tensor:
        return torch.randn(data.shape, generator=generator, dtype=torch.float64)

    def oracle(x: torch.Tensor, t: int) -> torch.Tensor:
        left = schedule.alpha_bar[t]
        return (x - left**0.5 * data) / (1 - left) ** 0.5

    found = ddim(oracle, draw, schedule, 10) if method == "ddim" else ddpm(oracle, draw, schedule)
    torch.testing.assert_close(found, data)


def test_a_step_of_ddpm_has_the_official_mean_and_variance(expected: Arrays) -> None:
    """DDPM's eqs. 6 and 7 with the official schedule, for a prediction and noise that are always 0.3 and 1."""
    beta, variance = expected["betas"], expected["posterior_variance"]
    left = np.cumprod(1 - beta)
    x = 1.0
    for t in reversed(range(100)):
        before = left[t - 1] if t else 1.0
        clean = (x - np.sqrt(1 - left[t]) * 0.3) / np.sqrt(left[t])
        mean = np.sqrt(before) * beta[t] * clean + np.sqrt(1 - beta[t]) * (1 - before) * x
        x = mean / (1 - left[t]) + np.sqrt(variance[t]) * (t > 0)
    one = torch.ones((), dtype=torch.float64)
    drawn = ddpm(lambda x, t: 0.3 * one, lambda: one, Schedule())
    assert float(drawn) == pytest.approx(x, rel=1e-9)


@pytest.mark.parametrize("steps", [5, 10, 25, None])
def test_samples_are_those_of_diffusers(steps: int | None) -> None:
    """DDIM's with that many steps, or DDPM's, for the best prediction of normal data's noise."""
    diffusers = pytest.importorskip("diffusers")
    schedule, mean, variance = Schedule(), 0.4, 0.25
    options = {"num_train_timesteps": 100, "beta_schedule": "squaredcos_cap_v2", "clip_sample": False}

    def denoise(x: torch.Tensor, t: int) -> torch.Tensor:
        left = float(schedule.alpha_bar[t])
        return (x - np.sqrt(left) * mean) * np.sqrt(1 - left) / (left * variance + 1 - left)

    def normal(generator: torch.Generator) -> torch.Tensor:
        return torch.randn(2, 16, 7, generator=generator)

    ours, theirs = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    x = normal(theirs)
    if steps is None:
        expected, scheduler = ddpm(denoise, lambda: normal(ours), schedule), diffusers.DDPMScheduler(**options)
    else:
        expected = ddim(denoise, lambda: normal(ours), schedule, steps)
        scheduler = diffusers.DDIMScheduler(**options, timestep_spacing="leading")
    scheduler.set_timesteps(steps or 100)
    for t in scheduler.timesteps.tolist():
        x = scheduler.step(denoise(x, t), t, x, generator=theirs).prev_sample
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-5)


def test_ddpm_draws_from_the_distribution_of_the_data() -> None:
    """For normal data the best prediction of the noise is linear."""
    schedule, mean, deviation = Schedule(), 0.4, 0.6
    generator = torch.Generator().manual_seed(0)
    asked: list[int] = []

    def draw() -> torch.Tensor:
        asked.append(1)
        return torch.randn(20000, generator=generator)

    def best(x: torch.Tensor, t: int) -> torch.Tensor:
        left = float(schedule.alpha_bar[t])
        return (1 - left) ** 0.5 * (x - left**0.5 * mean) / (left * deviation**2 + 1 - left)

    drawn = ddpm(best, draw, schedule)
    assert float(drawn.mean()) == pytest.approx(mean, abs=0.02)
    assert float(drawn.std()) == pytest.approx(deviation, rel=0.03)
    assert len(asked) == schedule.steps  # the last step adds no noise


@torch.inference_mode()
def test_ddpm_of_the_head_asks_for_noise_in_every_step(head: DiffusionModel, expected: Arrays) -> None:
    draw, asked = counting(torch.from_numpy(expected["noise"]))
    drawn = head.sample(torch.from_numpy(expected["z"]), Sampling("ddpm"), draw)
    assert drawn.shape == (1, 16, 7)
    assert drawn.isfinite().all()
    assert len(asked) == 100


@pytest.mark.parametrize(("name", "millions"), [("DiT-S", 13), ("DiT-B", 89), ("DiT-L", 308)])
def test_published_heads_have_the_published_size(name: str, millions: int) -> None:
    """Parameters as CogACT reports them, in millions."""
    with torch.device("meta"):
        head = DiffusionModel(DIT[name])
    assert sum(weight.numel() for weight in head.parameters()) / 1e6 == pytest.approx(millions, rel=0.05)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"steps": 11}, "no stride"),
        ({"steps": 0}, "no stride"),
        ({"method": "euler"}, "euler"),
        ({"guidance": 0.5}, "at least 1"),
    ],
)
def test_samplings_without_sense(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(Sampling(), **setting)


@pytest.mark.parametrize("change", [{"heads": 5}, {"depth": 0}])
def test_heads_without_sense(change: dict[str, int]) -> None:
    with pytest.raises(CheckpointError, match=r"no multiple|at least 1"):
        replace(DIT["DiT-S"], **change)


def test_a_refused_chunk_leaves_the_ensemble_as_it_was() -> None:
    ensemble, same = AdaptiveEnsemble(horizon=2), AdaptiveEnsemble(horizon=2)
    chunks = np.random.default_rng(0).normal(size=(2, 4, 7)).astype(np.float32)
    ensemble(chunks[0])
    same(chunks[0])
    for chunk in (chunks[0, 0], chunks[0, :1], chunks[0, :, :6]):
        with pytest.raises(InputError, match=r"that many actions|reset\(\)"):
            ensemble(chunk)
    np.testing.assert_array_equal(ensemble(chunks[1]), same(chunks[1]))
    with pytest.raises(InputError, match="horizon"):
        AdaptiveEnsemble(horizon=0)
