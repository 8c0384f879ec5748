"""SIMPLER's published tables, made of episodes; and whether a run may be called by their name.

A cell is a mean over the means of variants, as in the benchmark's own tool; averages are over cells. Complete runs have
as many episodes in every variant, so that this is the plain mean; in incomplete ones it is not.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich import box
from rich.table import Table

from lac_vla.errors import InputError
from lac_vla.sims.simpler.episode import Setup
from lac_vla.sims.simpler.protocol import episodes, tasks

NAMES: Final[dict[Setup, str]] = {
    "vm": "SIMPLER, Google robot, visual matching",
    "va": "SIMPLER, Google robot, variant aggregation",
    "widowx": "SIMPLER, WidowX, visual matching",
}
DRAWERS: Final = ("top", "middle", "bottom")
TABLE: Final = "simpler.json"
"""File of a run that holds its table."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of one episode of one method.

    Attributes:
        setup: Its setup.
        task: Number of the task.
        number: Of the episode in the task.
        success: The goal held at the last step: what SIMPLER counts.
        success_any: The goal held at some step: what some papers count.
        grasped: The object was in the gripper at some step (WidowX).
        ray_traced: Rays were traced.
        backend: ``ms2`` or ``ms3``.
        stress: The disturbance of the observations; empty for none.
    """

    setup: Setup
    task: int
    number: int
    success: bool
    success_any: bool
    grasped: bool
    ray_traced: bool
    backend: str
    stress: str = ""

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> Outcome:
        """Read it from a line of a run's ``episodes.jsonl``.

        Raises:
            InputError: If the line is of another benchmark.
        """
        try:
            more = line["outcome"]
            setup: Setup = line["suite"].removeprefix("simpler-")
            return cls(
                setup=setup,
                task=line["task"],
                number=line["init_state"],
                success=line["success"],
                success_any=more["success_any"],
                grasped=more["grasped"],
                ray_traced=more["ray_traced"],
                backend=more["backend"],
                stress=line["stress"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"this is no episode of SIMPLER (it lacks {error})") from error


@dataclass(frozen=True)
class Cell:
    """One number of a table.

    Attributes:
        name: Its column.
        value: A share in [0, 1]; ``None`` where no episode was played.
        played: Episodes behind it.
        of: Episodes of the protocol.
    """

    name: str
    value: float | None
    played: int
    of: int

    @property
    def percent(self) -> str:
        """The share in words, e.g. ``25.0 %``."""
        return "-" if self.value is None else f"{100 * self.value:.1f} %"


@dataclass(frozen=True)
class PublishedTable:
    """SIMPLER's table of a run.

    Attributes:
        setup: The setup that the table is about.
        title: The benchmark's name, or that it is not the benchmark's table.
        reasons: Reasons why it is not; empty if it is.
        methods: Method → one row with success counted at the last step (``last_step``), one at any (``any_step``).
    """

    setup: Setup
    title: str
    reasons: tuple[str, ...]
    methods: dict[str, dict[str, tuple[Cell, ...]]]

    @classmethod
    def read(cls, run: Path) -> PublishedTable:
        """Make the table of a run's folder.

        Raises:
            InputError: If the run holds no episode of SIMPLER.
        """
        methods: dict[str, list[Outcome]] = {}
        for text in (run / "episodes.jsonl").read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            methods.setdefault(line["method"], []).append(Outcome.from_json(line))
        if not methods:
            raise InputError(f"{run} holds no finished episode: let the run go on, or resume it")
        return cls.of(next(iter(methods.values()))[0].setup, methods)

    @classmethod
    def of(cls, setup: Setup, methods: Mapping[str, Sequence[Outcome]]) -> PublishedTable:
        """Make the table of some methods' episodes, and decide what it may be called."""
        why = tuple(reason for name, outcomes in methods.items() for reason in reasons(setup, name, outcomes))
        why = why if methods else ("no episode was played",)
        rows = {
            name: {"last_step": cells(setup, outcomes), "any_step": cells(setup, outcomes, any_step=True)}
            for name, outcomes in methods.items()
        }
        return cls(setup, f"not {NAMES[setup]}: not comparable with its tables" if why else NAMES[setup], why, rows)

    def to_terminal(self) -> Table:
        """Show it in the terminal, with one column per method."""
        notes = "\n".join(f"- {reason}" for reason in self.reasons)
        table = Table(title=self.title, box=box.SIMPLE, caption=notes or None, caption_justify="left")
        table.add_column("last step (any step), played / of")
        for name in self.methods:
            table.add_column(name, justify="right")
        rows = (zip(row["last_step"], row["any_step"], strict=True) for row in self.methods.values())
        for pairs in zip(*rows, strict=True):
            values = (f"{last.percent} ({some.percent}) {last.played}/{last.of}" for last, some in pairs)
            table.add_row(pairs[0][0].name, *values)
        return table


