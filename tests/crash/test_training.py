"""Training that is killed: at every file that it replaces, deletes or appends to, and started again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import torch

from lac_vla import InputError, LACPolicy, load_vla
from lac_vla.files import locked
from lac_vla.training import pretrain as pretrain_module
from lac_vla.training import run_files
from lac_vla.training import train as train_module
from lac_vla.training.config import PretrainConfig, TrainConfig
from lac_vla.training.pretrain import pretrain
from lac_vla.training.store import FrameStore
from lac_vla.training.train import train
from tests.crash.kills import run_killed
from tests.training import test_pretrain
from tests.training.test_pretrain import tiny as tiny_recipe  # noqa: F401
from tests.training.test_train import dataset, model, short_run  # noqa: F401
from tests.training.worlds import tiny

SHORT = 9
"""Of so many kills, `make test` tries one."""
EVERY = [pytest.param(first, marks=[] if first == 4 else pytest.mark.slow) for first in range(SHORT)]


def append_in_two(log: IO[str], row: Any) -> None:
    """Half a row is on the disk at the moment of a change."""
    line = json.dumps(row) + "\n"
    for part in (line[:20], line[20:]):
        log.write(part)
        log.flush()
        os.fsync(log.fileno())


def every_kill(run: Callable[[Path], object], folder: Path, first: int) -> Iterator[Path]:
    """Folders of runs, each killed at another change, ``SHORT`` changes apart, and begun again; until none is left."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (train_module, pretrain_module):
            patch.setattr(module, "append", append_in_two)
        for at in range(first, 500, SHORT):
            out = folder / str(at) / "run"
            if not run_killed(at, lambda out=out: run(out)):  # type: ignore[misc]
                assert at > 20
                return
            run(out)
            yield out


def rows(out: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in found]


@pytest.fixture
def config(model: Path, dataset: Path, tmp_path: Path) -> TrainConfig:  # noqa: F811
    short = replace(short_run(model, dataset, tmp_path / "whole" / "run"), stage1_steps=1, stage2_steps=2, flow="none")
    FrameStore.build(load_vla(model), dataset, tmp_path / "store", flow="none", patch_pixels=short.patch_pixels)
    return replace(short, store=tmp_path / "store")


@pytest.mark.parametrize("first", EVERY)
def test_a_run_killed_anywhere_ends_as_the_unbroken_one(config: TrainConfig, tmp_path: Path, first: int) -> None:
    train(config)
    state = torch.load(config.out / "state.pt", weights_only=True)
    for out in every_kill(lambda out: train(replace(config, out=out)), tmp_path / "broken", first):
        found = torch.load(out / "state.pt", weights_only=True)
        assert found["step"] == 3
        for name, weight in state["networks"].items():
            assert torch.equal(found["networks"][name], weight), (out, name)
        policy = LACPolicy.from_pretrained(out)
        for name, weight in policy.networks.state_dict().items():
            assert torch.equal(weight, state["networks"][name]), (out, name)
        assert json.loads((out / "policy/config.json").read_text())["about"]["steps"] == 3
        assert rows(out) == rows(config.out), out
        with np.load(config.out / "saliency.npz") as one, np.load(out / "saliency.npz") as other:
            assert all(np.array_equal(one[name], other[name]) for name in one.files)


def test_a_policy_that_is_not_the_states_is_written_again(config: TrainConfig) -> None:
    """As a run leaves it that was killed between the state and the policy, in an order of before."""
    train(config)
    path = config.out / "policy/config.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole | {"about": whole["about"] | {"steps": 1}}))
    train(config)
    assert json.loads(path.read_text())["about"]["steps"] == 3
    (config.out / "policy/model.safetensors").write_bytes(b"half")
    train(config)
    LACPolicy.from_pretrained(config.out)


def test_a_store_killed_anywhere_is_whole_in_the_end(model: Path, dataset: Path, tmp_path: Path) -> None:  # noqa: F811
    vla = load_vla(model)

    def build(out: Path) -> FrameStore:
        return FrameStore.build(vla, dataset, out, flow="none", patch_pixels=4)

    whole = build(tmp_path / "whole")
    for at in count():
        out = tmp_path / str(at) / "store"
        if not run_killed(at, lambda out=out: build(out)):  # type: ignore[misc]
            assert at > 3
            break
        store = build(out)
        np.testing.assert_array_equal(store.visual, whole.visual)
        np.testing.assert_array_equal(store.targets, whole.targets)


@pytest.mark.parametrize("first", EVERY)
def test_pretraining_killed_anywhere_ends_as_the_unbroken_one(
    dataset_of_pretraining: Path, tmp_path: Path, first: int
) -> None:
    config = PretrainConfig(
        dataset_of_pretraining, tmp_path / "whole/run", coarse_samples=16, fine_samples=8, batch=8, every=16,
        held_out=0.25, warmup=2,
    )  # fmt: skip
    whole = load_vla(pretrain(config)).module.state_dict()
    for out in every_kill(lambda out: pretrain(replace(config, out=out)), tmp_path / "broken", first):
        for name, weight in load_vla(out / "model").module.state_dict().items():
            assert torch.equal(weight, whole[name]), (out, name)
        assert json.loads((out / "model/lac.json").read_text())["samples_shown"] == 24
        assert rows(out) == rows(config.out), out


dataset_of_pretraining = test_pretrain.dataset


def test_a_folder_has_one_process(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "whole")
    with locked(config.out / run_files.LOCK, "unused"), pytest.raises(InputError, match="another process trains in"):
        train(replace(config, out=tmp_path / "link" / "run"))
    assert not (config.out / "config.json").exists()
    other = replace(config, store=tmp_path / "other")
    with locked(tmp_path / "other.lock", "unused"), pytest.raises(InputError, match="another process fills"):
        FrameStore.build(tiny(), config.dataset, tmp_path / "other", flow="none", patch_pixels=4)
    train(other)
