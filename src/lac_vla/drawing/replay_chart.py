"""The picture of ``lac replay``: what policies computed in one recorded episode, and when the gripper moved."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np

from lac_vla.drawing import svg
from lac_vla.drawing.plots import Area, Axis
from lac_vla.results.replay_log import EpisodeReplay

COLOURS = ("#0072b2", "#d97706", "#009e73", "#b8528f", "#3fa3dd", "#c2410c", "#6b7280")
STYLE = """
svg{background:#fff} text{font:12px system-ui,sans-serif;fill:#222} .head{font-size:15px;font-weight:600}
.tick,.note{fill:#666;font-size:11px} .grid{stroke:#e4e4e4} .event{stroke:#b3372f;stroke-width:1.5;stroke-dasharray:3 3}
.contact{fill:#b3372f;opacity:.07} .line{fill:none;stroke:var(--c);stroke-width:2.2;stroke-linejoin:round}
.trace{fill:none;stroke:var(--c);stroke-width:1.2;stroke-linejoin:round;opacity:.65}
.aim{fill:none;stroke:var(--c);stroke-width:1.2;stroke-dasharray:5 4;opacity:.9}
"""
WIDTH, HEIGHT, TOP, LETTER = 900.0, 150.0, 64.0, 7.0


def replay_chart(episode: EpisodeReplay, tokens: int, contact: int, adaptive: Collection[str]) -> str:
    """Draw effective ratio, active tokens and divergence over the frames of an episode, a self-contained SVG file.

    Policies that choose their ratio for every frame are drawn strong, with the ratio they aim at dashed.

    Args:
        episode: What is drawn.
        tokens: Visual tokens of the model.
        contact: Frames around a gripper event that count as contact, shaded.
        adaptive: Names of those policies.
    """
    colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(episode.methods)}
    ratios = {name: [1 - share for share in calls.active] for name, calls in episode.methods.items()}
    counts = {name: [tokens * share for share in calls.active] for name, calls in episode.methods.items()}
    thousandths = {name: [1e3 * value for value in calls.divergence] for name, calls in episode.methods.items()}
    aims = {name: episode.methods[name].nominal for name in episode.methods if name in adaptive}
    low = min(0.9, math.floor(10 * min(min(values) for values in ratios.values())) / 10)  # all may be reused
    panels = [
        ("effective ratio; dashed: aimed at", ratios, Axis(low, 1.0, _ticks(low), share=True)),
        ("active visual tokens", counts, _from_zero(counts.values())),
        ("divergence from dense, thousandths", thousandths, _from_zero(thousandths.values())),
    ]
    title = f"Episode {episode.episode}: what is computed in which frame"
    parts = [svg.text("head", 12, 24, title), *_legend(colours, events=bool(episode.gripper))]
    for number, (label, lines, axis) in enumerate(panels):
        area = Area((0.0, float(episode.frames[-1])), axis, width=WIDTH, height=HEIGHT)
        drawn = [*_events(area, episode, contact), *area.axes("frame" if number == len(panels) - 1 else "")]
        drawn.append(svg.text("note", area.left, area.top - 6, label))
        for name, values in lines.items():
            kind = "line" if name in adaptive else "trace"
            points = list(zip(episode.frames, values, strict=True))
            drawn.append(area.path("polyline", kind, colours[name], points))
        for name, aimed in aims.items() if number == 0 else ():
            known = [
                (at, max(low, ratio)) for at, ratio in zip(episode.frames, aimed, strict=True) if ratio is not None
            ]
            drawn.append(area.path("polyline", "aim", colours[name], known))
        parts.append(f'<g transform="translate(0,{TOP + number * (HEIGHT + 46):g})">{"".join(drawn)}</g>')
    return svg.picture(WIDTH + 84, TOP + len(panels) * (HEIGHT + 46) + 20, parts, title, "replay", STYLE)


def middle(episodes: Sequence[EpisodeReplay], name: str) -> EpisodeReplay:
    """Choose the episode in the middle by a policy's mean divergence: neither the best nor the worst is shown."""
    ordered = sorted(episodes, key=lambda episode: float(np.mean(episode.methods[name].divergence)))
    return ordered[len(ordered) // 2]


def _ticks(low: float) -> list[float]:
    return [round(low + step * (1 - low) / 4, 3) for step in range(5)]


def _from_zero(lines: Collection[Sequence[float]]) -> Axis:
    return Axis.of([max(max(values) for values in lines)], wanted=4)


def _legend(colours: dict[str, str], *, events: bool) -> list[str]:
    parts, left = [], 12.0
    for name, colour in colours.items():
        parts += [svg.box(colour, left, 38, 12, 12, name), svg.text("name", left + 17, 48, name)]
        left += 34 + LETTER * len(name)
    words = "gripper told to open or close; shaded: contact"
    event = [svg.line("event", left + 6, left + 6, 36, 52), svg.text("name", left + 14, 48, words)]
    return [*parts, *(event if events else [])]


def _events(area: Area, episode: EpisodeReplay, contact: int) -> list[str]:
    parts, (first, last), (_, top) = [], area.x, area.at(0.0, area.y.high)
    for frame in episode.gripper or ():
        left, right = (area.at(min(last, max(first, frame + way)), area.y.high)[0] for way in (-contact, contact))
        parts.append(
            f'<rect class="contact" x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{area.height:g}"/>'
        )
        at, _ = area.at(min(last, float(frame)), area.y.high)
        parts.append(svg.line("event", at, at, top, top + area.height))
    return parts
