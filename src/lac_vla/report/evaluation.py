"""The report of evaluations: one self-contained HTML page from their folders."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from lac_vla.drawing import plots
from lac_vla.drawing.overlay import RECOMPUTED, RECOVERED, heat_colours
from lac_vla.drawing.picture import css, filmstrip, jpeg_base64
from lac_vla.drawing.video import sample_frames
from lac_vla.errors import InputError
from lac_vla.report.failures import gallery
from lac_vla.report.page import metadata_groups, setting, write_page
from lac_vla.report.runs import Run
from lac_vla.report.tradeoff import tradeoff
from lac_vla.results import format as write
from lac_vla.results import table
from lac_vla.results.records import EpisodeRecord, latencies
from lac_vla.results.summary import DENSE, MethodRow
from lac_vla.results.table import Column, TextTable

COLOURS = 7
"""Colours of the page's palette; the first is dense's."""

TILE = ("ratio, effective", "MACs, FLOPs", "observation to action", "net speed-up")
"""Columns that a method's tile shows, too."""

VIDEO_TRIALS = 6
"""At most so many trials are shown as videos."""
VIDEO_MB = 40
"""All videos of a run together are at most so large."""


def build_report(
    run_dirs: Sequence[str | Path],
    out_html: str | Path,
    *,
    title: str | None = None,
    tables: Sequence[TextTable] = (),
    curve: Mapping[str, Any] | None = None,
    clocks: Mapping[str, Any] | None = None,
) -> Path:
    """Write the report of one or several runs, and give the page's path.

    Args:
        run_dirs: Folders of runs: ``episodes.jsonl``, ``summary.json``, ``videos/``.
        out_html: The page to write; its folder is created.
        title: Heading of the page.
        tables: Tables over all runs, shown first.
        curve: The trade-off over all runs, see :func:`lac_vla.report.tradeoff.tradeoff`, shown behind them.
        clocks: Success over latency in a world that does not wait, see :func:`lac_vla.report.clocks.clock_charts`.

    Raises:
        InputError: If a folder is no run, or the page cannot be written.
        MissingExtraError: If jinja2 or PyAV is not installed.
    """
    if not run_dirs:
        raise InputError("no run is given: name at least one folder of 'lac eval'")
    runs = [Run.read(folder) for folder in run_dirs]
    groups = _column_groups(any(table.paced(run.summary) for run in runs))
    return write_page(
        "evaluation.html.j2",
        Path(out_html),
        title=title or "Visual token caching: evaluation report",
        tables=tables,
        curve=curve,
        clocks=clocks,
        runs=[_run(run) for run in runs],
        groups=groups,
        columns=[column for _, columns in groups for column in columns],
        ages=", ".join(css(colour) for colour in heat_colours()),
        recomputed=css(RECOMPUTED),
        recovered=css(RECOVERED),
    )


def _run(run: Run) -> dict[str, Any]:
    rows = run.summary.methods
    colours = _colours([row.method for row in rows])
    dense = run.summary.row(DENSE)
    trials = run.recorded()
    return {
        "name": run.folder.name,
        "suites": ", ".join(sorted({e.suite for e in run.episodes})),
        "metadata": metadata_groups(run.metadata),
        "setting": setting(run.metadata),
        "altered": run.rendering not in ("", "official"),
        "rendering": run.rendering,
        "notes": [*run.notes, *([f"{run.busy[0].upper()}{run.busy[1:]}."] if run.busy else [])],
        "table_notes": [table.TIME_NOTE, *table.run_notes(run.summary)],
        "methods": [_method(run, row, dense, colours[row.method]) for row in rows],
        "tasks": run.summary.tasks,
        "latency": [
            {"name": window.replace("_", " "), "meaning": meaning, "svg": _latency(run, window, colours)}
            for window, meaning in table.WINDOWS.items()
        ],
        "ratio": _ratio(run, colours),
        "curve": tradeoff(run.summary, run.episodes, run.specs),
        "gallery": gallery(run, colours),
        "trials": [
            [_clip(run, episode, colours[episode.method]) for episode in group] for group in _shown(run, trials)
        ],
        "recorded": len(trials),
        "dense": dense is not None,
        "steps": sum(row.steps for row in rows),
        "episodes": len(run.episodes),
        "horizons": ", ".join(str(value) for value in sorted({e.horizon for e in run.episodes})),
        "seeds": ", ".join(str(value) for value in sorted({e.seed for e in run.episodes})),
    }


