"""A policy session behind a server, with the interface of one that runs here."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lac_vla.client import KEY_VARIABLE
from lac_vla.client.observation import ObservationKeys
from lac_vla.errors import InputError
from lac_vla.running_chunk import RealTimeChunk
from lac_vla.timing import windows
from lac_vla.types import FloatArray, Frame


@dataclass(frozen=True)
class RemoteReport:
    """A server's report of a frame, see :class:`lac_vla.engine.step_info.StepReport`.

    Attributes:
        ratio: Effective cache ratio, in [0, 1].
        nominal_ratio: The cache ratio that the policy aimed at, in [0, 1]; ``None`` if it aims at none.
        oldest_age: Age of the oldest slot, frames; ``None`` where the frame pruned.
        stages: Milliseconds by stage, on the server.
        round_trip: Milliseconds from observation to action, here.
    """

    ratio: float
    nominal_ratio: float | None
    oldest_age: int | None
    stages: Mapping[str, float]
    round_trip: float

    @property
    def timings(self) -> dict[str, float]:
        """Milliseconds in the three windows, on the server, and those of the round trip."""
        return {**windows(self.stages), "round_trip": self.round_trip}


@dataclass
class RemoteSession:
    """Drives a robot through a server, see :class:`lac_vla.engine.step_info.PolicySession`.

    Attributes:
        client: A :class:`lac_vla.client.connection.Client`, or anything with its interface.
        last_info: The report of the last frame.
        actions_per_call: Actions of an answer that the server wants executed before the next request; 1 if it leaves
            that to its clients.

    Raises:
        InputError: If the server's metadata is not that of ``lac serve``.
    """

    client: Any
    last_info: RemoteReport | None = None
    actions_per_call: int = field(default=1, init=False)
    _seed: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        metadata = self.client.metadata
        try:
            self._keys = ObservationKeys(dict(metadata["cameras"]), metadata["state"], metadata["prompt"])
            self.actions_per_call = int(metadata["actions_per_call"] or 1)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"this server's metadata lacks what `lac serve` sends: {error!r:.200}") from error

    @classmethod
    def connect(cls, url: str, model: str, method: str) -> RemoteSession:
        """Open a session; the server's key is read from the environment variable ``LAC_API_KEY``.

        Args:
            url: ``ws://host:port``.
            model: Name of the model that the server must serve.
            method: Name of the method with which it must serve it.

        Raises:
            InputError: If it serves something else.
            LacError: If there is no such server, or it refuses.
        """
        from lac_vla.client.connection import Client  # needs an optional dependency

        client = Client(url, os.environ.get(KEY_VARIABLE))
        session = cls(client)
        served = (client.metadata.get("model"), client.metadata.get("method"))
        if served != (model, method):
            client.close()
            raise InputError(
                f"{url} serves the model {served[0]!r} with {served[1]!r}, not {model!r} with {method!r}: "
                "name both as the server does, by --model and --policies"
            )
        return session

    def reset(self, seed: int | None = None) -> None:
        """Begin a new episode with the next frame."""
        self._seed, self.last_info = seed, None
        self.client.reset()

    def act(self, frame: Frame, rtc: RealTimeChunk | None = None) -> FloatArray:
        """Send a frame, and what is left of a running chunk; return the actions of the answer, float32, (n, A)."""
        request = self._keys.request(frame)
        if rtc is not None:
            request |= rtc.to_request()
        if self._seed is not None:
            request["seed"] = self._seed
        start = time.perf_counter()
        answer = self.client.infer(request)
        round_trip = 1e3 * (time.perf_counter() - start)
        try:
            report = {name: answer["lac"][name] for name in ("ratio", "nominal_ratio", "oldest_age", "stages")}
            actions = np.asarray(answer["actions"], dtype=np.float32)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"the server's answer lacks what `lac serve` sends: {error!r:.200}") from error
        if actions.ndim not in (1, 2) or not actions.size or not np.isfinite(actions).all():
            raise InputError(f"the server answered with actions of shape {actions.shape}, or some that are not finite")
        self.last_info = RemoteReport(**report, round_trip=round_trip)
        return actions
