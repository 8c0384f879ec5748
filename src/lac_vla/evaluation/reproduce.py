"""The plan of the paper's LIBERO tables on a model of one's own: which rows, on which episodes."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from lac_vla.errors import CheckpointError, InputError
from lac_vla.evaluation.clock import WorldClock
from lac_vla.evaluation.config import EvalConfig
from lac_vla.evaluation.realtime import Mode
from lac_vla.evaluation.runner import CONFIG as RUN_CONFIG
from lac_vla.evaluation.runner import EPISODES, evaluate_together
from lac_vla.factory import ModelOptions, method_name
from lac_vla.files import read_object
from lac_vla.policies import LACPolicy, PolicySpec
from lac_vla.policies.lac import SUBFOLDER
from lac_vla.policies.lac.policy import CONFIG
from lac_vla.provenance import load
from lac_vla.results.records import EpisodeRecord, read_episodes
from lac_vla.sims.libero.benchmark import Libero
from lac_vla.sims.libero.renderer import Convention, Rendering
from lac_vla.sims.libero.suites import FIRST_HELD_OUT


@dataclass(frozen=True)
class Row:
    """A row of a table, and its policy as on a command line."""

    label: str
    spec: str

    @property
    def method(self) -> str:
        """Its name in episode records."""
        return method_name(self.spec)


DENSE = Row("Dense", "dense")
LAC = Row("LAC", "lac")

TABLE_1 = (
    DENSE,
    Row("SparseVLM", "sparsevlm"),
    Row("FastV", "fastv:ratio=0.5"),
    Row("VLA-Cache, as published", "vla-cache:variant=paper"),
    Row("VLA-Cache, as released", "vla-cache:variant=released"),
    Row("Motion", "motion:ratio=0.8"),
    Row("Motion, wrist kept", "motion-wrist@motion:ratio=0.85,keep=wrist"),
    Row("Random", "random:ratio=0.8"),
    LAC,
)
"""The methods of the paper's Table 1, and three that it leaves out: rules that cost nothing to think of."""

ABLATIONS = (
    DENSE,
    Row("Selector, fixed ratio", "lac-selector@lac:ratio=0.8,recovery=0"),
    Row("+ predictor", "lac-predictor@lac:recovery=0"),
    Row("+ recovery (LAC)", "lac"),
)
"""Parts of LAC switched off at inference; policies trained without a part are added by their folders."""

CURVE = (
    ("Random", "random:ratio={ratio:g}"),
    ("Motion", "motion:ratio={ratio:g}"),
    ("Motion, wrist kept", "motion:ratio={ratio:g},keep=wrist"),
    ("FastV", "fastv:ratio={ratio:g}"),
    ("LAC at a fixed ratio", "lac:ratio={ratio:g}"),
)
"""Methods whose ratio can be set: label and spec."""

SETTINGS = (
    Row("SparseVLM, 303+110+36", "sparsevlm:keep=303+110+36"),
    Row("SparseVLM, 66+30+17", "sparsevlm:keep=66+30+17"),
    Row("VLA-Cache, 200 static", "vla-cache:variant=released,static=200,protect=50"),
    Row("VLA-Cache, 240 static", "vla-cache:variant=released,static=240,protect=16"),
)
"""Further points of the curve, of methods that have other numbers to set. SparseVLM's are its release's."""


