"""Count the robots that a server on one thread answers in time: one at a time and in batches, dense and with reuse.

``python scripts/robots_served.py`` plays robots that ask at 20 Hz, each at its own phase, to the server's batcher and
the real model; more and more of them, until the 99th percentile is behind the deadline. What a frame costs where
several are answered together is told first, and is all that is with ``--limit 0``. Time is the processor time of
this thread, and idle time passes at once: other work on the machine does not count, but for the caches that it shares.
Messages are packed and unpacked as on the wire; sockets are not in it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import cv2
import numpy as np
import torch
import tyro

from lac_vla.bench.scene import SIDE, synthetic
from lac_vla.client import wire
from lac_vla.client.observation import ObservationKeys
from lac_vla.engine.budget import smallest_budget
from lac_vla.engine.layers import Between
from lac_vla.errors import LacError
from lac_vla.factory import CachedVLA, ModelOptions, load_methods
from lac_vla.realtime.deadline import DeadlineController, LatencyTable
from lac_vla.serving.batches import Batcher, Request
from lac_vla.serving.sessions import Answer, RobotSession, SessionOptions

ROUNDS = 24
"""Batches of every size, to tell what a frame costs."""
ENGINE = ("tower", "projector", "prefill", "decode")
LENGTH = 40
"""Frames of a robot's scene, over and over."""
JITTER = 0.05
"""Standard deviation of the time between two requests, so that robots meet in every order."""


@dataclass(frozen=True)
class Load:
    """The load.

    Attributes:
        model: Bundled model or checkpoint folder.
        policies: Compared with one at a time and in batches.
        max_batch: Of the rows in batches.
        hz: Requests per second and robot.
        deadline_ms: Within which 99 % of the answers have to be there.
        seconds: Of every measurement.
        beside_seconds: The same with a noisy neighbour, and of what it is compared with.
        limit: Robots, at most.
    """

    model: str = "mini"
    policies: tuple[str, ...] = ("dense", "lac")
    max_batch: int = 8
    hz: float = 20.0
    deadline_ms: float = 50.0
    seconds: float = 5.0
    beside_seconds: float = 20.0
    limit: int = 64


class Clock:
    """The processor time of this thread, and the idle time that was passed over."""

    def __init__(self) -> None:
        self.passed = 0.0

    def __call__(self) -> float:
        """Return the time in seconds."""
        return self.passed + time.thread_time()

    def wait_until(self, moment: float) -> None:
        """Let idle time pass."""
        self.passed += max(0.0, moment - self())


@dataclass
class Site:
    """A model and the robots that it serves.

    Attributes:
        load: The load.
        vla: Model and policy.
        clock: The time.
        batcher: Answers.
        keys: Where messages hold what the model needs.
        scenes: Packed messages of a few robots.
    """

    load: Load
    vla: CachedVLA
    clock: Clock
    batcher: Batcher
    keys: ObservationKeys
    scenes: list[list[bytes]]

    def cost(self, count: int) -> str:
        """Tell what a frame takes where so many robots ask at once, in milliseconds, and which stages."""
        robots = [RobotSession(self.vla, self.keys, SessionOptions(), None) for _ in range(count)]
        took, stages = list[float](), dict.fromkeys(ENGINE, 0.0)
        for step in range(ROUNDS + 4):
            begin = self.clock()
            batch = [
                Request(robot, wire.unpack(self._message(number, step, False), 2**24), begin)
                for number, robot in enumerate(robots)
            ]
            answers = [each for each in self.batcher.answer(batch).values() if isinstance(each, Answer)]
            for answer in answers:
                wire.pack(answer.message)
            if step >= 4:
                took.append(1e3 * (self.clock() - begin) / count)
                for stage in ENGINE:  # every robot is told the time of the whole batch
                    stages[stage] += answers[0].step.stages[stage] / count / ROUNDS
        told = ", ".join(f"{stage} {milliseconds:.1f}" for stage, milliseconds in stages.items())
        return f"{count} together: {np.median(took):.1f} ms a frame ({told}, the rest per robot)"

    def play(self, count: int, seconds: float, noisy: bool = False) -> tuple[float, float]:
        """Serve so many robots.

        Args:
            count: Robots.
            seconds: For how long.
            noisy: After a second, add one that asks ten times as often, and whose every frame is a scene cut; it is
                not counted.

        Returns:
            99th percentile from request to answer, of all but the first second, with a noisy one the first two, in
            milliseconds; and the share of the time in which the model was busy.
        """
        rng, clock, controller = np.random.default_rng(count), self.clock, self.batcher.controller
        robots = [RobotSession(self.vla, self.keys, SessionOptions(), controller) for _ in range(count + noisy)]
        for step in range(2):  # first frames, and what has to warm up
            for number, robot in enumerate(robots):
                message = wire.unpack(self._message(number, step, False), 2**24)
                self.batcher.answer([Request(robot, message, clock())])
        pace = [1 / self.load.hz] * count + [0.1 / self.load.hz] * noisy
        begin, passed = clock(), clock.passed
        due = [begin + (number == count) + every * rng.random() for number, every in enumerate(pace)]
        steps, took = [2] * len(robots), list[float]()
        waiting: dict[Request, int] = {}
        running: set[int] = set()

        def arrive() -> None:
            for number in np.argsort(due):
                if due[number] <= clock() and number not in running and number not in waiting.values():
                    data = self._message(number, steps[number], number == count)
                    waiting[Request(robots[number], wire.unpack(data, 2**24), due[number])] = number

        def answer(between: Between | None = None) -> None:
            chosen = self.batcher.choose(waiting, robots)
            batch = {request: waiting.pop(request) for request in chosen}
            running.update(batch.values())
            outcomes = self.batcher.answer(chosen, waiting, robots, between) if batch else {}
            for request, outcome in outcomes.items():
                if not isinstance(outcome, Answer):
                    raise outcome
                wire.pack(outcome.message)
                number = batch.pop(request)
                running.discard(number)
                if number < count and request.arrived > begin + 1 + noisy:
                    took.append(1e3 * (clock() - request.arrived))
                steps[number] += 1
                following = request.arrived + pace[number] * (1 + JITTER * rng.standard_normal())
                due[number] = max(following, clock())
            waiting.update(batch)  # those that were put off wait on
            running.difference_update(batch.values())

        def interrupt() -> None:
            arrive()
            answer()

        while clock() < begin + seconds:
            arrive()
            if waiting:
                answer(interrupt)
            else:
                clock.wait_until(min(due))
        idle = (clock.passed - passed) / (clock() - begin)
        return float(np.quantile(took, 0.99)), 1 - idle

    def _message(self, number: int, step: int, cut: bool) -> bytes:
        scenes = len(self.scenes)
        scene = self.scenes[(number + step) % 2 - 2] if cut else self.scenes[number % (scenes - 2)]
        return scene[step % LENGTH]


