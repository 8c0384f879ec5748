"""Training that is killed: at every file that it replaces, deletes or appends to, and started again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
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
from tests.training import test_pretrain
from tests.training.test_pretrain import tiny as tiny_recipe  # noqa: F401
from tests.training.test_train import dataset, model, short_run  # noqa: F401
from tests.training.worlds import tiny


class Killed(BaseException):
    """Nothing may handle it."""


@contextmanager
def killed_after(count: int) -> Iterator[list[str]]:
    """Kill whoever changes a file for the next time after ``count`` changes; yields the changes that were made.

    What is appended is cut in its middle first, as a kill may leave it.
    """
    made: list[str] = []
    patch = pytest.MonkeyPatch()

    def counted(name: str, change: Callable[..., Any], half: Callable[..., Any] | None = None) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            if len(made) == count:
                if half is not None:
                    half(*arguments)
                raise Killed
            made.append(f"{name} {arguments[-1] if name == 'replace' else arguments[0]}")
            return change(*arguments, **options)

        return wrapper

    def half_a_row(log: IO[str], row: Any) -> None:
        log.write(json.dumps(row)[:20])
        log.flush()

    for name in ("replace", "unlink", "truncate"):
        patch.setattr(os, name, counted(name, getattr(os, name)))
    for module in (train_module, pretrain_module):
        patch.setattr(module, "append", counted("append", run_files.append, half_a_row))
    try:
        yield made
    finally:
        patch.undo()


def every_kill(run: Callable[[Path], object], folder: Path) -> Iterator[Path]:
    """Folders of runs, each killed at another change of a file and begun again, until one is not killed."""
    for count in range(100):
        out = folder / str(count) / "run"
        try:
            with killed_after(count):
                run(out)
        except Killed:
            run(out)
            yield out
        else:
            assert count > 5
            return


def rows(out: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in found]


@pytest.fixture
def config(model: Path, dataset: Path, tmp_path: Path) -> TrainConfig:  # noqa: F811
    short = replace(short_run(model, dataset, tmp_path / "whole" / "run"), stage1_steps=1, stage2_steps=2, flow="none")
    FrameStore.build(load_vla(model), dataset, tmp_path / "store", flow="none", patch_pixels=short.patch_pixels)
    return replace(short, store=tmp_path / "store")


def test_a_run_killed_anywhere_ends_as_the_unbroken_one(config: TrainConfig, tmp_path: Path) -> None:
    train(config)
    state = torch.load(config.out / "state.pt", weights_only=True)
    for out in every_kill(lambda out: train(replace(config, out=out)), tmp_path / "broken"):
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
    for count in range(3):
        out = tmp_path / str(count) / "store"
        with killed_after(count), suppress(Killed):
            build(out)
        store = build(out)
        np.testing.assert_array_equal(store.visual, whole.visual)
        np.testing.assert_array_equal(store.targets, whole.targets)


def test_pretraining_killed_anywhere_ends_as_the_unbroken_one(dataset_of_pretraining: Path, tmp_path: Path) -> None:
    config = PretrainConfig(
        dataset_of_pretraining, tmp_path / "whole/run", coarse_samples=16, fine_samples=8, batch=8, every=16,
        held_out=0.25, warmup=2,
    )  # fmt: skip
    whole = load_vla(pretrain(config)).module.state_dict()
    for out in every_kill(lambda out: pretrain(replace(config, out=out)), tmp_path / "broken"):
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
