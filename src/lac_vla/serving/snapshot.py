"""The live page shows snapshots of sessions: the last frame as a picture and in numbers, and the requests before it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from lac_vla.drawing.overlay import camera_overlays
from lac_vla.drawing.picture import jpeg_base64
from lac_vla.engine.step_info import StepInfo
from lac_vla.results.metrics import METRICS
from lac_vla.serving.sessions import Answer

KEPT = 120
"""The ratio and latency of so many requests are shown."""
EVENTS = 8
"""So many resets and dense frames are shown."""
HEIGHT = 280
"""Least height of a picture, pixels: a phone's width. It costs the server's processor what it is large."""


@dataclass(frozen=True)
class Event:
    """The reason why frames were computed in full, why an episode began or is not recorded, or a request was refused.

    Attributes:
        kind: ``"reset"``, ``"fallback"``, ``"unrecorded"`` or ``"refused"``.
        reason: The server's reason.
        first: Number of the request, from 1 on.
        last: Number of the last request in a row with this reason.
    """

    kind: str
    reason: str
    first: int
    last: int


@dataclass(frozen=True, eq=False)
class SessionSnapshot:
    """One session after one answer. It never changes, so that it may be drawn while the model goes on.

    Attributes:
        session: Its name, as in the log.
        peer: The robot's address.
        at: Time of the last answer, or of the connection, seconds.
        instruction: Instruction of the last request.
        frames: Number of answered requests.
        refused: Number of those that could not be used.
        step: The report of the last frame, without the head's metadata.
        token_budget: Tokens that the deadline allowed, at most; ``None`` without a deadline.
        ratios: Effective cache ratios of the last :data:`KEPT` requests, in [0, 1].
        latencies: Milliseconds from their arrival to their answer.
        events: The last :data:`EVENTS`, oldest first.
    """

    session: str
    peer: str
    at: float
    instruction: str = ""
    frames: int = 0
    refused: int = 0
    step: StepInfo | None = None
    token_budget: int | None = None
    ratios: tuple[float, ...] = ()
    latencies: tuple[float, ...] = ()
    events: tuple[Event, ...] = ()

    def after(self, answer: Answer, at: float) -> SessionSnapshot:
        """Make the snapshot after one more answer, given at the time ``at`` (seconds)."""
        report, noted = answer.message["lac"], self
        if (reason := answer.reset or answer.step.dense_reason) is not None:
            noted = noted.noting("reset" if answer.reset else "fallback", reason)
        if lost := report.get("not_recorded"):
            noted = noted.noting("unrecorded", lost)
        took = report["waited_ms"] + answer.message["server_timing"]["infer_ms"]
        return replace(
            self,
            at=at,
            instruction=answer.frame.instruction,
            frames=self.frames + 1,
            step=replace(answer.step, metadata={}, probe=None),  # these may hold tensors
            token_budget=report["token_budget"],
            ratios=(*self.ratios[1 - KEPT :], answer.step.ratio),
            latencies=(*self.latencies[1 - KEPT :], took),
            events=noted.events,
        )

    def refusing(self, reason: str) -> SessionSnapshot:
        """Make the snapshot after one more request that could not be used."""
        return replace(self.noting("refused", reason), refused=self.refused + 1)

    def noting(self, kind: str, reason: str) -> SessionSnapshot:
        """Make the snapshot with one more event, of the request that is next; or with the same one, going on."""
        number = self.frames + self.refused + 1
        same = [e for e in self.events if (e.kind, e.reason) == (kind, reason) and e.last >= number - 1]
        events = tuple(event for event in self.events if event not in same)
        event = Event(kind, reason, same[0].first if same else number, number)
        return replace(self, events=(*events[1 - EVENTS :], event))

    def summary(self, now: float, max_age: int, deadline_ms: float | None, *, draw: bool) -> dict[str, Any]:
        """Give the page's numbers, and pictures if ``draw``, for JSON; ``now`` is seconds by the clock of ``at``."""
        shown: dict[str, Any] = {
            "session": self.session,
            "peer": self.peer,
            "silent_s": round(now - self.at, 1),
            "frames": self.frames,
            "events": [asdict(event) for event in reversed(self.events)],
        }
        if (step := self.step) is None:
            return shown
        p50, p95 = np.quantile(self.latencies, (0.5, 0.95)).tolist()
        return shown | {
            "instruction": self.instruction,
            "skipped": step.decision.skipped.value,
            "ratio": step.ratio,
            "nominal_ratio": step.nominal_ratio,
            "tokens": step.layout.n_visual,
            "computed": int(step.active.sum()),
            "recovered": int((step.recovered & step.active).sum()),
            "token_budget": self.token_budget,
            "oldest_age": step.oldest_age,
            "metrics": [
                {"heading": metric.heading, "help": metric.help, "text": metric.text(value)}
                for metric in METRICS.values()
                if (value := metric.measure(step)) is not None
            ],
            "ages": np.bincount(np.minimum(step.age, max_age), minlength=max_age + 1).tolist(),
            "ratios": [round(ratio, 4) for ratio in self.ratios],
            "latencies_ms": [round(took, 2) for took in self.latencies],
            "p50_ms": p50,
            "p95_ms": p95,
            "late": sum(took > deadline_ms for took in self.latencies) if deadline_ms is not None else 0,
            "stages": {stage: round(milliseconds, 3) for stage, milliseconds in step.stages.items()},
            "cameras": [
                {
                    "name": camera.name,
                    "tokens": camera.size,
                    "computed": int(step.active[camera.tokens].sum()),
                    "recovered": int((step.recovered & step.active)[camera.tokens].sum()),
                    "jpeg": self.pictures[number] if draw else None,
                }
                for number, camera in enumerate(step.layout.cameras)
            ],
        }

    @cached_property
    def pictures(self) -> list[str]:
        """Draw what was computed of every camera's image, JPEG in base64, when first asked for."""
        return [] if self.step is None else [jpeg_base64(picture) for picture in camera_overlays(self.step, HEIGHT)]
