"""SmolVLA's processor: frames → images, token ids and state; and their embeddings."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F  # noqa: N812

from lac_vla.errors import InputError
from lac_vla.models.images import fit
from lac_vla.models.lerobot_layout import Units
from lac_vla.models.protocols import PromptInputs
from lac_vla.models.siglip import as_uint8
from lac_vla.models.smolvla.config import SmolVLAConfig
from lac_vla.models.smolvla.model import SmolVLAModel
from lac_vla.models.tokenizer import Encode
from lac_vla.transfer import upload, upload_ids
from lac_vla.types import FloatArray, Frame, TokenLayout, UInt8Image

PROMPTS_REMEMBERED = 64


class SmolVLAProcessor:
    """Implements :class:`lac_vla.models.protocols.Processor` for SmolVLA.

    Args:
        model: The modules.
        config: What they were built from.
        encode: The tokenizer: text → token ids.
        name: For error messages.
        units: Units of the state.

    Attributes:
        grids: Camera → (rows, cols) of its visual tokens, in token order.
        state_dim: Values of the state.
        prompt_ids: Instruction → token ids.
        units: As given.
    """

    def __init__(self, model: SmolVLAModel, config: SmolVLAConfig, encode: Encode, name: str, units: Units) -> None:
        self._model, self._config, self._encode, self._name, self.units = model, config, encode, name, units
        self.grids = dict.fromkeys(config.cameras, (config.side, config.side))
        self.state_dim = config.state_dim
        self.prompt_ids = lru_cache(PROMPTS_REMEMBERED)(self._ids)

    def picture(self, image: UInt8Image) -> torch.Tensor:
        """Make what the tower sees, RGB in [-1, 1], (3, size, size): fitted in, black on the left and on top."""
        size = self._config.vision.pixels
        pixels = torch.tensor(image).permute(2, 0, 1).float() / 255.0
        return fit(pixels, (size, size), centred=False) * 2.0 - 1.0

    def images(self, frame: Frame) -> dict[str, UInt8Image]:
        """Round what the tower sees to uint8.

        Raises:
            InputError: If a camera is missing. Further cameras are ignored.
        """
        missing = [name for name in self.grids if name not in frame.images]
        if missing:
            raise InputError(
                f"{self._name} needs the cameras {list(self.grids)}; the frame has {sorted(frame.images)}, "
                f"so {missing} are missing: rename the images, or pass `cameras` when loading the model"
            )
        return {name: as_uint8(self.picture(frame.images[name])) for name in self.grids}

    def prompt(self, frame: Frame) -> PromptInputs:
        """Lay out ``[visual tokens of all cameras | text | state]``.

        Raises:
            InputError: If the frame has no state, or one of another length; or if the instruction is too long.
        """
        ids = self.prompt_ids(frame.instruction)
        return PromptInputs(ids, self.normalize_state(frame.proprio), TokenLayout.of(self.grids, 0, len(ids) + 1))

    def embed(self, prompt: PromptInputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Embed what is before the visual tokens, nothing, (0, width), and behind them, (n_suffix, width)."""
        table, project = self._model.text.embed_tokens, self._model.linear("state_proj")
        weight: torch.Tensor = table.weight
        text = table(upload_ids(prompt.ids, weight.device)) * weight.shape[1] ** 0.5
        if prompt.state is None:  # pragma: no cover - normalize_state has checked it
            raise InputError(f"{self._name} needs a state")
        state = upload(prompt.state, weight.device).to(weight.dtype)
        state = project(F.pad(state, (0, project.in_features - len(state))))
        return text[:0], torch.cat([text, state[None]])

    def normalize_state(self, state: FloatArray | None) -> FloatArray:
        """Scale a state in the robot's own units to the model's, float32, (..., state_dim).

        Raises:
            InputError: If it is missing, or has another length.
        """
        if state is None or state.shape[-1] != self.state_dim:
            given = "none" if state is None else state.shape[-1]
            raise InputError(f"{self._name} needs {self.state_dim} values in Frame.proprio, got {given}")
        return self.units.normalize(state)

    def _ids(self, instruction: str) -> list[int]:
        ids = self._encode(instruction if instruction.endswith("\n") else f"{instruction}\n")
        if len(ids) > self._config.max_tokens:
            raise InputError(
                f"the instruction has {len(ids)} tokens; {self._name} takes up to {self._config.max_tokens}: "
                f"shorten {instruction[:60]!r}"
            )
        if max(ids) >= self._config.text.vocab_size:
            raise InputError(
                f"the instruction has token {max(ids)}, {self._name} knows {self._config.text.vocab_size}: take the "
                "tokenizer of its language model"
            )
        return ids
