"""What a paired evaluation depends on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lac_vla.engine.options import EngineOptions
from lac_vla.errors import InputError
from lac_vla.evaluation.stress import make_stress
from lac_vla.factory import make_policies
from lac_vla.flow import make_flow
from lac_vla.sims.libero import SUITES

FIRST_HELD_OUT = 40
"""First initial state of every task that no demonstration used: demonstrations start from states 0 to 39."""


@dataclass(frozen=True)
class EvalConfig:
    """A paired evaluation.

    Attributes:
        model: Checkpoint folder or hub id.
        out: Folder of the run. If it holds a run with the same settings, that run goes on.
        policies: Methods, e.g. ``dense``, ``motion:ratio=0.5``, ``lac`` (the policy that comes with the model),
            ``lac:path=FOLDER,recovery=0``; ``NAME@`` before one names it in tables.
        suite: LIBERO suite.
        tasks: Task ids; empty for all ten.
        init_states: First and one-past-last initial state of every task.
        seed: Of every session; and of the scene's fixtures, whose places vary by a centimetre.
        flow: Optical flow of all policies that read it: ``dis``, ``raft_small:FILE`` or ``none``; by default each
            has the one that it was made for.
        max_age: No slot is reused once it is this old, frames.
        options: EngineOptions beside caching, of all methods, dense included: ``default``, ``none``, ``exact``,
            ``draft+async_policy``, …
        stress: What disturbs every episode, the same for all methods: ``shake``, ``lighting``, ``drift``,
            ``occlusion``, ``instruction``, ``drops`` or ``long``, see :mod:`lac_vla.evaluation.stress`.
        rendering: ``fast`` (altered pixels, for models trained on them) or ``official``.
        convention: ``upright`` for our own models; ``openvla`` for OpenVLA's checkpoints, whose images are rotated by
            180° and whose gripper runs from 0, closed, to 1, open.
        image_pipeline: The model's image geometry, if not its own: ``libero`` for OpenVLA's LIBERO evaluation.
        ensemble: Of a model that answers in chunks of actions: over how many of the last chunks every action is
            averaged, by CogACT's adaptive ensemble; 1 for the newest chunk's first action, by default what the
            model's ``config.json`` says.
        videos: Per method and task, how many episodes get an overlay video.
        server: ``ws://…`` of a policy server: it runs the one method of ``policies`` on its ``model``, which are named
            as the server names them. No MACs, no videos then.
        unnorm_key: Statistics key of the checkpoint, if it has several.
        device: ``cpu`` or ``cuda``.
        workers: Processes. Latencies are only worth reporting from one.
        threads: CPU threads of torch per process; 0 leaves it to torch.
        ray: Run the workers on the Ray cluster at this address (``auto``, ``ray://HOST:PORT``; ``local`` for this
            machine), whose nodes share the folders that are named here. The results do not depend on it, nor on the
            number of workers, if ``threads`` is set.
    """

    model: str
    out: Path
    policies: tuple[str, ...] = ("dense", "motion:ratio=0.5")
    suite: str = "libero_spatial"
    tasks: tuple[int, ...] = ()
    init_states: tuple[int, int] = (FIRST_HELD_OUT, 50)
    seed: int = 0
    flow: str | None = None
    max_age: int = 16
    options: str = "default"
    stress: str | None = None
    rendering: Literal["fast", "official"] = "fast"
    convention: Literal["upright", "openvla"] = "upright"
    image_pipeline: str | None = None
    ensemble: int | None = None
    videos: int = 1
    server: str | None = None
    unnorm_key: str | None = None
    device: str = "cpu"
    workers: int = 1
    threads: int = 0
    ray: str | None = None

    def __post_init__(self) -> None:
        if self.suite not in SUITES:
            raise InputError(f"unknown suite {self.suite!r}; choose one of {sorted(SUITES)}")
        first, stop = self.init_states
        if not 0 <= first < stop <= SUITES[self.suite].trials:
            raise InputError(
                f"init_states {self.init_states}: give first and one-past-last in 0..{SUITES[self.suite].trials}"
            )
        if self.workers < 1:
            raise InputError(f"workers is {self.workers}; give at least 1")
        if self.ensemble is not None and self.ensemble < 1:
            raise InputError(f"ensemble is {self.ensemble}; at least the newest chunk must count")
        EngineOptions.parse(self.options)
        if self.server is None:
            make_policies(self.policies, self.model)
        elif len(self.policies) != 1 or self.workers != 1 or self.ray is not None:
            raise InputError("a server runs one method, for one process: give one of --policies, and --workers 1")
        make_flow(self.flow or "none")
        if self.stress is not None:
            make_stress(self.stress)

    @property
    def task_ids(self) -> tuple[int, ...]:
        """The tasks to run."""
        return self.tasks or tuple(range(SUITES[self.suite].n_tasks))
