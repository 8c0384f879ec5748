"""Write one Markdown page of all that ``scripts/gpu_session.sh`` measured: ``gpu_summary.py RESULTS --out PAGE``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WINDOWS = ("decoder_prefill", "model_call", "observation_to_action")
ACTION = WINDOWS[-1]
GRAPHS = "default+bucket=16+cuda_graphs"
REUSED = "random:ratio=.8"


def main(results: Path, page: Path) -> None:
    """Read every ``bench.json`` below ``results``, and write the page."""
    steps = results / "steps.txt"
    files = [*sorted(results.glob("frame-*/bench.json")), *sorted(results.glob("batch-*/bench.json"))]
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    parts = [_conditions(runs[0])] if runs else ["nothing was measured"]
    if asked := [line for run in runs for line in _asked(run)]:
        parts.append("### What was asked for\n\n" + _table(["what", "asked", "measured"], asked))
    for run in runs:
        parts += [_frame(run["frame"])] if run.get("frame") else []
        parts += [_batch(run["batch"])] if run.get("batch") else []
        parts += [_trace(run["trace"])] if run.get("trace") else []
    kernels = results / "kernels" / "log.txt"
    parts += ["### Kernels\n\n" + kernels.read_text(encoding="utf-8")] if kernels.is_file() else []
    parts += ["```\n" + steps.read_text(encoding="utf-8") + "```"] if steps.is_file() else []
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _conditions(run: dict[str, Any]) -> str:
    hardware, versions = run["hardware"], run["versions"]
    device = hardware.get("accelerator") if run["config"]["device"] != "cpu" else None
    named = ", ".join(f"{name} {versions.get(name)}" for name in ("torch", "transformers"))
    return f"{device or hardware['processor']}; {named}; commit {run.get('commit')}; random weights, medians in ms"


def _asked(run: dict[str, Any]) -> Iterator[list[str]]:
    """List what is asked of a run, and what came of it; nothing where a row is missing."""
    frame = run.get("frame") or {"model": "", "rows": []}
    rows, model = {row["name"]: row for row in frame["rows"]}, frame["model"]
    if model == "openvla-7b" and (row := rows.get(f"dense +{GRAPHS}, 6/6 accepted")):
        took, floor = row["windows_ms"][ACTION]["p50"], sum(row["floor_ms"].values())
        what = "openvla-7b, dense, graphs, drafts accepted"
        yield [f"{what}: observation to action", "≤ 30 ms", f"{took:.1f} ms"]
        yield [f"{what}: over the floors of prefill and decoding", "≤ 1.5 ×", f"{took / floor:.2f} ×"]
    least = {"openvla-7b-oft": 1.8, "pi05-3": 1.6}.get(model)
    for options in (GRAPHS, f"{GRAPHS}+vision_kv_reuse"):
        if least and (row := rows.get(f"{REUSED} +{options}")):
            faster = _times(row["faster_than_equal"][ACTION])
            yield [f"{model}, {REUSED} +{options}: than dense so equipped", f"≥ {least} ×", faster]
    for row in (run.get("batch") or {"rows": []})["rows"]:
        if row["sessions"] == 8 and row["name"].startswith(REUSED):
            what = f"{run['batch']['model']}, 8 robots, {row['name']}: than as many dense"
            yield [what, "≥ 2 ×", _times(row["faster_than_dense"])]


def _frame(part: dict[str, Any]) -> str:
    rows = []
    for row in part["rows"]:
        floors = " / ".join(
            f"{row['times_floor'][stage]:.1f}" for stage in ("prefill", "decode") if stage in row["times_floor"]
        )
        rows.append([
            row["name"], f"{row['ratio_effective']:.0%}", *(f"{row['windows_ms'][w]['p50']:.2f}" for w in WINDOWS),
            *(_times(row[f"faster_than_{other}"].get(ACTION)) for other in ("stock", "dense", "equal")), floors or "–",
        ])  # fmt: skip
    title = f"### {part['model']}, {part['dtype']}, batch 1, {part['frames']} frames"
    heads = ["row", "reused", *(f"{window.replace('_', ' ')}, ms" for window in WINDOWS)]
    return (
        title
        + "\n\n"
        + _table([*heads, "than stock", "than dense", "than dense so equipped", "prefill / decode, × floor"], rows)
    )


def _batch(part: dict[str, Any]) -> str:
    rows = [
        [row["name"], str(row["sessions"]), f"{row['frames_per_second']:.1f}", f"{row['latency_ms']['p50']:.2f}",
         f"{row['faster_than_one']['value']:.2f}×", f"{row['faster_than_dense']['value']:.2f}×"]
        for row in part["rows"]
    ]  # fmt: skip
    heads = ["row", "robots", "frames/s", "a pass, ms", "than one robot", "than as many dense"]
    return f"### {part['model']}, {part['dtype']}, robots together\n\n" + _table(heads, rows)


def _trace(part: dict[str, Any]) -> str:
    rows = [
        [row["name"], f"{row['span_ms']:.2f}", f"{row['busy_ms']:.2f}", str(row["launches"]),
         "; ".join(f"`{name[:40]}` {ms:.2f} × {calls}" for name, ms, calls in row["heaviest"][:3])]
        for row in part["rows"]
    ]  # fmt: skip
    launched = "kernels" if part["device"] == "cuda" else "operations"
    heads = ["row", "span, ms", "busy, ms", launched, "heaviest: ms × calls"]
    return f"### {part['model']}, one frame under the profiler, which makes it longer\n\n" + _table(heads, rows)


def _times(ratio: dict[str, float] | None) -> str:
    return "–" if ratio is None else f"{ratio['value']:.2f}×"


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[2] != "--out":
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[3]))
