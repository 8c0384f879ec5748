"""A server that records is killed anywhere: after the next start every episode is there, whole and once."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lac_vla import Frame
from lac_vla.datasets import LeRobotDataset
from lac_vla.datasets.video import VideoWriter
from lac_vla.serving.metrics import Metrics
from lac_vla.serving.raw import COLUMNS, RawEpisode, RawWriter
from lac_vla.serving.record import Recorder
from tests.crash.kills import counted, files, run_killed

TASKS = ("pick up the bowl", "open the drawer", "pick up the bowl", "close the drawer")
POINTS = 78
"""Changes to the disk while these episodes are packed."""

VIDEO = (VideoWriter, "_open")


def frame(episode: int, at: int) -> Frame:
    image = np.full((32, 32, 3), 40 * episode + 5 * at, np.uint8)
    return Frame({"front": image}, TASKS[episode], np.full(2, episode + at / 8, np.float32))


def action(episode: int, at: int) -> Any:
    return np.array([episode, at, 0.5], np.float32)


def start(folder: Path) -> Recorder:
    return Recorder(folder, Metrics(), cameras=("front",), action=3, state=2, fps=5, metadata={"model": "tiny"})


def restart(folder: Path) -> None:
    start(folder).close()


def leave(folder: Path) -> Path:
    """What a killed server leaves: three episodes that ended, and one that did not."""
    raw = folder.with_name(folder.name + ".recording")
    raw.mkdir(parents=True)
    for episode in range(4):
        path = raw / f"{9 - episode}-name.frames"
        writer = RawWriter(path, {"model": "tiny", "raw": path.name})
        for at in range(3 + episode):
            writer.write(frame(episode, at), action(episode, at), dict.fromkeys(COLUMNS, at))
        if episode < 3:
            writer.finish("reset")
        else:
            writer._file.close()  # type: ignore[union-attr]
        os.utime(path, (episode, episode))  # in the order of their ends, not of their names
    return folder


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = leave(tmp_path_factory.mktemp("unbroken") / "log")
    with counted(VIDEO) as count:
        restart(folder)
    assert count.done == POINTS
    return folder


def check(folder: Path) -> list[Any]:
    """All episodes that count are whole, and what is derived from them agrees."""
    if not folder.exists():
        return []
    dataset = LeRobotDataset(folder)
    episodes = list(dataset)
    for episode in episodes:
        number = round(float(episode.action[0, 0]))
        np.testing.assert_array_equal(episode.action, [action(number, at) for at in range(len(episode))])
        np.testing.assert_array_equal(episode.state, [frame(number, at).proprio for at in range(len(episode))])
        assert episode.instruction == TASKS[number]
        assert episode.images["front"].shape == (len(episode), 32, 32, 3)
    assert dataset.total_frames == sum(map(len, episodes))
    return episodes


def test_the_unbroken_one(unbroken: Path) -> None:
    episodes = check(unbroken)
    assert [len(episode) for episode in episodes] == [3, 4, 5, 6]
    assert [episode.metadata["ended"] for episode in episodes] == [*["reset"] * 3, "the server was killed"]
    dataset = LeRobotDataset(unbroken)
    assert len(dataset.tasks) == dataset.info["total_tasks"] == 3
    assert {int(entry["count"].item()) for entry in dataset.stats.values()} == {18}
    actions = np.concatenate([episode.action for episode in episodes])
    np.testing.assert_allclose(dataset.stats["action"]["mean"], actions.mean(axis=0), rtol=1e-6)


@pytest.mark.parametrize(
    "at", [pytest.param(at, marks=[] if at % 9 == 4 else pytest.mark.slow) for at in range(POINTS)]
)
def test_killed_while_it_packs(unbroken: Path, tmp_path: Path, at: int) -> None:
    folder = leave(tmp_path / "log")
    assert run_killed(at, lambda: restart(folder), VIDEO)
    check(folder)
    restart(folder)
    assert files(folder) == files(unbroken)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log"]


def test_killed_twice(unbroken: Path, tmp_path: Path) -> None:
    folder = leave(tmp_path / "log")
    for at in (17, 11, 8):
        assert run_killed(at, lambda: restart(folder), VIDEO)
        check(folder)
    restart(folder)
    assert files(folder) == files(unbroken)


WHILE = (VIDEO, (RawWriter, "open"), (RawWriter, "write"), (RawWriter, "finish"))


@pytest.mark.parametrize("at", range(14))
def test_killed_while_it_records(tmp_path: Path, at: int) -> None:
    """Two sessions of three frames each, one behind the other."""
    folder, finished = tmp_path / "log", tmp_path / "finished"
    finished.touch()
    finish = RawWriter.finish

    def note(writer: RawWriter, ended: str) -> None:
        finish(writer, ended)
        with finished.open("a") as file:
            file.write(f"{writer.metadata['session']}\n")

    def record() -> None:
        recorder = start(folder)
        for number in range(2):
            recorder.begin(f"session{number}")
            for step in range(3):
                answer = SimpleNamespace(
                    reset=None,
                    frame=frame(number, step),
                    step=SimpleNamespace(ratio=0.5),
                    message={"actions": action(number, step)[None]},
                )
                recorder.add(f"session{number}", answer, float(step), 1.0)  # type: ignore[arg-type]
            recorder.end(f"session{number}", "reset")
        recorder.close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RawWriter, "finish", note)
        assert run_killed(at, record, *WHILE)
    restart(folder)
    episodes = check(folder)
    lengths = {episode.metadata["session"]: len(episode) for episode in episodes}
    assert len(lengths) == len(episodes), "none is there twice"
    assert all(lengths[session] == 3 for session in finished.read_text().split())
    assert not folder.with_name("log.recording").exists()


def test_a_disk_that_fails_behind_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server goes on: what was committed is not written over by the next episode."""
    folder, real = leave(tmp_path / "log"), os.replace

    def replace(source: Any, target: Any) -> None:
        real(source, target)
        if Path(target).name == "info.json" and b'"total_episodes": 2' in Path(target).read_bytes():
            raise OSError("the disk failed")

    monkeypatch.setattr(os, "replace", replace)
    restart(folder)
    monkeypatch.undo()
    restart(folder)
    assert [len(episode) for episode in check(folder)] == [3, 4, 5, 6]


