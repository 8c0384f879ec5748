"""``lac serve --record``: what robots sent and got is in the dataset, whatever happens; and ``lac train`` takes it."""

from __future__ import annotations

import logging
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from lac_vla import CachedVLA, InputError, LACPolicy, load_vla
from lac_vla.cli import main
from lac_vla.client.connection import Client
from lac_vla.datasets import LeRobotDataset
from lac_vla.serving import raw, record
from lac_vla.serving.config import ServeConfig, make_server
from lac_vla.serving.metrics import Metrics
from lac_vla.serving.record import Recorder
from lac_vla.serving.sessions import SessionOptions
from tests.evaluation.worlds import save_tiny
from tests.serving.conftest import Running

Start = Callable[..., Running]
ROOT = Path(__file__).parents[2]
CAMERAS = {"agentview": "observation/image", "wrist": "observation/wrist_image"}


def scene(robot: int, at: int, prompt: str = "pick up the bowl", side: int = 64) -> dict[str, Any]:
    """A smooth picture whose brightness tells robot and frame, as real ones can be compressed."""
    rows, cols = np.mgrid[:side, :side]
    image = np.stack([rows + 20 * robot, cols + 8 * at, np.full_like(rows, 60)], axis=-1).astype(np.uint8)
    image[10 + at : 20 + at, 20:40] = 230
    state = np.random.default_rng([robot, at]).normal(size=8)
    return {
        "observation/image": image,
        "observation/wrist_image": cv2.flip(image, 1),
        "observation/state": state,
        "prompt": prompt,
    }


def play(client: Client, robot: int, frames: int, first: int = 0, **options: Any) -> list[Any]:
    """An episode's answered actions; begins a new one."""
    client.reset()
    return [client.infer(scene(robot, first + at, **options))["actions"][0] for at in range(frames)]


def same(episode: Any, robot: int, frames: range, actions: list[Any]) -> None:
    """The dataset's episode is what the robot saw and got."""
    assert len(episode) == len(frames)
    np.testing.assert_array_equal(episode.action, np.float32(actions))
    for at, frame in enumerate(frames):
        sent = scene(robot, frame)
        np.testing.assert_array_equal(episode.state[at], np.float32(sent["observation/state"]))
        for camera, key in CAMERAS.items():
            difference = np.abs(episode.images[camera][at].astype(int) - sent[key])
            assert difference.mean() < 2, f"{camera} of frame {frame}"


def recorder(folder: Path, **options: Any) -> Recorder:
    return Recorder(folder, **{"cameras": tuple(CAMERAS), "action": 7, "fps": 10, "metrics": Metrics(), **options})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("recorded") / "model")


def counted(server: Running) -> tuple[float, float]:
    """Episodes kept and dropped."""
    metrics = server.server.recorder.metrics
    return tuple(metrics.recorded.labels(outcome)._value.get() for outcome in ("kept", "dropped"))  # type: ignore[return-value]


def test_from_a_robots_log_to_a_policy(model: Path, folder: Path, tmp_path: Path) -> None:
    options = SessionOptions(actions_per_call=1)
    config = ServeConfig(str(model), "random:ratio=0.5", port=0, record=folder, record_fps=5, session_options=options)
    server = Running(make_server(config))
    try:
        with Client(server.url) as client:
            actions = [play(client, 0, 6), play(client, 1, 7, prompt="put it down")]
    finally:
        server.stop()
    dataset = LeRobotDataset(folder)
    assert (len(dataset), dataset.total_frames, dataset.fps, dataset.cameras) == (2, 13, 5, ("agentview", "wrist"))
    same(dataset.episode(0), 0, range(6), actions[0])
    same(dataset.episode(1), 1, range(7), actions[1])
    assert [episode.instruction for episode in dataset] == ["pick up the bowl", "put it down"]
    for episode in dataset:
        np.testing.assert_allclose(episode.columns["timestamp"], np.arange(len(episode)) / 5, rtol=1e-6)
        assert episode.columns["seconds"][0] == 0
        assert (np.diff(episode.columns["seconds"]) > 0).all()
        np.testing.assert_array_equal(episode.columns["cache_ratio"], [0] + [0.5] * (len(episode) - 1))
        assert (episode.columns["latency_ms"] > 0).all()
        about = [episode.metadata[name] for name in ("model", "method", "actions_per_call", "horizon")]
        assert about == ["model", "random-0.5", 1, 1]
    assert [episode.metadata["ended"] for episode in dataset] == ["reset", "closed by the client"]
    assert not folder.with_name("log.recording").exists()
    words = f"train --model {model} --dataset {folder} --out {tmp_path / 'run'} --loss distill --stage1-steps 1"
    words += " --stage2-steps 2 --stage1-batch 2 --batch 2 --window 3 --width 8 --held-out 0.5 --every 2"
    main(words.split())
    policy = LACPolicy.from_pretrained(tmp_path / "run" / "policy")
    CachedVLA(load_vla(str(model)), policy)  # which checks that it fits