def prepare(load: Load, vla: CachedVLA, clock: Clock, max_batch: int, deadline: bool) -> Site:
    """Measure latencies where there is a deadline, and make the robots' messages."""
    controller = None
    if deadline:
        tokens = sum(rows * cols for rows, cols in vla.model.grids.values())
        floor = smallest_budget(tokens, vla.max_age)
        controller = DeadlineController(load.deadline_ms, LatencyTable.measure(vla, max_batch=max_batch), floor)
    cameras = tuple(vla.model.grids)
    keys = ObservationKeys.parse(cameras, (), state="observation/state", prompt="prompt")
    frames = [synthetic(cameras, vla.model.processor.state_dim, LENGTH, seed).frames for seed in range(4)]
    scenes = [[wire.pack(keys.request(frame)) for frame in own] for own in frames]
    for light in (0, 255):
        images = {camera: np.full((SIDE, SIDE, 3), light, np.uint8) for camera in cameras}
        scenes.append([wire.pack(keys.request(frame) | {keys.cameras[c]: images[c] for c in cameras})
                       for frame in frames[0]])  # fmt: skip
    return Site(load, vla, clock, Batcher(vla.engine, controller, max_batch), keys, scenes)


def main(load: Load) -> None:
    """Print, row by row, how many robots are served in time."""
    clock = Clock()
    time.perf_counter = clock  # type: ignore[assignment]  # the model, too, is timed by it
    torch.set_num_threads(1)
    cv2.setNumThreads(1)  # or optical flow is computed by threads whose time is not this one's
    vlas = load_methods(load.model, load.policies, ModelOptions(threads=1))
    print(f"{load.model}, one thread, robots at {load.hz:g} Hz, p99 within {load.deadline_ms:g} ms of processor time")
    for name, vla in vlas.items():
        for deadline in (False, True) if name != "dense" and load.limit else (False,):
            for max_batch in (1, load.max_batch):
                row = f"{name}, {f'batches of up to {max_batch}' if max_batch > 1 else 'one at a time'}"
                row += ", deadline" if deadline else ""
                try:
                    site = prepare(load, vla, clock, max_batch, deadline)
                except LacError as error:
                    print(f"{row}: {error}")
                    continue
                if not deadline:
                    counts = [
                        count for count in (1, 2, 4, 8, 16) if count <= max_batch and (count > 1) == (max_batch > 1)
                    ]
                    for count in counts:
                        print(f"{row}, {site.cost(count)}", flush=True)
                served, p99 = 0, dict[int, tuple[float, float]]()
                while served < load.limit:
                    p99[served + 1] = site.play(served + 1, load.seconds)
                    if p99[served + 1][0] > load.deadline_ms:
                        break
                    served += 1
                if not p99:
                    continue
                shown = ", ".join(f"{count}: {value:.1f} ms, busy {busy:.0%}" for count, (value, busy) in p99.items())
                print(f"{row}: {served} robots (p99 by robots: {shown})", flush=True)
                if served:
                    half = max(1, served // 2)
                    (alone, _), (beside, _) = (site.play(half, load.beside_seconds, noisy) for noisy in (False, True))
                    print(f"    {half} robots: p99 {alone:.1f} ms, beside a noisy one {beside:.1f} ms", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Load))