def test_a_torn_end_is_no_frame(tmp_path: Path) -> None:
    path = next(iter(leave(tmp_path / "log").with_name("log.recording").glob("9-*")))
    whole = path.read_bytes()
    for cut in range(1, 40):
        path.write_bytes(whole[:-cut])
        read = RawEpisode.read(path)
        assert read.ended is None
        assert len(read.records) == 3 - (cut > len("reset") + 12)


def test_two_names_of_one_folder_have_one_writer(tmp_path: Path) -> None:
    from lac_vla import InputError

    (tmp_path / "real").mkdir()
    (tmp_path / "other").symlink_to(tmp_path / "real")
    one = start(tmp_path / "real" / "log")
    with pytest.raises(InputError, match="another process writes to"):
        start(tmp_path / "other" / "log")
    one.close()
    shutil.rmtree(tmp_path / "real")


def test_too_many_open_files_are_a_reason_to_try_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The descriptors come back while the first frames wait."""
    real, refused = Path.open, [0]

    def full(path: Path, mode: str = "r", **options: Any) -> Any:
        if path.suffix == ".frames" and mode == "xb" and refused[0] < 4:
            refused[0] += 1
            raise OSError(errno.EMFILE, "too many open files")
        return real(path, mode, **options)

    monkeypatch.setattr(Path, "open", full)
    writer = RawWriter(tmp_path / "1.frames", {})
    with pytest.raises(OSError, match="too many"):
        writer.open()
    for at in range(3):
        writer.write(frame(0, at), action(0, at), dict.fromkeys(COLUMNS, at))
    writer.finish("reset")
    assert (len(RawEpisode.read(writer.path).records), refused) == (3, [4])
