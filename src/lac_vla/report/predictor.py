"""The charts of the ratio predictor's own steps: what ratios cost, and what is chosen."""

from __future__ import annotations

from collections.abc import Sequence

from lac_vla.drawing.plots import Curve, curve_chart
from lac_vla.report.training_run import TrainingRun
from lac_vla.results.adaptivity import SHARE
from lac_vla.results.format import percent

COSTS = "held_out_costs_"
HINTS = {
    "loss": "How far what the predictor expects of every candidate is from what it costs, divergence plus λ for the "
    "active tokens (deviance of an exponential distribution).",
    "costs": "Mean divergence from dense at every candidate, on the cache that the policy left before its predictor "
    "was trained; the dots are what the predictor chose last, and the best of each frame in hindsight.",
    "chosen": "The predictor's choices, against a fixed ratio of the same mean (interpolated) and the best of each "
    "frame in hindsight, which is lucky: a limit.",
    "shares": "How often every candidate was the likeliest on held-out frames; those never chosen are left out.",
}
Panel = dict[str, object]


def predictor_cards(run: TrainingRun) -> list[list[Panel]]:
    """Make the charts of every card; none for a run without such steps, or before the first."""
    stages = ("stage1_steps", "stage2_steps", "delta_steps")
    own, begin = run.curve("loss", stage=4), float(sum(int(run.config.get(name, 0)) for name in stages))
    if not own:
        return []
    steps = (begin, float(run.step))
    compared = [
        Curve(name, f"var(--m{colour})", run.curve(f"{COSTS}divergence{end}"), measured=True)
        for name, end, colour in (("chosen", "", 2), ("a fixed ratio", "_fixed", 0), ("in hindsight", "_best", 3))
    ]
    shares = {
        float(name.removeprefix(SHARE)): run.curve(name) for row in run.rows for name in row if name.startswith(SHARE)
    }
    chosen = [(ratio, points) for ratio, points in sorted(shares.items()) if any(share for _, share in points)]
    lines = [
        Curve(percent(ratio, 0), f"var(--m{number % 7})", points, measured=True)
        for number, (ratio, points) in enumerate(chosen)
    ]
    return [
        [_panel("Loss of the predictor's own steps", HINTS["loss"], [Curve("training", "var(--m1)", own)], steps)],
        [_costs(run)],
        [_panel("Divergence of the ratios chosen, held out", HINTS["chosen"], compared, steps)],
        [_panel("Ratios chosen, held out", HINTS["shares"], lines, steps, share=True)],
    ]


def _costs(run: TrainingRun) -> Panel:
    """Draw what every candidate costs in the mean over held-out frames."""
    at, lam = f"{COSTS}divergence_at_", run.last("lam") or 0.0
    names = sorted({name for row in run.rows for name in row if name.startswith(at)}, key=_ratio)
    divergence = [(_ratio(name), value) for name in names if (value := run.last(name)) and _ratio(name)]
    priced = [(ratio, value + lam * (1 - ratio)) for ratio, value in divergence]
    mean = run.last(f"{COSTS}ratio")
    dots = [
        Curve(name, f"var(--m{colour})", [(mean, value)], measured=True)
        for name, end, colour in (("chosen", "", 2), ("in hindsight", "_best", 3))
        if mean is not None and (value := run.last(f"{COSTS}divergence{end}"))
    ]
    curves = [
        Curve("divergence", "var(--m1)", divergence, measured=True),
        Curve("plus λ · active tokens", "var(--m0)", priced),
        *dots,
    ]
    low = min((ratio for ratio, _ in divergence), default=0.0)
    legend = [(curve, f"{curve.points[-1][1]:.3g}" if curve.points else "") for curve in curves]
    name = "What ratios cost, held out"
    svg = curve_chart(curves, name, steps=(low, 1.0), across="cache ratio", across_share=True)
    return {"name": name, "hint": HINTS["costs"], "svg": svg, "legend": legend}


def _ratio(metric: str) -> float:
    return float(metric.rpartition("_")[2])


def _panel(name: str, hint: str, curves: Sequence[Curve], steps: tuple[float, float], *, share: bool = False) -> Panel:
    last = [curve.points[-1][1] if curve.points else None for curve in curves]
    texts = ["-" if value is None else percent(value, 0) if share else f"{value:.3g}" for value in last]
    svg = curve_chart(curves, name, steps=steps, share=share)
    return {"name": name, "hint": hint, "svg": svg, "legend": list(zip(curves, texts, strict=True))}
