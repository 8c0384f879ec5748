"""A simulator in a process of its own: one task after the other, with the interface of one that runs here."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import numpy.typing as npt

from lac_vla.sims.base import Benchmark, Env, SimulatorError
from lac_vla.types import Frame


class ProcessEnv(Env):
    """A task whose simulator runs in another process, which all tasks share: starting one takes long.

    Args:
        benchmark: Makes the simulators, there.
        task: The first task.

    Raises:
        LacError: As ``Benchmark.make_env`` does.
        SimulatorError: If the process is lost. The next ``reset`` starts another.
    """

    def __init__(self, benchmark: Benchmark, task: int) -> None:
        self._benchmark = benchmark
        self._connection: Connection | None = None
        self.enter(task)

    def enter(self, task: int) -> None:
        """Go on with another task; the last one's simulator is closed."""
        if self._connection is None:
            context = _context()
            self._connection, theirs = context.Pipe()
            self._process: BaseProcess = context.Process(target=_simulate, args=(theirs, self._benchmark), daemon=True)
            self._process.start()
            theirs.close()
        self.task = task
        self.suite, self.instruction, self.horizon, self.no_op, self.control_hz = self._call("enter", task)

    def reset(self, init_state: int, seed: int = 0) -> Frame:
        """See :meth:`Env.reset`."""
        if self._connection is None:
            self.enter(self.task)
        frame: Frame
        frame, self.instruction, self.horizon = self._call("reset", init_state, seed)
        return frame

    def step(self, action: npt.ArrayLike) -> tuple[Frame, bool]:
        """See :meth:`Env.step`."""
        frame, success = self._call("step", action)
        return frame, success

    def tick(self, action: npt.ArrayLike) -> tuple[Callable[[], Frame], bool]:
        """See :meth:`Env.tick`."""
        success: bool = self._call("tick", action)
        return lambda: self._call("observe"), success

    def outcome(self) -> Mapping[str, Any]:
        """See :meth:`Env.outcome`."""
        found: Mapping[str, Any] = self._call("outcome")
        return found

    def close(self) -> None:
        """End the process."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        with suppress(OSError):
            connection.send(("close", ()))
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        connection.close()

    def kill(self) -> None:
        """End the process from another thread, in the middle of whatever it does."""
        self._process.kill()

    def _call(self, name: str, *arguments: Any) -> Any:
        if self._connection is None:
            raise SimulatorError("the simulator's process has ended: reset the environment")
        try:
            self._connection.send((name, arguments))
            error, value = self._connection.recv()
        except (OSError, EOFError) as lost:
            self._process.join(5)
            code = self._process.exitcode
            self.close()
            raise SimulatorError(
                f"the process of a simulator was lost (exit code {code}): what it printed says why; the system may "
                "also have killed it for want of memory, of which fewer --envs need less"
            ) from lost
        if error is not None:
            raise error
        return value


def _context() -> Any:
    """Processes without this one's GL contexts, which survive no fork; what is slow to import is so only once."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


class _Host:
    """The simulator of the present task, in its process."""

    def __init__(self, benchmark: Benchmark) -> None:
        self.benchmark = benchmark
        self.env: Env | None = None
        self.observe: Callable[[], Frame]

    def __call__(self, name: str, *arguments: Any) -> Any:
        if name == "enter":
            if self.env is not None:
                self.env.close()
                self.env = None
            self.env = self.benchmark.make_env(*arguments)
            env = self.env
            return env.suite, env.instruction, env.horizon, env.no_op, env.control_hz
        if self.env is None:  # it failed to open
            raise SimulatorError("no task has been entered")
        if name == "tick":  # a function cannot be sent
            self.observe, success = self.env.tick(*arguments)
            return success
        if name == "observe":
            return self.observe()
        value = getattr(self.env, name)(*arguments)
        return (value, self.env.instruction, self.env.horizon) if name == "reset" else value


def _simulate(connection: Connection, benchmark: Benchmark) -> None:
    """Do what the other end asks for until it says ``close``, or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt reaches every process of a terminal; the parent decides
    host, name = _Host(benchmark), ""
    while name != "close":
        try:
            name, arguments = connection.recv()
        except (EOFError, OSError):
            break
        reply: tuple[Exception | None, Any]
        try:
            reply = None, host(name, *arguments)
        except Exception as error:  # the other end raises it
            reply = error, None
        with suppress(OSError):
            connection.send(reply)