@dataclass(frozen=True)
class ReproduceConfig:
    """The paper's LIBERO tables on a model of one's own, every method on the same initial states.

    Attributes:
        out: Folder of the runs; the same command goes on where it stopped, and may ask for more.
        model: Checkpoint folder or hub id; by default the bundled VLA.
        suites: LIBERO suites that the model knows.
        tasks: Task ids; empty for all ten.
        first: First initial state of every task; demonstrations of the bundled VLA used those before 40.
        trials: Initial states per task.
        policies: Only these rows, by method (``lac``), policy (``vla-cache``: both variants) or spec (of another
            policy); dense always runs. Empty for all.
        ablations: Folders of runs of ``lac train`` with something left out: a row each.
        curve: Also run every method that can be set to reuse more or less at several settings, for the trade-off curve.
        ratios: Nominal cache ratios of the curve, of the methods that have one.
        curve_policies: Only these points beside the tables' rows, chosen as by ``policies``. Empty for all.
        stresses: Also run every method under each of these disturbances, see ``lac eval --help``.
        stress_policies: Only these methods there, chosen as by ``policies``; dense always runs. Empty for all.
        clocks: Also run every method in a world that does not wait, by each of these clocks, see ``lac eval --help``.
        modes: What the robot does there while the policy thinks, each with every clock.
        clock_policies: Only these methods there, chosen as by ``policies``; dense always runs. Empty for all.
        deadline_ms: Deadline there; 0 for none.
        actions_per_call: Actions of an answer that are executed before the model is asked again; 0 for 1.
        ensemble: Chunks that are averaged, see ``lac eval --help``.
        curve_trials: Initial states per task of the curve's points, the first ones; 0 for as many as ``trials``.
        stress_trials: The same under every stress.
        clock_trials: The same by every clock.
        more_seeds: Dense and LAC run once more with each of these, for a closer comparison of the two.
        rendering: ``fast`` (altered pixels, those of the bundled VLA) or ``official``.
        convention: ``upright`` for our own models; ``openvla`` for OpenVLA's checkpoints.
        videos: Per method and task, how many episodes get an overlay video.
        camera: The simulator's images for a camera of the model, see ``lac eval --help``.
        workers: Processes. Latencies are only worth reporting from one.
        ray: Run the workers on the Ray cluster at this address, see ``lac eval --help``.
        model_options: How the model is loaded and run, see ``lac eval --help``.

    Raises:
        InputError: If a setting makes no sense.
    """

    out: Path = Path("outputs/reproduce-libero")
    model: str = "mini"
    suites: tuple[str, ...] = ("libero_spatial",)
    tasks: tuple[int, ...] = ()
    first: int = FIRST_HELD_OUT
    trials: int = 10
    policies: tuple[str, ...] = ()
    ablations: tuple[Path, ...] = ()
    curve: bool = False
    ratios: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.9)
    curve_policies: tuple[str, ...] = ()
    stresses: tuple[str, ...] = ()
    stress_policies: tuple[str, ...] = ()
    clocks: tuple[str, ...] = ()
    modes: tuple[Mode, ...] = ("hold", "async")
    clock_policies: tuple[str, ...] = ()
    deadline_ms: float = 0
    actions_per_call: int = 0
    ensemble: int | None = None
    curve_trials: int = 0
    stress_trials: int = 0
    clock_trials: int = 0
    more_seeds: tuple[int, ...] = ()
    rendering: Rendering = "fast"
    convention: Convention = "upright"
    videos: int = 1
    camera: tuple[str, ...] = ()
    workers: int = 1
    ray: str | None = None
    model_options: Annotated[ModelOptions, tyro.conf.arg(name="")] = field(default_factory=ModelOptions)

    def __post_init__(self) -> None:
        if self.trials < 1 or not self.suites or len(set(self.suites)) < len(self.suites):
            raise InputError("give at least one trial, and every suite once")
        for name in ("curve_trials", "stress_trials", "clock_trials"):
            if not 0 <= getattr(self, name) <= self.trials:
                raise InputError(f"{name} is {getattr(self, name)}: give 0 to {self.trials}, the trials of the tables")
        if (self.curve_policies and not self.curve) or (self.stress_policies and not self.stresses):
            raise InputError("curve_policies need curve, and stress_policies need stresses: nothing would be run")
        if self.clock_policies and not self.clocks:
            raise InputError("clock_policies need clocks: nothing would be run")
        for name in ("stresses", "clocks", "modes"):
            if len(set(given := getattr(self, name))) < len(given):
                raise InputError(f"{name} are {given}: give every one once")
        if self.clocks and not self.modes:
            raise InputError("clocks need modes: nothing would be run")
        seed = self.model_options.seed
        if len({seed, *self.more_seeds}) < 1 + len(self.more_seeds):
            raise InputError(f"more_seeds is {self.more_seeds}: give every seed once, and not {seed}")

    @property
    def on_curve(self) -> int:
        """Initial states per task of the curve's points."""
        return self.curve_trials or self.trials

    @property
    def under_stress(self) -> int:
        """Initial states per task under every stress."""
        return self.stress_trials or self.trials

    @property
    def by_clock(self) -> int:
        """Initial states per task by every clock."""
        return self.clock_trials or self.trials

    @property
    def worlds(self) -> tuple[WorldClock, ...]:
        """Every clock in every mode."""
        return tuple(WorldClock(clock, mode, self.deadline_ms or None) for clock in self.clocks for mode in self.modes)

    def run(
        self,
        suite: str,
        rows: Sequence[Row],
        trials: int,
        *,
        curve: bool = False,
        stress: str | None = None,
        seed: int | None = None,
        world: WorldClock | None = None,
    ) -> EvalConfig:
        """Make the evaluation of rows on one suite and ``trials`` initial states; by default with the first seed."""
        return EvalConfig(
            self.model,
            self.folder(suite, curve=curve, stress=stress, seed=seed, world=world),
            tuple(row.spec for row in rows),
            Libero(suite, self.rendering, self.convention),
            tasks=self.tasks,
            init_states=(self.first, self.first + trials),
            stress=stress,
            clock=world.clock if world else None,
            mode=world.mode if world else "hold",
            deadline_ms=world.deadline_ms if world else None,
            actions_per_call=self.actions_per_call or None,
            ensemble=self.ensemble,
            videos=0 if curve or stress or world or seed is not None else self.videos,
            camera=self.camera,
            workers=self.workers,
            ray=self.ray,
            model_options=self.model_options if seed is None else replace(self.model_options, seed=seed),
        )

    def folder(
        self,
        suite: str,
        *,
        curve: bool = False,
        stress: str | None = None,
        seed: int | None = None,
        world: WorldClock | None = None,
    ) -> Path:
        """Name the folder of a suite's episodes; the curve, stresses, clocks and other seeds apart."""
        parts = [suite, *(["curve"] if curve else []), *([stress] if stress else [])]
        parts += re.findall(r"[\w.]+", world.label) if world else []
        return self.out / "-".join([*parts, *([] if seed is None else [f"seed{seed}"])])


