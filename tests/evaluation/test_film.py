"""A film on one wall clock, made of a run on a fake simulator."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lac_vla.cli import main
from lac_vla.drawing import film
from lac_vla.drawing.picture import footnote
from lac_vla.drawing.video import frames_of
from lac_vla.errors import InputError
from lac_vla.evaluation.config import EvalConfig
from lac_vla.evaluation.film import FilmConfig, _choose, make_film
from lac_vla.evaluation.runner import evaluate
from lac_vla.results.records import read_episodes

HZ, AFTER = 20, 20


@pytest.fixture
def config(model: str, tmp_path: Path) -> EvalConfig:
    """An answer takes two control steps: every third of an episode's actions is the robot's."""
    policies = ("dense", "motion:ratio=0.5")
    out = tmp_path / "run"
    return EvalConfig(model, out, policies, tasks=(0,), init_states=(5, 7), videos=2, clock="80", mode="hold")


def shown(picture: np.ndarray, column: int = 0) -> tuple[int, int, int]:
    """The state whose colour a method's bar has."""
    colours = (film.ACTING, film.THINKING, film.SOLVED, film.FAILED)
    seen = picture[30 + film.BAR // 2, 40 + 326 * column].astype(int)
    return min(colours, key=lambda colour: float(np.abs(seen - np.array(colour)).sum()))


def test_every_tick_of_the_world_is_filmed_with_its_state(config: EvalConfig) -> None:
    run = evaluate(config)
    for episode in read_episodes(run / "episodes.jsonl"):
        assert episode.realtime is not None
        assert episode.video is not None
        pictures = list(frames_of(run / episode.video))
        assert len(pictures) == episode.steps + AFTER
        states = [shown(picture) for picture in pictures]
        end = film.SOLVED if episode.success else film.FAILED
        assert states[episode.steps :] == [end] * AFTER
        assert states[: episode.steps].count(film.THINKING) == episode.realtime.held
        assert states[:3] == [film.THINKING, film.THINKING, film.ACTING]


def test_methods_stand_side_by_side_on_one_clock(config: EvalConfig, tmp_path: Path) -> None:
    run = evaluate(config)
    out, gif = tmp_path / "films" / "film.mp4", tmp_path / "film.gif"
    main(["film", str(run), "--out", str(out), "--gif", str(gif), "--init-state", "6"])
    pictures = list(frames_of(out))
    episodes = [e for e in read_episodes(run / "episodes.jsonl") if e.init_state == 6]
    assert len(pictures) == max(e.steps for e in episodes) + AFTER
    assert pictures[0].shape[1] == 320 + 6 + 320
    assert {shown(pictures[30 - 30][30:], column) for column in (0, 1)} == {film.THINKING}
    moving = Image.open(gif)
    assert getattr(moving, "n_frames", 1) > 5
    assert moving.info["loop"] == 0
    assert gif.stat().st_size < 3_000_000
    lasts = []
    for number in range(getattr(moving, "n_frames", 1)):
        moving.seek(number)
        lasts.append(moving.info["duration"])
    assert sum(lasts[:-1]) == pytest.approx(1000 * len(pictures) / HZ, abs=150), "it plays in the world's time"


def test_below_the_world_stands_what_the_last_answer_computed(config: EvalConfig) -> None:
    run = evaluate(replace(config, init_states=(6, 7)))
    rooms = {}
    for episode in read_episodes(run / "episodes.jsonl"):
        pictures = list(frames_of(run / str(episode.video)))[: episode.steps]
        rooms[episode.method] = np.array([picture[-film.ROOM :].mean() for picture in pictures])
    dense, reusing = rooms["dense"], rooms["motion-0.5"]
    assert dense[:2].max() < 40 < dense[2:].min(), "empty until the first answer is there"
    assert reusing[2] == pytest.approx(dense[2], abs=2), "the first one computes all"
    assert reusing[5] < 0.85 * dense[5], "what is reused is dim"


def test_a_moving_picture_leaves_the_noise_of_a_video_out() -> None:
    rng = np.random.default_rng(0)
    scene = rng.integers(40, 200, (8, 8, 3))
    pictures = [Image.fromarray((scene + rng.integers(-4, 5, scene.shape)).astype(np.uint8)) for _ in range(9)]
    moved = scene.copy()
    moved[:4] = 255 - moved[:4]
    moved[moved == scene] += 30
    *still, last = film._calm([*pictures, Image.fromarray(moved.astype(np.uint8))])
    assert all(picture.tobytes() == pictures[0].tobytes() for picture in still)
    changed = np.abs(moved - np.asarray(pictures[0])).max(axis=2) > film.STILL
    assert changed.any()
    np.testing.assert_array_equal(np.asarray(last)[changed], moved[changed])


def test_who_is_done_shows_the_end_until_all_are(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    from tests.engine.scenes import frame

    paths = []
    for name, ticks in (("slow", 9), ("fast", 4)):
        video = film.WorldVideo(tmp_path / f"{name}.mp4", name, HZ)
        for tick in range(ticks):
            video.tick(frame(int(rng.integers(5))), thinking=tick % 2 == 0)
        paths.append(video.close(success=name == "fast"))
    assert film.WorldVideo(tmp_path / "none.mp4", "none", HZ).close(success=True) is None
    film.join([path for path in paths if path is not None], tmp_path / "both.mp4", HZ, "words")
    pictures = [picture[30:] for picture in frames_of(tmp_path / "both.mp4")]
    assert len(pictures) == 9 + AFTER
    assert [shown(picture, 1) for picture in pictures[4:]] == [film.SOLVED] * (5 + AFTER)
    assert [shown(picture, 0) for picture in pictures] == [film.THINKING, film.ACTING] * 4 + [film.THINKING] + [
        film.FAILED
    ] * AFTER


def test_an_answer_that_comes_too_late_is_not_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from tests.engine.scenes import frame

    from lac_vla import CachedVLA, Dense, random_vla

    session, said, caption = CachedVLA(random_vla("tiny"), Dense()).session(), list[str](), film.caption

    def listen(picture: np.ndarray, left: str, right: str) -> np.ndarray:
        said.append(right)
        return caption(picture, left, right)

    monkeypatch.setattr(film, "caption", listen)
    video = film.WorldVideo(tmp_path / "video.mp4", "dense", HZ)
    video.tick(frame(0), thinking=True)
    session.act(frame(0))
    assert session.last_info is not None
    video.add(frame(0), session.last_info)
    video.close(success=False)
    assert "all computed" not in said
    assert said.count("no answer yet") == 1 + AFTER


def test_it_says_whose_latencies_it_plays(config: EvalConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run, said = evaluate(config), list[str]()

    def listen(picture: np.ndarray, words: str) -> np.ndarray:
        said.append(words)
        return footnote(picture, words)

    monkeypatch.setattr(film, "footnote", listen)
    make_film(run, FilmConfig(tmp_path / "film.mp4"))
    for part in ("libero_spatial task 0", "model model", "mode hold", "every answer takes 80 ms", "altered rendering"):
        assert part in said[0]


def test_there_must_be_something_to_film(config: EvalConfig, tmp_path: Path) -> None:
    run = evaluate(config)
    for wrong in ({"task": 5}, {"methods": ("dense", "lac")}, {"init_state": 0}):
        with pytest.raises(InputError, match="lac eval --clock DEVICE"):
            make_film(run, FilmConfig(tmp_path / "film.mp4", **wrong))  # type: ignore[arg-type]
    waiting = evaluate(replace(config, out=tmp_path / "waiting", clock=None))
    with pytest.raises(InputError, match="lac eval --clock DEVICE"):
        make_film(waiting, FilmConfig(tmp_path / "film.mp4"))
    assert not (tmp_path / "film.mp4").exists()
    (run / "videos" / "dense_task00_init05.mp4").write_bytes(b"no video")
    with pytest.raises(InputError, match="play the episode again"):
        make_film(run, FilmConfig(tmp_path / "film.mp4", init_state=5))


def test_a_moving_picture_that_cannot_be_small_enough_is_refused(config: EvalConfig, tmp_path: Path) -> None:
    run = evaluate(replace(config, init_states=(4, 5)))
    videos = sorted((run / "videos").glob("*.mp4"))
    with pytest.raises(InputError, match="film a shorter episode"):
        film.join(videos, tmp_path / "film.mp4", HZ, "words", tmp_path / "film.gif", limit=5000)
    assert not (tmp_path / "film.gif").exists()
    with pytest.raises(InputError, match="size above 0"):
        FilmConfig(tmp_path / "film.mp4", gif_mb=0)
    with pytest.raises(InputError, match="film a shorter episode"):
        make_film(run, FilmConfig(tmp_path / "film.mp4", tmp_path / "film.gif", gif_mb=0.005))


def test_the_first_trial_on_which_methods_disagree_is_shown(config: EvalConfig) -> None:
    episodes = [replace(each, success=True) for each in read_episodes(evaluate(config) / "episodes.jsonl")]
    wanted = FilmConfig(Path("film.mp4"))
    assert {each.init_state for each in _choose(episodes, wanted)} == {5}
    apart = [replace(each, success=each.method == "dense") if each.init_state == 6 else each for each in episodes]
    assert [(each.method, each.init_state) for each in _choose(apart, wanted)] == [("dense", 6), ("motion-0.5", 6)]
