"""The rows of the section ``frame``: the stock model, then policies, each with every set of options."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lac_vla.bench.config import BenchConfig
from lac_vla.bench.engine import DENSE
from lac_vla.bench.lerobot_session import LeRobotSession
from lac_vla.bench.stock import STOCK, StockSession, has_stock
from lac_vla.bench.sweep import scripted
from lac_vla.engine.options import EngineOptions
from lac_vla.factory import CachedVLA, resolve_policy
from lac_vla.models import VLA
from lac_vla.models.heads.tokens import TokenHead
from lac_vla.policies import paths_by_name
from lac_vla.session import Session


@dataclass(frozen=True)
class Method:
    """Something to be timed.

    Attributes:
        name: Of its row.
        session: Acts.
        options: The options that are on; empty for none and for the stock model.
        swept: What of it is prescribed, and no property of the method: ``ratio``, ``acceptance``.
    """

    name: str
    session: Session | StockSession | LeRobotSession
    options: str = ""
    swept: tuple[str, ...] = ()


def make_methods(model: VLA, config: BenchConfig) -> Iterator[Method]:
    """Make the stock model, where there is one, and every policy with every set of options.

    Where drafts have a prescribed acceptance, also every one of these.
    """
    if config.lerobot:
        yield Method(STOCK, LeRobotSession(model, config.seed, config.empty_cameras))
    elif has_stock(model):
        yield Method(STOCK, StockSession(model, config.seed))
    for options in dict.fromkeys(("none", *config.options)):
        for spec in (DENSE, *config.methods):
            name = row_name(paths_by_name(spec), options)
            swept = ("ratio",) if config.model is None and spec != DENSE else ()

            session = cached_vla(model, spec, options, config).session(config.seed)
            yield Method(name, session, "" if options == "none" else options, swept)
            if not EngineOptions.parse(options).draft or not isinstance(model.head, TokenHead):
                continue
            for share in config.acceptance:
                drafted = model.head.max_new_tokens - 1
                accepted = round(share * drafted)
                row = f"{name}, {accepted}/{drafted} accepted"
                session = cached_vla(scripted(model, model.head, accepted), spec, options, config).session(config.seed)
                yield Method(row, session, options, (*swept, "acceptance"))


def cached_vla(model: VLA, spec: str, options: str, config: BenchConfig) -> CachedVLA:
    """Put a policy beside the model, with a set of options."""
    policy, engine_options = resolve_policy(spec, config.model), EngineOptions.parse(options)
    vla = CachedVLA(model, policy, flow=config.flow, max_age=config.max_age, options=engine_options)
    vla.engine.stage_events = True
    return vla


def row_name(method: str, options: str) -> str:
    """Name a method with options on."""
    return method if options in ("", "none") else f"{method} +{options}"
