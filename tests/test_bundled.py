"""The bundled models: what they must be, and that they close the loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from lac_vla import CachedVLA, CachePolicy, Dense, Frame, Motion, load_vla
from lac_vla.bundled import MINI, MINI_COGACT, MINI_FLOW, MINI_VIT
from lac_vla.cost import CostModel
from lac_vla.evaluation.ensemble import AdaptiveEnsemble
from lac_vla.evaluation.rollout import EpisodeLog, rollout
from lac_vla.sims.libero.env import LiberoEnv
from lac_vla.sims.libero.suites import FIRST_HELD_OUT


def black() -> Frame:
    images = {camera: np.zeros((256, 256, 3), np.uint8) for camera in ("agentview", "wrist")}
    return Frame(images, "pick up the black bowl on the stove and place it on the plate", np.zeros(8, np.float32))


@pytest.mark.parametrize(("folder", "shape"), [(MINI, (7,)), (MINI_VIT, (7,)), (MINI_COGACT, (16, 7))])
def test_it_is_worth_caching(folder: Path, shape: tuple[int, ...]) -> None:
    """At least 128 visual tokens, and the decoder the larger part of the cost."""
    vla = load_vla(folder)
    session = CachedVLA(vla).session()
    action = session.act(black())
    assert action.shape == shape
    assert np.abs(action).max() <= 1.01
    step = session.last_info
    assert step is not None
    assert step.layout.n_visual >= 128
    macs = CostModel.of(vla, black()).step(step)
    assert macs["prefill"] > 0.5 * sum(macs.values())


def test_the_small_smolvla_costs_where_the_large_one_does() -> None:
    """Its tower is the larger part: what its tokens save in the decoder alone is less than half of a frame."""
    vla = load_vla(MINI_FLOW)
    session = CachedVLA(vla).session()
    action = session.act(black())
    assert action.shape == (10, 7)
    assert np.abs(action[:, :6]).max() <= 1.5
    step = session.last_info
    assert step is not None
    assert step.layout.n_visual == 2 * 49
    macs = CostModel.of(vla, black()).step(step)
    assert macs["tower"] > 0.5 * sum(macs.values()) > macs["prefill"] > 0.2 * sum(macs.values())
    assert sum(weight.numel() for weight in vla.module.parameters()) < 6e6


@pytest.mark.parametrize("folder", [MINI, MINI_VIT, MINI_COGACT, MINI_FLOW])
def test_it_is_small_and_documented(folder: Path) -> None:
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert sum(files.values()) < 20e6
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert {"dataset_statistics.json", "policy_preprocessor.json"} & set(files)


@pytest.fixture(scope="module")
def env() -> Iterator[LiberoEnv]:
    with closing(LiberoEnv("libero_spatial", 0)) as environment:
        yield environment


DENSE, REUSE = Dense(), Motion(0.5)


@pytest.mark.sim
@pytest.mark.parametrize(
    ("folder", "policy", "ensemble"),
    [
        pytest.param(MINI, DENSE, None, id="mini-dense"),
        pytest.param(MINI_VIT, REUSE, None, id="mini-vit-reuse"),
        pytest.param(MINI, REUSE, None, id="mini-reuse", marks=pytest.mark.slow),
        pytest.param(MINI_VIT, DENSE, None, id="mini-vit-dense", marks=pytest.mark.slow),
        pytest.param(MINI_COGACT, DENSE, AdaptiveEnsemble(4), id="mini-cogact-dense", marks=pytest.mark.slow),
        pytest.param(MINI_COGACT, REUSE, AdaptiveEnsemble(4), id="mini-cogact-reuse", marks=pytest.mark.slow),
    ],
)
def test_it_solves_a_task(env: LiberoEnv, folder: Path, policy: CachePolicy, ensemble: AdaptiveEnsemble | None) -> None:
    """Initial states that no demonstration used; two tries, as another processor rounds otherwise."""
    session = CachedVLA(load_vla(folder), policy).session()
    logs = (EpisodeLog(env, session, "any", FIRST_HELD_OUT + k, ensemble=ensemble) for k in range(2))
    assert any(record.success for record in map(rollout, logs))