@dataclass(frozen=True)
class Reproduction:
    """A reproduction that was asked for, and the episodes that have been run of it.

    Attributes:
        config: The request.
        table_1: Its rows.
        ablations: Rows of tables 2 and 5.
        curve: Rows that are run for the curve alone.
        episodes: All episodes of all suites that belong to a row, with the first seed, undisturbed.
        seeds: Those of dense and LAC with all seeds; empty if there is only one.
        stress_rows: Rows that are run under stress.
        stressed: Their episodes under all stresses.
        clock_rows: Rows that are run in a world that does not wait.
        clocked: Their episodes by all clocks.
        workers: The most processes that ever shared the machine in one of the runs.
    """

    config: ReproduceConfig
    table_1: tuple[Row, ...]
    ablations: tuple[Row, ...]
    curve: tuple[Row, ...]
    episodes: list[EpisodeRecord]
    seeds: list[EpisodeRecord] = field(default_factory=list)
    stress_rows: tuple[Row, ...] = ()
    stressed: list[EpisodeRecord] = field(default_factory=list)
    clock_rows: tuple[Row, ...] = ()
    clocked: list[EpisodeRecord] = field(default_factory=list)
    workers: int = 1

    @property
    def rows(self) -> tuple[Row, ...]:
        """Every row of the tables, once."""
        return _once((*self.table_1, *self.ablations))

    @property
    def extra_rows(self) -> tuple[Row, ...]:
        """Rows that no table has: the curve's, and those under stress and by clocks; they run undisturbed, too."""
        there = {row.method for row in self.rows}
        further = _once((*self.curve, *self.stress_rows, *self.clock_rows))
        return tuple(row for row in further if row.method not in there)

    def trials(self, row: Row) -> int:
        """Initial states per task that a row is run on, undisturbed."""
        config = self.config
        if row.method in {r.method for r in self.rows}:
            return config.trials
        further = (
            (self.curve, config.on_curve),
            (self.stress_rows, config.under_stress),
            (self.clock_rows, config.by_clock),
        )
        return max(number for rows, number in further if row.method in {r.method for r in rows})

    @property
    def curve_episodes(self) -> list[EpisodeRecord]:
        """The undisturbed episodes that the points of the curve share: those of its initial states."""
        return _first(self.config, self.config.on_curve, self.episodes)

    @property
    def all_clocks(self) -> list[EpisodeRecord]:
        """The episodes of the rows by all clocks, and those of the same initial states in a world that waits."""
        methods = {row.method for row in self.clock_rows}
        calm = _first(self.config, self.config.by_clock, self.episodes)
        return [e for e in (*calm, *self.clocked) if e.method in methods]

    @property
    def undisturbed(self) -> list[EpisodeRecord]:
        """The undisturbed episodes of the initial states that are run under stress."""
        return _first(self.config, self.config.under_stress, self.episodes)


