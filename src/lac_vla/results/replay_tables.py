"""The tables of ``lac replay``."""

from __future__ import annotations

from collections.abc import Sequence

from lac_vla.results.format import NONE, p_value, percent, points
from lac_vla.results.replay import MethodReplay, Phases, Replay
from lac_vla.results.replay_saved import FEWEST
from lac_vla.results.table import TextTable

_HEADINGS = (
    *("policy", "effective ratio", "active tokens", "deviation", "divergence", "p50", "p95"),
    *("ratios chosen", "reuse by camera", "saved [95 %]"),
)
_BOOTSTRAP = f"95 %, bootstrap over episodes: too narrow with few of them, none with fewer than {FEWEST}"
_PHASES = ("policy", "active, contact", "active, free", "difference [95 %]", "p", "divergence, contact / free")


def replay_tables(found: Replay, notes: Sequence[str] = ()) -> list[TextTable]:
    """Make the terminal's tables; ``notes`` stand below the first."""
    rows = [(name, *_cells(row)) for name, row in found.methods.items()]
    against = " and ".join(found.baselines)
    meaning = [
        f"{found.frames} frames of {found.episodes} recorded episodes, every policy in a session of its own on its "
        "own cache; divergence of the answer from dense's, by the head's loss, in thousandths",
        "deviation: of the effective ratio within an episode, calls that had to compute everything left out; ratios: "
        "aimed at, recovery and maximum age come on top",
    ]
    if len(found.baselines) > 1:
        meaning.append(
            f"saved: divergence, against {against}, interpolated at the same active tokens; a straight line "
            f"between two lies above what they bend, so take near ones; {_BOOTSTRAP}"
        )
    elif found.baselines:
        meaning.append(
            f"saved: divergence, against {against}, over the same frames, at unequal cost: how many more tokens were "
            f"active, in points, stands below; {_BOOTSTRAP}"
        )
    tables = [TextTable("Sessions over recorded episodes", _HEADINGS, tuple(rows), (*meaning, *notes))]
    phases = [(name, *_phase_cells(row.phases)) for name, row in found.methods.items() if row.phases is not None]
    if phases and found.contact_share is not None:
        told = (
            f"contact: {percent(found.contact_share, 0)} of the frames, within {found.contact} of one at which the "
            "recorded gripper is told to open or close",
            "difference: active tokens in contact less those in free motion, in points, mean over the episodes; "
            f"{_BOOTSTRAP}; p: sign-flip test, two-sided",
        )
        tables.append(TextTable("Around contact and in free motion", _PHASES, tuple(phases), told))
    return tables


def _cells(row: MethodReplay) -> list[str]:
    chosen = sorted(row.adaptivity.shares.items())
    saved = row.saved
    compared = NONE
    if saved is not None:
        ends = "" if saved.interval is None else "\n[{}, {}]".format(*(percent(end, 0) for end in saved.interval))
        more = "" if saved.active == 0 else f"\n{points(saved.active)} active"
        compared = f"{percent(saved.share, 0)}{ends}{more}"
    return [
        percent(row.ratio),
        f"{row.tokens:.1f}",
        NONE if row.adaptivity.deviation is None else f"{row.adaptivity.deviation:.3f}",
        *(f"{1e3 * value:.2f}" for value in (row.divergence, row.p50, row.p95)),
        "\n".join(f"{ratio:g}: {percent(share, 0)}" for ratio, share in chosen) or NONE,
        "\n".join(f"{camera}: {percent(share, 0)}" for camera, share in row.adaptivity.cameras.items()),
        compared,
    ]


def _phase_cells(row: Phases | None) -> list[str]:
    if row is None:
        return [NONE] * (len(_PHASES) - 1)
    ends = "" if row.interval is None else "\n[{}, {}]".format(*map(points, row.interval))
    return [
        percent(row.contact),
        percent(row.free),
        f"{points(row.difference)}{ends}",
        p_value(row.p),
        "{:.2f} / {:.2f}".format(*(1e3 * value for value in row.divergence)),
    ]
