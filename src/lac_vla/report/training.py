"""The report of a training run: one self-contained HTML page, and a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lac_vla.drawing.overlay import RECOMPUTED, heat_colours, saliency_strip
from lac_vla.drawing.picture import css, jpeg_base64
from lac_vla.drawing.plots import Curve, curve_chart
from lac_vla.report.page import metadata_groups, setting, write_page
from lac_vla.report.predictor import predictor_cards
from lac_vla.report.training_run import Saliency, TrainingRun
from lac_vla.results.adaptivity import collapse_warning, shares_chosen
from lac_vla.results.format import NONE, percent
from lac_vla.results.regret import BUDGETS, WAYS, Regret
from lac_vla.results.table import TextTable

LOSS = {
    "distill": "divergence of the actions from those of the dense pass of the same model",
    "demo": "the model's own loss on the recorded actions",
}
HINTS = {
    "alignment": "How far the saliency is from the attention of the dense model. Stage II does not train on it: there "
    "it shows how far the selector moves away.",
    "task": "Reusing less lowers it too: read it together with the ratio.",
    "ratio": "Expected is the predictor's mean over its candidates; chosen is what was reused: sampled in training, "
    "the likeliest candidate on held-out frames, as at inference.",
    "lam": "Weight of the reward for reuse: it grows while the likeliest candidate, on held-out frames, is below the "
    "target in the mean.",
}
ELSEWHERE = {"out", "store", "tensorboard"}
"""Settings that do not bear on the result."""
BLUE, ORANGE, GREEN, GREY = "var(--m1)", "var(--m2)", "var(--m3)", "var(--m0)"


def build_training_report(run: str | Path, out: str | Path) -> Path:
    """Write the page of a run of ``lac train``, finished or not, and give its path; its folder is created.

    The run's folder holds ``config.json``, ``metrics.jsonl`` and, once saved, ``policy/`` and ``saliency.npz``.

    Raises:
        InputError: If the folder is no such run, a file in it is damaged, or the page cannot be written.
        MissingExtraError: If jinja2 is not installed.
    """
    found = TrainingRun.read(run)
    metadata = found.metadata.get("trained_with", {})
    return write_page(
        "training.html.j2",
        Path(out),
        title="Visual token caching: training report",
        name=found.folder.name,
        statement=_statement(found),
        setting=setting(metadata),
        notes=_notes(found),
        tiles=_tiles(found),
        cards=[*_cards(found), *predictor_cards(found)],
        saliency=_saliency(found.saliency),
        regret=_regret(found.regret),
        settings=[(key.replace("_", " "), _setting(found.config[key])) for key in found.config if key not in ELSEWHERE],
        metadata=metadata_groups(metadata),
        recomputed=css(RECOMPUTED),
    )


def training_table(run: TrainingRun) -> TextTable:
    """Make the terminal's table of how far a run is."""
    ratios = (percent(run.last(f"held_out_{name}_ratio"), 0) for name in ("chosen", "expected"))
    cells = (f"{run.step}/{run.steps}", _number(run.last("held_out_task")), *ratios, _minutes(run.seconds))
    headings = ("steps", "held-out task loss", "chosen ratio", "expected ratio", "minutes")
    return TextTable("Training", headings, (cells,), ("held out: argmax decisions, as at inference",))


def _statement(run: TrainingRun) -> str:
    """Say in one sentence what was trained on which data."""
    config, metadata = run.config, run.metadata
    fixed = config.get("fixed_ratio")
    what = f"a selector at a fixed cache ratio of {percent(fixed, 0)}" if fixed else "a selector and a ratio predictor"
    data = str(config.get("dataset", NONE))
    if "frames" in metadata and "episodes" in metadata:
        data = f"{metadata['frames']:,} frames of {metadata['episodes']:,} episodes of {data}"
    cameras = run.saliency.scores.items() if run.saliency else ()
    seen = " and ".join(f"{name} ({score.shape[1]}×{score.shape[2]} tokens)" for name, score in cameras)
    if seen:
        data += f", seen through {seen}"
    time = "" if run.seconds is None else f" and {_minutes(run.seconds)} minutes"
    return (
        f"LAC, {what}, learned which visual tokens of {_model(config.get('model'))} to recompute on {data}, "
        f"in {run.step:,} of {run.steps:,} steps{time}; the model itself stayed as it was."
    )


def _notes(run: TrainingRun) -> list[str]:
    """List what is not there yet."""
    notes = []
    if not run.rows:
        notes.append("metrics.jsonl is empty: the run has not noted a step yet.")
    elif run.step < run.steps:
        notes.append(f"Not finished: {run.step:,} of {run.steps:,} steps are done; the same command goes on.")
    if run.config["stage2_steps"] and not run.curve("task"):
        notes.append("Stage II has not begun: the ratio predictor is not trained, what it chooses means nothing yet.")
    varied = [shares for row in run.rows if (shares := shares_chosen(row))]
    if varied and (warning := collapse_warning(varied[-1])):
        notes.append(f"On held-out episodes {warning}.")
    if run.saliency is None:
        notes.append("There is no saliency.npz yet: it is written with the policy, at every validation.")
    return notes


