"""The kinds of disturbance: cameras, networks and people change a robot's observations.

All that happens in an episode is drawn before its first frame, and depends on the number of the step alone: never on
what a method did.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, TypeAlias

import cv2
import numpy as np
import numpy.typing as npt

from lac_vla.errors import InputError
from lac_vla.types import Frame, UInt8Image

Disturbance: TypeAlias = Callable[[Frame, int], Frame]
"""The observation that is shown at a step, from the true one; called once for every step, in order from 0."""


@dataclass(frozen=True)
class EpisodeDraw:
    """An episode before it begins, as far as a stress may know it, to draw its disturbances from.

    It has at most ``steps`` observations; ``others`` are the instructions of the suite's other tasks.
    """

    rng: np.random.Generator
    steps: int
    others: Sequence[str] = ()


class Stress(ABC):
    """A kind of disturbance; its strength in its fields."""

    settable: ClassVar[tuple[str, ...]] = ()
    """Fields that a command line may set."""
    hold: int = 0
    """Steps for which the robot is held still before its actions count; the horizon is that much longer."""
    speed: float = 0.0
    """Metres a second of simulated time at which the object to take slides until it is grasped."""

    @abstractmethod
    def begin(self, draw: EpisodeDraw) -> Disturbance:
        """Draw all that will happen in one episode."""


@dataclass(frozen=True)
class Shake(Stress):
    """The cameras shake: every frame is shifted and turned a little, the same in all cameras.

    Attributes:
        shift: Standard deviation of the shift, as a share of the image's side.
        turn: Standard deviation of the angle, degrees.
        memory: Share of a displacement that is left one frame later, in [0, 1).
    """

    shift: float = 0.01
    turn: float = 0.4
    memory: float = 0.5

    def begin(self, draw: EpisodeDraw) -> Disturbance:
        """See :meth:`Stress.begin`."""
        moves = draw.rng.normal(size=(draw.steps, 3))
        for t in range(1, draw.steps):
            moves[t] = self.memory * moves[t - 1] + np.sqrt(1 - self.memory**2) * moves[t]

        def shaken(image: UInt8Image, step: int) -> UInt8Image:
            height, width = image.shape[:2]
            matrix = cv2.getRotationMatrix2D((width / 2, height / 2), self.turn * moves[step, 2], 1.0)
            matrix[:, 2] += self.shift * moves[step, :2] * (width, height)
            return np.asarray(cv2.warpAffine(image, matrix, (width, height), borderMode=cv2.BORDER_REPLICATE))

        return lambda frame, step: _images(frame, lambda image: shaken(image, step))


@dataclass(frozen=True)
class Lighting(Stress):
    """A lamp goes off and on again: from one frame to the next, everything is darker and warmer.

    Attributes:
        gains: Factors of red, green and blue while it is off.
        begins: It goes off at a step drawn from this range.
        lasts: Steps until it is on again.
    """

    gains: tuple[float, float, float] = (0.85, 0.8, 0.72)
    begins: tuple[int, int] = (10, 40)
    lasts: int = 30

    def begin(self, draw: EpisodeDraw) -> Disturbance:
        """See :meth:`Stress.begin`."""
        first = int(draw.rng.integers(*self.begins))

        def dark(image: UInt8Image) -> UInt8Image:
            return np.asarray(np.rint(image * np.array(self.gains)), dtype=np.uint8)

        return lambda frame, step: _images(frame, dark) if 0 <= step - first < self.lasts else frame


@dataclass(frozen=True)
class Drift(Stress):
    """Brightness and hue rise and fall by less than a grey level per frame: no two adjacent frames differ much.

    Levels are whole numbers: a fixed dither decides which pixels change a frame earlier than others, so that no
    frame holds a jump of the whole image.

    Attributes:
        rate: Grey levels per frame, below 1.
        reach: Furthest from the true level.
    """

    rate: float = 0.4
    reach: float = 40.0

    def begin(self, draw: EpisodeDraw) -> Disturbance:
        """See :meth:`Stress.begin`."""
        direction = draw.rng.uniform(-1, 1, size=3)
        direction /= np.abs(direction).max()
        dithers: dict[str, npt.NDArray[np.float32]] = {}

        def disturb(frame: Frame, step: int) -> Frame:
            wave = self.reach - abs((self.reach + self.rate * step) % (4 * self.reach) - 2 * self.reach)
            images = {}
            for camera, image in frame.images.items():
                if camera not in dithers:
                    dithers[camera] = draw.rng.random(image.shape, dtype=np.float32)
                level = image + (wave * direction).astype(np.float32) + dithers[camera]
                images[camera] = np.clip(np.floor(level), 0, 255).astype(np.uint8)
            return replace(frame, images=images)

        return disturb


@dataclass(frozen=True)
class Occlusion(Stress):
    """A plain patch crosses the first camera's view, as a hand or a tool would.

    Attributes:
        size: Side of the patch, as a share of the image's.
        begins: It enters at a step drawn from this range.
        lasts: Steps that it takes to cross.
    """

    size: float = 0.3
    begins: tuple[int, int] = (10, 40)
    lasts: int = 30

    def begin(self, draw: EpisodeDraw) -> Disturbance:
        """See :meth:`Stress.begin`."""
        first = int(draw.rng.integers(*self.begins))
        top, leftwards = draw.rng.uniform(0, 1 - self.size), draw.rng.random() < 0.5
        colour = draw.rng.integers(40, 216, size=3)

        def disturb(frame: Frame, step: int) -> Frame:
            way = (step - first) / self.lasts
            if not 0 <= way < 1:
                return frame
            camera, image = next(iter(frame.images.items()))
            height, width = image.shape[:2]
            left = (1 + self.size) * (1 - way if leftwards else way) - self.size
            rows = slice(round(top * height), round((top + self.size) * height))
            covered = image.copy()
            covered[rows, max(0, round(left * width)) : max(0, round((left + self.size) * width))] = colour
            return replace(frame, images={**frame.images, camera: covered})

        return disturb


@dataclass(frozen=True)
class Instruction(Stress):
    """The robot is told another of the suite's tasks for some frames, and then its own again.

    Attributes:
        begins: The other instruction comes at a step drawn from this range.
        lasts: Steps for which it stands.
    """

    begins: tuple[int, int] = (10, 40)
    lasts: int = 10

    def begin(self, draw: EpisodeDraw) -> Disturbance:
        """See :meth:`Stress.begin`."""
        if not draw.others:
            raise InputError("the stress 'instruction' needs a suite with at least two different instructions")
        first, other = int(draw.rng.integers(*self.begins)), str(draw.rng.choice(list(draw.others)))
        return lambda frame, step: replace(frame, instruction=other) if 0 <= step - first < self.lasts else frame


@dataclass(frozen=True)
class Drops(Stress):
    """Frames are lost or late: the images of an earlier step are shown again, in all cameras. Proprioception is not.

    Attributes:
        chance: Of every frame after the first.
        longest: An image shown again is 1 to this many steps old.
    """

    chance: float = 0.25
    longest: int = 4

    def begin(self, draw: EpisodeDraw) -> Disturbance:
        """See :meth:`Stress.begin`."""
        delays = draw.rng.integers(1, self.longest + 1, size=draw.steps)
        delays[draw.rng.random(draw.steps) >= self.chance] = 0
        seen: deque[Frame] = deque(maxlen=self.longest + 1)

        def disturb(frame: Frame, step: int) -> Frame:
            seen.append(frame)
            return replace(frame, images=seen[max(0, len(seen) - 1 - int(delays[step]))].images)

        return disturb


class Physical(Stress):
    """A stress of the world itself: its frames are those that the simulator shows."""

    def begin(self, draw: EpisodeDraw) -> Disturbance:
        """See :meth:`Stress.begin`: nothing is drawn."""
        return lambda frame, step: frame


@dataclass(frozen=True)
class Long(Physical):
    """The robot is held still while the policy looks on and the cache ages; then it has its whole horizon.

    Made for policies that reuse much, e.g. at a ratio of 0.9: what a cache gets wrong has time to add up.

    Attributes:
        hold: Steps for which actions do not count.
    """

    hold: int = 150


@dataclass(frozen=True)
class Moving(Physical):
    """The object to take does not wait: what it stands on slides at a constant speed until it is grasped.

    The direction is drawn for every episode, and the way ends where something stands or the arm's reach does. Nothing
    but the number of control steps moves it: where the world goes on while a policy thinks, so does the object.

    Attributes:
        speed: Metres a second, in (0, 0.2].

    Raises:
        InputError: If the speed is out of range.
    """

    settable: ClassVar[tuple[str, ...]] = ("speed",)
    speed: float = 0.02

    def __post_init__(self) -> None:
        if isinstance(self.speed, bool | str) or not 0.0 < self.speed <= 0.2:
            raise InputError(f"speed is {self.speed!r}: give metres a second in (0, 0.2], e.g. moving:speed=0.02")


def _images(frame: Frame, change: Callable[[UInt8Image], UInt8Image]) -> Frame:
    return replace(frame, images={camera: change(image) for camera, image in frame.images.items()})
