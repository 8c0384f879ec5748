"""``lac replay``: its sessions are real ones, frame by frame; what follows from them; resumed and refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.training import recorded
from tests.training.recorded import LENGTHS, MAX_AGE, Recorded, record, session_of
from tests.training.worlds import save_with_tokenizer, tiny

from lac_vla import InputError, LACPolicy
from lac_vla.cli import main
from lac_vla.drawing.replay_chart import replay_chart
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
    assert figures["dense"].adaptivity.deviation is None
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


def test_a_run_is_bound_to_what_its_folders_hold_not_to_their_names(
    world: Recorded, config: ReplayConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, policies=(f"own@lac:path={world.policy}",))
    replay(config)
    log = (config.out / FRAMES).read_bytes()
    vla, policy = world.vla(), LACPolicy.from_pretrained(world.policy)
    with torch.no_grad():
        next(vla.module.parameters()).add_(1e-3)
    model = save_with_tokenizer(vla, tmp_path / "elsewhere" / "tiny")
    other = LACPolicy(replace(policy.config, recovery=0.5))
    other.networks.load_state_dict(policy.networks.state_dict())
    other.save_pretrained(tmp_path / "elsewhere" / "policy")
    monkeypatch.setattr(recorded, "LENGTHS", (9, 13, 5, 2))  # as many frames, and the first episode is the same
    demos = record(tmp_path / "again").dataset
    FrameStore.build(world.vla(), world.dataset, tmp_path / "store", flow="dis", patch_pixels=8, episodes=[0, 1])
    for change, message in (
        ({"model": str(model)}, "model_weights"),
        ({"policies": (f"own@lac:path={tmp_path / 'elsewhere' / 'policy'}",)}, "shapes"),
        ({"dataset": demos}, "recordings"),
        ({"store": tmp_path / "store"}, "numbers"),
    ):
        with pytest.raises(InputError, match=rf"other \['{message}'.*another --out"):
            replay(replace(config, **change))  # type: ignore[arg-type]
        assert (config.out / FRAMES).read_bytes() == log
    settings = json.loads((config.out / "config.json").read_text())
    assert settings["dtype"] == "torch.float32"
    foreign = json.dumps({"model": "tiny", "dataset": "demos", "out": "replay"})  # of lac train, say
    (config.out / "config.json").write_text(foreign)
    with pytest.raises(InputError, match=r"something else than a run of lac replay.*another --out"):
        replay(config)
    assert (config.out / "config.json").read_text() == foreign


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
        ({"held_out": 0.1, "episodes": 1}, "cannot be divided.*give --held-out 1 for all"),
        ({"held_out": 0.99}, "cannot be divided.*or a smaller share"),
        ({"store": tmp_path}, "holds no stored embeddings"),
        ({"model": str(tiny_model)}, "reads 8 values of proprioception, the model none"),
        ({"stride": 13}, "no episode is longer than 13 frames"),
    ):
        with pytest.raises(InputError, match=message):
            replay(replace(config, **change))  # type: ignore[arg-type]
        assert not (config.out / "store").exists()
    for change, message in (
        ({"baseline": ("lac:ratio=0.9",)}, "the baseline lac-0.9 is none of --policies"),
        ({"baseline": ("dense", "dense")}, "dense is given twice"),
        ({"policies": ()}, "no policy to replay"),
        ({"held_out": 1.5}, "share of the episodes"),
        ({"contact": -1}, "contact is -1"),
    ):
        with pytest.raises(InputError, match=message):
            replace(config, **change)  # type: ignore[arg-type]


def test_episodes_that_a_policy_was_trained_on_are_named(
    world: Recorded, config: ReplayConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = LACPolicy.from_pretrained(world.policy)
    training = {"dataset": "demos", "episodes": 0, "held_out": 0.25, "seed": 3}
    for name, about in (
        ("known", {"training": training, "frames": sum(LENGTHS)}),
        ("others", {"training": training, "frames": 1000}),
        ("damaged", {"training": {**training, "seed": "x"}, "frames": sum(LENGTHS)}),
        ("elsewhere", {"training": {**training, "dataset": "kitchen"}, "frames": sum(LENGTHS)}),
        ("untold", {}),
        ("started", {"training": {**training, "start": "policy"}, "frames": sum(LENGTHS)}),
    ):
        policy.save_pretrained(tmp_path / name, about=about)
    names = ("known", "others", "damaged", "elsewhere", "untold", "started")
    config = replace(config, policies=tuple(f"lac:path={tmp_path / name}" for name in names))
    unknown = "whether it was trained on these episodes is not known"
    assert replay(config).notes == [
        "lac-known: trained on 3 of these 4 episodes",
        f"lac-others: trained on other recordings of this name: {unknown}",
        f"lac-damaged, lac-elsewhere, lac-untold: {unknown}",
        "lac-started: trained on 3 of these 4 episodes, its --start may have been trained on more of them",
    ]
    monkeypatch.setattr("lac_vla.training.replay.GRIPPER", 7)  # the actions have a column less than is known
    held = replay(replace(config, out=tmp_path / "held", held_out=0.25, seed=3))
    assert not [note for note in held.notes if note.startswith("lac-known:")]
    assert "lac-started: trained on 0 of these 1 episodes, its --start may have been trained on them" in held.notes
    assert held.replay.contact_share is None
    assert "contact is not told" in held.notes[-1]


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
    log = [episode(number, own=0.003 + 0.0001 * number, active=0.15, gripper=[3]) for number in range(8)]
    found = Replay.of(log, ["less", "more"], 100, 2)
    own = found.methods["own"]
    assert own.ratio == pytest.approx(0.8)
    assert own.tokens == pytest.approx(20)
    assert own.saved is not None
    assert own.saved.divergence == pytest.approx(0.006)
    assert own.saved.share == pytest.approx(1 - 0.00335 / 0.006)
    assert own.saved.interval is not None
    assert own.saved.interval.low < own.saved.share < own.saved.interval.high
    assert own.adaptivity.deviation == pytest.approx(0.05)
    assert own.phases is not None
    assert own.phases.difference == pytest.approx(0.1)
    assert own.phases.p == pytest.approx(2 / 2**8)
    assert found.contact_share == pytest.approx(0.5)
    assert found.methods["less"].phases is not None
    assert found.methods["less"].phases.p == 1.0
    alone = Replay.of(log, ["less"], 100, 2).methods["own"].saved
    assert alone is not None
    assert alone.share == pytest.approx(1 - 0.00335 / 0.008)
    assert alone.active == pytest.approx(0.1)


def test_beyond_the_baselines_nothing_is_claimed() -> None:
    few = [episode(number, own=0.003, active=0.4, gripper=None) for number in range(7)]
    found = Replay.of(few, ["less", "more"], 100, 2)
    assert found.methods["own"].saved is None
    assert found.methods["own"].phases is None
    assert found.contact_share is None
    alone = Replay.of(few, ["less"], 100, 2).methods["own"].saved
    assert alone is not None
    assert alone.interval is None, "seven episodes"


@pytest.mark.parametrize("middle", [0.11, 0.29])
def test_near_the_ends_of_the_baselines_a_policy_on_their_line_saves_nothing(middle: float) -> None:
    """Its active tokens vary from episode to episode, so that resamples lie beyond the ends, too."""
    log = []
    for number, shift in enumerate(np.linspace(-0.09, 0.09, 12)):
        active = middle + float(shift)  # around frame 3 it is 0.1 more
        log.append(episode(number, own=0.008 - 0.02 * (active - 0.1), active=active - 0.05, gripper=None))
    found = Replay.of(log, ["less", "more"], 100, 2).methods["own"].saved
    assert found is not None
    assert found.share == pytest.approx(0, abs=1e-9)
    assert found.interval is not None
    assert [*found.interval] == pytest.approx([0, 0], abs=1e-9)


def test_of_baselines_at_one_cost_the_better_counts_and_calls_that_compute_everything_do_not_vary() -> None:
    log = []
    for number in range(8):
        found = episode(number, own=0.003, active=0.15, gripper=None)
        worse = replace(found.methods["less"], divergence=[0.02] * 10)
        every = Calls([0.0, *[0.003] * 9], [1.0, *[0.2] * 9], [None, *[0.8] * 9], {"front": [0.0, *[0.8] * 9]})
        log.append(replace(found, methods={**found.methods, "worse": worse, "every": every}))
    for baselines in (["less", "worse", "more"], ["worse", "more", "less"]):
        methods = Replay.of(log, baselines, 100, 2).methods
        assert methods["own"].saved is not None
        assert methods["own"].saved.divergence == pytest.approx(0.006)
    assert methods["every"].adaptivity.deviation == pytest.approx(0)


def test_a_policy_that_reuses_everything_is_drawn() -> None:
    found = episode(0, own=0.003, active=0.1, gripper=[3])
    idle = Calls([0.001] * 10, [0.0] * 10, [None] * 10, {"front": [1.0] * 10})
    assert "nan" not in replay_chart(replace(found, methods={"periodic-100": idle}), 100, 2, ())


def test_a_damaged_line_is_named(config: ReplayConfig) -> None:
    config.out.mkdir()
    line = episode(0, own=0.1, active=0.1, gripper=None).to_json()
    line["methods"]["own"]["active"] = [0.1]
    (config.out / FRAMES).write_text(json.dumps(line) + "\n")
    with pytest.raises(InputError, match=re.escape(FRAMES) + ", line 1: its rows are not equally long"):
        replay(config)