def cells(setup: Setup, outcomes: Iterable[Outcome], *, any_step: bool = False) -> tuple[Cell, ...]:
    """One row of a setup's table, in the published order.

    Args:
        setup: Which table.
        outcomes: Episodes of one method.
        any_step: Count success at any step in place of the last.

    Raises:
        InputError: If an episode is of another setup, is none of the protocol's, or is there twice.
    """
    played = _by_episode(setup, outcomes)

    def success(outcome: Outcome) -> bool:
        return outcome.success_any if any_step else outcome.success

    def cell(name: str, *names: str, of: Callable[[Outcome], bool] = success) -> Cell:
        return _cell(setup, name, names or (name,), played, of)

    if setup == "widowx":
        row = [
            cell(f"{what}: {task.name}", task.name, of=of)
            for task in tasks(setup)
            for what, of in (("grasp", lambda outcome: outcome.grasped), ("success", success))
        ]
        return (*row, _average("success: average", row[1::2]))
    cans = [cell(f"coke can {lie}") for lie in ("horizontal", "vertical", "standing")]
    drawers = [cell(f"drawer {do}", *(f"{do} {which} drawer" for which in DRAWERS)) for do in ("open", "close")]
    coke, drawer = _average("coke can average", cans), _average("drawer average", drawers)
    near, apple = cell("move near"), cell("apple in drawer")
    return (*cans, coke, near, *drawers, drawer, apple, _average("average", [coke, near, drawer, apple]))


def reasons(setup: Setup, name: str, outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Say why a method's episodes make no table of SIMPLER's; of its episodes, those are missing whose assets are."""
    played = _by_episode(setup, outcomes)
    absent = Counter(e.name for e in episodes(setup) if (e.task, e.number) not in played)
    if absent:
        which = ", ".join(f"{task} {n}" for task, n in absent.items())
        yield f"the sweep is not whole: {name} lacks {absent.total()} of {len(episodes(setup))}: {which}"
    flat = {task for task, number in played if not played[task, number].ray_traced}
    if short := [task.name for k, task in enumerate(tasks(setup)) if k in flat and task.ray_traced]:
        yield f"not ray-traced: {name} in {', '.join(short)}"
    if others := sorted({outcome.backend for outcome in outcomes} - {"ms2"}):
        yield f"not the original simulator: {name} on {', '.join(others)}"
    if stresses := sorted({outcome.stress for outcome in outcomes} - {""}):
        yield f"under stress: {name} under {', '.join(stresses)}"


def _by_episode(setup: Setup, outcomes: Iterable[Outcome]) -> dict[tuple[int, int], Outcome]:
    known = {(episode.task, episode.number) for episode in episodes(setup)}
    played: dict[tuple[int, int], Outcome] = {}
    for outcome in outcomes:
        key = (outcome.task, outcome.number)
        if outcome.setup != setup or key not in known or key in played:
            what = "stands there twice" if key in played else f"is none of {setup}'s"
            raise InputError(f"task {outcome.task}, episode {outcome.number} ({outcome.setup}) {what}")
        played[key] = outcome
    return played


def _cell(
    setup: Setup,
    name: str,
    names: Sequence[str],
    played: Mapping[tuple[int, int], Outcome],
    of: Callable[[Outcome], bool],
) -> Cell:
    """The mean over (task, variant) of the means over episodes."""
    wanted = [episode for episode in episodes(setup) if episode.name in names]
    groups: dict[tuple[int, str], list[bool]] = {}
    for episode in wanted:
        outcome = played.get((episode.task, episode.number))
        if outcome is not None:
            groups.setdefault((episode.task, episode.variant.name), []).append(of(outcome))
    means = [sum(group) / len(group) for group in groups.values()]
    value = sum(means) / len(means) if means else None
    return Cell(name, value, sum(map(len, groups.values())), len(wanted))


def _average(name: str, parts: Sequence[Cell]) -> Cell:
    """The mean of cells; it does not exist before they all do."""
    values = [part.value for part in parts if part.value is not None]
    value = sum(values) / len(values) if len(values) == len(parts) else None
    return Cell(name, value, sum(part.played for part in parts), sum(part.of for part in parts))