def plan(config: ReproduceConfig) -> Reproduction:
    """Choose the rows; nothing is run yet.

    Raises:
        InputError: If a policy is unknown or cannot be made.
        CheckpointError: If a folder of ``config.ablations`` holds no policy.
    """
    trained = tuple(ablation_row(folder) for folder in config.ablations)
    table_1: tuple[Row, ...] = TABLE_1
    ablations: tuple[Row, ...] = (*ABLATIONS, *trained)
    if config.policies:
        chosen = _with_dense(config.policies)
        methods = {row.method for row in chosen}
        others = (row for row in chosen if row not in TABLE_1 + ABLATIONS)
        table_1 = (*(row for row in TABLE_1 if row.method in methods), *others)
        ablations = (*(row for row in ABLATIONS if row.method in methods), *trained)
        if {row.method for row in ablations} <= {row.method for row in table_1}:
            ablations = ()
    if config.more_seeds and LAC not in table_1:
        raise InputError("more_seeds compares LAC with dense: leave lac among the policies")
    curve: tuple[Row, ...] = ()
    if config.curve:
        asked = {PolicySpec.parse(row.spec).name for row in table_1}
        points = [Row(f"{name}, {at:g}", spec.format(ratio=at)) for name, spec in CURVE for at in config.ratios]
        there = {row.method for row in (*table_1, *ablations)}
        further = (point for point in _once((*points, *SETTINGS)) if point.method not in there)
        curve = tuple(point for point in further if PolicySpec.parse(point.spec).name in asked)
        if config.curve_policies:
            curve = _once(point for word in config.curve_policies for point in _further(word, curve, there))
    stress_rows: tuple[Row, ...] = ()
    if config.stresses:
        stress_rows = _with_dense(config.stress_policies) if config.stress_policies else table_1
    clock_rows: tuple[Row, ...] = ()
    if config.clocks:
        clock_rows = _with_dense(config.clock_policies) if config.clock_policies else table_1
    planned = Reproduction(config, table_1, ablations, curve, [], stress_rows=stress_rows, clock_rows=clock_rows)
    for suite in config.suites:  # refuse what cannot be made before the first episode
        config.run(suite, (*planned.rows, *planned.extra_rows), config.trials)
        for stress in config.stresses:
            config.run(suite, stress_rows, config.under_stress, stress=stress)
        for world in config.worlds:
            config.run(suite, clock_rows, config.by_clock, world=world)
    return planned


