from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from tests.report.pages import write_video

from lac_vla.drawing import overlay as draw
from lac_vla.drawing import picture as pictures
from lac_vla.drawing.observers import EpisodeVideo
from lac_vla.drawing.video import sample_frames
from lac_vla.engine.step_info import StepInfo
from lac_vla.errors import InputError
from lac_vla.types import Decision, Frame, TokenLayout

GRID = (4, 4)
COLOUR = (200, 40, 90)


def picture(height: int = 32, width: int = 32) -> np.ndarray:
    return np.full((height, width, 3), COLOUR, dtype=np.uint8)


def mask(*tokens: int) -> np.ndarray:
    chosen = np.zeros(16, dtype=bool)
    chosen[list(tokens)] = True
    return chosen


def test_recomputed_keeps_its_colour_reused_is_grey_and_recovered_orange() -> None:
    drawn = draw.overlay(picture(), GRID, mask(0, 5), mask(5))
    assert drawn.shape == (384, 384, 3)
    recomputed, reused, recovered = drawn[48, 48], drawn[48, 240], drawn[144, 144]
    np.testing.assert_array_equal(recomputed, COLOUR)
    assert np.ptp(reused.astype(int)) < 15
    assert reused.mean() < 0.6 * np.mean(COLOUR)
    expected = 0.72 * np.array(COLOUR) + 0.28 * np.array(draw.RECOVERED)
    np.testing.assert_allclose(recovered, expected, atol=1)
    np.testing.assert_array_equal(drawn[0, 48], draw.RECOMPUTED)
    np.testing.assert_array_equal(drawn[96, 144], draw.RECOVERED)


def test_neighbours_share_one_outline() -> None:
    drawn = draw.overlay(picture(), GRID, mask(0, 1))
    np.testing.assert_array_equal(drawn[48, 96], COLOUR)


def test_dense_is_the_picture_in_a_thin_frame() -> None:
    drawn = draw.overlay(picture(), GRID, mask(*range(16)))
    assert (drawn[2:-2, 2:-2] == COLOUR).all()
    assert (drawn[0] == draw.RECOMPUTED).all()


def test_a_token_that_is_not_active_is_not_recovered() -> None:
    drawn = draw.overlay(picture(), GRID, mask(), mask(5))
    np.testing.assert_array_equal(drawn, draw.overlay(picture(), GRID, mask()))


def test_proportions_are_kept_and_the_height_reached() -> None:
    drawn = draw.overlay(picture(30, 60), (3, 6), np.ones(18, dtype=bool), height=400)
    assert drawn.shape == (402, 804, 3)


@pytest.mark.parametrize(
    ("image", "active"),
    [(picture(), np.ones(15, bool)), (picture().astype(np.float32), mask()), (picture()[..., 0], mask())],
)
def test_what_does_not_fit_is_refused(image: np.ndarray, active: np.ndarray) -> None:
    with pytest.raises(InputError, match=r"give uint8|tokens"):
        draw.overlay(image, GRID, active)


def test_caption_adds_a_strip_with_text() -> None:
    drawn = pictures.caption(picture(40, 300), "motion-0.5   step 3", "reused 50 %")
    assert drawn.shape == (70, 300, 3)
    np.testing.assert_array_equal(drawn[30:], picture(40, 300))
    strip = drawn[:30].mean(axis=2)
    assert strip[:, :150].max() > 180
    assert strip[:, 200:].max() > 180


def test_a_long_caption_does_not_run_into_the_right_one() -> None:
    short = pictures.caption(picture(2, 200), "", "reused 50 %")[:30]
    long = pictures.caption(picture(2, 200), "a very long name of a method that does not fit", "reused 50 %")[:30]
    np.testing.assert_array_equal(long[:, 100:], short[:, 100:])


def test_side_by_side_and_filmstrip() -> None:
    both = pictures.side_by_side([picture(20, 30), picture(10, 8)], gap=4)
    assert both.shape == (20, 42, 3)
    np.testing.assert_array_equal(both[15, 38], pictures.PAPER)
    frames = [np.full((6, 6, 3), 10 * t, dtype=np.uint8) for t in range(11)]
    strip = pictures.filmstrip(frames, 3)
    assert strip.shape == (6, 30, 3)
    assert [int(strip[3, x, 0]) for x in (3, 15, 27)] == [0, 50, 100]
    assert pictures.filmstrip(frames[:2], 5).shape == (6, 18, 3)
    with pytest.raises(InputError, match="filmstrip"):
        pictures.filmstrip([], 3)


def test_heat_is_brighter_where_the_score_is_higher_and_bounded_by_its_scale() -> None:
    scores = np.array([[0.0, 0.5], [1.0, 9.0]], np.float32)
    drawn = draw.heat(picture(), scores, (0.0, 1.0), height=100)
    assert drawn.shape == (100, 100, 3)
    dark, middle, bright, beyond = (drawn[y, x].astype(int).sum() for y, x in ((25, 25), (25, 75), (75, 25), (75, 75)))
    assert dark < middle < bright == beyond
    np.testing.assert_array_equal(
        draw.heat(picture(), scores * 0, (0.3, 0.3)), draw.heat(picture(), scores * 0, (0, 1))
    )
    assert draw.heat_colours(3)[0] < draw.heat_colours(3)[-1]


