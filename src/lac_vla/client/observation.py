"""Turns a request into a frame and back: where a robot's message holds what the model needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from lac_vla.errors import InputError
from lac_vla.running_chunk import RealTimeChunk
from lac_vla.types import Frame

LIBERO_IMAGES = ("observation/image", "observation/wrist_image")
"""Keys of openpi's LIBERO client, in the order of a model's cameras."""
MAX_SIDE = 2048
"""Pixels along an image's side."""
SESSION_KEYS = ("episode_id", "reset", "seed")
"""Keys of a request that say when an episode begins."""
RTC_KEYS = ("control_hz", *(field.name for field in fields(RealTimeChunk)))
"""Keys of a request that goes on with a running chunk; all of them may be left out."""
MAX_PROMPT = 1000
"""Characters of an instruction."""


@dataclass(frozen=True)
class ObservationKeys:
    """Keys under which a request holds what the model needs. A ``/`` may also lead into a map within the message.

    Attributes:
        cameras: The model's camera → key of its image, uint8, H×W×3.
        state: Key of the proprioception, numbers, (S,).
        prompt: Key of the instruction.
    """

    cameras: Mapping[str, str]
    state: str = "observation/state"
    prompt: str = "prompt"

    @classmethod
    def parse(cls, cameras: Iterable[str], named: Iterable[str], *, state: str, prompt: str) -> ObservationKeys:
        """Read ``agentview=observation/image``; cameras that are not named are taken to be LIBERO's, in their order.

        Args:
            cameras: The model's cameras, in its order.
            named: Texts ``camera=key``.
            state: Key of the proprioception.
            prompt: Key of the instruction.

        Raises:
            InputError: If a text cannot be read, or names a camera that the model does not have, or one is left over.
        """
        cameras = list(cameras)
        keys = dict(zip(cameras, LIBERO_IMAGES, strict=False))
        for text in named:
            camera, _, key = (part.strip() for part in text.partition("="))
            if camera not in cameras or not key:
                raise InputError(f"cannot use the camera {text!r}; write one of {cameras}, = and the key of its image")
            keys[camera] = key
        if missing := [camera for camera in cameras if camera not in keys]:
            raise InputError(f"where are the images of {missing}? Add --camera {missing[0]}=KEY")
        return cls(keys, state, prompt)

    @property
    def wanted(self) -> frozenset[str]:
        """List the keys of a request that are read; all others may hold anything."""
        return frozenset({*self.cameras.values(), self.state, self.prompt, *SESSION_KEYS, *RTC_KEYS})

    def frame(self, request: Mapping[str, Any]) -> Frame:
        """Make the frame of a request.

        Raises:
            InputError: If something is missing, or is not what it should be.
        """
        images = {camera: _find(request, key) for camera, key in self.cameras.items()}
        if missing := [self.cameras[camera] for camera, image in images.items() if image is None]:
            there = [f"{key:.40}" for key in sorted(request)[:20]]
            raise InputError(f"the request has no {missing}; it has {there}")
        for camera, image in images.items():
            if not isinstance(image, np.ndarray):
                raise InputError(f"{self.cameras[camera]} is a {type(image).__name__}; send an array, uint8, H×W×3")
            if max(image.shape, default=0) > MAX_SIDE:
                raise InputError(
                    f"{self.cameras[camera]} has the shape {image.shape}; send at most {MAX_SIDE} pixels a side"
                )
        prompt, state = _find(request, self.prompt), _find(request, self.state)
        if not isinstance(prompt, str) or len(prompt) > MAX_PROMPT:
            raise InputError(f"{self.prompt} must be a text of at most {MAX_PROMPT} characters")
        if state is not None and not (isinstance(state, np.ndarray) and state.dtype.kind in "biuf"):
            raise InputError(f"{self.state} must be an array of numbers")
        return Frame(images, prompt, state)

    def request(self, frame: Frame) -> dict[str, Any]:
        """Make the message that :meth:`frame` reads as this frame."""
        images = {key: frame.images[camera] for camera, key in self.cameras.items() if camera in frame.images}
        state = {} if frame.proprio is None else {self.state: frame.proprio}
        return {**images, **state, self.prompt: frame.instruction}


def _find(message: Mapping[str, Any], key: str) -> Any:
    """Return what is at ``key``, else at the end of the path that it spells; ``None`` if there is nothing."""
    if key in message:
        return message[key]
    value: Any = message
    for part in key.split("/"):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return value
