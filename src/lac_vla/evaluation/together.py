"""Episodes side by side: simulators in processes of their own, whose frames one model answers in one batch.

The episodes keep step: once every simulator waits for an answer, all are answered. So what is computed together depends
on the episodes alone, not on how fast a simulator happens to be.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Condition, Thread
from typing import Any, TypeAlias

from lac_vla.engine.engine import Engine
from lac_vla.evaluation.config import EvalConfig
from lac_vla.evaluation.process_env import ProcessEnv
from lac_vla.evaluation.worker import EpisodeWorker, Job, load_vlas
from lac_vla.factory import CachedVLA
from lac_vla.results.records import EpisodeRecord
from lac_vla.running_chunk import RealTimeChunk
from lac_vla.session import Session, plan_together
from lac_vla.sims.base import Env
from lac_vla.types import FloatArray, Frame

Post: TypeAlias = "tuple[TogetherSession, Frame, RealTimeChunk | None] | EpisodeRecord | Exception | None"
"""What a place waits with: a frame to be answered, an episode to be taken note of, what went wrong; ``None``: a job."""


class _GivenUpError(Exception):
    """The run has ended; the episode does not go on."""


@dataclass
class _Meeting:
    """The place where episodes, each in a thread, meet the one thread that runs the model.

    Attributes:
        live: Number of places where something is played.
        posts: What they wait with, by place.
        replies: What they get, by place; an exception is raised there.
        over: Whether the run has ended.
    """

    live: int
    posts: dict[int, Post] = field(default_factory=dict)
    replies: dict[int, Any] = field(default_factory=dict)
    over: bool = False
    changed: Condition = field(default_factory=Condition)

    def ask(self, place: int, post: Post) -> Any:
        """Wait, in a place's thread, for a reply."""
        with self.changed:
            self.posts[place] = post
            self.changed.notify_all()
            self.changed.wait_for(lambda: place in self.replies or self.over)
            reply = _GivenUpError() if self.over else self.replies.pop(place)
        if isinstance(reply, Exception):
            raise reply
        return reply

    def gather(self) -> list[tuple[int, Post]]:
        """Wait until every place waits, or one has failed, and take up what they wait with, in their order."""
        with self.changed:
            self.changed.wait_for(
                lambda: len(self.posts) == self.live or any(isinstance(post, Exception) for post in self.posts.values())
            )
            posts, self.posts = sorted(self.posts.items(), key=lambda item: item[0]), {}
        return posts

    def reply(self, replies: Mapping[int, Any]) -> None:
        """Let places go on."""
        with self.changed:
            self.replies |= replies
            self.changed.notify_all()

    def end(self) -> None:
        """Let nobody go on."""
        with self.changed:
            self.over = True
            self.changed.notify_all()


class TogetherSession(Session):
    """A session whose frames are answered together with those of others; its methods are those of any other."""

    def __init__(self, meeting: _Meeting, place: int, engine: Engine, vla: CachedVLA, seed: int) -> None:
        # one engine for all methods: they differ in nothing that it runs
        super().__init__(engine, vla.policy, vla.flow_used, vla.max_age, vla.scene_cut, seed)
        self._meeting, self._place = meeting, place

    def act(self, frame: Frame, rtc: RealTimeChunk | None = None) -> FloatArray:
        """Answer an observation once all others wait for their answers, too; see :meth:`Session.act`."""
        answer: FloatArray = self._meeting.ask(self._place, (self, frame, rtc))
        return answer


class _Place(EpisodeWorker):
    """A place for one episode at a time: its sessions, by method, and its simulator."""

    def __init__(self, config: EvalConfig, meeting: _Meeting, vlas: Mapping[str, CachedVLA], number: int) -> None:
        self._meeting, self._number, self._engine = meeting, number, next(iter(vlas.values())).engine
        self._process: ProcessEnv | None = None
        super().__init__(config, vlas)

    def play(self) -> None:
        """Play what there is to play, in a thread."""
        meeting, number = self._meeting, self._number
        try:
            while (job := meeting.ask(number, None)) is not None:
                for record in job.play(self):
                    meeting.ask(number, record)
        except _GivenUpError:
            pass
        except Exception as error:
            with meeting.changed:
                meeting.posts[number] = error
                meeting.changed.notify_all()
        finally:
            self.close()

    def give_up(self) -> None:
        """End the simulator, whatever it is doing."""
        if self._process is not None:
            self._process.kill()

    def _session(self, vla: CachedVLA, seed: int) -> Session:
        return TogetherSession(self._meeting, self._number, self._engine, vla, seed)

    def _simulator(self, config: EvalConfig, task: int) -> Env:
        if self._meeting.over:
            raise _GivenUpError
        if self._process is None:
            self._env = self._process = ProcessEnv(config.benchmark, task)
        elif self._process.task != task:
            self._process.enter(task)
        return self._process


def run_together(config: EvalConfig, jobs: Sequence[Job]) -> Generator[EpisodeRecord, None, None]:
    """Run the episodes of all jobs, ``config.envs`` at a time; the order in which they finish is always the same.

    An error ends the run as it would with one simulator: what the others have in hand is given up. So does closing the
    iterator.

    Raises:
        SimulatorError: If a simulator's process is lost; the run can be resumed.
    """
    vlas, todo = load_vlas(config), deque(jobs)
    meeting = _Meeting(min(config.envs, len(jobs)))
    places = [_Place(config, meeting, vlas, number) for number in range(meeting.live)]
    threads = [Thread(target=place.play, daemon=True) for place in places]
    for thread in threads:
        thread.start()
    try:
        while meeting.live:
            posts = meeting.gather()
            frames = {place: post for place, post in posts if isinstance(post, tuple)}
            if len(frames) == len(posts):
                meeting.reply(_answer(frames))
                continue
            with meeting.changed:
                meeting.posts |= frames  # they wait for those that begin an episode
            yield from (post for _, post in posts if isinstance(post, EpisodeRecord))
            for _, post in posts:
                if isinstance(post, Exception):
                    raise post
            for place, post in posts:
                if post is None:
                    meeting.live -= not todo
                    meeting.reply({place: todo.popleft() if todo else None})
                elif isinstance(post, EpisodeRecord):
                    meeting.reply({place: None})
    finally:
        meeting.end()
        for each in places:
            each.give_up()
        for thread in threads:
            thread.join()


def _answer(frames: Mapping[int, tuple[TogetherSession, Frame, RealTimeChunk | None]]) -> dict[int, Any]:
    """Answer a frame of every place in one run; what goes wrong with one is its own affair."""
    replies: dict[int, Any] = {}
    planned = []
    plans = plan_together(
        [(session, frame) for session, frame, _ in frames.values()], [rtc for *_, rtc in frames.values()]
    )
    for (place, (session, *_)), plan in zip(frames.items(), plans, strict=True):
        if isinstance(plan, Exception):
            replies[place] = plan
        else:
            planned.append((place, session, plan))
    results = planned[0][1].engine.run([plan for *_, plan in planned]) if planned else []
    for (place, session, plan), result in zip(planned, results, strict=True):
        try:
            session.commit(plan, result)
            replies[place] = result.action
        except Exception as error:
            replies[place] = error
    return replies
