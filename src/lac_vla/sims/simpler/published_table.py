"""SIMPLER's published tables, made of episodes; and what a run may be called.

A cell is a mean over the means of variants, as in the benchmark's own tool; averages are over cells. Complete runs have
as many episodes in every variant, so that this is the plain mean; in incomplete ones it is not.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from rich import box
from rich.table import Table

from lac_vla.errors import InputError
from lac_vla.results import format as write
from lac_vla.results.records import EpisodeRecord
from lac_vla.sims.simpler.episode import Setup
from lac_vla.sims.simpler.protocol import episodes, tasks

NAMES: Final[dict[Setup, str]] = {
    "vm": "SIMPLER, Google robot, visual matching",
    "va": "SIMPLER, Google robot, variant aggregation",
    "widowx": "SIMPLER, WidowX, visual matching",
}
ROBOTS: Final[dict[Setup, str]] = {
    "vm": "Google robot visual matching",
    "va": "Google robot variant aggregation",
    "widowx": "WidowX visual matching",
}
NOT_COMPARABLE: Final = "; not comparable with published tables"
DRAWERS: Final = ("top", "middle", "bottom")


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


@dataclass(frozen=True)
class PublishedTable:
    """SIMPLER's table of a run.

    Attributes:
        setup: The setup that the table is about.
        title: The benchmark's name; or what was played in its place, by :func:`label`.
        reasons: Reasons why it is not; empty if it is.
        methods: Method → one row with success counted at the last step (``last_step``), one at any (``any_step``).
    """

    setup: Setup
    title: str
    reasons: tuple[str, ...]
    methods: dict[str, dict[str, tuple[Cell, ...]]]

    @classmethod
    def of(cls, setup: Setup, records: Iterable[EpisodeRecord]) -> PublishedTable:
        """Make the table of a run's episodes, and decide what it may be called.

        Raises:
            InputError: If an episode is none of the setup's.
        """
        methods: dict[str, list[EpisodeRecord]] = defaultdict(list)
        for record in records:
            methods[record.method].append(record)
        why = [reason for name, played in methods.items() for reason in reasons(setup, name, played)]
        if not methods:
            why = ["no episode was played"]
        rows = {
            name: {"last_step": cells(setup, played), "any_step": cells(setup, played, any_step=True)}
            for name, played in methods.items()
        }
        title = _title(setup, [record for played in methods.values() for record in played]) if why else NAMES[setup]
        return cls(setup, title, tuple(why), rows)

    def to_terminal(self) -> Table:
        """Show it in the terminal, with one column per method."""
        notes = "\n".join(f"- {reason}" for reason in self.reasons)
        table = Table(title=self.title, box=box.SIMPLE, caption=notes or None, caption_justify="left")
        table.add_column("last step (any step), played / of")
        for name in self.methods:
            table.add_column(name, justify="right")
        rows = (zip(row["last_step"], row["any_step"], strict=True) for row in self.methods.values())
        for pairs in zip(*rows, strict=True):
            values = (
                f"{write.percent(last.value)} ({write.percent(some.value)}) {last.played}/{last.of}"
                for last, some in pairs
            )
            table.add_row(pairs[0][0].name, *values)
        return table


def label(setup: Setup, backends: Collection[str], stand_ins: Iterable[str], more: Iterable[str] = ()) -> str:
    """Call what was played by an honest name: the simulator, and every file that is not the benchmark's own.

    Args:
        setup: What was played.
        backends: In which simulators.
        stand_ins: Names of the files.
        more: What else differs from the protocol.
    """
    original = f"SIMPLER {ROBOTS[setup]}, original simulator"
    what = "SIMPLER WidowX tasks, ManiSkill3 port" if "ms3" in backends else original
    names = ", ".join(sorted({*stand_ins}))
    return ", ".join([what, *more, *([f"stand-ins: {names}"] if names else [])])


def cells(setup: Setup, records: Iterable[EpisodeRecord], *, any_step: bool = False) -> tuple[Cell, ...]:
    """Compute one row of a setup's table, in the published order.

    Args:
        setup: Which table.
        records: Episodes of one method.
        any_step: Count success at any step in place of the last.

    Raises:
        InputError: If an episode is of another setup, is none of the protocol's, or is there twice.
    """
    played = _by_episode(setup, records)

    def cell(name: str, *names: str, grasps: bool = False) -> Cell:
        """The mean over (task, variant) of the means over episodes."""
        wanted = [episode for episode in episodes(setup) if episode.name in (names or (name,))]
        groups: dict[Any, list[bool]] = defaultdict(list)
        for episode in wanted:
            if record := played.get((episode.task, episode.number)):
                at_any_step = record.outcome["grasped" if grasps else "success_any"]
                groups[episode.task, episode.variant.name].append(at_any_step if grasps or any_step else record.success)
        means = [sum(group) / len(group) for group in groups.values()]
        return Cell(name, sum(means) / len(means) if means else None, sum(map(len, groups.values())), len(wanted))

    if setup == "widowx":
        row = [
            cell(f"{what}: {task.name}", task.name, grasps=what == "grasp")
            for task in tasks(setup)
            for what in ("grasp", "success")
        ]
        return (*row, _average("success: average", row[1::2]))
    cans = [cell(f"coke can {lie}") for lie in ("horizontal", "vertical", "standing")]
    drawers = [cell(f"drawer {do}", *(f"{do} {which} drawer" for which in DRAWERS)) for do in ("open", "close")]
    coke, drawer = _average("coke can average", cans), _average("drawer average", drawers)
    near, apple = cell("move near"), cell("apple in drawer")
    return (*cans, coke, near, *drawers, drawer, apple, _average("average", [coke, near, drawer, apple]))


def reasons(setup: Setup, name: str, records: Sequence[EpisodeRecord]) -> Iterator[str]:
    """Say why a method's episodes make no table of SIMPLER's; of its episodes, those are missing whose assets are."""
    played = _by_episode(setup, records)
    absent = Counter(e.name for e in episodes(setup) if (e.task, e.number) not in played)
    if absent:
        which = ", ".join(f"{task} {n}" for task, n in absent.items())
        yield f"the sweep is not whole: {name} lacks {absent.total()} of {len(episodes(setup))}: {which}"
    flat = {task for task, number in played if not played[task, number].outcome["ray_traced"]}
    if short := dict.fromkeys(e.name for e in episodes(setup) if e.ray_traced and e.task in flat):
        yield f"not ray-traced: {name} in {', '.join(short)}"
    if others := sorted({record.outcome["backend"] for record in records} - {"ms2"}):
        yield f"not the original simulator: {name} on {', '.join(others)}"
    if not all("stand_ins" in record.outcome for record in records):
        yield f"which files are the benchmark's own was not looked at: {name}, of an older run"
    if names := sorted({name for record in records for name in record.outcome.get("stand_ins", ())}):
        yield f"stand-ins for the benchmark's own files: {name} with {', '.join(names)}"
    if stresses := sorted({record.stress for record in records} - {""}):
        yield f"under stress: {name} under {', '.join(stresses)}"


def _title(setup: Setup, records: Sequence[EpisodeRecord]) -> str:
    """Name what makes no table of SIMPLER's; whether it is whole, the cells say themselves."""
    outcomes = [record.outcome for record in records]
    traced = {episode.task for episode in episodes(setup) if episode.ray_traced}
    flat = any(record.task in traced and not record.outcome["ray_traced"] for record in records)
    stresses = sorted({record.stress for record in records} - {""})
    more = [*(["not ray-traced"] if flat else []), *(f"under {stress}" for stress in stresses)]
    stand_ins = {name for outcome in outcomes for name in outcome.get("stand_ins", ("files that nobody looked at",))}
    return label(setup, {outcome["backend"] for outcome in outcomes}, stand_ins, more) + NOT_COMPARABLE


def _by_episode(setup: Setup, records: Iterable[EpisodeRecord]) -> dict[tuple[int, int], EpisodeRecord]:
    known = {(episode.task, episode.number) for episode in episodes(setup)}
    played: dict[tuple[int, int], EpisodeRecord] = {}
    for record in records:
        key = (record.task, record.init_state)
        if record.suite != f"simpler-{setup}" or key not in known or key in played:
            what = "stands there twice" if key in played else f"is none of {setup}'s"
            raise InputError(f"task {record.task}, episode {record.init_state} ({record.suite}) {what}")
        played[key] = record
    return played


def _average(name: str, parts: Sequence[Cell]) -> Cell:
    """The mean of cells; it does not exist before they all do."""
    values = [part.value for part in parts if part.value is not None]
    value = sum(values) / len(values) if len(values) == len(parts) else None
    return Cell(name, value, sum(part.played for part in parts), sum(part.of for part in parts))