def test_a_saliency_strip_has_three_rows_and_a_column_per_frame() -> None:
    images = np.stack([picture(), picture()])
    active = np.zeros((2, 4, 4), dtype=bool)
    active[1] = True
    strip = draw.saliency_strip(images, active.astype(np.float32), active, (0.0, 1.0), height=80)
    assert strip.shape == (30 + 3 * 80 + 2 * 6, 2 * 80 + 6, 3)
    np.testing.assert_array_equal(strip[30 + 40, 40], COLOUR)
    np.testing.assert_array_equal(strip[30 + 2 * 86 + 40, 86 + 40], COLOUR)
    assert strip[30 + 2 * 86 + 40, 40].mean() < 0.6 * np.mean(COLOUR)


def test_video_is_h264_with_even_sides_and_all_frames(tmp_path: Path) -> None:
    frames = [np.full((33, 47, 3), 20 * t, dtype=np.uint8) for t in range(10)]
    path = write_video(tmp_path / "deep" / "film.mp4", frames, fps=20)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.height, stream.width, stream.average_rate) == (34, 48, 20)
        shades = [int(frame.to_ndarray(format="rgb24").mean()) for frame in container.decode(stream)]
    np.testing.assert_allclose(shades, [20 * t for t in range(10)], atol=4)
    assert [path.name for path in path.parent.iterdir()] == ["film.mp4"]
    sampled = sample_frames(path, 4)
    np.testing.assert_allclose([frame.mean() for frame in sampled], [0, 60, 120, 180], atol=4)


def test_videos_that_cannot_be_are_refused(tmp_path: Path) -> None:
    assert not write_video(tmp_path / "none.mp4", [], fps=20).exists()
    with pytest.raises(InputError, match="give one size"):
        write_video(tmp_path / "mixed.mp4", [picture(32, 32), picture(34, 32)], fps=20)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        write_video(tmp_path / "file" / "film.mp4", [picture()], fps=20)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(InputError, match="cannot be decoded"):
        sample_frames(tmp_path / "broken.mp4", 3)
    assert not list(tmp_path.glob("*.mp4"))[1:]


def step(number: int) -> StepInfo:
    layout = TokenLayout.of({"agentview": (4, 4), "wrist": (2, 2)}, 1, 3)
    cached = np.arange(20) % 2 == 0
    decision = Decision.reuse(cached, 2, recovered=np.arange(20) == 3)
    age = np.where(cached, number, 0).astype(np.int64)
    pixels = {"agentview": picture(), "wrist": picture(16, 16)}
    because = "first frame" if number == 0 else None
    return StepInfo(layout, decision, np.zeros(20, dtype=bool), age, because, {}, {}, pixels)


def test_a_step_shows_all_cameras_under_its_caption() -> None:
    drawn = draw.step_picture(step(1), "motion-0.5", 1)
    assert drawn.shape == (30 + 384, 384 + 6 + 384, 3)
    np.testing.assert_array_equal(drawn[30 + 48, 96 + 48], COLOUR)
    np.testing.assert_array_equal(drawn[30 + 96, 390 + 192 + 96], COLOUR)


@pytest.mark.parametrize(("success", "shade"), [(True, (0, 158, 115)), (False, (213, 60, 60))])
def test_an_episodes_video_ends_with_its_outcome(tmp_path: Path, success: bool, shade: tuple[int, int, int]) -> None:
    video = EpisodeVideo(tmp_path / "episode.mp4", "motion-0.5", fps=5)
    frame = Frame({"agentview": picture(), "wrist": picture()}, "pick up the bowl")
    for number in range(4):
        video.add(frame, step(number))
    assert not video.path.exists()
    video.close(success=success)
    frames = sample_frames(video.path, 100)
    assert len(frames) == 4 + 5
    np.testing.assert_allclose(frames[-1][200, 2], shade, atol=25)
    np.testing.assert_allclose(frames[0][30 + 48, 96 + 48], COLOUR, atol=25)


def test_an_episode_without_steps_leaves_no_video(tmp_path: Path) -> None:
    video = EpisodeVideo(tmp_path / "episode.mp4", "dense")
    video.close(success=False)
    assert list(tmp_path.iterdir()) == []


def test_a_video_of_several_actions_per_call_runs_in_real_time(tmp_path: Path) -> None:
    video = EpisodeVideo(tmp_path / "episode.mp4", "motion-0.5", fps=5, actions_per_call=3)
    for number in range(2):
        video.add(Frame({"agentview": picture()}, "pick up the bowl"), step(number))
    video.close(success=True)
    frames = [frame.astype(int) for frame in sample_frames(video.path, 100)]
    assert len(frames) == 2 * 3 + 5
    assert np.abs(frames[0] - frames[2]).mean() < 1, "the first call's picture stands for three steps"
    counted, called = (draw.step_picture(step(1), "motion-0.5", number).astype(int) for number in (3, 1))
    errors = [np.abs(frames[3][:30] - drawn[:30]).mean() for drawn in (counted, called)]
    assert errors[0] < errors[1], "the caption counts world steps"
