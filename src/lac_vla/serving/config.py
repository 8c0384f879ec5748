"""``lac serve``: its settings, and the server that they make."""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import tyro

from lac_vla.checks import check_device
from lac_vla.errors import InputError
from lac_vla.factory import ModelOptions, load_methods
from lac_vla.serving.sessions import SessionOptions

if TYPE_CHECKING:
    from lac_vla.serving.server import PolicyServer


@dataclass(frozen=True)
class ServeConfig:
    """A policy server.

    Attributes:
        model: Name of a bundled model, checkpoint folder, hub id, or plug-in.
        policy: E.g. ``lac`` (the policy that comes with the model), ``lac:path=FOLDER``, ``dense``.
        host: Address to listen on. Any but this machine's own needs an API key.
        port: Port to listen on.
        camera: Where requests hold the images, ``camera=key``; by default openpi's LIBERO keys, in the cameras' order.
        state_key: Where they hold the proprioception.
        prompt_key: Where they hold the instruction.
        api_key_file: File whose first line is the API key; by default the environment variable LAC_API_KEY.
        tls_cert: Certificate, PEM.
        tls_key: Its key, PEM.
        deadline_ms: From a request's arrival to its answer; caps the tokens per frame. 0 for none.
        max_batch: Requests of different robots that are answered together, at most; 1 for one at a time.
        batch_window_ms: A request waits so long for others to join it; 0 for not at all.
        max_sessions: Robots at a time.
        kv_memory: Megabytes for all that robots keep, keys and values above all; 0 for as many as they need. A
            robot that is silent gives its room to one that asks, and starts dense when it returns; one that finds all
            room taken by robots at work is told so when it connects.
        max_rate: Requests per second and robot.
        max_message_mb: Size of a request.
        warmup: Instructions that robots will give: every shape of their frames is run, and with the option cuda_graphs
            captured, before the server listens, and none in mid-episode.
        record: Folder of a LeRobot dataset of what the sessions see and do, for ``lac train``; one that is there is
            continued.
        record_fps: Frames per second that it is to have; 0: those of the folder, or the rate of the first episode.
        drain_s: Seconds for which the robots that are there are served on after SIGTERM, while no more are taken and
            ``/readyz`` says ``draining``; a second signal, or Ctrl-C, stops at once.
        view: A live page for the operator at ``/view``; ``lac view`` opens it.
        session_options: Options of every robot's session.
        model_options: Options with which the model is loaded and run.

    Raises:
        InputError: If a setting makes no sense.
    """

    model: str
    policy: str = "lac"
    host: str = "127.0.0.1"
    port: int = 8000
    camera: tuple[str, ...] = ()
    state_key: str = "observation/state"
    prompt_key: str = "prompt"
    api_key_file: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    deadline_ms: float = 0.0
    max_batch: int = 8
    batch_window_ms: float = 0.0
    max_sessions: int = 32
    kv_memory: float = 0.0
    max_rate: float = 200.0
    max_message_mb: float = 8.0
    warmup: tuple[str, ...] = ()
    record: Path | None = None
    record_fps: int = 0
    drain_s: float = 2.0
    view: bool = False
    session_options: Annotated[SessionOptions, tyro.conf.arg(name="")] = field(default_factory=SessionOptions)
    model_options: Annotated[ModelOptions, tyro.conf.arg(name="")] = field(default_factory=ModelOptions)

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise InputError(f"port is {self.port}; give one in 0..65535, 0 for any free one")
        if self.max_sessions < 1 or not self.max_rate > 0 or not self.max_message_mb > 0 or self.deadline_ms < 0:
            raise InputError("max_sessions, max_rate and max_message_mb must be greater than 0, deadline_ms at least 0")
        if self.max_batch < 1 or not self.batch_window_ms >= 0:
            raise InputError("max_batch must be at least 1, which answers one at a time, batch_window_ms at least 0")
        if not 0 <= self.kv_memory < math.inf:
            raise InputError(f"kv_memory is {self.kv_memory:g}; give megabytes, or 0 for no limit")
        check_device(self.model_options.device)
        if not 0 <= self.drain_s < math.inf:
            raise InputError(f"drain_s is {self.drain_s:g}; give seconds, or 0 to stop at once")
        if self.record_fps < 0:
            raise InputError(f"record_fps is {self.record_fps}; give whole frames per second, or 0")


