"""Collect the scripted expert's demonstrations of SIMPLER's WidowX tasks, into a dataset that is whole at any time."""

from __future__ import annotations

from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from tqdm import tqdm

from lac_vla.errors import InputError, LacError
from lac_vla.files import locked, writing
from lac_vla.sims.simpler.backend import NotOnTableError
from lac_vla.sims.simpler.benchmark import Simpler
from lac_vla.sims.simpler.demonstration import Demonstration, demonstrate
from lac_vla.sims.simpler.episode import WIDOWX
from lac_vla.sims.simpler.layouts import draw_layout
from lac_vla.sims.simpler.ms3 import Ms3Backend

if TYPE_CHECKING:
    from lac_vla.datasets import DatasetAppender

SUITE = "simpler-widowx"
GIVE_UP = 20
"""Attempts in a row that the expert may fail."""
DTYPES = {"success": np.bool_, "phase": np.int8}
"""Column → dtype, where it is not float32."""
COLUMNS = {"executed": "executed_action", "success": "next.success"}
"""Row of a demonstration → column, where the two differ."""


@dataclass(frozen=True)
class CollectConfig:
    """The demonstrations to collect, in ManiSkill3's port.

    Attributes:
        out: Folder of the dataset, LeRobot v3; more is added to what is there.
        suite: ``simpler-widowx``.
        tasks: Task ids; none means all.
        episodes: Demonstrations of every task; layouts that the expert does not solve are left out.
        seed: Seed of the layouts and of the noise.
        noise: Range of the standard deviation of the noise on executed translations, metres, drawn per episode; ten
            times as many radians on rotations. The clean action is recorded.
        width: Width of the images, pixels. They are rendered as the benchmark renders them, and made smaller.
        assets: ManiSkill3's folder, which holds ``data``; by default ``MS_ASSET_DIR`` of the environment.
    """

    out: Path
    suite: str = SUITE
    tasks: tuple[int, ...] = ()
    episodes: int = 150
    seed: int = 0
    noise: tuple[float, float] = (0.0, 0.008)
    width: int = 320
    assets: Path | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be collected."""
        if self.suite != SUITE:
            raise InputError(f"the scripted expert plays the WidowX: give --suite {SUITE}, not {self.suite}")
        self.benchmark.task_ids(self.tasks)
        if self.episodes < 1 or self.seed < 0:
            raise InputError("give at least 1 of episodes, and a seed that is not negative")
        if not 0.0 <= self.noise[0] <= self.noise[1] <= 0.02:
            raise InputError(f"noise must be a range within 0..0.02 m, not {self.noise}")
        if not 32 <= self.width <= WIDOWX.image[1] or self.width % 8:
            raise InputError(f"width must be in 32..{WIDOWX.image[1]} and a multiple of 8, not {self.width}")

    @property
    def benchmark(self) -> Simpler:
        """The benchmark, in the port."""
        return Simpler(SUITE, "ms3", assets=self.assets)


def collect(config: CollectConfig) -> None:
    """Let the expert play new layouts of every task in turn, and add what it solves to the dataset.

    May be interrupted and started again: it goes on behind the last attempt whose episode is there.

    Raises:
        InputError: If something is missing, or the folder cannot be written or is another process's.
        DatasetError: If the folder holds another dataset.
        SimulatorError: If the simulator fails.
    """
    busy = f"another process collects into {config.out}: give another --out"
    lock = config.out.with_name(f"{config.out.name}.lock")
    with ExitStack() as opened:
        with writing(config.out, "--out"):
            opened.enter_context(locked(lock, busy))
        _collect(config, opened)


def _collect(config: CollectConfig, opened: ExitStack) -> None:
    from lac_vla.datasets import DatasetAppender

    with writing(config.out, "--out"):
        dataset = DatasetAppender(config.out, WIDOWX.control_hz)
    settings = {"seed": config.seed, "noise": list(config.noise), "width": config.width}
    if other := [note for note in dataset.metadata if any(note.get(key) != value for key, value in settings.items())]:
        there = {key: other[0].get(key) for key in settings}
        raise InputError(f"{config.out} holds demonstrations with {there}, not {settings}: give another --out")
    tasks = config.benchmark.task_ids(config.tasks)
    have = {task: [int(note["attempt"]) for note in dataset.metadata if note.get("task") == task] for task in tasks}
    following = {task: max(there, default=-1) + 1 for task, there in have.items()}
    missing = {task: config.episodes - len(there) for task, there in have.items()}
    players: dict[int, Player] = {}
    with tqdm(total=sum(max(0, n) for n in missing.values()), desc=config.suite, unit="episode", smoothing=0.05) as bar:
        while max(missing.values()) > 0:
            task = max(tasks, key=missing.__getitem__)  # of the fewest demonstrations: a run that goes on does alike
            if task not in players:
                players[task] = opened.enter_context(closing(Player(config, task)))
            solved = players[task].play(following[task])
            following[task] += 1
            if solved:
                demo, note = solved
                _append(dataset, config, demo, settings | note)
                missing[task] -= 1
                bar.update()
            bar.set_postfix(unsolved=sum(player.unsolved for player in players.values()))


class Player:
    """Plays attempts at a task, each in a layout of its own.

    Attributes:
        unsolved: Attempts that the expert did not solve.
    """

    def __init__(self, config: CollectConfig, task: int) -> None:
        self._config, self._env = config, config.benchmark.make_env(task)
        self._backend = self._env.backend
        if not isinstance(self._backend, Ms3Backend):
            raise TypeError("demonstrations are collected in ManiSkill3's port")
        self._known = self._backend.layouts(self._env.episodes[0])
        self._about = dict(self._backend.metadata())
        self.unsolved, self._in_a_row = 0, 0

    def play(self, attempt: int) -> tuple[Demonstration, dict[str, Any]] | None:
        """Play an attempt; return it with what the dataset says of it, or ``None`` if it is not solved.

        An object that lies so near the edge that it falls while it settles makes an attempt that is not solved.

        Raises:
            LacError: If too many in a row were not solved.
        """
        first = self._env.episodes[0]
        rng = np.random.default_rng([self._config.seed, first.task, attempt])
        layout = draw_layout(self._known, rng)
        episode = replace(first, number=attempt, place=layout)
        fell: NotOnTableError | None = None
        try:
            demo = demonstrate(self._env, episode, rng, self._config.noise)
        except NotOnTableError as error:
            fell = error
        if fell or not demo.solved:
            self._in_a_row += 1
            self.unsolved += 1
            if self._in_a_row == GIVE_UP:
                said = f"{first.name}: {GIVE_UP} attempts in a row were not solved: see lac check --suite {SUITE}"
                raise LacError(said) from fell
            return None
        self._in_a_row = 0
        outcome = self._env.outcome()
        facts = {"suite": SUITE, "task": first.task, "attempt": attempt, "sigma": demo.sigma, "layout": asdict(layout)}
        return demo, facts | self._about | {"stand_ins": outcome["stand_ins"]}

    def close(self) -> None:
        """Free the simulator."""
        self._env.close()


def _append(dataset: DatasetAppender, config: CollectConfig, demo: Demonstration, note: dict[str, Any]) -> None:
    size = (config.width, config.width * 3 // 4)
    (camera,) = config.benchmark.cameras
    images = np.stack([cv2.resize(frame.images[camera], size, interpolation=cv2.INTER_AREA) for frame in demo.frames])
    rows = dict(demo.rows)
    state, action = (np.array(rows.pop(name), dtype=np.float32) for name in ("state", "action"))
    columns = {COLUMNS.get(name, name): np.array(row, DTYPES.get(name, np.float32)) for name, row in rows.items()}
    with writing(config.out, "--out"):
        dataset.add_episode({camera: images}, state, action, demo.instruction, columns=columns, metadata=note)
