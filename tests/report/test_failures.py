"""Pictures of lost episodes: written for failures alone, and shown for those that dense solved."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from lac_vla import CachedVLA, InputError, Motion, random_vla
from lac_vla.drawing.observers import FailurePicture
from lac_vla.report import build_report
from lac_vla.report.failures import gallery, lost
from lac_vla.report.runs import Run
from lac_vla.results.records import EpisodeRecord
from tests.engine.scenes import frame
from tests.report.pages import Page, check_self_contained

HORIZON = 9


def watched(path: Path, steps: int, ages: int | None = None) -> FailurePicture:
    """An episode of ``steps`` steps; its tokens have an age of ``ages``, if that is given."""
    session = CachedVLA(random_vla("tiny"), Motion(0.5)).session()
    picture = FailurePicture(path, HORIZON, 16)
    for number in range(steps):
        session.act(frame(number))
        assert session.last_info is not None
        step = (
            session.last_info
            if ages is None
            else replace(session.last_info, age=np.full_like(session.last_info.age, ages))
        )
        picture.add(frame(number), step)
    return picture


def test_only_failures_leave_a_picture(tmp_path: Path) -> None:
    assert watched(tmp_path / "a" / "solved.jpg", 4).close(success=True) is None
    assert not (tmp_path / "a").exists()
    path = watched(tmp_path / "b" / "lost.jpg", HORIZON).close(success=False)
    assert path == tmp_path / "b" / "lost.jpg"
    assert path.stat().st_size < 200_000, "a record stays small"


def test_the_picture_shows_the_age_of_the_tokens(tmp_path: Path) -> None:
    bright = []
    for ages in (0, 16):
        path = watched(tmp_path / f"{ages}.jpg", HORIZON, ages).close(success=False)
        assert path is not None
        picture = cv2.imread(str(path))
        bright.append([half.mean() for half in np.array_split(picture, 2)])
    fresh, old = bright
    assert old[1] > fresh[1] + 40, "below: dark for fresh, bright for old"
    assert old[0] == pytest.approx(fresh[0], abs=3), "above: what was recomputed, the same in both"


def test_the_moments_are_calls_of_the_model(tmp_path: Path) -> None:
    """Nine steps, two a call: five calls, of which the picture shows all but the first."""
    session = CachedVLA(random_vla("tiny"), Motion(0.5)).session()
    picture = FailurePicture(tmp_path / "lost.jpg", HORIZON, 16, actions_per_call=2)
    widths = []
    for number in range(5):
        session.act(frame(number))
        assert session.last_info is not None
        picture.add(frame(number), session.last_info)
        path = picture.close(success=False)
        widths.append(0 if path is None else cv2.imread(str(path)).shape[1])
    assert widths[0] == 0
    assert widths[-1] > 3.9 * widths[1] > 0


def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="choose another folder"):
        watched(tmp_path / "file" / "lost.jpg", HORIZON).close(success=False)


@pytest.fixture
def run(run_dir: Path, tmp_path: Path) -> Run:
    """Of four trials, dense solves three and motion two of them; pictures of all failures."""
    folder = tmp_path / "run"
    shutil.copytree(run_dir, folder)
    picture = watched(folder / "failures" / "one.jpg", HORIZON).close(success=False)
    assert picture is not None
    lines = [json.loads(line) for line in (folder / "episodes.jsonl").read_text().splitlines()]
    for line in lines:
        line["failure"] = None if line["success"] else "failures/one.jpg"
    (folder / "episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Run.read(folder)


def test_the_page_shows_what_dense_solved_and_a_method_lost(run: Run, tmp_path: Path) -> None:
    ((dense, method),) = lost(run)
    assert (dense.method, method.method, dense.trial) == ("dense", "motion-0.5", method.trial)
    assert dense.trial == ("libero_spatial", 0, 1, 7, "", ""), "both lose the fourth: caching is not to blame for it"
    html = build_report([run.folder], tmp_path / "report.html")
    page = Page(html.read_text(encoding="utf-8"))
    text = " ".join(page.text.split())
    assert "1 episode was solved by dense and not by a method" in text
    assert "task 0 · initial state 1 · dense solved it in 3 steps, motion-0.5 had not after 3" in text
    check_self_contained(html)


def test_a_page_without_losses_or_pictures(run: Run) -> None:
    won = [e for e in run.episodes if e.success or e.method == "dense"]
    assert gallery(replace(run, episodes=won), {"motion-0.5": "red"}) is None
    bare = [replace(e, failure=None) for e in run.episodes]
    found = gallery(replace(run, episodes=bare), {"motion-0.5": "red"})
    assert found == {"lost": 1, "shown": []}


def test_few_of_many_losses_are_shown_and_those_of_different_tasks_first(run: Run) -> None:
    def episode(method: str, task: int, init: int, success: bool) -> EpisodeRecord:
        failure = None if success else "failures/one.jpg"
        return EpisodeRecord(method, "libero_spatial", task, "x", init, 0, success, 3, 220, failure=failure)

    trials = [(task, init) for task in (0, 1) for init in range(4)]
    episodes = [episode(m, *trial, m == "dense") for trial in trials for m in ("dense", "motion-0.5")]
    found = gallery(replace(run, episodes=episodes), {"motion-0.5": "red"})
    assert found is not None
    assert found["lost"] == 8
    assert [(shown["episode"].task, shown["episode"].init_state) for shown in found["shown"]] == [
        (0, 0),
        (1, 0),
        (0, 1),
    ]


@pytest.mark.parametrize("name", ["../secret", "link", "plain.txt", "huge.jpg", "failures", "x\0y", "n" * 5000, "loop"])
@pytest.mark.parametrize("field", ["failure", "video"])
def test_a_page_carries_nothing_away(run: Run, tmp_path: Path, name: str, field: str) -> None:
    """A foreign run's record may name any file: what lies outside, or is no picture, is not shown."""
    (tmp_path / "secret").write_text("the key")
    if field == "failure":  # a picture outside is none of the run's, either
        shutil.copy(run.folder / "failures" / "one.jpg", tmp_path / "secret")
    (run.folder / "link").symlink_to(tmp_path / "secret")
    (run.folder / "loop").symlink_to(run.folder / "loop")
    if field == "failure":
        (run.folder / "plain.txt").write_text("no picture")
        (run.folder / "huge.jpg").write_bytes(b"\xff\xd8" + bytes(2**23))
    episodes = [replace(e, video=None, failure=None) for e in run.episodes]
    shown = [replace(e, **{field: name}) for e in episodes]
    assert gallery(replace(run, episodes=shown), {"motion-0.5": "red"})["shown"] == []  # type: ignore[index]
    assert replace(run, episodes=shown).recorded() == []
