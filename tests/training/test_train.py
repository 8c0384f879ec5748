"""``lac train`` as a user runs it, on a tiny model: the saved policy, resuming, several processes, bad input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tests.training.worlds import SIDE, save_with_tokenizer, store_of, tiny

from lac_vla import CachedVLA, CheckpointError, Frame, InputError, LACPolicy, load_vla, random_vla, save_vla
from lac_vla.bundled import BUNDLED
from lac_vla.dataset_keys import DatasetKeys
from lac_vla.datasets import DatasetError, LeRobotDataset
from lac_vla.datasets.writer import DatasetWriter
from lac_vla.errors import MissingExtraError
from lac_vla.models.heads.tokens import TokenHead
from lac_vla.report import build_training_report
from lac_vla.training import store as store_module
from lac_vla.training.config import TrainConfig
from lac_vla.training.lac import Temperatures
from lac_vla.training.relaxation import gumbel_noise, ratio_reward, soft_ratio, straight_through
from lac_vla.training.store import FrameStore
from lac_vla.training.train import STATE, Training, divide_episodes, train

CAMERAS = ("agentview", "wrist")


def write_dataset(root: Path, episodes: int = 4, length: int = 9, cameras: tuple[str, ...] = CAMERAS) -> Path:
    rng = np.random.default_rng(0)
    with DatasetWriter(root, 20) as writer:
        for episode in range(episodes):
            still = {camera: rng.integers(0, 255, (64, 64, 3)) for camera in cameras}
            images = {
                camera: np.stack([np.roll(image, at, axis=1) for at in range(length)]).astype(np.uint8)
                for camera, image in still.items()
            }
            action = rng.uniform(-1, 1, (length, 7)).astype(np.float32)
            state = np.zeros((length, 2), np.float32)
            writer.add_episode(images, state, action, "pick up the bowl" if episode % 2 else "put it down")
    return root


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "demos")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_tokenizer(random_vla("tiny"), tmp_path_factory.mktemp("vla") / "tiny")


@pytest.fixture(scope="module")
def cogact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_tokenizer(random_vla("cogact-tiny"), tmp_path_factory.mktemp("vla") / "cogact")


def short_run(vla: Path, dataset: Path, out: Path) -> TrainConfig:
    return TrainConfig(
        str(vla),
        dataset,
        out,
        stage1_steps=2,
        stage2_steps=4,
        stage1_batch=4,
        batch=2,
        window=3,
        held_out=0.25,
        every=2,
        width=8,
    )


@pytest.fixture
def config(model: Path, dataset: Path, tmp_path: Path) -> TrainConfig:
    return short_run(model, dataset, tmp_path / "run")


def rows(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("loss", ["distill", "demo"])
@pytest.mark.parametrize(
    "options", [{}, {"inputs": "paper", "language": True}, {"flow": "none"}, {"fixed_ratio": 0.5}, {"stage1_steps": 0}]
)
def test_a_trained_policy_drives_the_model(config: TrainConfig, loss: str, options: dict[str, object]) -> None:
    config = replace(config, loss=loss, recovery=0.0, **options)  # type: ignore[arg-type]
    policy = LACPolicy.from_pretrained(train(config))
    session = CachedVLA(load_vla(config.model), policy).session()
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    frame = Frame({camera: image for camera in CAMERAS}, "pick up the bowl")
    for _ in range(3):
        session.act(frame)
    assert session.last_info is not None
    assert session.last_info.decision.nominal_ratio in config.ratios
    if config.fixed_ratio:
        assert session.last_info.ratio == pytest.approx(0.5, abs=0.02)
    scored = [row for row in rows(config.out) if "held_out_task" in row]
    assert scored
    assert all(np.isfinite(list(row.values())).all() for row in rows(config.out))


@pytest.mark.parametrize("loss", ["distill", "demo"])
def test_cogact_is_trained_and_resumed_exactly(config: TrainConfig, cogact: Path, tmp_path: Path, loss: str) -> None:
    config = replace(config, model=str(cogact), loss=loss, recovery=0.0)  # type: ignore[arg-type]
    policy = LACPolicy.from_pretrained(train(config))
    store = FrameStore.open(config.out / "store")
    assert store.targets.dtype == np.float32
    assert store.targets.shape == (36, 16 * 7)
    session = CachedVLA(load_vla(config.model), policy).session()
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for _ in range(3):
        action = session.act(Frame({camera: image for camera in CAMERAS}, "pick up the bowl"))
    assert action.shape == (16, 7)
    broken = replace(config, out=tmp_path / "broken", store=config.out / "store")
    for _ in range(20):
        train(broken, max_seconds=0.0)
    for key, whole in weights(config.out).items():
        torch.testing.assert_close(whole, weights(broken.out)[key], rtol=0, atol=0)
    scores = [[row["held_out_task"] for row in rows(out) if "held_out_task" in row] for out in (config.out, broken.out)]
    assert scores[0][-1] == scores[1][-1]


@pytest.mark.parametrize("loss", ["distill", "demo"])
def test_a_model_whose_tokens_see_each_other_is_trained_beside(config: TrainConfig, tmp_path: Path, loss: str) -> None:
    folder = save_with_tokenizer(random_vla("oft-tiny"), tmp_path / "oft")
    config = replace(config, model=str(folder), out=tmp_path / "out", loss=loss)  # type: ignore[arg-type]
    policy = LACPolicy.from_pretrained(train(config))
    assert FrameStore.open(config.out / "store").targets.shape == (36, 3 * 7)
    session = CachedVLA(load_vla(folder), policy).session()
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for _ in range(3):
        action = session.act(Frame({camera: image for camera in CAMERAS}, "pick up the bowl"))
    assert action.shape == (3, 7)


def test_plain_logs_teach_cogact_by_its_own_chunks(config: TrainConfig, cogact: Path, tmp_path: Path) -> None:
    logs = write_dataset(tmp_path / "logs", episodes=2, length=6)
    strip_actions(logs)
    config = replace(config, model=str(cogact), dataset=logs, held_out=0.5, recovery=0.0)
    store = FrameStore.open(train(config).parent / "store")
    assert not store.has_actions
    assert store.targets.shape == (12, 16 * 7)
    assert np.abs(store.targets).max() <= 1


def test_a_store_of_another_head_is_refused(config: TrainConfig, model: Path, cogact: Path, tmp_path: Path) -> None:
    """Same trunk, other head: the stored targets are another model's."""
    train(replace(config, model=str(cogact)))
    other = load_vla(cogact)
    with torch.no_grad():
        other.module.action_model.net.final_layer.linear.bias.add_(1.0)
    save_vla(other, tmp_path / "other")
    with pytest.raises(InputError, match=r"stored embeddings of other .*model"):
        train(replace(config, model=str(tmp_path / "other"), out=tmp_path / "run2", store=config.out / "store"))