def _column_groups(pace: bool) -> list[tuple[str, tuple[Column, ...]]]:
    return [
        ("Success", (*table.SUCCESS, table.SPEEDUP)),
        *([("A world that does not wait", table.PACE)] if pace else []),
        ("Per call of the model", table.metric_columns()),
        ("Latency p50 / p95, ms", table.TIME),
        ("Peak", (table.MEMORY,)),
    ]


def _method(run: Run, row: MethodRow, dense: MethodRow | None, colour: str) -> dict[str, Any]:
    reference = dense if dense is not row else None
    policy = run.specs.get(row.method, "")
    cells = {column.heading: column.cell(row, dense) for _, columns in _column_groups(pace=True) for column in columns}
    return {
        "row": row,
        "colour": colour,
        "policy": policy,
        "meaning": "computes everything in every frame" if row.method == DENSE else policy,
        "rate": write.percent(row.rate),
        "bar": plots.interval_bar(row.rate, *row.interval, reference.rate if reference else None),
        "cells": cells,
        "tile": [(heading, cells[heading]) for heading in TILE],
    }


def _latency(run: Run, window: str, colours: Mapping[str, str]) -> str:
    samples = {method: (colour, latencies(run.episodes, method, window)) for method, colour in colours.items()}
    return plots.latency_panel(samples, f"latency of {window}")


def _ratio(run: Run, colours: Mapping[str, str]) -> str:
    def series(name: str, method: str) -> list[Sequence[float | None]]:
        return [e.metrics[name] for e in run.episodes if e.method == method and name in e.metrics]

    cached = [method for method in colours if method != DENSE]
    effective = {method: (colours[method], series("ratio_effective", method)) for method in cached}
    return plots.ratio_chart(effective, {method: series("ratio_nominal", method) for method in cached})


def _shown(run: Run, trials: Sequence[list[EpisodeRecord]]) -> list[list[EpisodeRecord]]:
    shown: list[list[EpisodeRecord]] = []
    room = VIDEO_MB * 1e6
    for group in trials[:VIDEO_TRIALS]:
        room -= sum(path.stat().st_size for episode in group if (path := run.file(episode.video)))
        if room < 0 and shown:
            break
        shown.append(group)
    return shown


def _clip(run: Run, episode: EpisodeRecord, colour: str) -> dict[str, Any]:
    path = run.file(episode.video) or run.folder
    frames = sample_frames(path, 4)  # the first is dense with every method: nothing to see
    strip = filmstrip(frames[1:] or frames, 3)
    ratios = [value for value in episode.metrics.get("ratio_effective", ()) if value is not None]
    return {
        "episode": episode,
        "colour": colour,
        "ratio": write.percent(float(np.mean(ratios)) if ratios else None, 0),
        "video": base64.b64encode(path.read_bytes()).decode(),
        "strip": jpeg_base64(cv2.resize(strip, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)),
        "poster": jpeg_base64(frames[len(frames) // 2]),
        "width": frames[0].shape[1],
        "height": frames[0].shape[0],
    }


def _colours(methods: Sequence[str]) -> dict[str, str]:
    """Give every method its CSS colour: dense is grey, the others take the palette's in turn."""
    cached = [method for method in methods if method != DENSE]
    numbers = {method: 1 + index % (COLOURS - 1) for index, method in enumerate(cached)}
    return {method: f"var(--m{numbers.get(method, 0)})" for method in methods}
