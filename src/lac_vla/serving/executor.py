"""The one thread that runs the model: requests in the order of their arrival, idle work when none waits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from lac_vla.errors import LacError

T = TypeVar("T")


class BusyError(LacError):
    """The request queue is full."""


class ModelExecutor:
    """Runs jobs one at a time, off the event loop.

    Every connection hands in one request at a time, so the order of arrival is fair: a robot waits for at most one
    request of every other, however fast that one asks; ``capacity`` of them may wait or run. Idle work is a single
    short job at a time.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.waiting = capacity, 0
        self._thread = ThreadPoolExecutor(1, "model")
        self._idle: dict[Hashable, Callable[[], object]] = {}
        self._resting, self._closed = True, False

    async def run(self, job: Callable[[], T]) -> T:
        """Run a request's job; if the caller is cancelled, the job still runs to its end.

        Raises:
            BusyError: If too many wait.
        """
        if self.waiting >= self.capacity or self._closed:
            raise BusyError("the server is stopping" if self._closed else f"{self.waiting} requests wait: try later")
        self.waiting += 1
        future = asyncio.get_running_loop().run_in_executor(self._thread, job)
        future.add_done_callback(self._done)
        return await asyncio.shield(future)

    def offer(self, owner: Hashable, job: Callable[[], object]) -> None:
        """Leave a job for when no request waits; it replaces the owner's last one."""
        self._idle.pop(owner, None)
        self._idle[owner] = job
        self._rest()

    def withdraw(self, owner: Hashable) -> None:
        """Forget the owner's idle job."""
        self._idle.pop(owner, None)

    async def close(self) -> None:
        """Finish what was taken, drop idle work, and stop the thread."""
        self._closed = True
        self._idle.clear()
        await asyncio.get_running_loop().run_in_executor(None, self._thread.shutdown)

    def _done(self, future: asyncio.Future[T]) -> None:
        self.waiting -= 1
        if not future.cancelled():
            future.exception()  # seen, even if the caller has gone
        self._rest()

    def _rest(self) -> None:
        if self.waiting or not self._resting or not self._idle or self._closed:
            return
        job = self._idle.pop(next(iter(self._idle)))
        self._resting = False
        asyncio.get_running_loop().run_in_executor(self._thread, job).add_done_callback(self._rested)

    def _rested(self, future: asyncio.Future[object]) -> None:
        self._resting = True
        if not future.cancelled() and (error := future.exception()) is not None:
            asyncio.get_running_loop().call_exception_handler({"message": "idle work failed", "exception": error})
        self._rest()