def weights(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / STATE, weights_only=True)["networks"]  # type: ignore[no-any-return]


def test_resume_equals_an_unbroken_run(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, target_ratio=0.6)
    train(config)
    broken = replace(config, out=tmp_path / "broken", store=config.out / "store")
    for _ in range(20):  # every call stops at the first step after its time is up
        train(broken, max_seconds=0.0)
    whole, pieced = weights(config.out), weights(broken.out)
    assert whole.keys() == pieced.keys()
    for key in whole:
        torch.testing.assert_close(whole[key], pieced[key], rtol=0, atol=0)
    states = [torch.load(out / STATE, weights_only=True) for out in (config.out, broken.out)]
    assert states[0]["lam"] == states[1]["lam"] != config.lam


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_state(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    window = Training.advance

    def broken(self: Training) -> dict[str, float]:
        if self.step == 5:
            with torch.no_grad():
                next(iter(self.policy.selector.parameters())).fill_(float("nan"))
        return window(self)

    monkeypatch.setattr(Training, "advance", broken)
    with pytest.raises(InputError, match="last saved state is kept"):
        train(config)
    assert all(torch.isfinite(value).all() for value in weights(config.out).values())
    LACPolicy.from_pretrained(config.out / "policy")
    monkeypatch.undo()
    train(config)
    assert torch.load(config.out / STATE, weights_only=True)["step"] == 6


def test_other_settings_do_not_mix(config: TrainConfig) -> None:
    train(config)
    with pytest.raises(InputError, match=r"other .*lam.*another --out"):
        train(replace(config, lam=0.7))
    with pytest.raises(InputError, match=r"stored embeddings of other .*episodes"):
        train(replace(config, out=config.out.with_name("second"), store=config.out / "store", episodes=2))


def test_a_damaged_state_is_an_error(config: TrainConfig) -> None:
    train(config)
    (config.out / STATE).write_bytes((config.out / STATE).read_bytes()[:500])
    with pytest.raises(CheckpointError, match="damaged"):
        train(config)


def strip_actions(root: Path) -> None:
    for path in (root / "data").rglob("*.parquet"):
        pq.write_table(pq.read_table(path).drop_columns(["action"]), path)
    info = json.loads((root / "meta" / "info.json").read_text())
    info["features"].pop("action")
    (root / "meta" / "info.json").write_text(json.dumps(info))


def test_plain_logs_can_be_distilled_but_not_imitated(config: TrainConfig, tmp_path: Path) -> None:
    logs = write_dataset(tmp_path / "logs", episodes=2, length=6)
    strip_actions(logs)
    config = replace(config, dataset=logs, held_out=0.5)
    store = FrameStore.open(train(config).parent / "store")
    vla = load_vla(config.model)
    assert not store.has_actions
    session = CachedVLA(vla).session()
    images = {name: np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8) for name in CAMERAS}
    session.act(Frame(images, "put it down"))
    assert store.targets.min() >= 0
    assert store.targets.shape == (12, 7)
    with pytest.raises(InputError, match=r"records no actions.*distill"):
        train(replace(config, loss="demo", out=tmp_path / "demo"))


