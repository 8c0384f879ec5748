"""Settings of ``lac bench``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import tyro

from lac_vla.bench.roofline import GPUS
from lac_vla.bench.sweep import expand
from lac_vla.checks import check_device
from lac_vla.dataset_keys import DatasetKeys
from lac_vla.engine.options import EngineOptions
from lac_vla.errors import InputError
from lac_vla.factory import make_policies, resolve_policy
from lac_vla.flow import make_flow

Section: TypeAlias = Literal["engine", "frame", "memory", "batch", "trace", "roofline"]
SHAPES = ("llama-8x512", "llama-32x4096")
"""Decoders of the section ``engine``: presets (layers × width). The second is OpenVLA's Llama 2 7B."""
RULES = ("motion:ratio=0.5", "motion:ratio=0.7")
QUICK = {"sections": ("frame",), "frames": 40, "warmup": 3, "minutes": 0.5}
"""What is measured in about a minute."""


@dataclass(frozen=True)
class BenchConfig:
    """A benchmark.

    Attributes:
        out: Folder that ``bench.json`` is written to.
        sections: ``engine``, a decoder's prefill; ``frame``, whole observations; ``memory``, a long session;
            ``batch``, several sessions on one engine; ``trace``, one frame of dense and of the last policy under
            torch's profiler; ``roofline``, what the GPU of that option could do at best, from the model's shapes alone.
        quick: About a minute: the section ``frame`` alone, on few frames, whatever else is said of sections and frames.
        model: Name of a bundled model, checkpoint folder, hub id, or plug-in; by default ``mini``.
        random_weights: In place of a model, one with random weights, which costs the same: ``openvla-7b``, ``tiny``, …;
            ``lac models`` lists them.
        unnorm_key: Statistics key of the checkpoint, if it has several.
        device: ``cpu`` or ``cuda``.
        lerobot: Time LeRobot's own policy over the same weights as ``dense stock``: of a SmolVLA, π0 or π0.5, in an
            environment that has LeRobot.
        empty_cameras: Masked cameras that LeRobot's policy computes besides, as π0's and π0.5's checkpoints have.
        dtype: Of the weights; ``auto`` is bfloat16 on a GPU and float32 elsewhere.
        float8: Store the matrices of all decoder layers in float8, the baselines' too; needs torchao.
        threads: CPU threads of torch and of OpenCV; 0 leaves it to them.
        shape: Decoder of the section ``engine``: ``llama-8x512`` (that of the targets) or ``llama-32x4096``.
        active: Shares of the visual tokens that the section ``engine`` recomputes, in (0, 1).
        rounds: How often the sections ``engine`` and ``batch`` run every variant.
        policies: Methods of the sections ``frame`` and ``batch``, beside the dense ones; ``random:ratio=.25,.5,.9`` are
            three. By default ``lac``, the policy that comes with the model; for random weights, which have none,
            ``motion:ratio=0.5 motion:ratio=0.7``.
        options: Sets of options beside caching, each for dense and for every policy: ``none`` is the baseline and
            always there; ``draft``, ``draft+async_policy``, ``default``, ``exact`` (all that change no number), …
        acceptance: Shares of the drafted tokens that are made to be accepted, in [0, 1], for random weights, where
            their own acceptance means nothing: a further row each for every method with the option ``draft``.
        frames: Observations of the section ``frame``.
        minutes: The sections ``frame`` and ``batch`` end with the round in which they have taken so long; 0 for no
            limit.
        warmup: Rounds, or observations, that are run first and not counted.
        replay: LeRobot dataset whose frames are replayed, a folder or a hub id; by default a synthetic scene.
        flow: Optical flow of all policies that read it: ``dis``, ``raft_small:FILE`` or ``none``; by default each
            has the one that it was made for.
        max_age: No slot is reused once it is this old, frames.
        memory_policy: Method of the section ``memory``.
        memory_frames: Observations of the section ``memory``.
        batch: Numbers of sessions that the section ``batch`` runs together, beside 1.
        roofline: GPU whose floors are put beside the times: ``h200``, ``h100``, ``a100``, ``rtx4090``, ``agx-orin`` or
            ``thor``.
        latency_table: File, ``*.json``, of this machine's latency table for ``lac eval --clock``; nothing else is
            measured then. With the section ``roofline`` alone, that GPU's table, derived from the model's shapes.
        seed: Of weights, scene, orders and sessions.
        keys: Names of what is read of the dataset that is replayed.

    Raises:
        InputError: If a setting makes no sense.
    """

    out: Path = Path("outputs/bench")
    sections: tuple[Section, ...] = ("engine", "frame", "memory")
    quick: bool = False
    model: str | None = None
    random_weights: str | None = None
    unnorm_key: str | None = None
    lerobot: bool = False
    empty_cameras: int = 0
    device: str = "cpu"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    float8: bool = False
    threads: int = 0
    shape: str = "llama-8x512"
    active: tuple[float, ...] = (0.5, 0.25, 0.1)
    rounds: int = 50
    policies: tuple[str, ...] = ()
    options: tuple[str, ...] = ("none", "default")
    acceptance: tuple[float, ...] = ()
    frames: int = 200
    minutes: float = 0
    warmup: int = 5
    replay: Path | None = None
    flow: str | None = None
    max_age: int = 16
    memory_policy: str = "motion:ratio=0.5"
    memory_frames: int = 2000
    batch: tuple[int, ...] = (1, 2, 4, 8, 16)
    roofline: str | None = None
    latency_table: Path | None = None
    seed: int = 0
    keys: Annotated[DatasetKeys, tyro.conf.arg(name="")] = field(default_factory=DatasetKeys)

    def __post_init__(self) -> None:
        """Fill in what depends on other settings; check all that can be checked before anything is loaded."""
        if self.model is not None and self.random_weights is not None:
            raise InputError("give --model or --random-weights, not both")
        filled: dict[str, Any] = QUICK if self.quick else {}
        if self.model is None and self.random_weights is None:
            filled = {**filled, "model": "mini"}
        if not self.policies:
            filled = {**filled, "policies": RULES if self.random_weights else ("lac",)}
        for name, value in filled.items():
            object.__setattr__(self, name, value)
        check_device(self.device)
        if not self.sections:
            raise InputError("there is no section to measure: give engine, frame, memory, batch, trace or roofline")
        if self.shape not in SHAPES:
            raise InputError(f"unknown shape {self.shape!r}; choose one of {sorted(SHAPES)}")
        for name in ("rounds", "frames", "memory_frames"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; give at least 1")
        if self.warmup < 1:
            raise InputError(f"warmup is {self.warmup}; give at least 1: a first frame is always dense")
        if not self.batch or min(self.batch) < 1:
            raise InputError(f"batch is {self.batch}; give numbers of sessions, each at least 1")
        if self.threads < 0:
            raise InputError(f"threads is {self.threads}; give a number of threads, or 0 for the default")
        if not self.active or not all(0 < share < 1 for share in self.active):
            raise InputError(f"active is {self.active}; give shares of the visual tokens in (0, 1)")
        if self.roofline is not None and self.roofline not in GPUS:
            raise InputError(f"unknown GPU {self.roofline!r} for --roofline; choose one of {list(GPUS)}")
        if "roofline" in self.sections and self.roofline is None:
            raise InputError(f"whose roofline? give --roofline and one of {list(GPUS)}")
        if not all(0 <= share <= 1 for share in self.acceptance):
            raise InputError(f"acceptance is {self.acceptance}; give shares of the drafted tokens in [0, 1]")
        if self.acceptance and self.model is not None:
            raise InputError("acceptance is for random weights; a checkpoint's drafts have their own: leave it out")
        if self.minutes < 0:
            raise InputError(f"minutes is {self.minutes}; give a time, or 0 for no limit")
        if self.empty_cameras < 0 or (self.empty_cameras and not self.lerobot):
            raise InputError(f"empty_cameras is {self.empty_cameras}; give a number of cameras beside --lerobot")
        for options in self.options:
            EngineOptions.parse(options)
        make_policies(self.methods, self.model)
        resolve_policy(self.memory_policy, self.model)
        make_flow(self.flow or "none")

    @property
    def methods(self) -> list[str]:
        """One policy spec per value of every option."""
        return [spec for policy in self.policies for spec in expand(policy)]