def make_server(config: ServeConfig) -> PolicyServer:
    """Load the model, measure latencies where they are needed, and make the server; it does not listen yet.

    Raises:
        InputError: If a setting cannot be used.
        CheckpointError: If the model cannot be loaded.
        MissingExtraError: If the extra ``serve`` is not installed.
    """
    from lac_vla import __version__
    from lac_vla.client.observation import ObservationKeys
    from lac_vla.engine.budget import frames_of_age, smallest_budget
    from lac_vla.engine.warmup import warm_up
    from lac_vla.realtime.deadline import DeadlineController, LatencyTable, sample_frames
    from lac_vla.serving.auth import check_exposure, read_key, tls_context
    from lac_vla.serving.kv_memory import KVMemory
    from lac_vla.serving.server import Limits, PolicyServer

    key, tls = read_key(config.api_key_file), tls_context(config.tls_cert, config.tls_key)
    check_exposure(config.host, key)
    [(method, vla)] = load_methods(config.model, (config.policy,), config.model_options).items()
    keys = ObservationKeys.parse(vla.model.grids, config.camera, state=config.state_key, prompt=config.prompt_key)
    memory = KVMemory.take(vla, config.kv_memory) if config.kv_memory else None
    if config.warmup:
        frames = [replace(sample_frames(vla.model)[0], instruction=instruction) for instruction in config.warmup]
        robots = config.max_sessions if memory is None else min(config.max_sessions, memory.robots)
        warm_up(vla.engine, frames, robots, config.max_batch)
    table = None
    if config.deadline_ms or config.session_options.slack:
        table = LatencyTable.measure(vla, max_batch=config.max_batch if config.deadline_ms else 1)
    controller = None
    if config.deadline_ms and table is not None:
        n_visual = sum(rows * cols for rows, cols in vla.model.grids.values())
        max_frames = frames_of_age(vla.max_age, config.session_options.actions_per_call or 1)
        controller = DeadlineController(config.deadline_ms, table, smallest_budget(n_visual, max_frames))
    metadata = {
        "server": f"lac-vla {__version__}",
        "model": vla.model.name,
        "method": method,
        "cameras": dict(keys.cameras),
        "state": keys.state,
        "prompt": keys.prompt,
        "actions_per_call": config.session_options.actions_per_call or None,
        "max_age": vla.max_age,
        "options": str(vla.options),
        "deadline_ms": config.deadline_ms or None,
        "max_batch": config.max_batch if controller is None else controller.largest_batch(config.max_batch),
    }
    limits = Limits(config.max_sessions, config.max_rate, int(config.max_message_mb * 2**20))
    server = PolicyServer(
        vla, keys, config.session_options, controller, table, metadata, config.host, config.port, key, tls, limits,
        view=config.view, seed=config.model_options.seed, max_batch=config.max_batch,
        batch_window_ms=config.batch_window_ms, memory=memory,
    )  # fmt: skip
    if config.record is not None:
        from lac_vla.serving.record import Recorder

        horizon, action = np.atleast_2d(vla.session().act(sample_frames(vla.model)[0])).shape
        recorded = {name: metadata[name] for name in ("server", "model", "method", "actions_per_call")}
        server.recorder = Recorder(
            config.record, server.metrics, cameras=tuple(vla.model.grids), action=action,
            state=vla.model.processor.state_dim, fps=config.record_fps, metadata={**recorded, "horizon": horizon},
        )  # fmt: skip
    return server


def serve(config: ServeConfig) -> None:
    """Serve until the process is told to stop.

    Raises:
        InputError: If a setting cannot be used, or the address cannot be listened on.
    """
    from lac_vla.serving.metrics import log_to_stderr

    log_to_stderr()
    asyncio.run(until_stopped(make_server(config), config.drain_s))


async def until_stopped(server: PolicyServer, drain_s: float) -> None:
    """Serve until SIGINT; after SIGTERM, for so many more seconds."""
    drain, stop, loop = asyncio.Event(), asyncio.Event(), asyncio.get_running_loop()

    def terminate() -> None:
        (stop if drain.is_set() else drain).set()

    with contextlib.suppress(NotImplementedError):  # Windows
        loop.add_signal_handler(signal.SIGINT, stop.set)
        loop.add_signal_handler(signal.SIGTERM, terminate)
    async with server:
        stopped, drained = (asyncio.ensure_future(event.wait()) for event in (stop, drain))
        await asyncio.wait([stopped, drained], return_when=asyncio.FIRST_COMPLETED)
        if not stop.is_set():
            await asyncio.wait([stopped, asyncio.ensure_future(server.drain(drain_s))],
                               return_when=asyncio.FIRST_COMPLETED)  # fmt: skip
