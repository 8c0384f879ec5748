"""A Prismatic VLA as the engine sees it: the adapter between :class:`PrismaticVLA` and ``Backbone``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lac_vla.errors import CheckpointError, InputError
from lac_vla.models.base import DecoderShape, Extend, Rotary
from lac_vla.models.decoding import decode
from lac_vla.models.llama import LlamaDecoder, LlamaLayer
from lac_vla.models.prismatic.actions import PROPRIO_LIMIT, ActionTokenizer, Range, choose_stats
from lac_vla.models.prismatic.images import make_pipeline
from lac_vla.models.prismatic.model import PrismaticVLA
from lac_vla.models.prismatic.prompt import Encode, Prompt
from lac_vla.models.prismatic.vision import Glance, TowerMemory
from lac_vla.types import BoolArray, FloatArray, Frame, TokenLayout, UInt8Image

PROMPTS_REMEMBERED = 64


class PrismaticBackbone:
    """Implements :class:`lac_vla.models.base.Backbone` for OpenVLA and its small relatives.

    It holds no weights of its own and follows its model: train ``model``, and this acts with the new weights.

    Args:
        model: The modules.
        encode: The tokenizer: text → token ids.
        name: For tables and error messages.
        unnorm_key: Data set whose statistics give actions their units; may be ``None`` if there is only one.
        cameras: Names of the cameras in ``Frame.images``, in the model's order; ``None`` for its own names.
        image_pipeline: A key of :data:`lac_vla.models.prismatic.images.PIPELINES`; ``None`` for the own one.

    Attributes:
        model: The modules.
        encode: The tokenizer.
        prompt_ids: Instruction → token ids of its whole prompt.
        actions: Action values ↔ token ids.
        action_range: Units of the actions.
        proprio_range: Units of the proprioception; ``None`` if the model takes none.

    Raises:
        InputError: If an argument does not fit the model.
        CheckpointError: If the statistics are incomplete.
    """

    causal = True

    def __init__(
        self,
        model: PrismaticVLA,
        encode: Encode,
        *,
        name: str = "prismatic",
        unnorm_key: str | None = None,
        cameras: Sequence[str] | None = None,
        image_pipeline: str | None = None,
    ) -> None:
        config = model.config
        names = tuple(camera.name for camera in config.cameras) if cameras is None else tuple(cameras)
        if len(set(names)) != len(config.cameras):
            raise InputError(f"the model has {len(config.cameras)} camera(s), `cameras` names {list(names)}")
        stats = choose_stats(config.norm_stats, unnorm_key)
        self.model = model
        self.encode = encode
        self.actions = ActionTokenizer(config.vocab_size, config.n_action_bins, config.edge_token)
        self.action_range = Range.of(stats, "action")
        self.proprio_range = None if config.proprio_dim is None else Range.of(stats, "proprio")
        if self.proprio_range is not None and self.proprio_range.dim != config.proprio_dim:
            raise CheckpointError(
                f"statistics of {self.proprio_range.dim} proprio values, a model of {config.proprio_dim}"
            )
        self._name = name
        self._decoder = LlamaDecoder(model.language_model)
        self._cameras = dict(zip(names, config.cameras, strict=True))
        self._grids = dict(zip(names, model.vision_backbone.grids.values(), strict=True))
        self._crop = make_pipeline(image_pipeline or config.image_resize_strategy)
        self.prompt_ids = lru_cache(PROMPTS_REMEMBERED)(Prompt.of(config, encode).ids)

    @property
    def name(self) -> str:
        """For tables and error messages."""
        return self._name

    @property
    def layers(self) -> Sequence[LlamaLayer]:
        """The decoder blocks."""
        return self._decoder.layers

    @property
    def shape(self) -> DecoderShape:
        """The decoder's sizes."""
        return self._decoder.shape

    @property
    def kv_heads(self) -> int:
        """Key/value heads of a block."""
        return self._decoder.kv_heads

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self._decoder.head_dim

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        device: torch.device = self.model.language_model.lm_head.weight.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Of the hidden states."""
        dtype: torch.dtype = self.model.language_model.lm_head.weight.dtype
        return dtype

    @property
    def max_new_tokens(self) -> int:
        """One token per action dimension."""
        return self.action_range.dim

    @property
    def grids(self) -> Mapping[str, tuple[int, int]]:
        """Camera → (rows, cols) of its visual tokens, in token order."""
        return self._grids

    def pixels(self, frame: Frame) -> dict[str, UInt8Image]:
        """Crop and resize every camera's image to what its tower sees.

        Raises:
            InputError: If a camera is missing. Further cameras are ignored.
        """
        missing = [name for name in self._cameras if name not in frame.images]
        if missing:
            raise InputError(
                f"{self.name} needs the cameras {list(self._cameras)}; the frame has {sorted(frame.images)}, "
                f"so {missing} are missing: rename the images, or pass `cameras` when loading the model"
            )
        return {name: self._crop(frame.images[name], cam.image_size) for name, cam in self._cameras.items()}

    def layout(self, frame: Frame) -> TokenLayout:
        """``[BOS | visual tokens of all cameras | proprio token, if any | text]``."""
        n_proprio = self.proprio_range is not None
        return TokenLayout.of(self._grids, 1, len(self.prompt_ids(frame.instruction)) - 1 + n_proprio)

    def tower_memory(self) -> TowerMemory | None:
        """An empty memory for :meth:`features`; ``None`` if all towers are convolutions."""
        return TowerMemory() if self.model.config.has_transformer else None

    def look(self, pixels: Mapping[str, UInt8Image], memory: TowerMemory | None = None) -> Glance:
        """What the towers can compute before it is known which tokens matter."""
        vision = self.model.vision_backbone
        normal = {
            camera.name: vision.normalize(torch.tensor(pixels[name], device=self.device)[None]).to(self.dtype)
            for name, camera in self._cameras.items()
        }
        return vision.look(normal, whole=memory is None)

    def features(
        self, glance: Glance, computed: BoolArray | None = None, memory: TowerMemory | None = None
    ) -> torch.Tensor:
        """Features of the visual tokens ``computed`` (all by default), (n, features)."""
        wanted = None if computed is None or computed.all() else torch.from_numpy(computed).to(self.device)
        return self.model.vision_backbone.features(glance, wanted, memory)

    def see(self, pixels: Mapping[str, UInt8Image]) -> torch.Tensor:
        """Features of every visual token, (N, features)."""
        return self.features(self.look(pixels))

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """Projector, row by row: (n, features) → (n, width)."""
        rows: torch.Tensor = self.model.projector(features)
        return rows

    def prefix(self, frame: Frame) -> torch.Tensor:
        """Embedding of BOS, (1, width)."""
        return self._embed(self.prompt_ids(frame.instruction)[:1])

    def suffix(self, frame: Frame) -> torch.Tensor:
        """Embeddings of proprioception, if the model takes it, and text, (n_suffix, width).

        Raises:
            InputError: If the model takes proprioception and the frame has none, or one of another length.
        """
        text = self._embed(self.prompt_ids(frame.instruction)[1:])
        if self.model.proprio_projector is None:
            return text
        proprio = torch.from_numpy(self.normalize_proprio(frame.proprio)).to(self.device, self.dtype)
        return torch.cat([self.model.proprio_projector(proprio)[None], text])

    def normalize_actions(self, actions: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Units of the data set → about [-1, 1], not clipped, (..., action_dim)."""
        return self.action_range.normalize(actions)

    def normalize_proprio(self, proprio: FloatArray | None) -> FloatArray:
        """Proprioception in units of the data set → about [-1, 1], clipped, (..., proprio_dim), float32.

        Raises:
            InputError: If it is missing, has another length, or the model takes none.
        """
        if self.proprio_range is None:
            raise InputError(f"{self.name} takes no proprioception")
        if proprio is None or proprio.shape[-1] != self.proprio_range.dim:
            given = "none" if proprio is None else proprio.shape[-1]
            raise InputError(f"{self.name} needs {self.proprio_range.dim} values in Frame.proprio, got {given}")
        normal = np.clip(self.proprio_range.normalize(proprio), -PROPRIO_LIMIT, PROPRIO_LIMIT)
        return normal.astype(np.float32)

    def rotary(self, positions: torch.Tensor) -> Rotary:
        """Position embedding of sequence positions, int64, (rows,)."""
        return self._decoder.rotary(positions)

    def norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """The decoder's final normalisation."""
        return self._decoder.norm(hidden)

    def visible(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Causal: (rows,) and (slots,) positions → bool, (rows, slots)."""
        return keys[None, :] <= queries[:, None]

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings of token ids: (...) → (..., width)."""
        return self._decoder.embed(ids)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Scores of all tokens: normalised hidden states (..., width) → (..., vocabulary)."""
        return self._decoder.logits(hidden)

    def draft(self, last: Mapping[str, Any]) -> torch.Tensor:
        """Embeddings of the preceding action's tokens but the last, (action_dim - 1, width)."""
        return self._embed(last["tokens"][:-1])

    def act(
        self,
        frame: Frame,
        hidden: torch.Tensor,
        extend: Extend,
        rng: np.random.Generator | None = None,
        last: Mapping[str, Any] | None = None,
    ) -> tuple[FloatArray, dict[str, Any]]:
        """Decode one token per action dimension, greedily: nothing is left to chance.

        Returns:
            The action in the units of the data set, float32, (action_dim,); and, as lists, the token ids
            (``tokens``) and the action in [-1, 1] (``normalized``).
        """
        draft = [] if last is None else last["tokens"][:-1]
        tokens = decode(self.embed, self.logits, hidden, extend, self.max_new_tokens, draft)
        normalized = self.actions.decode(tokens)
        action = self.action_range.unnormalize(normalized).astype(np.float32)
        return action, {"tokens": tokens, "normalized": normalized.tolist()}

    def _embed(self, ids: Sequence[int]) -> torch.Tensor:
        return self._decoder.embed(torch.tensor(ids, device=self.device))
