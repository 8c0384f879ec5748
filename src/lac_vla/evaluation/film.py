"""The film of a run whose world did not wait: methods on the same trial, side by side on one clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lac_vla.drawing import film as drawn
from lac_vla.errors import InputError
from lac_vla.evaluation.clock import WorldClock
from lac_vla.files import read_object, writing
from lac_vla.results.realtime import RealTime
from lac_vla.results.records import EpisodeRecord, read_episodes


@dataclass(frozen=True)
class FilmConfig:
    """A film.

    Attributes:
        out: The ``.mp4`` file.
        gif: A moving picture of the same, for a page that plays no videos.
        gif_mb: What it may take, MB; it is as fine as fits.
        methods: Methods of the run, from left to right; by default all that have a video of the trial.
        task: Task id; by default that of the first trial on which they disagree, else of the first.
        init_state: Initial state, likewise.
    """

    out: Path
    gif: Path | None = None
    gif_mb: float = 3.0
    methods: tuple[str, ...] = ()
    task: int | None = None
    init_state: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.gif_mb < 1000:
            raise InputError(f"gif_mb is {self.gif_mb:g}; give a size above 0 and below 1000")


def make_film(run: Path, config: FilmConfig) -> list[EpisodeRecord]:
    """Make the film of a run of ``lac eval --clock … --videos N``; return the episodes that it shows.

    Raises:
        InputError: If the run has no such episodes with videos, or a file cannot be read or written.
    """
    chosen = _choose(read_episodes(run / "episodes.jsonl"), config)
    if not chosen:
        raise InputError(
            f"{run} has no such trial of all methods with videos in world time: play it by `lac eval --clock DEVICE "
            "--videos N`, on a clock other than wall"
        )
    videos = [run / str(episode.video) for episode in chosen]
    if outside := [video for video in videos if not video.resolve().is_relative_to(run.resolve())]:
        raise InputError(f"{outside[0]} lies outside of the run's folder {run}")
    with writing(config.out.parent, "the film's folder"):
        hz, words = _real(chosen[0]).control_hz, _words(run, chosen[0])
        drawn.join(videos, config.out, hz, words, config.gif, round(1e6 * config.gif_mb))
    return chosen


def _choose(episodes: Sequence[EpisodeRecord], config: FilmConfig) -> list[EpisodeRecord]:
    """Choose a trial of which all methods have a video in world time."""
    trials: dict[object, dict[str, EpisodeRecord]] = {}
    for episode in episodes:
        wanted = (config.task in (None, episode.task)) and (config.init_state in (None, episode.init_state))
        if wanted and episode.video is not None and episode.realtime is not None:
            trials.setdefault(episode.trial, {})[episode.method] = episode
    methods = config.methods or tuple(dict.fromkeys(method for trial in trials.values() for method in trial))
    groups = [[trial[method] for method in methods] for trial in trials.values() if set(methods) <= set(trial)]
    return min(groups, key=lambda group: len({episode.success for episode in group}) == 1, default=[])


def _words(run: Path, episode: EpisodeRecord) -> str:
    """Say what is played, and whose latencies."""
    summary, real = read_object(run / "summary.json", "resume the run, it writes it again"), _real(episode)
    model, simulator = summary.get("model"), summary.get("simulator")
    name = str(model.get("name", "?")) if isinstance(model, dict) else "?"
    rendering = str(simulator.get("rendering", "")) if isinstance(simulator, dict) else ""
    try:
        credit = WorldClock(real.clock.removesuffix(" ms"), real.mode).credit(real.table)  # type: ignore[arg-type]
    except (InputError, StopIteration):  # the table's file is not here
        credit = f"virtual time: latency table {real.table}"
    parts = [f"{episode.suite} task {episode.task}, model {name}, mode {real.mode}", credit]
    parts += [f"stress {episode.stress}"] if episode.stress else []
    parts += ["altered rendering"] if rendering == "fast" else []
    return "; ".join(parts)


def _real(episode: EpisodeRecord) -> RealTime:
    if episode.realtime is None:  # pragma: no cover - only such are chosen
        raise InputError("a film is of a world that does not wait")
    return episode.realtime
