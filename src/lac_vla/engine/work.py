"""Work between frames: it yields a plan, is sent the result, and returns what came of it; several go together."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TypeAlias, TypeVar

from lac_vla.engine.engine import Engine
from lac_vla.engine.plan import FramePlan, FrameResult

T = TypeVar("T")
Work: TypeAlias = Generator[FramePlan, FrameResult, T]
"""It yields at most one plan: work for which there is nothing to do returns at once."""


def work_together(engine: Engine, works: Sequence[Work[T]]) -> list[T | Exception]:
    """Do the work of several sessions in one run of their engine.

    Returns:
        What each returned, or what went wrong with it alone.
    """
    done: dict[int, T | Exception] = {}
    plans: dict[int, FramePlan] = {}

    def advance(index: int, result: FrameResult | None) -> None:
        try:
            plans[index] = next(works[index]) if result is None else works[index].send(result)
        except StopIteration as end:
            done[index] = end.value
        except Exception as error:  # of this session alone
            done[index] = error

    for index in range(len(works)):
        advance(index, None)
    for index, result in zip(list(plans), engine.run(list(plans.values())), strict=True):
        advance(index, result)
    return [done[index] for index in range(len(works))]


def work_alone(engine: Engine, work: Work[T]) -> T:
    """Do the work of one session; raise what goes wrong."""
    [done] = work_together(engine, [work])
    if isinstance(done, Exception):
        raise done
    return done
