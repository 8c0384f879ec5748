"""Names under which a data set holds what a model needs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lac_vla.errors import InputError

IMAGE_PREFIX = "observation.images."


@dataclass(frozen=True)
class DatasetKeys:
    """Names what is read of a data set, where it is not called as the model's cameras are, or as LeRobot calls it.

    Attributes:
        camera: The data set's images for a camera of the model, ``NAME=KEY``; by default those of its own name.
        state_key: The data set's column with the proprioception.
        action_key: The data set's column with the actions.

    Raises:
        InputError: If a camera cannot be read.
    """

    camera: tuple[str, ...] = ()
    state_key: str = "observation.state"
    action_key: str = "action"

    def __post_init__(self) -> None:
        for text in self.camera:
            name, _, key = text.partition("=")
            if not name.strip() or not key.strip():
                raise InputError(f"cannot use the camera {text!r}; write the model's camera, = and the data set's")

    def cameras(self, wanted: Iterable[str]) -> dict[str, str]:
        """Find the data set's name of every camera of the model.

        Raises:
            InputError: If one is named that the model does not have.
        """
        found = {name: name for name in wanted}
        for text in self.camera:
            name, key = (part.strip() for part in text.split("=", 1))
            if name not in found:
                raise InputError(f"cannot use the camera {text!r}: the model's cameras are {list(found)}")
            found[name] = key.removeprefix(IMAGE_PREFIX)
        return found
