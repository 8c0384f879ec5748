"""The rows of the section ``frame``: the stock model, then policies, each with every set of options."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from lac_vla.bench.config import BenchConfig
from lac_vla.bench.engine import DENSE
from lac_vla.bench.model import Timed
from lac_vla.bench.stock import STOCK, StockSession
from lac_vla.bench.sweep import Scripted
from lac_vla.engine.options import EngineOptions
from lac_vla.engine.step_info import StepInfo
from lac_vla.factory import resolve_policy
from lac_vla.models import PrismaticBackbone
from lac_vla.policies import paths_by_name
from lac_vla.session import CachedVLA, Session
from lac_vla.types import FloatArray, Frame


class Robot(Protocol):
    """A session, or the stock model behind the same face."""

    last_info: StepInfo | None

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
        options: The options that are on; empty for none and for the stock model.
        swept: What of it is prescribed, and no property of the method: ``ratio``, ``acceptance``.
    """

    name: str
    robot: Robot
    options: str = ""
    swept: tuple[str, ...] = ()


def make_methods(backbone: Timed, config: BenchConfig) -> Iterator[Method]:
    """The stock model; every policy with every set of options, and with every prescribed acceptance of their drafts."""
    yield Method(STOCK, StockSession(backbone, config.seed))
    for options in dict.fromkeys(("none", *config.options)):
        engine_options = EngineOptions.parse(options)
        for spec in (DENSE, *config.methods):
            name = row_name(paths_by_name(spec), options)
            swept = ("ratio",) if config.model is None and spec != DENSE else ()

            def robot(model: Timed, spec: str = spec, engine_options: EngineOptions = engine_options) -> Session:
                vla = CachedVLA(
                    model,
                    resolve_policy(spec, config.model),
                    flow=config.flow,
                    max_age=config.max_age,
                    options=engine_options,
                )
                return vla.session(config.seed)

            yield Method(name, robot(backbone), "" if options == "none" else options, swept)
            if not engine_options.draft or not isinstance(backbone, PrismaticBackbone):
                continue
            for share in config.acceptance:
                drafted = backbone.max_new_tokens - 1
                scripted = Scripted(backbone, round(share * drafted))
                kept = f"{name}, {scripted.kept}/{drafted} kept"
                yield Method(kept, robot(scripted), options, (*swept, "acceptance"))


def row_name(method: str, options: str) -> str:
    """Name of a method with options on."""
    return method if options in ("", "none") else f"{method} +{options}"
