"""Write one Markdown page of all that ``scripts/gpu_session.sh`` measured: ``gpu_summary.py RESULTS --out PAGE``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

WINDOWS = ("decoder_prefill", "model_call", "observation_to_action")


def main(results: Path, page: Path) -> None:
    """Read every ``bench.json`` below ``results``, and write the page."""
    steps = results / "steps.txt"
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(results.glob("*/bench.json"))]
    parts = [_conditions(runs[0])] if runs else ["nothing was measured"]
    for run in runs:
        parts += [_frame(run["frame"])] if run.get("frame") else []
        parts += [_batch(run["batch"])] if run.get("batch") else []
        parts += [_trace(run["trace"])] if run.get("trace") else []
    kernels = results / "kernels" / "log.txt"
    parts += [kernels.read_text(encoding="utf-8")] if kernels.is_file() else []
    parts += ["```\n" + steps.read_text(encoding="utf-8") + "```"] if steps.is_file() else []
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _conditions(run: dict[str, Any]) -> str:
    hardware, versions = run["hardware"], run["versions"]
    device = hardware.get("accelerator") if run["config"]["device"] != "cpu" else None
    named = ", ".join(f"{name} {versions.get(name)}" for name in ("torch", "transformers"))
    return f"{device or hardware['processor']}; {named}; commit {run.get('commit')}; random weights, medians in ms"


def _frame(part: dict[str, Any]) -> str:
    rows = []
    for row in part["rows"]:
        floors = " / ".join(
            f"{row['times_floor'][stage]:.1f}" for stage in ("prefill", "decode") if stage in row["times_floor"]
        )
        action = "observation_to_action"
        rows.append([
            row["name"], f"{row['ratio_effective']:.0%}", *(f"{row['windows_ms'][w]['p50']:.2f}" for w in WINDOWS),
            *(_times(row[f"faster_than_{other}"].get(action)) for other in ("stock", "dense", "equal")), floors or "–",
        ])  # fmt: skip
    title = f"### {part['model']}, {part['dtype']}, batch 1, {part['frames']} frames"
    heads = ["row", "reused", *(window.replace("_", " ") for window in WINDOWS)]
    return title + "\n\n" + _table([*heads, "than stock", "than dense", "than dense so equipped", "× floor"], rows)


def _batch(part: dict[str, Any]) -> str:
    rows = [
        [row["name"], str(row["sessions"]), f"{row['frames_per_second']:.1f}", f"{row['latency_ms']['p50']:.2f}",
         f"{row['faster_than_one']['value']:.2f}×", f"{row['faster_than_dense']['value']:.2f}×"]
        for row in part["rows"]
    ]  # fmt: skip
    heads = ["row", "robots", "frames/s", "a pass", "than one robot", "than as many dense"]
    return f"### {part['model']}, {part['dtype']}, robots together\n\n" + _table(heads, rows)


def _trace(part: dict[str, Any]) -> str:
    rows = [
        [row["name"], f"{row['span_ms']:.2f}", f"{row['busy_ms']:.2f}", str(row["launches"]),
         "; ".join(f"`{name[:40]}` {ms:.2f} × {calls}" for name, ms, calls in row["heaviest"][:3])]
        for row in part["rows"]
    ]  # fmt: skip
    heads = ["row", "span", "busy", "kernels", "heaviest"]
    return f"### {part['model']}, one frame under the profiler\n\n" + _table(heads, rows)


def _times(ratio: dict[str, float] | None) -> str:
    return "–" if ratio is None else f"{ratio['value']:.2f}×"


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[2] != "--out":
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[3]))
