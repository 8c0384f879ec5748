"""The processor of π0 and π0.5: frames → images and prompt, as LeRobot's pre-processors make them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lac_vla.errors import CheckpointError, InputError
from lac_vla.models.images import fit
from lac_vla.models.lerobot_layout import Units
from lac_vla.models.pi0.config import PiConfig
from lac_vla.models.protocols import PromptInputs
from lac_vla.models.siglip import as_uint8
from lac_vla.models.tokenizer import Encode
from lac_vla.types import FloatArray, Frame, TokenLayout, UInt8Image

BOS = 2
BINS = 256
PADDED = 128
"""The bin of 0: LeRobot 0.4 fills the state up with zeros before it writes it."""


@dataclass(frozen=True)
class Letterbox:
    """Makes what the tower sees: the image in the middle of a square, RGB in [-1, 1].

    Attributes:
        size: Side, pixels.
        fill: Value of the padding before [0, 1] becomes [-1, 1]: 0, black; LeRobot 0.4 fills with −1, which becomes −3.
    """

    size: int
    fill: float = 0.0

    def __call__(self, image: UInt8Image) -> torch.Tensor:
        """Resize in floating point: uint8, (H, W, 3) → float32, (3, size, size)."""
        pixels = torch.from_numpy(image).permute(2, 0, 1).float() / 255.0
        return fit(pixels, (self.size, self.size), centred=True, fill=self.fill) * 2.0 - 1.0


class PiProcessor:
    """Implements :class:`lac_vla.models.protocols.Processor`.

    Args:
        config: The model's.
        encode: The tokenizer: text → token ids.
        name: For error messages.
        cameras: Names of the cameras in ``Frame.images``, in token order.
        letterbox: Makes what the tower sees.
        state_units: Units of the state.
        embed: Token ids → embeddings.

    Attributes:
        grids: Camera → (rows, cols) of its visual tokens, in token order.
        state_dim: Values of the state; ``None`` if the model is not told it.
    """

    def __init__(
        self,
        config: PiConfig,
        encode: Encode,
        name: str,
        cameras: Sequence[str],
        letterbox: Letterbox,
        state_units: Units,
        embed: Callable[[Sequence[int]], torch.Tensor],
    ) -> None:
        side = config.vision.side
        self.grids = dict.fromkeys(cameras, (side, side))
        self.state_dim = config.state_dim if config.reads_state else None
        self._config, self._encode, self._name = config, encode, name
        self._letterbox, self._state_units, self._embed = letterbox, state_units, embed

    def images(self, frame: Frame) -> dict[str, UInt8Image]:
        """Letterbox every camera's image as the tower sees it, but rounded.

        Raises:
            InputError: If a camera is missing. Further cameras are ignored.
        """
        missing = [name for name in self.grids if name not in frame.images]
        if missing:
            raise InputError(
                f"{self._name} needs the cameras {list(self.grids)}; the frame has {sorted(frame.images)}, "
                f"so {missing} are missing: rename the images, or pass `cameras` when loading the model"
            )
        return {name: as_uint8(self._letterbox(frame.images[name])) for name in self.grids}

    def prompt(self, frame: Frame) -> PromptInputs:
        """Lay out ``[visual tokens of all cameras | text]``.

        Raises:
            InputError: If the state is missing or of another length, or the prompt is too long.
            CheckpointError: If the tokenizer is not the model's.
        """
        normalized = None if self.state_dim is None else self.normalize_state(frame.proprio)
        ids = list(self._encode(self.text(frame.instruction, normalized)))
        if ids[:1] != [BOS]:
            ids = [BOS, *ids]
        if len(ids) > self._config.max_tokens:
            raise InputError(
                f"the instruction makes a prompt of {len(ids)} tokens, more than {self._config.max_tokens}"
            )
        if max(ids) >= self._config.vocab_size:
            raise CheckpointError(
                f"token {max(ids)} is not in the model's vocabulary of {self._config.vocab_size}: another tokenizer?"
            )
        return PromptInputs(ids, normalized, TokenLayout.of(self.grids, 0, len(ids)))

    def normalize_state(self, state: FloatArray | None) -> FloatArray:
        """Map a state from the robot's units to the model's, (state_dim,), float32; not clipped.

        Raises:
            InputError: If it is missing or of another length.
        """
        if state is None or state.shape != (self._state_units.dim,):
            given = "none" if state is None else state.size
            raise InputError(f"{self._name} needs {self._state_units.dim} values in Frame.proprio, got {given}")
        return self._state_units.normalize(state)

    def text(self, instruction: str, state: FloatArray | None) -> str:
        """Write the prompt; that of π0.5 tells the normalised state, (state_dim,), in bins, none of them clipped."""
        config = self._config
        if not config.adaptive:
            return instruction if instruction.endswith("\n") else f"{instruction}\n"
        task = instruction.strip().replace("_", " ").replace("\n", " ")
        if state is None:
            return f"{task}\n"
        bins = (np.digitize(state, np.linspace(-1, 1, BINS + 1)[:-1]) - 1).tolist()
        if config.state_prompt == "padded":
            bins += [PADDED] * (config.state_width - len(bins))
        return f"Task: {task}, State: {' '.join(map(str, bins))};\nAction: "

    def embed(self, prompt: PromptInputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Embed nothing, (0, width), and the text, (n_suffix, width)."""
        embedded = self._embed(prompt.ids)
        return embedded[:0], embedded