def _tiles(run: TrainingRun) -> list[tuple[str, str, str, str, str]]:
    """Give name, meaning, number, comment and colour of every tile."""
    loss, target = str(run.config.get("loss", NONE)), run.config.get("target_ratio")
    task, aligned = _number(run.last("held_out_task")), _number(run.last("held_out_alignment"))
    dense = "0 is the dense model" if loss == "distill" else ""
    chosen, aim = percent(run.last("held_out_chosen_ratio"), 0), f"target {percent(target, 0)}" if target else ""
    before = "".join(f"{_number(value)} at step {step:g}" for step, value in run.curve("held_out_alignment")[:1])
    error = "mean squared error between the saliency and the model's own attention"
    time = NONE if run.seconds is None else f"{_minutes(run.seconds)} min"
    machine = setting(run.metadata.get("trained_with", {}))
    return [
        ("Task loss, held out", LOSS.get(loss, loss), task, dense, BLUE),
        ("Chosen ratio, held out", "share of the visual tokens that the policy reuses", chosen, aim, ORANGE),
        ("Alignment, held out", error, aligned, before, GREEN),
        ("Training time", machine, time, f"{run.step:,} of {run.steps:,} steps", GREY),
    ]


def _cards(run: TrainingRun) -> list[list[dict[str, Any]]]:
    """Make the charts of every card."""
    begin, target = float(run.config.get("stage1_steps", 0)), run.config.get("target_ratio")
    whole, second, border = (0.0, float(run.step)), (begin, float(run.step)), ("stage II", begin)
    level = (f"target {percent(target, 0)}", float(target)) if target else None
    held_out = Curve("held out", GREEN, run.curve("held_out_alignment"), measured=True)
    alignment = [Curve("training", GREEN, run.curve("loss", stage=1)), held_out]
    ratios = [*_curves(run, "expected_ratio", BLUE, "expected, "), *_curves(run, "chosen_ratio", ORANGE, "chosen, ")]
    steered = [_panel("λ, steered", HINTS["lam"], _curves(run, "lam", GREY)[:1], steps=second, height=90)]
    gradient = _curves(run, "gradient", GREY)[:1]
    task_hint = f"{LOSS.get(str(run.config.get('loss')), 'task loss').capitalize()}. {HINTS['task']}"
    return [
        [_panel("Alignment loss (stage I)", HINTS["alignment"], alignment, steps=whole, border=border)],
        [_panel("Task loss (stage II)", task_hint, _curves(run, "task", BLUE), steps=second)],
        [_panel("Cache ratio (stage II)", HINTS["ratio"], ratios, steps=second, height=300, share=True, level=level)],
        [
            *(steered if target and not run.config.get("fixed_ratio") else []),
            _panel("Gradient norm", "Before clipping.", gradient, steps=whole, height=90, border=border),
        ],
    ]


def _curves(run: TrainingRun, name: str, colour: str, prefix: str = "") -> list[Curve]:
    """Make the curves of a metric in training and on held-out episodes."""
    return [
        Curve(f"{prefix}training", colour, run.curve(name)),
        Curve(f"{prefix}held out", colour, run.curve(f"held_out_{name}"), measured=True),
    ]


def _panel(name: str, hint: str, curves: Sequence[Curve], **options: Any) -> dict[str, Any]:
    last = [curve.points[-1][1] if curve.points else None for curve in curves]
    texts = [percent(value, 0) if options.get("share") else _number(value) for value in last]
    svg = curve_chart(curves, name, **options)
    return {"name": name, "hint": hint, "svg": svg, "legend": list(zip(curves, texts, strict=True))}


def _saliency(found: Saliency | None) -> dict[str, Any] | None:
    if found is None or not found.frames:
        return None
    # One scale for all cameras, as their tokens compete; a single outlier does not darken all others.
    scores = np.concatenate([score.ravel() for score in found.scores.values()])
    low, high = map(float, np.quantile(scores, [0.01, 0.99]))
    strips = [
        {
            "camera": camera,
            "rows": score.shape[1],
            "cols": score.shape[2],
            "jpeg": jpeg_base64(saliency_strip(found.images[camera], score, found.active[camera], (low, high))),
        }
        for camera, score in found.scores.items()
    ]
    return {
        "frames": found.frames,
        "reused": percent(found.reused, 0),
        "low": _number(low),
        "high": _number(high),
        "colours": ", ".join(css(colour) for colour in heat_colours()),
        "strips": strips,
    }


def _regret(found: Regret | None) -> dict[str, Any] | None:
    """Draw divergence over the share of active tokens for every way to choose them."""
    if found is None:
        return None
    rows = {**{WAYS[way]: row for way, row in found.divergence.items()}, "selector, best ratios": found.best}
    curves = [
        Curve(name, f"var(--m{number})", list(zip(BUDGETS, row, strict=True)), measured=True)
        for number, (name, row) in enumerate(rows.items(), 1)
    ]
    steps, label = (0.0, max(BUDGETS)), "divergence from dense"
    svg = curve_chart(curves, label, steps=steps, height=300, across="active tokens, mean", across_share=True)
    return {"svg": svg, "curves": curves, "table": found.table()}


def _setting(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(str(item) for item in value)
    return NONE if value in (None, "") else str(value)


def _model(value: Any) -> str:
    """Name a model by its hub id, or by its folder's name."""
    words = str(value or NONE).rstrip("/")
    is_id = words.count("/") == 1 and not words.startswith((".", "/", "~"))
    return words if is_id else words.split("/")[-1]


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.3g}"


def _minutes(seconds: float | None) -> str:
    return NONE if seconds is None else f"{seconds / 60:.1f}"
