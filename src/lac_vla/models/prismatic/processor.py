"""A Prismatic VLA's processor: frames → images, token ids and state; and their embeddings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import ClassVar

import numpy as np
import torch

from lac_vla.errors import CheckpointError, InputError
from lac_vla.models.heads.units import Range
from lac_vla.models.images import make_pipeline
from lac_vla.models.prismatic.config import CameraConfig, PrismaticConfig
from lac_vla.models.prismatic.model import PrismaticVLA
from lac_vla.models.protocols import PromptInputs
from lac_vla.models.tokenizer import Encode
from lac_vla.transfer import upload
from lac_vla.types import FloatArray, Frame, TokenLayout, UInt8Image

PROMPTS_REMEMBERED = 64


def prompt_ids(config: PrismaticConfig, encode: Encode, instruction: str) -> list[int]:
    """Make the token ids of a whole prompt: the instruction, lower-cased, in the model's template.

    Raises:
        InputError: If the prompt is too long.
        CheckpointError: If the tokenizer is not the model's.
    """
    ids = encode(config.prompt_template.replace("{instruction}", instruction.lower()))
    if ids[:1] != [config.bos_id]:
        ids = [config.bos_id, *ids]
    if config.prompt_end_id is not None and ids[-1] != config.prompt_end_id:
        ids = [*ids, config.prompt_end_id]
    if len(ids) > config.llm_max_length:
        raise InputError(f"the instruction makes a prompt of {len(ids)} tokens, more than {config.llm_max_length}")
    if outside := [token for token in ids if not 0 <= token < config.vocab_size]:
        raise CheckpointError(f"token {outside[0]} is not in the model's vocabulary of {config.vocab_size}")
    return ids


class PrismaticProcessor:
    """Implements :class:`lac_vla.models.protocols.Processor` for OpenVLA and its relatives.

    Args:
        model: The modules.
        encode: The tokenizer: text → token ids.
        name: For error messages.
        cameras: The model's cameras by their names in ``Frame.images``.
        image_pipeline: A key of :data:`lac_vla.models.images.PIPELINES`; ``None`` for the model's own.
        state_range: Units of the proprioception; ``None`` if the model takes none.
        embed: Token ids → embeddings.

    Attributes:
        grids: Camera → (rows, cols) of its visual tokens, in token order.
        state_dim: Values of the proprioception; ``None`` if the model takes none.
        prompt_ids: Instruction → token ids of its whole prompt.
        state_limit: Normalised proprioception is clipped to ± this: beyond the 1 % and 99 % quantiles, yet bounded.

    Raises:
        InputError: If there is no such image pipeline.
        CheckpointError: If the statistics are of another number of values than the model's state.
    """

    state_limit: ClassVar[float] = 1.5

    def __init__(
        self,
        model: PrismaticVLA,
        encode: Encode,
        name: str,
        cameras: Mapping[str, CameraConfig],
        image_pipeline: str | None,
        state_range: Range | None,
        embed: Callable[[Sequence[int]], torch.Tensor],
    ) -> None:
        config: PrismaticConfig = model.config
        if state_range is not None and state_range.dim != config.proprio_dim:
            raise CheckpointError(f"statistics of {state_range.dim} proprio values, a model of {config.proprio_dim}")
        self.grids = dict(zip(cameras, model.vision_backbone.grids.values(), strict=True))
        self.state_dim = config.proprio_dim
        self.prompt_ids = lru_cache(PROMPTS_REMEMBERED)(partial(prompt_ids, config, encode))
        self._model, self._name, self._cameras, self._embed = model, name, cameras, embed
        self._crop = make_pipeline(image_pipeline or config.image_resize_strategy, config.letterbox_fill)
        self._state_range = state_range
        self._covered = {
            name: self.grids[name][0] * (camera.tower or config.vit_towers[0]).stride
            for name, camera in cameras.items()
        }

    def images(self, frame: Frame) -> dict[str, UInt8Image]:
        """Crop and resize every camera's image to what its tower sees: what no patch covers (of 384 px) is left out.

        Raises:
            InputError: If a camera is missing. Further cameras are ignored.
        """
        missing = [name for name in self._cameras if name not in frame.images]
        if missing:
            raise InputError(
                f"{self._name} needs the cameras {list(self._cameras)}; the frame has {sorted(frame.images)}, "
                f"so {missing} are missing: rename the images, or pass `cameras` when loading the model"
            )
        return {
            name: covered(self._crop(frame.images[name], cam.image_size), self._covered[name])
            for name, cam in self._cameras.items()
        }

    def prompt(self, frame: Frame) -> PromptInputs:
        """Lay out ``[BOS | visual tokens of all cameras | proprio token, if any | text]``.

        Raises:
            InputError: If the model takes proprioception and the frame has none, or one of another length; or if the
                instruction is too long.
        """
        ids = self.prompt_ids(frame.instruction)
        state = None if self._state_range is None else self.normalize_state(frame.proprio)
        return PromptInputs(ids, state, TokenLayout.of(self.grids, 1, len(ids) - 1 + (state is not None)))

    def embed(self, prompt: PromptInputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Embed BOS, (1, width), and what is behind the visual tokens, (n_suffix, width)."""
        embedded = self._embed(prompt.ids)
        prefix, suffix = embedded[:1], embedded[1:]
        if prompt.state is not None and self._model.proprio_projector is not None:
            state = upload(prompt.state, embedded.device).to(embedded.dtype)
            suffix = torch.cat([self._model.proprio_projector(state)[None], suffix])
        return prefix, suffix

    def normalize_state(self, state: FloatArray | None) -> FloatArray:
        """Scale proprioception in units of the data set to about [-1, 1], clipped, (..., proprio_dim), float32.

        Raises:
            InputError: If it is missing, has another length, or the model takes none.
        """
        if self._state_range is None:
            raise InputError(f"{self._name} takes no proprioception")
        if state is None or state.shape[-1] != self._state_range.dim:
            given = "none" if state is None else state.shape[-1]
            raise InputError(f"{self._name} needs {self._state_range.dim} values in Frame.proprio, got {given}")
        return np.clip(self._state_range.normalize(state), -self.state_limit, self.state_limit).astype(np.float32)


def covered(image: UInt8Image, side: int) -> UInt8Image:
    """Cut off what is right of and below the last whole patch; the patches' convolution never reads it."""
    return image if len(image) == side else image[:side, :side].copy()
