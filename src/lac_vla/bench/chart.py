"""The benchmark as a picture: where the milliseconds of a frame go, method by method."""

from __future__ import annotations

from lac_vla.bench.frame import FrameResult, FrameRow
from lac_vla.drawing.svg import box, line, picture, text, ticks
from lac_vla.results.format import milliseconds
from lac_vla.timing import STAGES

COLOURS = dict(
    zip(STAGES, ("#9aa5b1", "#f2b134", "#e4572e", "#4f6d7a", "#a3bfa8", "#2e86ab", "#7768ae", "#c9c3b8"), strict=True)
)
"""Stage → colour: the decoder's cool, the cache's own work warm."""
STYLE = """
svg{background:#fff;font:12px system-ui,sans-serif} text{fill:#222} .tick,.note{fill:#666;font-size:11px}
.head{font-size:15px;font-weight:600} .grid{stroke:#e4e4e4} .axis{stroke:#888} .floor{stroke:#c00;stroke-width:2}
"""
LETTER, WIDTH, BAR, GAP, TOP = 6.8, 620.0, 16.0, 8.0, 78.0


def stage_chart(result: FrameResult) -> str:
    """Draw stacked bars of the stages' medians, a self-contained SVG file.

    A red mark is the floor of prefill and decoding on the GPU that was named, drawn from where the prefill begins.
    """
    totals = [sum(row.stages_ms[stage].p50 for stage in STAGES) for row in result.rows]
    limit = 1.02 * max(totals) or 1.0
    scale = WIDTH / limit
    left = 20 + LETTER * max(32, *(len(row.name) for row in result.rows))
    bottom = TOP + len(result.rows) * (BAR + GAP)
    title = f"{result.model}, {result.dtype}: median milliseconds of a frame by stage, {result.frames} frames"
    parts = [text("head", 12, 24, title), *_legend()]
    for tick in ticks(limit, 8):
        x = left + tick * scale
        parts += [line("grid", x, x, TOP - 4, bottom), text("tick", x, bottom + 15, f"{tick:g}", "middle")]
    for index, (row, total) in enumerate(zip(result.rows, totals, strict=True)):
        y = TOP + index * (BAR + GAP)
        parts += [text("name", left - 8, y + BAR - 4, row.name, "end"), *_bar(row, left, y, scale)]
        parts.append(text("note", left + total * scale + 6, y + BAR - 4, milliseconds(total)))
    parts += [line("axis", left, left + WIDTH, bottom, bottom)]
    notes = ["milliseconds; medians of the stages, whose sum is not quite the median of the whole"]
    if result.random_weights:
        notes.append("random weights: ratios and accepted drafts are swept or without meaning")
    if result.roofline:
        notes.append(f"red: floor of prefill and decoding on one {result.roofline}, bfloat16")
    for index, note in enumerate(notes):
        parts.append(text("note", left, bottom + 34 + 16 * index, note))
    return picture(left + WIDTH + 70, bottom + 32 + 16 * len(notes), parts, title, "bench", STYLE)


def _legend() -> list[str]:
    step = 118.0
    return [
        part
        for index, (stage, colour) in enumerate(COLOURS.items())
        for part in (box(colour, 12 + step * index, 44, 12, 12, stage), text("name", 28 + step * index, 54, stage))
    ]


def _bar(row: FrameRow, left: float, y: float, scale: float) -> list[str]:
    """Draw one row's stages, and its floor."""
    parts, at, prefill = [], left, left
    for stage, colour in COLOURS.items():
        value = row.stages_ms[stage].p50
        if stage == "prefill":
            prefill = at
        parts.append(box(colour, at, y, value * scale, BAR, f"{row.name}: {stage} {milliseconds(value)} ms"))
        at += value * scale
    if row.floor_ms:
        x = prefill + sum(row.floor_ms.values()) * scale
        parts.append(line("floor", x, x, y - 2, y + BAR + 2))
    return parts
