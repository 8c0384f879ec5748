"""The rows of the section ``frame``: the stock model, then policies, each with every set of levers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from lac_vla.bench.config import BenchConfig
from lac_vla.bench.engine import DENSE
from lac_vla.bench.model import Timed
from lac_vla.bench.stock import STOCK, StockSession
from lac_vla.bench.sweep import Scripted
from lac_vla.evaluation.methods import resolve
from lac_vla.levers import Levers
from lac_vla.models import PrismaticBackbone
from lac_vla.policies import paths_by_name
from lac_vla.step import Step
from lac_vla.types import FloatArray, Frame
from lac_vla.vla import CachedVLA, Session


class Robot(Protocol):
    """A session, or the stock model behind the same face."""

    last: Step | None

    def reset(self) -> None:
        """Begin a new episode."""
        ...

    def act(self, frame: Frame) -> FloatArray:
        """Answer an observation with an action."""
        ...


@dataclass(frozen=True)
class Method:
    """Something to be timed.

    Attributes:
        name: Of its row.
        robot: What acts.
        levers: What is pulled; empty for none and for the stock model.
        swept: What of it is prescribed, and no property of the method: ``ratio``, ``acceptance``.
    """

    name: str
    robot: Robot
    levers: str = ""
    swept: tuple[str, ...] = ()


def make_methods(backbone: Timed, config: BenchConfig) -> Iterator[Method]:
    """The stock model; every policy with every set of levers, and with every prescribed acceptance of their drafts."""
    yield Method(STOCK, StockSession(backbone, config.seed))
    for levers in dict.fromkeys(("none", *config.levers)):
        pulled = Levers.parse(levers)
        for spec in (DENSE, *config.methods):
            name = row_name(paths_by_name(spec), levers)
            swept = ("ratio",) if config.model is None and spec != DENSE else ()

            def robot(model: Timed, spec: str = spec, pulled: Levers = pulled) -> Session:
                vla = CachedVLA(
                    model, resolve(spec, config.model), flow=config.flow, max_age=config.max_age, levers=pulled
                )
                return vla.session(config.seed)

            yield Method(name, robot(backbone), "" if levers == "none" else levers, swept)
            if not pulled.draft or not isinstance(backbone, PrismaticBackbone):
                continue
            for share in config.acceptance:
                drafted = backbone.max_new_tokens - 1
                scripted = Scripted(backbone, round(share * drafted))
                kept = f"{name}, {scripted.kept}/{drafted} kept"
                yield Method(kept, robot(scripted), levers, (*swept, "acceptance"))


def row_name(method: str, levers: str) -> str:
    """Name of a method with levers pulled."""
    return method if levers in ("", "none") else f"{method} +{levers}"
