"""A session behind a policy server, with the face of one that is here."""

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
from lac_vla.timing import windows
from lac_vla.types import FloatArray, Frame


@dataclass(frozen=True)
class RemoteReport:
    """What the server said about a frame; see :class:`lac_vla.session.StepInfo`.

    Attributes:
        ratio: Effective cache ratio.
        nominal_ratio: What the policy aimed at.
        oldest_age: Of the oldest slot, frames; ``None`` where the frame pruned.
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
    """Drives a robot through a server.

    Attributes:
        client: A :class:`lac_vla.client.connection.Client`, or what has its face.
        last_info: About the last frame.
    """

    client: Any
    last_info: RemoteReport | None = None
    _seed: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        about = self.client.metadata
        try:
            self._keys = ObservationKeys(dict(about["cameras"]), about["state"], about["prompt"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError("this server does not say where it wants the images: is it one of `lac serve`?") from error

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
        from lac_vla.client.connection import Client

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
        self._seed = seed
        self.last_info = None
        self.client.reset()

    def act(self, frame: Frame) -> FloatArray:
        """Send a frame, get the action."""
        request = self._keys.request(frame)
        if self._seed is not None:
            request["seed"] = self._seed
        start = time.perf_counter()
        answer = self.client.infer(request)
        round_trip = 1e3 * (time.perf_counter() - start)
        about = answer["lac"]
        self.last_info = RemoteReport(
            about["ratio"], about["nominal_ratio"], about["oldest_age"], about["stages"], round_trip
        )
        return np.asarray(answer["actions"], dtype=np.float32)
