"""Oracles against finite differences, chance and a window of training; what is measured, and how it is resumed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.training.test_train import short_run, write_dataset
from tests.training.worlds import losses_of, save_with_tokenizer, store_of, tiny

from lac_vla import InputError, random_vla
from lac_vla.files import write_object
from lac_vla.report import build_training_report
from lac_vla.results.format import NONE
from lac_vla.results.regret import (
    BUDGETS,
    EPISODES,
    FIGURES,
    FOLDER,
    SETTINGS,
    WAYS,
    EpisodeRegret,
    FrameRegret,
    Regret,
    at_mean,
    priced,
    read_regret,
)
from lac_vla.training import precision
from lac_vla.training.config import TrainConfig
from lac_vla.training.lac import LACLoss
from lac_vla.training.noise import PixelNoise
from lac_vla.training.oracle import drop_order, first_masks, refresh_values, value_order
from lac_vla.training.store import FrameStore
from lac_vla.training.stream import HARD, Stream
from lac_vla.training.train import train


def stream_of(name: str = "tiny", *, double: bool = False) -> Stream:
    """A second frame behind a dense one, everything changed."""
    vla = tiny(name)
    if double:
        vla.module.double()
    losses = losses_of(vla, store_of(vla))
    stream = Stream(LACLoss(vla, losses.store, losses.policy, "distill", exact=True), 0)
    stream.next()
    return stream


@pytest.mark.parametrize("name", ["tiny", "cogact-tiny"])
def test_first_order_values_are_finite_differences(name: str) -> None:
    stream = stream_of(name, double=True)
    n = stream.losses.store.layout.n_visual
    masks = (torch.zeros(n).double(), torch.from_numpy(np.random.default_rng(0).random(n)))
    for mask in masks:
        values = refresh_values(stream.divergence, mask)
        for token in (0, 9, n - 1):
            step = torch.zeros(n).double()
            step[token] = 1e-4
            with torch.no_grad():
                slope = (stream.divergence((mask + step)[None]) - stream.divergence((mask - step)[None])) / 2e-4
            assert float(values[token]) == pytest.approx(-float(slope), rel=0.01, abs=1e-7)


def test_oracles_are_no_worse_than_chance() -> None:
    stream = stream_of()
    n, rng = stream.losses.store.layout.n_visual, np.random.default_rng(0)
    counts = [2, 6, 12, 18]
    for _ in range(3):
        value = value_order(stream.divergence, n)
        drop = drop_order(stream.divergence, value, 2, max(counts))
        assert sorted(drop.tolist()) == sorted(value.tolist()) == list(range(n))
        with torch.no_grad():
            by_value, by_drop = (stream.divergence(first_masks(order, counts)) for order in (value, drop))
            draws = [stream.divergence(first_masks(torch.from_numpy(rng.permutation(n)), counts)) for _ in range(8)]
        chance = torch.stack(draws).mean(dim=0)
        assert (by_drop <= chance).all()
        assert (by_drop <= by_value + 1e-7).float().mean() >= 0.5
        assert by_drop.sum() <= by_value.sum()
        assert by_value.sum() < chance.sum()
        stream.commit(first_masks(drop, [6])[0])
        stream.next()


def test_a_chunk_is_taken_for_what_it_really_brings() -> None:
    """Two tokens help together alone: values do not see it, drops of a chunk of both do."""

    def divergence(masks: torch.Tensor) -> torch.Tensor:
        return 3 - 2 * masks[:, 0] * masks[:, 1] - 0.5 * masks[:, 2] - 0.1 * masks[:, 3]

    value = value_order(divergence, 4)
    assert value.tolist() == [2, 3, 0, 1]
    assert drop_order(divergence, value, 2, 2).tolist() == [0, 1, 2, 3]
    assert drop_order(divergence, value, 1, 1).tolist() == [2, 3, 0, 1]


@pytest.mark.parametrize("name", ["tiny", "cogact-tiny", "oft-tiny"])
def test_every_decision_meets_the_same_chance(name: str) -> None:
    stream = stream_of(name)
    n = stream.losses.store.layout.n_visual
    mask = torch.from_numpy((np.random.default_rng(1).random(n) < 0.3).astype(np.float32))
    with torch.no_grad():
        found = stream.divergence(torch.stack([mask, torch.ones(n), mask]))
    assert float(found[0]) == pytest.approx(float(found[2]), rel=1e-4)
    assert float(found[1]) == pytest.approx(0.0, abs=1e-6)
    assert float(found[0]) > 1e-4


@pytest.mark.parametrize("name", ["tiny", "cogact-tiny", "oft-tiny", "smolvla-tiny"])
def test_rows_that_are_cached_need_not_be_computed(name: str) -> None:
    vla = tiny(name)
    losses = losses_of(vla, store_of(vla))
    losses.exact = True
    n, rng = losses.store.layout.n_visual, np.random.default_rng(0)
    masks = torch.stack([first_masks(torch.from_numpy(rng.permutation(n)), [n // 3])[0] for _ in range(3)])
    with torch.no_grad():
        old = losses.decode(np.array([0, 8, 16])).store.slots
        dense = losses.decode(np.array([1, 9, 17])).context()
        whole, compact = (
            losses.decode(np.array([1, 9, 17]), mask=masks, old=old, compact=compact) for compact in (False, True)
        )
        targets = losses.load(losses.store.targets, np.array([1, 9, 17]))
        by_whole, by_compact = (
            vla.head.loss(each.context(), targets, torch.Generator().manual_seed(0), dense) for each in (whole, compact)
        )
    torch.testing.assert_close(by_compact, by_whole, rtol=1e-4, atol=1e-6)
    assert float(by_whole.min()) > 0
    for kept in ("keys", "values"):
        for one, other in zip(getattr(compact.store.slots, kept), getattr(whole.store.slots, kept), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_stream_is_a_window_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "AUTOCAST", False)
    vla = tiny()
    losses = losses_of(vla, store_of(vla))
    torch.nn.init.normal_(losses.policy.predictor.head.weight, std=3.0)
    window = losses.window(np.array([8]), 5, HARD, None, lam=0.0, learn=False)
    stream, divergences, ratios = Stream(losses, 8), [], []
    for _ in range(4):
        stream.next()
        mask = stream.choice().mask[0]
        with torch.no_grad():
            divergences.append(float(stream.divergence(mask[None])))
        ratios.append(1 - float(mask.mean()))
        stream.commit(mask)
    assert len(set(ratios)) > 1
    assert np.mean(ratios) == pytest.approx(window["chosen_ratio"], abs=1e-6)
    assert np.mean(divergences) == pytest.approx(window["task"], rel=1e-4)


SHARES = np.array([0.0, 0.5, 1.0])


def test_the_best_shares_spend_where_it_is_hard() -> None:
    """Of two frames, one loses everything without half its tokens, the other nothing."""
    tried = np.array([[[0.0, 0.0, 0.0]], [[8.0, 0.0, 0.0]]])
    costs, divergences = priced(tried, SHARES)
    means = costs.mean(axis=1), divergences.mean(axis=1)
    assert at_mean(*means, [0.25]) == pytest.approx([0.0])
    assert at_mean(*means, [0.125]) == pytest.approx([2.0]), "chance: every other time"
    assert np.interp(0.25, SHARES, tried.mean(axis=(0, 1))) == pytest.approx(2.0), "of a fixed share"


def test_luck_is_no_gain() -> None:
    """Frames that are all alike but for noise: an oracle that is scored on what it chose by thinks it gains."""
    noise = np.random.default_rng(0).gamma(0.5, 1.0, (4000, 2, 3)) * np.array([2.0, 1.0, 0.0])
    gains = []
    for tried in (noise[:, :1], noise):
        costs, divergences = priced(tried, SHARES)
        found = at_mean(costs.mean(axis=1), divergences.mean(axis=1), [0.3])
        gains.append(1 - float(found[0]) / float(np.interp(0.3, SHARES, tried.mean(axis=(0, 1)))))
    lucky, honest = gains
    assert lucky > 0.2
    assert abs(honest) < 0.05


def test_noise_is_a_camera_s() -> None:
    image = np.full((64, 64, 3), 100, np.uint8)
    noise = PixelNoise(2.0, 1)
    one, same = (noise.add({"a": image}, noise.generator(3))["a"] for _ in range(2))
    other = PixelNoise(2.0, 2).add({"a": image}, PixelNoise(2.0, 2).generator(3))["a"]
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)
    assert float(one.std()) == pytest.approx(2.0, rel=0.05)
    assert float(one.mean()) == pytest.approx(100.0, abs=0.1)
    assert np.array_equal(PixelNoise().add({"a": image}, noise.generator(3))["a"], image)


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    model = save_with_tokenizer(random_vla("tiny"), tmp_path / "tiny")
    run = short_run(model, write_dataset(tmp_path / "demos"), tmp_path / "run")
    return replace(run, held_out=0.5, stage2_steps=1)


def test_a_run_ends_with_its_regret_and_goes_on_where_it_was_stopped(config: TrainConfig, tmp_path: Path) -> None:
    measured = replace(config, oracle_frames=6)
    train(measured)
    folder = measured.out / FOLDER
    found = read_regret(folder)
    assert found is not None
    assert (found.episodes, found.streams) == (2, 2)
    assert 4 <= found.frames <= 6
    figures = json.loads((folder / FIGURES).read_text())
    assert figures["frames"] == found.frames
    assert set(figures["regret"]) == {*WAYS, "best"}
    assert len(figures["regret"]["lac"]) == len(BUDGETS)
    assert figures["regret"]["drop"] == [0.0] * len(BUDGETS)
    whole = (folder / EPISODES).read_text()
    stores = [FrameStore.open(folder / f"stream-{seed}") for seed in range(2)]
    assert stores[0].numbers == stores[1].numbers
    assert not np.array_equal(stores[0].images["agentview"], stores[1].images["agentview"])
    (folder / EPISODES).write_text(whole[: len(whole) * 2 // 3])  # killed in the second episode
    train(measured)
    assert (folder / EPISODES).read_text() == whole
    page = build_training_report(measured.out, tmp_path / "page.html").read_text()
    assert "How far from an oracle" in page
    assert "selector, best ratio of each frame" in page
    assert found.gain == [None] * len(BUDGETS), "two episodes"
    assert figures["settings"]["policy"] == json.loads((folder / SETTINGS).read_text())["policy"]
    assert figures["measured_with"]["versions"]["torch"] == torch.__version__
    before = (measured.out / "config.json").read_text()
    for change in ({"oracle_noise": 1.0}, {"oracle_frames": 5}):
        with pytest.raises(InputError, match=f"delete {folder}"):
            train(replace(measured, **change))  # type: ignore[arg-type]
    assert (measured.out / "config.json").read_text() == before
    settings = json.loads((folder / SETTINGS).read_text())
    write_object(folder / SETTINGS, {**settings, "policy": "another"})
    with pytest.raises(InputError, match="policy"):
        train(measured)
    without = {key: value for key, value in settings.items() if key != "shares"}
    for damaged in (without, {**settings, "shares": "x"}, {**settings, "shares": [0.5]}):
        write_object(folder / SETTINGS, damaged)
        with pytest.raises(InputError, match=f"delete {folder}"):
            build_training_report(measured.out, tmp_path / "page.html")


def test_a_fixed_ratio_is_measured_at_its_own_share(config: TrainConfig, capfd: pytest.CaptureFixture[str]) -> None:
    measured = replace(config, oracle_frames=2, fixed_ratio=0.63, stage1_steps=1, stage2_steps=0)
    train(measured, max_seconds=1e-9)
    assert not (measured.out / FOLDER).exists(), "the time was up"
    assert "the same command goes on" in "".join(capfd.readouterr())
    train(measured)
    found = read_regret(measured.out / FOLDER)
    assert found is not None
    assert found.predicted is None
    assert "predictor" not in " ".join(found.table().notes)
    assert 0.37 in json.loads((measured.out / FOLDER / SETTINGS).read_text())["shares"]


def test_ages_are_in_frames(monkeypatch: pytest.MonkeyPatch, config: TrainConfig) -> None:
    """A session that executes three actions of a chunk refreshes after a third of the frames."""
    ages: list[int] = []
    monkeypatch.setattr("lac_vla.training.train.held_out_streams", lambda *args: [])
    monkeypatch.setattr(
        "lac_vla.training.train.measure", lambda streams, regret, *args, **time: ages.append(regret.max_age)
    )
    train(replace(config, oracle_frames=2, stride=3, stage1_steps=1, stage2_steps=0))
    assert ages == [16 // 3]


def test_few_episodes_and_no_loss_have_no_interval() -> None:
    shares = [0.0, 0.5]

    def regret(count: int, worst: float) -> Regret:
        row = {way: [[worst, worst / 2], [worst, worst / 2]] for way in WAYS}
        frames = [FrameRegret(at, row, [0.5, 0.5], 0.5, [worst / 2] * 2) for at in range(2)]
        return Regret.of([EpisodeRegret(number, frames) for number in range(count)], shares)

    assert regret(2, 1.0).gain == [None] * len(BUDGETS)
    assert None not in regret(3, 1.0).gain
    still = regret(3, 0.0)
    assert still.gain == [None] * len(BUDGETS)
    assert "nan" not in json.dumps(still.to_json()).lower()
    assert {row[0]: row[1] for row in still.table().rows}["gain of the best ratios, 95 %"] == NONE


def test_nothing_is_measured_unless_asked(config: TrainConfig) -> None:
    train(config)
    assert not (config.out / FOLDER).exists()
    for change in ({"oracle_frames": -1}, {"oracle_noise": -1.0}, {"oracle_frames": 3, "vision_kv_reuse": True}):
        with pytest.raises(InputError, match="oracle"):
            replace(config, **change)  # type: ignore[arg-type]