def test_sessions_do_not_mix(start: Start, folder: Path) -> None:
    server = start(recorder=recorder(folder))
    with Client(server.url) as one, Client(server.url) as other:
        actions: list[list[Any]] = [[], [], []]
        for at in range(5):
            actions[0].append(one.infer(scene(0, at))["actions"][0])
            actions[1].append(other.infer(scene(1, at))["actions"][0])
        one.reset()
        for at in range(3):
            actions[2].append(one.infer(scene(2, at))["actions"][0])
    server.stop()
    dataset = LeRobotDataset(folder)
    found = {round(float(episode.images["agentview"][0, 50, 50, 0])) // 20: episode for episode in dataset}
    for robot, length in enumerate((5, 5, 3)):
        same(found[robot + 2], robot, range(length), actions[robot])
    assert counted(server) == (3, 0)
    assert found[2].metadata["session"] == found[4].metadata["session"] != found[3].metadata["session"]


def test_a_folder_is_continued_if_it_fits(start: Start, folder: Path, model: Path) -> None:
    for robot in range(2):
        server = start(recorder=recorder(folder, fps=0 if robot else 10))
        with Client(server.url) as client:
            actions = play(client, robot, 4)
        server.stop()
    dataset = LeRobotDataset(folder)
    assert (len(dataset), dataset.fps) == (2, 10)
    same(dataset.episode(1), 1, range(4), actions)
    for wrong, complaint in (
        ({"fps": 20}, "has 10 frames per second, not 20"),
        ({"cameras": ("agentview",)}, r"recorded here are the cameras \['agentview'\]"),
        ({"cameras": ("agentview", "wrist", "third")}, "third"),
        ({"action": 6}, "actions of 6 numbers"),
        ({"state": 5}, "states of 5"),
    ):
        with pytest.raises(InputError, match=complaint):
            recorder(folder, **{"fps": 0} | wrong)
    with pytest.raises(InputError, match="frames per second"):
        make_server(ServeConfig(str(model), "dense", port=0, record=folder, record_fps=9))
    with pytest.raises(InputError, match="give another --record"):
        recorder(model)
    assert not model.with_name("model.recording").exists()
    holder = recorder(folder, fps=0)
    with pytest.raises(InputError, match=r"another process writes to .*give another --record"):
        recorder(folder)
    holder.close()


def test_a_disk_that_is_too_slow_drops_whole_episodes(
    start: Start, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    image = 64 * 64 * 3
    monkeypatch.setattr(record, "MAX_WAITING", 8 * image)  # four frames
    go, write = threading.Event(), record.RawWriter.write
    monkeypatch.setattr(record.RawWriter, "write", lambda *args: go.wait() and write(*args))
    server = start(recorder=recorder(folder))
    with Client(server.url) as client, caplog.at_level(logging.WARNING):
        play(client, 0, 9)  # answered all the same
        assert server.server.recorder._waiting == 8 * image
        go.set()
        until(lambda: not server.server.recorder._waiting)
        kept = play(client, 1, 3)
    server.stop()
    assert counted(server) == (1, 1)
    assert (
        server.server.recorder.metrics.unwritten._value.get()
        == server.server.recorder.metrics.unpacked._value.get()
        == 0
    )
    assert any(row.metadata["reason"] == "the disk is slower than the robots" for row in caplog.records)
    dataset = LeRobotDataset(folder)
    assert len(dataset) == 1
    same(dataset.episode(0), 1, range(3), kept)


def test_a_disk_that_is_full(start: Start, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start(recorder=recorder(folder))
    with Client(server.url) as client:
        play(client, 0, 3)
        monkeypatch.setattr(record, "MIN_FREE", 2**60)
        client.infer(scene(0, 3))
        until(lambda: counted(server) == (0, 1))
        monkeypatch.undo()
        client.infer(scene(0, 4))  # of the episode that has lost a frame
        actions = play(client, 1, 3)
    server.stop()
    assert counted(server) == (1, 1)
    same(LeRobotDataset(folder).episode(0), 1, range(3), actions)


def test_a_disk_that_fails_while_it_writes(start: Start, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    def full(path: Path, mode: str = "r") -> Any:  # whose buffer cannot be flushed, not even when it is closed
        return real(Path("/dev/full"), "wb") if path.suffix == ".frames" and mode == "xb" else real(path, mode)

    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    server = start(recorder=recorder(folder))
    monkeypatch.setattr(raw.Path, "open", full)
    with Client(server.url) as client:
        play(client, 0, 3)
    server.stop()
    assert counted(server) == (0, 1)


def test_what_cannot_be_packed_is_tried_again(start: Start, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError("no space left")

    server = start(recorder=recorder(folder))
    monkeypatch.setattr(record.DatasetAppender, "add_episode", broken)
    with Client(server.url) as client:
        actions = play(client, 0, 3)
    server.stop()
    monkeypatch.undo()
    assert (counted(server), folder.exists()) == ((0, 1), False)
    recorder(folder).close()
    same(LeRobotDataset(folder).episode(0), 0, range(3), actions)


@pytest.mark.parametrize(
    ("options", "complaint"), [({"side": 48}, "48, 48, 3"), ({"side": 65}, "even sides")], ids=["other", "odd"]
)
def test_images_that_do_not_fit_are_not_recorded_but_answered(
    start: Start, folder: Path, caplog: pytest.LogCaptureFixture, options: dict[str, Any], complaint: str
) -> None:
    server = start(recorder=recorder(folder))
    with Client(server.url) as client, caplog.at_level(logging.WARNING):
        play(client, 0, 3)
        play(client, 0, 1)  # too short
        client.reset()
        client.infer(scene(1, 0))  # which ends it
        until(lambda: counted(server) == (1, 1))
        assert len(play(client, 0, 3, **options)) == 3
        until(lambda: counted(server) == (1, 3))
    server.stop()
    reasons = [row.metadata["reason"] for row in caplog.records]
    assert reasons[:2] == ["it has a single frame"] * 2
    assert complaint in reasons[2]
    assert counted(server) == (1, 3)


def test_a_robot_that_never_resets(start: Start, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "MAX_FRAMES", 4)
    monkeypatch.setattr(record, "MIN_FIRST", 4)
    server = start(recorder=recorder(folder, fps=0))
    with Client(server.url) as client:
        actions = [client.infer(scene(0, at))["actions"][0] for at in range(7)]
    server.stop()
    dataset = LeRobotDataset(folder)
    assert [len(episode) for episode in dataset] == [4, 3]
    assert dataset.episode(0).metadata["ended"] == "went on after 4 frames"
    same(dataset.episode(1), 0, range(4, 7), actions[4:])
    rate = 1 / np.median(np.diff(dataset.episode(0).columns["seconds"]))
    assert dataset.fps == pytest.approx(rate, abs=0.51)


def test_a_few_frames_to_try_it_decide_nothing(
    start: Start, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The rate and the size of a new dataset are those of a whole episode, not of somebody's first test."""
    monkeypatch.setattr(record, "MIN_FIRST", 6)
    server = start(recorder=recorder(folder, fps=0))
    with Client(server.url) as client, caplog.at_level(logging.WARNING):
        play(client, 0, 5, side=32)
        actions = play(client, 1, 6)
        after = play(client, 0, 3)
    server.stop()
    assert counted(server) == (2, 1)
    assert "--record-fps" in next(row.metadata["reason"] for row in caplog.records)
    dataset = LeRobotDataset(folder)
    assert [len(episode) for episode in dataset] == [6, 3]
    same(dataset.episode(0), 1, range(6), actions)
    same(dataset.episode(1), 0, range(3), after)


def test_the_answer_says_that_it_is_not_recorded(start: Start, folder: Path) -> None:
    server = start(recorder=recorder(folder), view=True)
    with Client(server.url) as client:
        play(client, 0, 3)
        play(client, 0, 2)
        until(lambda: counted(server) == (1, 0))  # the dataset has a size now
        play(client, 0, 1, side=32)
        until(lambda: counted(server) == (2, 1))
        told = [client.infer(scene(0, at, side=32))["lac"]["not_recorded"] for at in (1, 2)]
        shown = server.server._view._snapshots
        until(lambda: next(iter(shown.values())).frames == 8)
        (snapshot,) = shown.values()
        client.reset()
        assert "not_recorded" not in client.infer(scene(0, 0))["lac"]
    server.stop()
    assert "32" in told[0]
    assert told[0] == told[1]
    assert [(event.kind, event.first, event.last) for event in snapshot.events][-1] == ("unrecorded", 7, 8)


def test_a_killed_server_loses_no_finished_episode(model: Path, folder: Path) -> None:
    serve = [
        "serve",
        "--model",
        str(model),
        "--policy",
        "dense",
        "--port",
        "0",
        "--record",
        str(folder),
        "--record-fps",
        "10",
    ]
    process = subprocess.Popen(
        [sys.executable, "-c", "from lac_vla.cli import main; main()", *serve],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stderr is not None
    url = next(line for line in process.stderr if '"listening"' in line).split('"url": "')[1].partition('"')[0]
    with Client(url) as client:
        actions = play(client, 0, 4)
        half = play(client, 1, 3)
        until(lambda: folder.exists())
        left = folder.with_name("log.recording")
        until(lambda: sum(path.stat().st_size for path in left.glob("*.frames")) > 3 * 2 * 64 * 64 * 3)
        process.send_signal(signal.SIGKILL)
        process.wait()
    process.stderr.close()
    dataset = LeRobotDataset(folder)
    assert len(dataset) == 1
    same(dataset.episode(0), 0, range(4), actions)
    torn = next(left.glob("*.frames"))
    shutil.copy(torn, left / "torn-in-a-record.frames")
    with (left / "torn-in-a-record.frames").open("r+b") as file:
        file.truncate(torn.stat().st_size - 5)
    (left / "torn-in-the-header.frames").write_bytes(torn.read_bytes()[:20])
    recorder(folder, fps=0).close()  # the next start
    dataset = LeRobotDataset(folder)
    assert [len(episode) for episode in dataset] == [4, 3, 2]
    same(dataset.episode(1), 1, range(3), half)
    assert dataset.episode(1).metadata["ended"] == "the server was killed"
    assert not left.exists()


def until(condition: Callable[[], object], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
