"""The report of a training run: one self-contained HTML page, and a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from lac_vla.drawing.overlay import RECOMPUTED, heat_colours, saliency_strip
from lac_vla.drawing.picture import css, jpeg_base64
from lac_vla.drawing.plots import Curve, curve_chart
from lac_vla.report.page import metadata_groups, setting, write_page
from lac_vla.report.training_run import Saliency, TrainingRun
from lac_vla.types import UInt8Image

NONE = "–"
"""Written where a number does not exist."""

LOSS = {
    "distill": "divergence of the actions from those of the dense pass of the same model",
    "demo": "the model's own loss on the recorded actions",
}
SETTINGS = {
    "Data": {
        "vla": "model",
        "dataset": "dataset",
        "episodes": "episodes asked for",
        "held_out": "share held out",
        "window": "frames in a window",
        "flow": "optical flow",
        "unnorm_key": "statistics key",
    },
    "Objective": {
        "loss": "task loss",
        "lam": "λ at the start",
        "target_ratio": "target ratio",
        "ratios": "candidate ratios",
        "fixed_ratio": "fixed ratio",
    },
    "Optimisation": {
        "stage1_steps": "steps of stage I",
        "stage2_steps": "steps of stage II",
        "stage1_batch": "frames a step, stage I",
        "batch": "windows a step, stage II",
        "lr": "peak learning rate",
        "tau_ratio": "τ of the ratio",
        "tau_score": "τ of the mask",
        "every": "steps between validations",
        "seed": "seed",
        "device": "device",
    },
    "Policy": {
        "inputs": "inputs",
        "language": "reads the instruction",
        "width": "channels",
        "recovery": "chance of recovery",
    },
}
ELSEWHERE = {"out", "store", "tensorboard"}
"""Settings that do not bear on the result."""
ALL_OR_NONE = {"episodes": "all", "target_ratio": "none", "fixed_ratio": "none: chosen frame by frame"}
"""What a zero means."""

BLUE, ORANGE, GREEN, GREY = "var(--m1)", "var(--m2)", "var(--m3)", "var(--m0)"


def build_training_report(run: str | Path, out: str | Path) -> Path:
    """Write the report of a run of ``lac train``, finished or not.

    Args:
        run: Its folder: ``config.json``, ``metrics.jsonl`` and, once saved, ``policy/`` and ``saliency.npz``.
        out: The page to write; its folder is created.

    Returns:
        The page's path.

    Raises:
        InputError: If the folder is no such run, a file in it is damaged, or the page cannot be written.
        MissingExtraError: If jinja2 is not installed.
    """
    found = TrainingRun.read(run)
    metadata = found.about.get("trained_with", {})
    return write_page(
        "training.html.j2",
        out,
        title="Visual token caching: training report",
        name=found.folder.name,
        statement=_statement(found),
        setting=setting(metadata),
        notes=_notes(found),
        tiles=_tiles(found),
        panels=_panels(found),
        small=_small_panels(found),
        saliency=_saliency(found.saliency),
        settings=_settings(found.config),
        metadata=metadata_groups(metadata),
        recomputed=css(RECOMPUTED),
    )


def training_table(run: TrainingRun) -> Table:
    """Where a run stands, for the terminal."""
    table = Table(box=box.SIMPLE, caption="held out: argmax decisions, as at inference")
    for heading in ("steps", "held-out task loss", "chosen ratio", "expected ratio", "minutes"):
        table.add_column(heading, justify="right")
    table.add_row(
        f"{run.step}/{run.steps}",
        _number(run.last("held_out_task")),
        _percent(run.last("held_out_chosen_ratio")),
        _percent(run.last("held_out_expected_ratio")),
        _minutes(run.seconds),
    )
    return table


def _statement(run: TrainingRun) -> str:
    """What was trained on what, in one sentence."""
    config, about = run.config, run.about
    fixed = config.get("fixed_ratio")
    what = f"a selector at a fixed cache ratio of {_percent(fixed)}" if fixed else "a selector and a ratio predictor"
    data = str(config.get("dataset", NONE))
    if "frames" in about and "episodes" in about:
        data = f"{about['frames']:,} frames of {about['episodes']:,} episodes of {data}"
    cameras = run.saliency.scores.items() if run.saliency else ()
    seen = " and ".join(f"{name} ({score.shape[1]}×{score.shape[2]} tokens)" for name, score in cameras)
    if seen:
        data += f", seen through {seen}"
    time = "" if run.seconds is None else f" and {_minutes(run.seconds)} minutes"
    return (
        f"LAC, {what}, learned which visual tokens of {_model(config.get('vla'))} to recompute on {data}, "
        f"in {run.step:,} of {run.steps:,} steps{time}; the model itself stayed as it was."
    )


def _notes(run: TrainingRun) -> list[str]:
    """What is not there yet."""
    notes = []
    if not run.rows:
        notes.append("metrics.jsonl is empty: the run has not noted a step yet.")
    elif run.step < run.steps:
        notes.append(f"Not finished: {run.step:,} of {run.steps:,} steps are done; the same command goes on.")
    if run.config["stage2_steps"] and not run.curve("task"):
        notes.append("Stage II has not begun: the ratio predictor is not trained, what it chooses means nothing yet.")
    if run.saliency is None:
        notes.append("There is no saliency.npz yet: it is written with the policy, at every validation.")
    return notes


def _tiles(run: TrainingRun) -> list[dict[str, str]]:
    loss, target = str(run.config.get("loss", NONE)), run.config.get("target_ratio")
    first, now = run.curve("held_out_alignment")[:1], run.last("held_out_alignment")
    return [
        {
            "name": "Task loss, held out",
            "what": LOSS.get(loss, loss),
            "big": _number(run.last("held_out_task")),
            "small": "0 is the dense model" if loss == "distill" else "",
            "colour": BLUE,
        },
        {
            "name": "Chosen ratio, held out",
            "what": "share of the visual tokens that the policy reuses",
            "big": _percent(run.last("held_out_chosen_ratio")),
            "small": f"target {_percent(target)}" if target else "",
            "colour": ORANGE,
        },
        {
            "name": "Alignment, held out",
            "what": "mean squared error between the saliency and the model's own attention",
            "big": _number(now),
            "small": f"{_number(first[0][1])} at step {first[0][0]:g}" if first else "",
            "colour": GREEN,
        },
        {
            "name": "Training time",
            "what": setting(run.about.get("trained_with", {})),
            "big": f"{_minutes(run.seconds)} min" if run.seconds is not None else NONE,
            "small": f"{run.step:,} of {run.steps:,} steps",
            "colour": GREY,
        },
    ]


def _panels(run: TrainingRun) -> list[dict[str, Any]]:
    begin, target = float(run.config.get("stage1_steps", 0)), run.config.get("target_ratio")
    return [
        _panel(
            "Alignment loss (stage I)",
            "How far the saliency is from the attention of the dense model. Stage II no longer trains on it: there it "
            "shows how far the selector moves away.",
            [
                Curve("training", GREEN, run.curve("loss", stage=1)),
                Curve("held out", GREEN, run.curve("held_out_alignment"), measured=True),
            ],
            steps=(0, run.step),
            border=("stage II", begin),
        ),
        _panel(
            "Task loss (stage II)",
            f"{LOSS.get(str(run.config.get('loss')), 'task loss').capitalize()}. Reusing less lowers it too: read it "
            "together with the ratio.",
            [
                Curve("training", BLUE, run.curve("task")),
                Curve("held out", BLUE, run.curve("held_out_task"), measured=True),
            ],
            steps=(begin, run.step),
        ),
        _panel(
            "Cache ratio (stage II)",
            "Expected is the predictor's mean over its candidates; chosen is what was reused: sampled in training, the "
            "likeliest candidate on held-out frames, as at inference.",
            [
                Curve("expected, training", BLUE, run.curve("expected_ratio")),
                Curve("expected, held out", BLUE, run.curve("held_out_expected_ratio"), measured=True),
                Curve("chosen, training", ORANGE, run.curve("chosen_ratio")),
                Curve("chosen, held out", ORANGE, run.curve("held_out_chosen_ratio"), measured=True),
            ],
            steps=(begin, run.step),
            height=300,
            share=True,
            level=(f"target {_percent(target)}", float(target)) if target else None,
        ),
    ]


def _small_panels(run: TrainingRun) -> list[dict[str, Any]]:
    begin = float(run.config.get("stage1_steps", 0))
    panels = [
        _panel(
            "Gradient norm",
            "Before clipping.",
            [Curve("training", GREY, run.curve("gradient"))],
            steps=(0, run.step),
            height=90,
            border=("stage II", begin),
        )
    ]
    if run.config.get("target_ratio") and not run.config.get("fixed_ratio"):
        steered = _panel(
            "λ, steered",
            "Weight of the reward for reuse: it grows while the expected ratio is below the target.",
            [Curve("training", GREY, run.curve("lam"))],
            steps=(begin, run.step),
            height=90,
        )
        panels.insert(0, steered)
    return panels


def _panel(name: str, hint: str, curves: Sequence[Curve], **options: Any) -> dict[str, Any]:
    percent = options.get("share", False)
    return {
        "name": name,
        "hint": hint,
        "svg": curve_chart(curves, name, **options),
        "legend": [
            {
                "name": curve.name,
                "colour": curve.colour,
                "measured": curve.measured,
                "last": (_percent if percent else _number)(curve.points[-1][1] if curve.points else None),
            }
            for curve in curves
        ],
    }


def _saliency(found: Saliency | None) -> dict[str, Any] | None:
    if found is None or not found.frames:
        return None
    low, high = _scale(found)
    return {
        "frames": found.frames,
        "reused": _percent(found.reused),
        "low": _number(low),
        "high": _number(high),
        "colours": ", ".join(css(colour) for colour in heat_colours()),
        "strips": [
            {"camera": camera, "rows": score.shape[1], "cols": score.shape[2], "jpeg": jpeg_base64(strip)}
            for (camera, strip), score in zip(_strips(found).items(), found.scores.values(), strict=True)
        ],
    }


def _strips(found: Saliency) -> dict[str, UInt8Image]:
    scale = _scale(found)
    return {
        camera: saliency_strip(found.images[camera], score, found.active[camera], scale)
        for camera, score in found.scores.items()
    }


def _scale(found: Saliency) -> tuple[float, float]:
    """One scale for all cameras, as their tokens compete; a single outlier does not darken all others."""
    low, high = np.quantile(np.concatenate([score.ravel() for score in found.scores.values()]), [0.01, 0.99])
    return float(low), float(high)


def _settings(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The settings in groups; one that no group knows is shown under its own name."""
    named = {key for group in SETTINGS.values() for key in group}
    other = {key: key.replace("_", " ") for key in config if key not in named | ELSEWHERE}
    groups = {**SETTINGS, "Other": other}
    return [
        {"name": name, "rows": [(words, _setting(key, config.get(key))) for key, words in group.items()]}
        for name, group in groups.items()
        if group
    ]


def _setting(key: str, value: Any) -> str:
    if value is None or value == "":
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value == 0 and key in ALL_OR_NONE:
        return ALL_OR_NONE[key]
    if isinstance(value, list):
        return (" → " if key.startswith("tau") else ", ").join(str(item) for item in value)
    return _model(value) if key == "vla" else str(value)


def _model(value: Any) -> str:
    """A model by its hub id, or by its folder's name."""
    words = str(value or NONE).rstrip("/")
    is_id = words.count("/") == 1 and not words.startswith((".", "/", "~"))
    return words if is_id else words.split("/")[-1]


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.0f} %"


def _minutes(seconds: float | None) -> str:
    return NONE if seconds is None else f"{seconds / 60:.1f}"