def damaged(root: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    for path in (root / "data").rglob("*.parquet"):
        table = pq.read_table(path)
        columns = {"frame_index": table.column("frame_index").to_numpy().copy()}
        change(columns)
        index = table.column_names.index("frame_index")
        pq.write_table(table.set_column(index, "frame_index", pa.array(columns["frame_index"])), path)


def test_frames_that_do_not_follow_one_another_are_refused(config: TrainConfig, tmp_path: Path) -> None:
    short = write_dataset(tmp_path / "short", length=2)
    with pytest.raises(InputError, match=r"no episode has 3 consecutive frames"):
        train(replace(config, dataset=short))
    skipping = write_dataset(tmp_path / "skipping")
    damaged(skipping, lambda columns: columns["frame_index"].__imul__(2))
    with pytest.raises(InputError, match="skips frames"):
        train(replace(config, dataset=skipping, out=tmp_path / "second"))


def test_a_missing_camera_is_named(config: TrainConfig, tmp_path: Path) -> None:
    other = write_dataset(tmp_path / "other", cameras=("agentview", "front"))
    with pytest.raises(InputError, match=r"wrist.*missing"):
        train(replace(config, dataset=other))


def test_actions_in_other_units_are_refused(config: TrainConfig, tmp_path: Path) -> None:
    root = tmp_path / "millimetres"
    rng = np.random.default_rng(0)
    with DatasetWriter(root, 20) as writer:
        images = {camera: rng.integers(0, 255, (6, 64, 64, 3), dtype=np.uint8) for camera in CAMERAS}
        for _ in range(2):
            writer.add_episode(images, np.zeros((6, 1), np.float32), 100 * np.ones((6, 7), np.float32), "go")
    with pytest.raises(InputError, match=r"outside the model's range.*--unnorm-key"):
        train(replace(config, dataset=root))


def test_a_full_disk_is_noticed_before_anything_is_written(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil.disk_usage(config.dataset)._replace(free=1000)
    monkeypatch.setattr(store_module.shutil, "disk_usage", lambda path: free)
    with pytest.raises(InputError, match=r"need 0\.\d MB, store's disk has 0\.0 MB free: .*fewer --episodes"):
        train(config)
    assert not (config.out / "store").exists()
    assert not (config.out / "store.incomplete").exists()


def test_a_folder_of_something_else_is_left_alone(config: TrainConfig, tmp_path: Path) -> None:
    keep = tmp_path / "holiday" / "picture.png"
    keep.parent.mkdir()
    keep.write_bytes(b"beach")
    with pytest.raises(InputError, match="something else than stored embeddings"):
        train(replace(config, store=keep.parent))
    assert keep.read_bytes() == b"beach"


def test_settings_out_of_range_are_refused(config: TrainConfig) -> None:
    for change in ({"window": 1}, {"lam": -1.0}, {"held_out": 1.0}, {"tau_score": (0.0, 0.1)}, {"ratios": (0.5,)}):
        with pytest.raises(InputError):
            train(replace(config, **change))  # type: ignore[arg-type]


def test_a_store_of_another_tower_is_refused(config: TrainConfig, model: Path) -> None:
    vla = load_vla(model)

    def build() -> FrameStore:
        return FrameStore.build(
            vla, config.dataset, config.out / "store", flow="none", patch_pixels=config.patch_pixels
        )

    stored = build().visual[0]
    assert np.array_equal(build().visual[0], stored)
    with torch.no_grad():
        for weight in vla.module.vision_backbone.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(InputError, match="another vision tower; give another --store"):
        build()


def test_the_store_holds_what_the_model_computes(config: TrainConfig) -> None:
    train(config)
    store = FrameStore.open(config.out / "store")
    vla = load_vla(config.model)

    episode = LeRobotDataset(config.dataset).episode(1)
    frame = Frame({c: episode.images[c][4] for c in CAMERAS}, episode.instruction)
    at = int(store.start[1]) + 4
    with torch.inference_mode():
        expected = vla.encode_image(frame).numpy()
        suffix = vla.processor.embed(vla.processor.prompt(frame))[1].numpy()
    np.testing.assert_allclose(store.visual[at].astype(np.float32), expected, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(store.suffix[at, : store.suffix_length[at]], suffix)
    head = vla.head
    assert isinstance(head, TokenHead)
    assert np.array_equal(store.targets[at], head.tokenizer.encode(head.action_range.normalize(episode.action[4])))
    assert store.images["agentview"].shape[1:] == (6 * config.patch_pixels, 6 * config.patch_pixels, 3)


def test_flow_is_over_the_stride(config: TrainConfig) -> None:
    """The pictures of the data set move by one pixel a frame; a run at the stride ends as any other does."""
    policy = LACPolicy.from_pretrained(train(replace(config, stride=3, window=2, store=config.out / "strided")))
    about = json.loads((config.out / "policy" / "config.json").read_text())["about"]
    assert about["training"]["stride"] == 3
    assert policy.config.flow == "dis"
    near = FrameStore.build(
        load_vla(config.model), config.dataset, config.out / "near", flow="dis", patch_pixels=config.patch_pixels
    )
    far = FrameStore.open(config.out / "strided")
    assert (near.stride, far.stride) == (1, 3)
    assert not np.asarray(far.flow["agentview"][:3]).any()
    moved = [float(np.median(store.flow["agentview"][3:9, ..., 0].astype(np.float32))) for store in (near, far)]
    assert moved[1] > 2 * moved[0] > 0
    with pytest.raises(InputError, match=r"other .*stride"):
        train(replace(config, out=config.out / "other", store=config.out / "strided"))
    with pytest.raises(InputError, match="--stride must be at least 1"):
        replace(config, stride=0)


TWO = """
import torch
from pathlib import Path
from lac_vla.dataset_keys import DatasetKeys
from lac_vla.training import train as module
from lac_vla.training.config import TrainConfig

torch.set_num_threads(1)
kept, loop = [], module._loop
module._loop = lambda run, rank, limit: (loop(run, rank, limit), kept.append(run))[0]
module.train({config})
print("sum", float(sum(weight.double().abs().sum() for weight in kept[0].networks.parameters())), kept[0].lam)
"""


def two_processes(config: TrainConfig, port: int, before: str = "") -> list[tuple[int, str, str]]:
    """Run a training as torchrun would; exit status, output and errors of both processes."""
    code = before + TWO.format(config=repr(config).replace("PosixPath", "Path"))
    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    ends = [process.communicate(timeout=300) for process in processes]
    return [(process.returncode, *end) for process, end in zip(processes, ends, strict=True)]


def test_two_processes_train_one_policy(config: TrainConfig, tmp_path: Path) -> None:
    """Gradients and what steers λ are means, so both processes end with the same weights and the same λ."""
    FrameStore.build(
        load_vla(config.model), config.dataset, tmp_path / "store", flow="dis", patch_pixels=config.patch_pixels
    )
    run = replace(config, stage1_steps=1, stage2_steps=2, out=tmp_path / "two", store=tmp_path / "store")
    ends = two_processes(replace(run, target_ratio=0.8), 29517)
    assert [end[0] for end in ends] == [0, 0], ends
    lines = [out.strip().splitlines()[-1] for _, out, _ in ends]
    assert lines[0] == lines[1]
    assert lines[0].startswith("sum")
    assert float(lines[0].split()[2]) != run.lam


def test_where_the_loss_of_one_process_breaks_both_stop(config: TrainConfig, tmp_path: Path) -> None:
    """The other does not wait for ever for a gradient that never comes."""
    FrameStore.build(
        load_vla(config.model), config.dataset, tmp_path / "store", flow="dis", patch_pixels=config.patch_pixels
    )
    run = replace(config, stage1_steps=0, stage2_steps=2, out=tmp_path / "two", store=tmp_path / "store")
    broken = """
import os
from lac_vla.training.lac import LACLoss
window = LACLoss.window
def nan(*args, **options):
    return {**window(*args, **options), "loss": float("nan")}
if os.environ["RANK"] == "1":
    LACLoss.window = nan
"""
    ends = two_processes(run, 29518, broken)
    assert all(status != 0 and "the loss became nan" in errors for status, _, errors in ends), ends


def test_lambda_rises_below_the_target_ratio_and_falls_above(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    vla = tiny()
    steered = replace(config, stage1_steps=0, target_ratio=0.6)
    run = Training(steered, vla, store_of(vla))

    def lambda_after(run: Training, chosen: float, expected: float = 0.6) -> float:
        """Of a predictor whose likeliest ratio on held-out frames is this, whatever it expects under noise."""
        monkeypatch.setattr(run.losses, "window", lambda *_, **__: {"loss": 0.0, "expected_ratio": expected})
        monkeypatch.setattr(run.losses, "ratios_chosen", lambda first, length: chosen_of(run, first, chosen))
        run.advance()
        return run.lam

    def chosen_of(run: Training, first: np.ndarray, chosen: float) -> torch.Tensor:
        assert set(first) <= set(run.held_first)
        return torch.full((2, len(first)), chosen)

    first, falls = lambda_after(run, 0.2), lambda_after(run, 0.9)
    assert first > config.lam
    assert falls < first
    assert first / config.lam > first / falls > 1  # the further from the target, the faster
    assert lambda_after(run, 0.6, 0.1) == pytest.approx(falls)
    assert lambda_after(Training(replace(steered, target_ratio=0.0), vla, store_of(vla)), 0.2) == config.lam


def test_the_likeliest_ratio_meets_the_target(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """What inference chooses settles there in the mean, although another ratio is expected under noise.

    The model's part is replaced by a price: reuse of a dark frame costs little, that of a bright one much.
    """
    vla = tiny()
    store = store_of(
        vla, episodes=8, paint=lambda rng, at, grid: np.full((*(SIDE * n for n in grid), 3), 250 * (at % 2), np.uint8)
    )
    steered = replace(config, stage1_steps=0, stage2_steps=60, batch=8, patch_pixels=SIDE, width=16, lam=0.5)
    run = Training(replace(steered, target_ratio=0.6, ratios=(0.0, 0.3, 0.5, 0.7, 0.9)), vla, store)
    losses = run.losses

    def window(
        first: np.ndarray, length: int, warm: Temperatures, chance: torch.Generator, *, lam: float, **_: object
    ) -> dict[str, float]:
        hard = torch.from_numpy(np.where((first + 1) % 2, 3.0, 0.3)).float()
        young = [torch.zeros(len(first), *grid) for grid in store.grids.values()]
        before = [losses.pixels(name, first) for name in store.grids]
        logits = losses.policy.predictor(losses.inputs(first + 1, before, young))
        soft = soft_ratio(logits, gumbel_noise(logits.shape, chance, losses.device), warm.ratio)
        task = (straight_through(soft) * hard[:, None] * losses.ratios**4).sum(dim=1)
        (task + lam * ratio_reward(soft, losses.ratios)).mean().backward()
        return {"loss": 0.0, "expected_ratio": -float(ratio_reward(soft.detach(), losses.ratios).mean())}

    monkeypatch.setattr(losses, "window", window)
    last = [run.advance() for _ in range(60)][-20:]
    chosen, expected = (float(np.mean([row[f"{name}_ratio"] for row in last])) for name in ("argmax", "expected"))
    assert chosen == pytest.approx(0.6, abs=0.05), expected
    by_frame = losses.ratios_chosen(store.start, 5)
    assert by_frame[1::2].mean() > by_frame[::2].mean() + 0.15, "dark frames, bright ones"


def test_a_predictor_that_has_collapsed_is_told(config: TrainConfig, capfd: pytest.CaptureFixture[str]) -> None:
    train(replace(config, ratios=(0.0,)))  # it has no other choice
    assert "collapsed to one value: 0 % in 100 % of the frames" in "".join(capfd.readouterr())
    [*_, last] = [row for row in rows(config.out) if "held_out_deviation" in row]
    assert (last["held_out_share_0"], last["held_out_deviation"]) == (1.0, 0.0)
    note = "On held-out episodes the ratio predictor has collapsed"
    assert note in build_training_report(config.out, config.out / "report.html").read_text()


def test_an_episode_too_short_for_a_window_may_be_held_out(model: Path, tmp_path: Path) -> None:
    """With frames four apart, the last episode has no second one: it is left out."""
    logs = tmp_path / "logs"
    rng = np.random.default_rng(0)
    with DatasetWriter(logs, 20) as writer:
        for length in (12, 12, 12, 3):
            images = {camera: rng.integers(0, 255, (length, 64, 64, 3), dtype=np.uint8) for camera in CAMERAS}
            writer.add_episode(images, np.zeros((length, 2), np.float32), np.zeros((length, 7), np.float32), "go")
    config = replace(short_run(model, logs, tmp_path / "run"), stride=4, window=2, held_out=0.5, seed=2)
    assert 3 in divide_episodes(config, 4)[1]
    train(config)
    assert "held_out_deviation" in rows(config.out)[-1]


def test_a_bundled_model_is_trained_beside_by_its_name(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUNDLED, "mini", Path(config.model))
    train(replace(config, model="mini", stage1_steps=1, stage2_steps=1))
    assert json.loads((config.out / "config.json").read_text())["model"] == "mini"
    LACPolicy.from_pretrained(config.out)


def rename(root: Path, **names: str) -> None:
    """Give columns of a dataset other names, as other tools choose them."""
    for path in (root / "data").rglob("*.parquet"):
        table = pq.read_table(path)
        pq.write_table(table.rename_columns([names.get(name, name) for name in table.column_names]), path)
    info = json.loads((root / "meta" / "info.json").read_text())
    info["features"] = {names.get(name, name): entry for name, entry in info["features"].items()}
    (root / "meta" / "info.json").write_text(json.dumps(info))


def test_what_training_reads_can_be_named(config: TrainConfig, tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "other", cameras=("top", "hand", "depth"))
    rename(root, **{"observation.state": "state", "action": "actions"})
    depth = next((root / "videos" / "observation.images.depth").rglob("*.mp4"))
    depth.write_text("version https://git-lfs.github.com/spec/v1\n")
    plain = replace(config, dataset=root, loss="demo", stage1_steps=1, stage2_steps=1, flow="none")
    cameras = ("agentview=top", "wrist=observation.images.hand")
    with pytest.raises(InputError, match=r"\['agentview', 'wrist'\] are missing.*'hand'.*--camera agentview=KEY"):
        train(plain)
    with pytest.raises(InputError, match=r"records no actions.*--action-key takes one of \['state', 'actions'\]"):
        train(replace(plain, keys=DatasetKeys(cameras)))
    assert not (config.out / "store").exists()
    named = replace(plain, keys=DatasetKeys(cameras, "state", "actions"))
    train(named)
    store = FrameStore.open(config.out / "store")
    assert store.has_actions
    episode = LeRobotDataset(root, {"agentview": "top", "wrist": "hand"}).episode(0)
    with torch.inference_mode():
        seen = load_vla(config.model).encode_image(Frame({c: episode.images[c][3] for c in CAMERAS}, "go")).numpy()
    np.testing.assert_allclose(store.visual[3].astype(np.float32), seen, rtol=2e-3, atol=2e-3)
    swapped = DatasetKeys(("agentview=hand", "wrist=top"), "state", "actions")
    with pytest.raises(InputError, match=r"stored embeddings of other \['keys'\]"):
        train(replace(named, keys=swapped, out=tmp_path / "second", store=config.out / "store"))


def test_what_cannot_be_trained_on_is_refused_before_anything_is_stored(config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="use at least 2"):
        train(replace(config, dataset=write_dataset(tmp_path / "one", episodes=1)))
    with pytest.raises(InputError, match="consecutive frames, the longest has 2"):
        train(replace(config, dataset=write_dataset(tmp_path / "short", length=2)))
    broken = write_dataset(tmp_path / "broken")
    for path in (broken / "data").rglob("*.parquet"):
        table = pq.read_table(path)
        actions = table.column("action").to_pylist()
        actions[-2] = [float("nan")] * 7
        pq.write_table(table.set_column(table.column_names.index("action"), "action", pa.array(actions)), path)
    with pytest.raises(DatasetError, match="episode 3, frame 7: 'action' is not finite"):
        train(replace(config, dataset=broken))
    assert not (config.out / "store").exists()
    assert not (config.out / "store.incomplete").exists()


def test_a_missing_extra_is_told_before_anything_is_loaded(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtraError, match="tensorboard"):
        train(replace(config, model="nowhere", tensorboard=True))


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere"])
def test_a_folder_that_cannot_be_written_is_one_error(config: TrainConfig, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"cannot write to .*give another --out"):
        train(replace(config, model="nowhere", out=tmp_path / place))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 64 vs 0")])
def test_a_disk_that_fills_up_is_one_error_and_loses_nothing(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    train(replace(config, stage2_steps=4), max_seconds=0.0)
    before = (config.out / STATE).read_bytes()

    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(InputError, match="make room"):
        train(config)
    monkeypatch.undo()
    assert (config.out / STATE).read_bytes() == before
    assert not list(config.out.rglob("*.partial"))
    train(config)
    assert torch.load(config.out / STATE, weights_only=True)["step"] == 6
