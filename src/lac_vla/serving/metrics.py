"""The server exports Prometheus metrics, and logs one JSON object per line."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

from lac_vla.errors import MissingExtraError
from lac_vla.results.metrics import METRICS
from lac_vla.serving.sessions import Answer

try:
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary, generate_latest
except ModuleNotFoundError as error:
    raise MissingExtraError("serve", "Serving") from error

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.35, 0.5, 1, 2, 5)
"""Upper bounds of the histogram of request times."""

LONGEST, LONGEST_TRACE = 1000, 20_000
"""Characters of a text, and of a traceback, in the log."""

LOG = logging.getLogger("lac_vla.serving")


class Metrics:
    """The counters of one server."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter("lac_requests", "Requests by outcome", ["outcome"], registry=registry)
        self.rejected = Counter("lac_rejected_connections", "Connections refused", ["reason"], registry=registry)
        self.hung_up = Gauge("lac_hung_up_connections", "Dropped before their handshake", registry=registry)
        self.sessions = Gauge("lac_sessions", "Open sessions", registry=registry)
        self.waiting = Gauge("lac_waiting_requests", "Requests that wait or run", registry=registry)
        self.memory = Gauge("lac_cache_bytes", "Keys and values of all sessions", registry=registry)
        self.memory_limit = Gauge("lac_cache_limit_bytes", "What they may take, if limited", registry=registry)
        self.evicted = Gauge("lac_evicted_sessions", "Sessions that gave their slots to another", registry=registry)
        self.seconds = Histogram("lac_request_seconds", "From arrival to answer", buckets=SECONDS, registry=registry)
        self.batch = Histogram(
            "lac_batch_robots", "Robots answered together", buckets=(1, 2, 4, 8, 16, 32), registry=registry
        )
        self.stages = Counter("lac_stage_seconds", "Time spent, by stage", ["stage"], registry=registry)
        self.dense = Counter("lac_dense_frames", "Frames computed in full", ["reason"], registry=registry)
        self.resets = Counter("lac_resets", "Episodes begun", ["reason"], registry=registry)
        self.late = Counter("lac_late_answers", "Answers behind their deadline", registry=registry)
        self.recorded = Counter("lac_recorded_episodes", "Kept or dropped whole", ["outcome"], registry=registry)
        self.unwritten = Gauge("lac_unwritten_bytes", "Frames that wait for the disk", registry=registry)
        self.unpacked = Gauge("lac_unpacked_episodes", "Ended, not in the dataset yet", registry=registry)
        self.refreshed = Counter("lac_refreshed_tokens", "Slots computed in idle time", registry=registry)
        self.steps: dict[str, Histogram | Summary] = {}
        for name, metric in METRICS.items():
            about = (f"lac_{metric.exported or name}", metric.help)
            if metric.needs == "cost":  # a server counts no operations
                continue
            if metric.buckets:
                self.steps[name] = Histogram(*about, buckets=metric.buckets, registry=registry)
            else:
                self.steps[name] = Summary(*about, registry=registry)

    def count(self, answer: Answer, seconds: float) -> None:
        """Count an answer that was sent ``seconds`` after the request's arrival."""
        report, step = answer.message["lac"], answer.step
        self.requests.labels("answered").inc()
        self.seconds.observe(seconds)
        self.batch.observe(report["batch"])
        for stage, milliseconds in step.stages.items():
            self.stages.labels(stage).inc(milliseconds / 1e3)
        for name, exported in self.steps.items():
            if (value := METRICS[name].measure(step)) is not None:
                exported.observe(value)
        if step.dense_reason is not None:  # the number in a disagreement is no label
            self.dense.labels(step.dense_reason.partition(" by ")[0]).inc()
        if answer.reset is not None:
            self.resets.labels(answer.reset).inc()
        if report["late"]:
            self.late.inc()
        self.refreshed.inc(report["refreshed"])

    def text(self) -> bytes:
        """Write all of them as Prometheus reads them."""
        return bytes(generate_latest(self._registry))


class JsonLines(logging.Formatter):
    """Formats a record as one JSON object per line: time, level, event, and the event's metadata."""

    def format(self, record: logging.LogRecord) -> str:
        """See :meth:`logging.Formatter.format`."""
        entry = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **{name: _short(value) for name, value in getattr(record, "metadata", {}).items()},
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)[-LONGEST_TRACE:]
        return json.dumps(entry, default=str)


def _short(value: Any) -> Any:
    return f"{value[:LONGEST]}…" if isinstance(value, str) and len(value) > LONGEST else value


def log(event: str, *, level: int = logging.INFO, exc_info: bool = False, **metadata: Any) -> None:
    """Log an event with its metadata."""
    LOG.log(level, event, extra={"metadata": metadata}, exc_info=exc_info)


def log_to_stderr() -> None:
    """Write this package's log to standard error, as JSON lines."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    LOG.handlers = [handler]
    LOG.setLevel(logging.INFO)
    LOG.propagate = False
    websockets = logging.getLogger("lac_vla.serving.websockets")
    websockets.setLevel(logging.WARNING)  # it speaks of every connection
    websockets.addFilter(lambda record: "handshake failed" not in record.getMessage())  # nor is anyone's our trouble
