"""The metrics of a call of the model.

A metric is one object. Episode records, summaries, the tables of the terminal and of the reports, the server's
``/metrics`` and its live page iterate over :data:`METRICS`: a new metric is one more entry there. Latencies are no
such metrics: every stage and window of :mod:`lac_vla.timing` is always recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lac_vla.cost import CostModel
from lac_vla.engine.step_info import StepInfo, StepReport
from lac_vla.results.format import count, percent


@dataclass(frozen=True)
class Metric:
    """One number per call of the model.

    Attributes:
        name: Key in episode records and summaries, in snake case.
        heading: Heading of its column, and its name on pages.
        help: One sentence that explains it.
        value: Its value for one call, or ``None`` where the call has none. The argument is what ``needs`` says.
        needs: ``"report"``: any :class:`StepReport`, a server's too. ``"step"``: a session's own :class:`StepInfo`.
            ``"cost"``: the multiply-accumulates by stage, see :meth:`lac_vla.cost.CostModel.step`.
        aggregate: One number for all values of a method, of which there is at least one; by default their mean.
        text: Writes a value, or an aggregate, for people.
        exported: Its name for Prometheus, behind ``lac_``; by default ``name``.
        buckets: Upper bounds of a Prometheus histogram; empty for count and sum alone.
    """

    name: str
    heading: str
    help: str
    value: Callable[[Any], float | None]
    needs: Literal["report", "step", "cost"] = "step"
    aggregate: Callable[[Sequence[float]], float | None] = lambda values: float(np.mean(values))
    text: Callable[[float], str] = "{:.1f}".format
    exported: str = ""
    buckets: Sequence[float] = ()

    def measure(self, step: StepReport, cost: CostModel | None = None) -> float | None:
        """Measure one call; ``None`` where it has no value, or the report does not tell it."""
        if self.needs == "cost":
            return self.value(cost.step(step)) if cost is not None and isinstance(step, StepInfo) else None
        return self.value(step) if self.needs == "report" or isinstance(step, StepInfo) else None


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "ratio_nominal",
            "ratio, nominal",
            "Cache ratio that the policy aimed at.",
            lambda step: step.nominal_ratio,
            needs="report",
            text=lambda value: percent(value, 0),
            exported="nominal_cache_ratio",
        ),
        Metric(
            "ratio_effective",
            "ratio, effective",
            "Share of the visual tokens, over all layers, that was not computed; full frames count as 0.",
            lambda step: step.ratio,
            needs="report",
            text=percent,
            exported="cache_ratio",
            buckets=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1),
        ),
        Metric(
            "oldest_age",
            "oldest token",
            "Age of the oldest reused token, in frames; its maximum over all calls.",
            lambda step: step.oldest_age,
            needs="report",
            aggregate=lambda ages: max(ages) or None,
            text="{:.0f}".format,
            exported="oldest_age_frames",
            buckets=(0, 1, 2, 4, 8, 12, 16, 24, 32, 64),
        ),
        Metric(
            "macs",
            "MACs, FLOPs",
            "Multiply-accumulates per call, counted analytically, and FLOPs, twice as many; DIS flow counts as 0.",
            lambda macs: float(sum(macs.values())),
            needs="cost",
            text=lambda value: f"{count(value)}\n{count(2 * value)}",
        ),
        Metric(
            "decode_passes",
            "decode passes",
            "Decoding passes behind the prefill.",
            lambda step: len(step.decode_passes),
        ),
        Metric(
            "accepted",
            "draft accepted",
            "Drafted tokens that were accepted, of the calls with a draft.",
            lambda step: step.accepted,
        ),
    )
}
"""Name → metric, in the order of the tables' columns."""
