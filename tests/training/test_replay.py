"""``lac replay``: its sessions are real ones, frame by frame; what follows from them; resumed and refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.training.recorded import LENGTHS, MAX_AGE, Recorded, record, session_of
from tests.training.worlds import save_with_tokenizer, tiny

from lac_vla import InputError, LACPolicy
from lac_vla.cli import main
from lac_vla.factory import make_policies
from lac_vla.results.replay import Replay
from lac_vla.results.replay_log import Calls, EpisodeReplay
from lac_vla.training.lac import LACLoss
from lac_vla.training.replay import FIGURES, FRAMES, replay
from lac_vla.training.replay_config import ReplayConfig
from lac_vla.training.store import FrameStore
from lac_vla.training.stream import Stream


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    return record(tmp_path_factory.mktemp("recorded"))


@pytest.fixture
def config(world: Recorded, tmp_path: Path) -> ReplayConfig:
    return ReplayConfig(
        world.dataset,
        str(world.model),
        tmp_path / "replay",
        policies=("dense", f"own@lac:path={world.policy}", "motion:ratio=0.6,keep=wrist", "periodic:every=3"),
        held_out=1,
        max_age=MAX_AGE,
        contact=1,
    )


def test_every_policy_does_what_it_does_in_a_real_session(world: Recorded, config: ReplayConfig) -> None:
    found = replay(config)
    assert [episode.episode for episode in found.episodes] == [0, 1, 2, 3]
    vla, store = world.vla(), FrameStore.open(config.out / "store")
    losses = LACLoss(vla, store, LACPolicy.from_pretrained(world.policy), "distill", exact=True)
    recovered = 0
    for name, policy in make_policies(config.policies, config.model).items():
        for episode, first in zip(found.episodes, store.start, strict=True):
            calls, stream = episode.methods[name], Stream(losses, int(first))
            assert [*episode.frames] == [*range(1, LENGTHS[episode.episode])]
            for at, (_, _, info) in enumerate(session_of(world, vla, policy, episode.episode)):
                assert calls.active[at] == pytest.approx(info.active.mean(), abs=1e-9), (name, episode.episode, at)
                assert calls.nominal[at] == info.nominal_ratio
                for camera, ratio in info.camera_ratios.items():
                    assert calls.reuse[camera][at] == pytest.approx(ratio, abs=1e-9)
                recovered += int(info.recovered.sum())
                stream.next()
                mask = torch.from_numpy(info.active).float()
                with torch.no_grad():
                    expected = float(stream.divergence(mask[None]))
                assert calls.divergence[at] == pytest.approx(expected, rel=1e-3, abs=1e-6)
                stream.commit(mask)
    assert recovered
    figures = found.replay.methods
    assert figures["dense"].divergence == pytest.approx(0.0, abs=1e-6)
    assert figures["dense"].ratio == 0.0
    assert len(figures["own"].adaptivity.shares) > 2, "by what the robot feels, too"
    assert figures["own"].divergence > 0
    assert figures["own"].saved is None, "dense leaves nothing to save"


def test_a_stopped_replay_goes_on_and_another_baseline_asks_for_no_session(
    world: Recorded, config: ReplayConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lac_vla.training.robots.TOGETHER", 2)
    config = replace(config, policies=(*config.policies[1:3], "again@random:ratio=0.5"))
    replay(config)
    log = config.out / FRAMES
    whole = log.read_text()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 4
    for kept in ("".join(lines[:1]), "".join(lines[:3]) + lines[3][:20]):  # killed within a group
        log.write_text(kept)
        replay(config)
        assert sorted(log.read_text().splitlines()) == sorted(whole.splitlines())
    monkeypatch.setattr("lac_vla.training.replay._gone_through", None)
    words = ["replay", "--dataset", str(world.dataset), "--model", config.model, "--out", str(config.out)]
    words += ["--policies", *config.policies, "--held-out", "1", "--max-age", "4", "--contact", "2"]
    main([*words, "--baseline", "motion:ratio=0.6,keep=wrist", "again"])
    told = capsys.readouterr().out
    assert "Around contact and in free motion" in told
    assert "against motion-0.6-wrist and again" in " ".join(told.split())
    content = json.loads((config.out / FIGURES).read_text())
    assert content["baselines"] == ["motion-0.6-wrist", "again"]
    assert content["settings"]["seed"] == 0
    assert content["measured_with"]["versions"]["torch"] == torch.__version__
    assert str(world.model) not in json.dumps(content["settings"])
    picture = (config.out / "replay.svg").read_text()
    assert picture.count('class="event"') == 3 + 1, "one event in each of three panels, and the legend's"
    with pytest.raises(InputError, match=r"policies.*another --out"):
        replay(replace(config, policies=config.policies[:2]))


def test_what_cannot_be_replayed_is_refused_before_anything_is_stored(
    world: Recorded, config: ReplayConfig, tmp_path: Path
) -> None:
    tiny_model = save_with_tokenizer(tiny(), tmp_path / "tiny")
    other = LACPolicy.from_pretrained(world.policy)
    LACPolicy(replace(other.config, patch_pixels=4)).save_pretrained(tmp_path / "other")
    for change, message in (
        ({"policies": ("vla-cache",)}, "vla-cache reads attention.*lac eval"),
        ({"policies": ("fastv:ratio=0.5",)}, "fastv-0.5 reads attention"),
        ({"policies": (*config.policies, f"lac:path={tmp_path / 'other'}")}, r"pictures of \[4, 8\] pixels"),
        ({"policies": ("motion:keep=left",)}, "keep the camera 'left'"),
        ({"held_out": 0.1, "episodes": 1}, "cannot be divided"),
        ({"store": tmp_path}, "holds no stored embeddings"),
        ({"model": str(tiny_model)}, "reads 8 values of proprioception, the model none"),
        ({"stride": 13}, "no episode is longer than 13 frames"),
    ):
        with pytest.raises(InputError, match=message):
            replay(replace(config, **change))  # type: ignore[arg-type]
        assert not (config.out / "store").exists()
    for change, message in (
        ({"baseline": ("lac:ratio=0.9",)}, "the baseline lac-0.9 is none of --policies"),
        ({"policies": ()}, "no policy to replay"),
        ({"held_out": 1.5}, "share of the episodes"),
        ({"contact": -1}, "contact is -1"),
    ):
        with pytest.raises(InputError, match=message):
            replace(config, **change)  # type: ignore[arg-type]


def test_episodes_that_a_policy_was_trained_on_are_named(world: Recorded, config: ReplayConfig, tmp_path: Path) -> None:
    policy, said = LACPolicy.from_pretrained(world.policy), {}
    training = {"dataset": "demos", "episodes": 0, "held_out": 0.25, "seed": 3}
    for name, about in (
        ("known", {"training": training, "frames": sum(LENGTHS)}),
        ("others", {"training": training, "frames": 1000}),
        ("damaged", {"training": {**training, "seed": "x"}, "frames": sum(LENGTHS)}),
        ("elsewhere", {"training": {**training, "dataset": "kitchen"}, "frames": sum(LENGTHS)}),
    ):
        policy.save_pretrained(tmp_path / name, about=about)
    config = replace(
        config, policies=tuple(f"lac:path={tmp_path / name}" for name in ("known", "others", "damaged", "elsewhere"))
    )
    said = replay(config).notes
    assert said == [
        "lac-known: trained on 3 of these 4 episodes",
        "lac-others: trained on other recordings of this name: whether these were among them is not known",
    ]
    held = replay(replace(config, out=tmp_path / "held", held_out=0.25, seed=3))
    assert not [note for note in held.notes if "known:" in note]


def episode(number: int, *, own: float, active: float, gripper: list[int] | None) -> EpisodeReplay:
    """Ten calls; around frame 3 the policy computes more. Baselines: 10 % active at 8, 30 % at 4 thousandths."""
    near = [1 <= at <= 5 for at in range(1, 11)]

    def calls(divergence: float, share: list[float]) -> Calls:
        return Calls([divergence] * 10, share, [0.9] * 10, {"front": [1 - each for each in share]})

    return EpisodeReplay(
        number,
        [*range(1, 11)],
        gripper,
        {
            "own": calls(own, [active + 0.1 * at for at in near]),
            "less": calls(0.008, [0.1] * 10),
            "more": calls(0.004, [0.3] * 10),
        },
    )


def test_a_policy_is_compared_at_its_own_cost_and_by_phase() -> None:
    """Half of the frames have 25 % active, half 15 %; at the mean of 20 % the baselines have 6 thousandths."""
    log = [episode(number, own=0.003 + 0.0001 * number, active=0.15, gripper=[3]) for number in range(5)]
    found = Replay.of(log, ["less", "more"], 100, 2)
    own = found.methods["own"]
    assert own.ratio == pytest.approx(0.8)
    assert own.tokens == pytest.approx(20)
    assert own.saved is not None
    assert own.saved.divergence == pytest.approx(0.006)
    assert own.saved.share == pytest.approx(1 - 0.0032 / 0.006)
    assert own.saved.interval is not None
    assert own.saved.interval.low < own.saved.share < own.saved.interval.high
    assert own.adaptivity.deviation == pytest.approx(0.05)
    assert own.phases is not None
    assert own.phases.difference == pytest.approx(0.1)
    assert own.phases.p == pytest.approx(2 / 2**5)
    assert found.contact_share == pytest.approx(0.5)
    assert found.methods["less"].phases is not None
    assert found.methods["less"].phases.p == 1.0
    alone = Replay.of(log, ["less"], 100, 2).methods["own"].saved
    assert alone is not None
    assert alone.share == pytest.approx(0.6)
    assert alone.active == pytest.approx(0.1)


def test_beyond_the_baselines_nothing_is_claimed() -> None:
    few = [episode(number, own=0.003, active=0.4, gripper=None) for number in range(2)]
    found = Replay.of(few, ["less", "more"], 100, 2)
    assert found.methods["own"].saved is None
    assert found.methods["own"].phases is None
    assert found.contact_share is None
    alone = Replay.of(few, ["less"], 100, 2).methods["own"].saved
    assert alone is not None
    assert alone.interval is None, "two episodes"


def test_a_damaged_line_is_named(config: ReplayConfig) -> None:
    config.out.mkdir()
    line = episode(0, own=0.1, active=0.1, gripper=None).to_json()
    line["methods"]["own"]["active"] = [0.1]
    (config.out / FRAMES).write_text(json.dumps(line) + "\n")
    with pytest.raises(InputError, match=re.escape(FRAMES) + ", line 1: its rows are not equally long"):
        replay(config)