def reproduce(config: ReproduceConfig) -> Reproduction:
    """Run what is missing of the paper's tables; errors are those of :func:`plan` and of ``runner.evaluate``."""
    planned = plan(config)
    episodes: list[EpisodeRecord] = []
    seeds: list[EpisodeRecord] = []
    stressed: list[EpisodeRecord] = []
    clocked: list[EpisodeRecord] = []
    workers, before = [1], load()

    def played(*runs: EvalConfig) -> list[EpisodeRecord]:
        evaluate_together(runs, before)
        for run in runs:
            workers.append(int(read_object(run.out / RUN_CONFIG, "run the same command again").get("workers", 1)))
        methods, tasks = {method_name(spec) for spec in runs[0].policies}, runs[0].task_ids
        found = [episode for run in runs for episode in read_episodes(run.out / EPISODES)]
        return [episode for episode in found if episode.method in methods and episode.task in tasks]

    trials = sorted({planned.trials(row) for row in planned.extra_rows})
    for suite in config.suites:
        episodes += played(config.run(suite, planned.rows, config.trials))
        for number in trials:
            rows = tuple(row for row in planned.extra_rows if planned.trials(row) == number)
            episodes += played(config.run(suite, rows, number, curve=True))
        for seed in config.more_seeds:
            seeds += played(config.run(suite, (DENSE, LAC), config.trials, seed=seed))
        if config.stresses:
            rows, number = planned.stress_rows, config.under_stress
            runs = [config.run(suite, rows, number, stress=name) for name in config.stresses]
            stressed += _first(config, number, played(*runs))
        if config.clocks:
            rows, number = planned.clock_rows, config.by_clock
            runs = [config.run(suite, rows, number, world=world) for world in config.worlds]
            clocked += _first(config, number, played(*runs))
    if seeds:
        seeds += [e for e in episodes if e.method in (DENSE.method, LAC.method)]
    return replace(planned, episodes=episodes, seeds=seeds, stressed=stressed, clocked=clocked, workers=max(workers))


def ablation_row(folder: Path) -> Row:
    """Make the row of a policy that was trained with something left out, named by what that is.

    Raises:
        CheckpointError: If the folder holds no policy.
    """
    config = LACPolicy.from_pretrained(folder).config
    home = folder / SUBFOLDER if (folder / SUBFOLDER / CONFIG).is_file() else folder
    about = read_object(home / CONFIG, "train it again", CheckpointError).get("about")
    training = about.get("training") if isinstance(about, dict) else None
    steps = training.get("stage1_steps") if isinstance(training, dict) else None
    lacking = {
        "selector alone": config.ratio is not None,
        "without stage I": steps == 0,
        "language-guided": config.language,
        "without flow": config.flow == "none",
        "the paper's inputs": config.inputs == "paper",
    }
    name = (folder.parent if folder.name == SUBFOLDER else folder).resolve().name
    what = ", ".join(words for words, holds in lacking.items() if holds) or "all parts, trained anew"
    alone = ",recovery=0" if config.ratio is not None else ""
    return Row(f"{what[0].upper()}{what[1:]} ({name})", f"{name}@lac:path={folder}{alone}")


def _first(config: ReproduceConfig, trials: int, episodes: Iterable[EpisodeRecord]) -> list[EpisodeRecord]:
    """Keep the episodes of the first initial states: a folder may hold more."""
    return [e for e in episodes if e.init_state < config.first + trials]


def _with_dense(words: Iterable[str]) -> tuple[Row, ...]:
    """Dense, and the rows that words of ``--policies`` or ``--stress-policies`` mean."""
    return _once((DENSE, *(row for word in words for row in _chosen(word, _once(TABLE_1 + ABLATIONS)))))


def _chosen(word: str, rows: Sequence[Row]) -> list[Row]:
    """The rows that a word of ``--policies`` means."""
    exact = [row for row in rows if word in (row.method, row.spec)]
    return exact or [row for row in rows if PolicySpec.parse(row.spec).name == word] or [Row(method_name(word), word)]


def _further(word: str, points: Sequence[Row], there: Container[str]) -> list[Row]:
    """The points of the curve that a word of ``--curve-policies`` means; none of the tables' rows."""
    chosen = [row for row in _chosen(word, points) if row.method not in there]
    if not chosen or not all(PolicySpec.parse(row.spec).options for row in chosen):
        raise InputError(f"curve_policies: the curve has no further points of {word!r}; give a spec with its options")
    return chosen


def _once(rows: Iterable[Row]) -> tuple[Row, ...]:
    """The rows without those that run the same method as an earlier one."""
    found: dict[str, Row] = {}
    for row in rows:
        found.setdefault(row.method, row)
    return tuple(found.values())
